"""One rank of a job of `jfog bench train`: training steps with synthetic data."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfog import optimizers, primitives, runtime, topology
from jfog.bench import measure, models
from jfog.bench.train import WITHOUT

_TINY: dict[str, dict[str, Any]] = {
  "resnet": {"blocks": (1, 1), "width": 8, "classes": 10, "side": 32},
  "transformer": {
    **{"layers": 2, "width": 32, "heads": 2, "length": 32, "words": 64}
  },
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  "resnet50": ("resnet", {}),
  "resnet18": ("resnet", {"blocks": (2, 2, 2, 2), "bottleneck": False}),
  "transformer": ("transformer", {}),
}
_OUTER = {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}


def model(name: str, size: str, dtype: str) -> models.Model:
  """The model of `--model`, `--size` and `--dtype`."""
  family, arguments = _MODELS[name]
  if size == "tiny":
    arguments = {**arguments, **_TINY[family]}
  return getattr(models, family)(**arguments, dtype=jnp.dtype(dtype))


def transformation(
  name: str,
  graph_name: str,
  every: int,
  comm: runtime.Communicator,
) -> optax.GradientTransformation:
  """SGD with momentum on all ranks, in the form of `--optimizer`."""
  inner = optax.sgd(1e-3, momentum=0.9)
  if name == WITHOUT:
    return inner
  if name == "gradient_allreduce":
    return optimizers.gradient_allreduce(inner)
  if name == "local_sgd":
    return optimizers.local_sgd(inner, every)
  if name == "diloco":
    return optimizers.diloco(inner, optax.sgd(**_OUTER), every)
  return getattr(optimizers, name)(inner, _graph(graph_name, comm))


def _graph(name: str, comm: runtime.Communicator) -> Any:
  if name != "hierarchical":
    return getattr(topology, name)(comm.size)
  machines = topology.one_peer_exponential(comm.machine_size)

  def average(params: Any, step: Any) -> Any:
    return primitives.hierarchical_neighbor_allreduce(params, machines, step)

  return average


def _key(seed: int) -> jax.Array:
  """A key whose draws compile in seconds, also the 54 of a ResNet-50 on a CPU."""
  return jax.random.key(seed, impl="rbg")


class _Training:
  """A training that goes on from call to call."""

  def __init__(
    self,
    made: models.Model,
    tx: optax.GradientTransformation,
    batch: Any,
  ):
    self._step = models.train_step(made.loss, tx)
    self._params = jax.jit(made.init)(_key(0))  # equal on all ranks
    self.parameters = models.count(self._params)
    self._state = tx.init(self._params)
    self._batch = batch
    self.loss = jnp.zeros(())

  def seconds(self, steps: int) -> float:
    """The seconds of so many steps, from a barrier to their end here."""
    jax.block_until_ready(self._params)
    primitives.barrier()
    begin = time.perf_counter()
    for _ in range(steps):
      self._params, self._state, self.loss = self._step(
        self._params, self._state, self._batch
      )
    jax.block_until_ready((self._params, self.loss))
    return time.perf_counter() - begin


def run(job: dict[str, Any]) -> dict[str, Any] | None:
  """Times the trainings of a job in turns. Collective.

  Args:
    job: `model`, `size`, `batch`, `optimizers`, `graph`, `every`, `steps`, `rounds`,
      and `dtype`, None for that of the device.

  Returns:
    On rank 0, the seconds of a step by optimizer and what was trained; None on the
    others.

  Raises:
    RuntimeError: if a loss is not finite.
  """
  comm = runtime.init()
  device = jax.devices()[0]
  dtype = job["dtype"] or (
    "float32" if device.platform == "cpu" else "bfloat16"
  )
  made = model(job["model"], job["size"], dtype)
  batch = jax.jit(made.batch, static_argnums=1)(
    _key(1 + int(comm.rank)), job["batch"]
  )
  names = list(dict.fromkeys([WITHOUT, *job["optimizers"]]))
  trainings = {}
  for name in names:
    tx = transformation(name, job["graph"], job["every"], comm)
    trainings[name] = _Training(made, tx, batch)
    trainings[name].seconds(2)  # compiles, and connects

  slowest = _slowest()
  times = measure.alternate(
    trainings,
    job["rounds"],
    lambda training: slowest(training.seconds(job["steps"])) / job["steps"],
  )
  for name, training in trainings.items():
    if not np.isfinite(float(training.loss)):
      raise RuntimeError(f"{name}: the loss is {float(training.loss)}.")
  if comm.rank:
    return None
  return {
    "ranks": comm.size,
    "device": device.device_kind,
    "dtype": dtype,
    "parameters": trainings[WITHOUT].parameters,
    "unit": made.unit,
    "units": job["batch"] * made.units,  # of a rank and step
    "seconds": times,
  }


def _slowest() -> Callable[[float], float]:
  """The largest number of all ranks."""
  largest = jax.jit(lambda x: primitives.allreduce(x, "max"))
  return lambda seconds: float(largest(jnp.float32(seconds)))
