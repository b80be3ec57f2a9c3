"""Communicators: which one is used, where functions may run, how they start."""

import os
import subprocess
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jfog
import jfog.runtime
from jfog import topology
from jfog.runtime import _bootstrap, _extensions


@pytest.fixture(autouse=True)
def no_world():
  """Every test starts and ends without a world."""
  jfog.shutdown()
  yield
  jfog.shutdown()


def python(program, **environment):
  """Runs a program in a process that no launcher has started."""
  return subprocess.run(
    [sys.executable, "-c", program],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_without_a_communicator_all_remedies_are_named():
  for call in (
    lambda: jfog.allreduce(1.0),
    lambda: jfog.neighbor_allreduce(1.0, topology.ring(1)),
    jfog.barrier,
    jfog.rank,
    jfog.size,
    jax.jit(lambda: jfog.allreduce(1.0)),
  ):
    with pytest.raises(jfog.NotInitializedError) as error:
      call()
    for remedy in ("jfog.init()", "jfog.simulate", "jfog.spmd", "comm="):
      assert remedy in str(error.value)


def test_a_world_of_one():
  world = jfog.init()
  assert world is jfog.init()
  assert (world.size, world.rank, world.backend) == (1, 0, "single")
  assert (jfog.local_rank(), jfog.local_size()) == (0, 1)
  assert (jfog.machine_rank(), jfog.machine_size()) == (0, 1)
  assert world.local.size == world.machines.size == 1
  assert hash(world) == hash(jfog.init())
  assert jfog.allreduce(jnp.float32(3)) == 3


def test_a_function_jitted_once_is_right_in_both_places():
  """The bound axis is part of jit's cache key."""
  jfog.init()
  traces = []

  @jax.jit
  def mean(x):
    traces.append(jfog.size())
    return jfog.allreduce(x)

  np.testing.assert_allclose(mean(jnp.float32(4)), 4)
  simulated = jfog.simulate(mean, 4)(jnp.arange(4.0))
  np.testing.assert_allclose(simulated, [1.5] * 4)
  mesh = Mesh(np.array(jax.devices()[:2]), ("jfog",))
  np.testing.assert_allclose(jfog.spmd(mean, mesh)(jnp.arange(2.0)), [0.5] * 2)
  np.testing.assert_allclose(mean(jnp.float32(5)), 5)
  np.testing.assert_allclose(jfog.simulate(mean, 3)(jnp.arange(3.0)), [1.0] * 3)
  np.testing.assert_allclose(jfog.simulate(mean, 4)(jnp.ones(4)), [1.0] * 4)
  assert sorted(traces) == [1, 2, 3, 4]


def test_a_function_traced_for_an_old_world_is_traced_again():
  jfog.init()
  size = jax.jit(lambda: jnp.int32(jfog.size()))
  assert size() == 1
  jfog.shutdown()
  with pytest.raises(jfog.NotInitializedError):
    size()


def test_ranks_and_sizes_inside_a_simulation():
  def program(x):
    comm = jfog.runtime.resolve()
    assert (comm.size, comm.local_size, comm.machine_size) == (6, 2, 3)
    assert comm.backend == "mesh"
    assert hash(comm) == hash(jfog.Axis("jfog", "jfog_local"))
    return x, jfog.rank(), jfog.local_rank(), jfog.machine_rank()

  out = jfog.simulate(program, 6, local_size=2)(jnp.arange(6))
  np.testing.assert_array_equal(out[1], out[0])
  np.testing.assert_array_equal(out[2], [0, 1] * 3)
  np.testing.assert_array_equal(out[3], [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_users_own_shard_map(check_vma):
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("jfog", "model"))
  graph = topology.one_peer_exponential(2)
  spec = PartitionSpec("jfog", "model")

  def program(x, step):
    y = jfog.neighbor_allreduce(x, graph, step)
    return y, jfog.allreduce(y, "sum"), jfog.broadcast(y, 1)

  run = jax.jit(
    jax.shard_map(
      program,
      mesh=mesh,
      in_specs=(spec, PartitionSpec()),
      out_specs=(
        spec,
        PartitionSpec(None, "model"),
        PartitionSpec(None, "model"),
      ),
      check_vma=check_vma,
    )
  )
  x = np.random.RandomState(0).randn(2, 6).astype(np.float32)
  y, total, last = run(x, jnp.int32(3))
  truth = graph[3].mixing_matrix @ x
  np.testing.assert_allclose(y, truth, rtol=1e-6)
  np.testing.assert_allclose(total, truth.sum(axis=0, keepdims=True), rtol=1e-5)
  np.testing.assert_allclose(last, truth[1:], rtol=1e-6)


def test_an_axis_of_another_name_needs_comm():
  comm = jfog.Axis("data")
  x = jnp.array([0.0, 4.0])
  run = jax.vmap(lambda x: jfog.allreduce(x, comm=comm), axis_name="data")
  np.testing.assert_allclose(run(x), [2.0, 2.0])
  with pytest.raises(jfog.NotInitializedError):
    jax.vmap(jfog.allreduce, axis_name="data")(x)
  with pytest.raises(jfog.NotInitializedError, match=r"'data'.*not bound"):
    jfog.allreduce(x, comm=comm)
  mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
  run = jfog.spmd(lambda x: jfog.allreduce(x, comm=comm), mesh, axis="data")
  np.testing.assert_allclose(run(x), [2.0, 2.0])


def test_two_axes_of_a_mesh():
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("hosts", "gpu"))
  comm = jfog.Axis("hosts", local="gpu")
  graph = topology.ring(4, "right")
  x = jnp.array([1.0, 2.0, 3.0, 10.0])

  def program(x):
    return (
      comm.rank,
      jfog.neighbor_allreduce(x, graph, comm=comm),
      jfog.allreduce(x, comm=comm.local),
      jfog.allreduce(x, comm=comm.machines),
    )

  run = jax.jit(jfog.spmd(program, mesh, axis=("hosts", "gpu")))
  rank, mixed, local, machines = run(x)
  np.testing.assert_array_equal(rank, range(4))
  np.testing.assert_allclose(mixed, graph.mixing_matrix @ x)
  np.testing.assert_allclose(local, [1.5, 1.5, 6.5, 6.5])
  np.testing.assert_allclose(machines, [2.0, 6.0, 2.0, 6.0])


def test_a_mesh_made_by_make_mesh_and_an_explicitly_sharded_argument():
  mesh = jax.make_mesh((2,), ("jfog",), devices=jax.devices()[:2])
  x = jnp.array([0.0, 4.0])
  sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("jfog"))
  for value in (x, jax.device_put(x, sharding)):
    for wrap in (lambda f: f, jax.jit):
      run = wrap(jfog.spmd(jfog.allreduce, mesh))
      np.testing.assert_allclose(run(value), [2.0, 2.0])


