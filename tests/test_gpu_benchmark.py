"""The parts of `benchmarks/gpu.py` without a GPU, and its job on a stand-in."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jfog
from jfog import launch, runtime

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"
TINY = {
  "ResNet-50": (
    "resnet",
    {
      "blocks": [1],
      "width": 4,
      "classes": 4,
      "side": 16,
      "dtype": "float32",
    },
    4,
  ),
  "transformer": (
    "transformer",
    {
      "layers": 2,
      "width": 16,
      "heads": 2,
      "length": 8,
      "words": 16,
      "dtype": "float32",
    },
    4,
  ),
}
# NCCL and the CUDA driver, as far as the raw peers call them: memory is the
# host's, a group is a set of MPI messages, and everything ends where it begins.
STAND_IN = r"""
#include <mpi.h>
#include <string.h>

typedef struct { char internal[128]; } ncclUniqueId;
static MPI_Comm comm;
static MPI_Request requests[64];
static int pending;

int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return device; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuStreamCreate(void** stream, unsigned flags) {
  *stream = requests;
  return flags != 1;
}
int cuStreamSynchronize(void* stream) { return stream != requests; }
int cuStreamDestroy_v2(void* stream) { return stream != requests; }
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from,
                         size_t size, void* stream) {
  memcpy((void*)to, (void*)from, size);
  return stream != requests;
}
int ncclGetVersion(int* version) { *version = 22803; return 0; }
int ncclGetUniqueId(ncclUniqueId* id) {
  memset(id->internal, 7, 128);
  return 0;
}
int ncclCommInitRank(MPI_Comm** made, int size, ncclUniqueId id, int rank) {
  *made = &comm;
  return id.internal[127] != 7 || MPI_Comm_dup(MPI_COMM_WORLD, &comm);
}
int ncclCommDestroy(MPI_Comm* made) { return MPI_Comm_free(made); }
int ncclGroupStart(void) { return pending; }
int ncclGroupEnd(void) {
  int code = MPI_Waitall(pending, requests, MPI_STATUSES_IGNORE);
  pending = 0;
  return code;
}
int ncclSend(void* x, size_t size, int type, int peer, MPI_Comm* on, void* s) {
  MPI_Isend(x, size, MPI_BYTE, peer, 0, *on, requests + pending++);
  return type != 1 || s != requests;
}
int ncclRecv(void* x, size_t size, int type, int peer, MPI_Comm* on, void* s) {
  MPI_Irecv(x, size, MPI_BYTE, peer, 0, *on, requests + pending++);
  return type != 1 || s != requests;
}
"""


@pytest.fixture
def benchmark(monkeypatch):
  """A function that imports a module of the benchmarks."""
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  return importlib.import_module


@pytest.mark.parametrize(
  ("name", "leaves", "parameters"),
  [("resnet", 161, 25_557_032), ("transformer", 8, 33_824_768)],
)
def test_models_have_their_shapes(benchmark, name, leaves, parameters):
  models = benchmark("_models")
  model = getattr(models, name)()
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(model.init, key)
  assert len(jax.tree.leaves(params)) == leaves
  assert models.count(params) == parameters
  batch = jax.eval_shape(lambda key: model.batch(key, 2), key)
  step = jax.value_and_grad(model.loss)
  loss, gradient = jax.eval_shape(step, params, batch)
  assert (loss.shape, loss.dtype) == ((), "float32")
  assert jax.tree.map(lambda x: x.shape, gradient) == jax.tree.map(
    lambda x: x.shape, params
  )


@pytest.mark.parametrize("model", TINY)
def test_models_learn_a_batch(benchmark, model):
  models = benchmark("_models")
  name, arguments, samples = TINY[model]
  model = getattr(models, name)(**arguments)
  params = jax.jit(model.init)(jax.random.key(0))
  batch = model.batch(jax.random.key(1), samples)
  tx = optax.sgd(0.3)
  step, state = models.train_step(model.loss, tx), tx.init(params)
  losses = []
  for _ in range(15):
    params, state, loss = step(params, state, batch)
    losses.append(float(loss))
  assert losses[-1] < 0.5 * losses[0], losses


def test_refuses_without_a_gpu(tmp_path):
  done = subprocess.run(
    [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert "no GPU here: JAX uses other platforms only (cpu)" in line
  assert not any(tmp_path.iterdir())


@pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
def test_the_job_runs_on_a_stand_in(benchmark, tmp_path):
  """All but the machine: peers are checked against NumPy, timed, tabulated."""
  gpu = benchmark("gpu")
  source, library = tmp_path / "gpu.c", tmp_path / "gpu.so"
  source.write_text(STAND_IN)
  launcher = launch.installed_mpi().launcher
  compiler = pathlib.Path(launcher).parent / "mpicc"
  flags = ["-shared", "-fPIC", str(source), "-o", str(library)]
  subprocess.run([str(compiler), *flags], check=True)
  result = tmp_path / "result.json"
  job = {
    "place": "mpi",
    "cases": [("ring", 4096), ("one-peer exponential", 4096)],
    "models": {},
    "rounds": 2,
    "target": 1e-3,
    "cuda": str(library),
    "nccl": str(library),
    "result": str(result),
  }
  words = [sys.executable, str(SCRIPT), "--job", json.dumps(job)]
  done = subprocess.run(
    launch.command_line(
      ["--no-tag-output", "-np", "2", "--timeout", "100", *words]
    ),
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(result.read_text())
  measured = {"ranks": 2, "gpus": 1, **found["facts"]}
  for part in ("average", "training"):
    measured[part] = {
      case: {peer: [times] for peer, times in peers.items()}
      for case, peers in found[part].items()
    }
  text = "\n".join(gpu.text_of([measured], job["cases"], ["A GPU"], {}))
  assert "GPUs: 1, A GPU; driver for CUDA 13.0; NCCL 2.28.3" in text
  assert "| 2 | 1 | one-peer exponential | 4 kB |" in text
  assert "| no device of its own for each rank |" in text


def test_trainings_are_timed_with_and_without_averages(benchmark, monkeypatch):
  gpu, models = benchmark("gpu"), benchmark("_models")
  linear = models.Model(
    init=lambda key: jax.random.normal(key, (3,)),
    loss=lambda params, batch: jnp.square(batch @ params).mean(),
    batch=lambda key, samples: jax.random.normal(key, (samples, 3)),
    unit="rows",
    units=2,
  )
  monkeypatch.setattr(models, "linear", lambda: linear, raising=False)
  alone = types.SimpleNamespace(rank=0, size=1, Barrier=lambda: None)
  job = {"rounds": 2, "target": 1e-4}
  jfog.shutdown()
  jfog.init(backend="single")
  count, times = gpu.times_of_training(job, ("linear", {}, 4), alone, float)
  jfog.shutdown()
  assert count == 3
  assert {name: len(values) for name, values in times.items()} == {
    "without": 2,
    "adapt_then_combine": 2,
  }
  times = {"without": [[0.01, 0.02]], "adapt_then_combine": [[0.02, 0.04]]}
  measured = {"ranks": 2, "gpus": 1, "parameters": {"small": count}}
  measured["training"] = {"small": times}
  (row,) = gpu.training_rows([measured], {"small": ("linear", {}, 4)})
  assert row == [
    *("small", "3", 2, 1, "8 rows", "533", "267", "0.50 [0.50, 0.50]")
  ]


def test_tables_say_what_was_measured(benchmark):
  gpu = benchmark("gpu")
  size = gpu.WANTED_CASE[-1]
  cases = [("ring", size), ("one-peer exponential", size)]
  times = {
    "jfog": [[0.010, 0.020], [0.010]],
    "raw NCCL": [[0.007, 0.014], [0.007]],
    "device copy": [[0.001, 0.002], [0.001]],
  }
  other = {**times, "XLA ppermute": [[0.020], [0.030, 0.050]]}
  measured = [
    {"ranks": 2, "gpus": 2, "average": {gpu.key(*cases[0]): other}},
    {"ranks": 2, "gpus": 1, "average": {gpu.key(*cases[0]): times}},
  ]
  own, shared = gpu.average_rows(measured, cases[:1])
  lonely = "no device of its own for each rank"
  assert shared[:4] == [2, 1, "ring", "256 MB"]
  assert shared[4:6] == ["10 ms", "26.8 GB/s"]
  assert shared[6:] == [
    "0.70 [0.70, 0.70]",
    "0.10 [0.10, 0.10]",
    lonely,
    lonely,
  ]
  assert own[8] == "2.67 [2.00, 3.33]"  # by the medians of each turn
  assert gpu.wanted_row(measured)[1:] == [
    *("0.70 [0.70, 0.70]", "0.6", "reached")
  ]
  times["raw NCCL"] = [[0.005, 0.010], [0.005]]
  assert gpu.wanted_row(measured)[-1] == "missed"
  assert gpu.wanted_row(measured[:1])[1] == "not measured"
  assert np.isclose(gpu.ratios(times, "raw NCCL"), 0.5).all()