def test_places_take_axes_like_vmap():
  def program(x, shared, pair):
    return x + shared + pair[0].sum(), jfog.allreduce(x)

  x = jnp.arange(8.0).reshape(2, 4)
  pair = (jnp.ones((4, 3)), None)
  for place in (jfog.simulate, lambda f, n, **k: jfog.spmd(f, **k)):
    run = place(program, 4, in_axes=(1, None, 0), out_axes=(1, None))
    y, mean = jax.jit(run)(x, 10.0, pair)
    np.testing.assert_allclose(y, x + 13)
    np.testing.assert_allclose(mean, x.mean(axis=1))


@pytest.mark.parametrize(
  ("arguments", "error", "text"),
  [
    ({"size": 0}, ValueError, "size=0"),
    ({"size": 2.0}, TypeError, "size=2.0 must be an int"),
    ({"size": 4, "local_size": 3}, ValueError, "local_size=3 does not divide"),
    ({"size": 3}, ValueError, "not stacked over 3 ranks"),
    ({"size": 4, "in_axes": -1}, ValueError, "got -1"),
  ],
)
def test_bad_simulations(arguments, error, text):
  with pytest.raises(error, match=text):
    jfog.simulate(lambda x: x, **arguments)(jnp.arange(4.0))


def test_bad_meshes():
  with pytest.raises(ValueError, match="none of them named 'jfog'"):
    jfog.spmd(lambda x: x, Mesh(np.array(jax.devices()), ("data",)))
  with pytest.raises(ValueError, match="not stacked over 4 ranks"):
    jfog.spmd(lambda x: x)(jnp.arange(3.0))
  with pytest.raises(ValueError, match="different names"):
    jfog.Axis("a", local="a")
  with pytest.raises(TypeError, match="axis name"):
    jfog.Axis(cast(Any, 0))


@pytest.mark.parametrize(
  ("arguments", "error", "text"),
  [
    ({"backend": "gloo"}, ValueError, "'gloo'"),
    ({"backend": "mesh"}, ValueError, "jfog.spmd"),
    ({"timeout": 0}, ValueError, "timeout=0"),
    ({"timeout": "long"}, TypeError, "'long'"),
    ({"timeout": float("nan")}, ValueError, "nan"),
    ({"local_size": 0}, ValueError, "local_size=0"),
    ({"local_size": 2}, ValueError, "does not divide a world of 1"),
    ({"local_size": 1.0}, TypeError, "1.0"),
    ({"comm": 7}, TypeError, "mpi4py|installed without MPI"),
  ],
)
def test_bad_init(arguments, error, text):
  with pytest.raises((error, RuntimeError), match=text):
    jfog.init(**arguments)


def test_a_second_init_with_other_arguments():
  jfog.init(backend="single")
  jfog.init()
  with pytest.raises(ValueError, match=r"jfog\.shutdown"):
    jfog.init(backend="mpi")


def test_a_second_init_with_another_timeout():
  """The default of a later call asks for nothing, a number does."""
  jfog.init(backend="single", timeout=60)
  assert jfog.init() is jfog.init(timeout=60)
  with pytest.raises(ValueError, match=r"timeout=60 and not 30"):
    jfog.init(timeout=30)
  with pytest.raises(ValueError, match=r"timeout=60 and not 300\.0"):
    jfog.init(timeout=300.0 + 0 * len("x"))
  jfog.shutdown()
  jfog.init()
  with pytest.raises(ValueError, match=r"timeout=300\.0 and not 60"):
    jfog.init(timeout=60)


@pytest.mark.parametrize(
  "variables",
  [
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
    {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
    {"WORLD_SIZE": "2", "RANK": "1"},
    {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "0"},
  ],
  ids=lambda variables: next(iter(variables)),
)
@pytest.mark.parametrize("backend", [None, "mpi"])
def test_copies_that_mpi_knows_nothing_about(monkeypatch, variables, backend):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  size = next(iter(variables))
  text = rf"one of 2 copies \({size}=2, .*jfog run -np 2.*backend='single'"
  with pytest.raises(RuntimeError, match=text):
    jfog.init(backend=backend)
  assert jfog.init(backend="single").size == 1
  jfog.shutdown()


@pytest.mark.parametrize(
  "variables",
  [
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # a batch script
    {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
    {"WORLD_SIZE": "1", "RANK": "0"},
    {"WORLD_SIZE": "2"},
  ],
  ids=str,
)
def test_one_copy_is_a_world_of_one(monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert jfog.init().size == 1


def test_local_size_from_the_environment(monkeypatch):
  monkeypatch.setenv("JFOG_LOCAL_SIZE", "two")
  with pytest.raises(ValueError, match="JFOG_LOCAL_SIZE='two'"):
    jfog.init()
  monkeypatch.setenv("JFOG_LOCAL_SIZE", "1")
  assert jfog.init().local_size == 1


def test_timeout_from_the_environment(monkeypatch):
  for text in ("soon", "0", "-1", "nan"):
    monkeypatch.setenv("JFOG_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"JFOG_TIMEOUT='{text}'.*unset it"):
      jfog.init()
    jfog.init(timeout=60)  # which the variable does not change
    jfog.shutdown()
  monkeypatch.setenv("JFOG_TIMEOUT", "40")
  jfog.init()
  assert jfog.init(timeout=40).size == 1
  with pytest.raises(ValueError, match=r"timeout=40\.0 and not 41"):
    jfog.init(timeout=41)


def test_importing_starts_nothing():
  done = python(
    "import sys, jfog\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge.backends_are_initialized()\n"
    "assert not any(m.split('.')[-1] == '_mpi' for m in sys.modules)\n"
    "assert 'mpi4py' not in sys.modules\n"
  )
  assert done.returncode == 0, done.stderr


def test_simulation_and_mesh_work_without_mpi():
  """An installation without MPI: no `_build`, no `_mpi`."""
  done = python(
    "import sys; sys.modules['jfog._build'] = sys.modules['jfog._mpi'] = None\n"
    "import jax, jax.numpy as jnp, jfog\n"
    "assert jfog.simulate(jfog.allreduce, 2)(jnp.arange(2.0))[0] == 0.5\n"
    "assert jfog.spmd(jfog.allreduce)(jnp.ones(jax.device_count()))[0] == 1\n"
    "assert jfog.init().size == 1\n"
    "jfog.shutdown()\n"
    "try: jfog.init(backend='mpi')\n"
    "except RuntimeError as e: assert 'installed without MPI' in str(e)\n"
    "else: raise SystemExit('no error')\n"
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
  not _extensions.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
def test_a_world_that_is_not_the_job_says_so():
  """A foreign mpirun starts N worlds of one."""
  for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
    program = f"import os; os.environ[{name!r}] = '3'\nimport jfog; jfog.init()"
    done = python(program)
    assert done.returncode == 1
    assert "one of 3 ranks" in done.stderr
    assert "jfog run -np 3" in done.stderr


@pytest.mark.skipif(
  not _extensions.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
def test_handlers_are_registered_after_the_backends_have_started():
  """`init` starts none: JAX replays what it deferred in an order that fails."""
  done = python(
    "import concurrent.futures, jax.numpy as jnp, jfog\n"
    "from jax._src import xla_bridge\n"
    "jfog.init(backend='mpi')\n"
    "assert not xla_bridge.backends_are_initialized()\n"
    "graph = jfog.topology.fully_connected(1)\n"
    "def mix(n): return jfog.neighbor_allreduce(jnp.ones(n), graph).sum()\n"
    "with concurrent.futures.ThreadPoolExecutor(4) as pool:\n"
    "  assert list(pool.map(mix, range(1, 9))) == list(range(1, 9))\n"
  )
  assert done.returncode == 0, done.stderr


def test_the_loaded_library_is_compared_with_the_built_one():
  check = _extensions._check_library
  check("Open MPI v5.0.11", "Open MPI v5.0.3, package: Debian")
  check("MPICH Version: 4.0.2", "MPICH Version:\t4.1\nMPICH Release date")
  for loaded in ("Open MPI v4.1.4, package: x", "MPICH Version: 5.0", ""):
    with pytest.raises(RuntimeError, match=r"built with 'Open MPI v5\.0\.11'"):
      check("Open MPI v5.0.11", loaded)


def test_machines_of_different_sizes_are_refused_by_name():
  world = jfog.runtime.ProcessCommunicator(0, 3, 0, (0, 0, 1))
  assert (world.machine_rank, world.machine_size) == (0, 2)
  with pytest.raises(ValueError, match=r"\[2, 1\]"):
    _ = world.machines


@pytest.mark.host("of a world on CPUs")
@pytest.mark.places("mpi")
def test_an_mpi_world(place):
  jfog.shutdown()
  world = jfog.init(timeout=60)
  n = place.size
  assert world.backend == "mpi"
  assert world.size == n
  assert isinstance(world.rank, int)
  assert (world.local_size, world.machine_size) == (n, 1)
  assert world.local_rank == world.rank
  total = jfog.allreduce(jnp.int32(world.rank), "sum")
  assert total == n * (n - 1) // 2
  assert hash(world) == hash(jfog.init())
  # The same jitted function in a simulation inside of the job.
  mean = jax.jit(jfog.allreduce)
  np.testing.assert_allclose(mean(jnp.float32(world.rank)), (n - 1) / 2)
  np.testing.assert_allclose(jfog.simulate(mean, 3)(jnp.arange(3.0)), [1.0] * 3)
  jfog.shutdown()
  jfog.init(timeout=60)


@pytest.mark.places("mpi-2", "mpi-3")
def test_a_world_of_an_mpi4py_communicator(place):
  MPI = pytest.importorskip("mpi4py.MPI")
  if MPI.Get_library_version() != _extensions.mpi().library_version():
    pytest.skip("this mpi4py runs on another MPI than jfog")
  jfog.shutdown()
  jfog.init(timeout=60)
  jfog.shutdown()
  turned = MPI.COMM_WORLD.Split(0, -MPI.COMM_WORLD.rank)
  world = jfog.init(comm=turned, timeout=60)
  assert (world.rank, world.size) == (turned.rank, turned.size)
  got = jfog.broadcast(jnp.int32(MPI.COMM_WORLD.rank))
  assert got == place.size - 1
  jfog.shutdown()
  jfog.init(timeout=60)


@pytest.mark.parametrize("text", ["", "1", "1025", "many", "-4"])
def test_bad_numbers_of_chunks_name_the_value(text):
  with pytest.raises(ValueError, match=f"JFOG_CHUNKS_IN_FLIGHT='{text}'"):
    _bootstrap._check_chunks({"JFOG_CHUNKS_IN_FLIGHT": text})
  for good in ({}, {"JFOG_CHUNKS_IN_FLIGHT": "64"}):
    _bootstrap._check_chunks(good)
