"""Ranks along one axis of a mesh, and the model of each rank split along the other.

    python examples/two_mesh_axes.py         # 8 CPU devices, if there are no others

On a mesh of 4 x 2 devices four ranks average their parameters with neighbors, and
the two devices of each rank share its model: the first layer is split by columns,
the second by rows (tensor parallelism). The average stays split: a device sends its
half of the parameters to its counterparts. The program of one rank is that of
`examples/minimal.py`; the compiler inserts the sums over the axis "model".
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import jfog
from jfog.diagnostics import bytes_per_step

jax.config.update("jax_num_cpu_devices", 8)
RANKS, PARTS = 4, 2
mesh = jax.make_mesh(
  (RANKS, PARTS), (jfog.AXIS_NAME, "model"), (jax.sharding.AxisType.Auto,) * 2
)
# How a parameter with an axis over ranks in front is split.
SPLITS = {
  "hidden": PartitionSpec("jfog", None, "model"),
  "bias": PartitionSpec("jfog", "model"),
  "out": PartitionSpec("jfog", "model", None),
}
graph = jfog.topology.one_peer_exponential(RANKS)
tx = jfog.optimizers.adapt_then_combine(optax.adam(3e-3), graph)


def logits(params, x):
  return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["out"]


def loss_fn(params, x, y):
  return optax.softmax_cross_entropy_with_integer_labels(
    logits(params, x), y
  ).mean()


def train_step(params, state, x, y):
  loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state, jfog.allreduce(loss)


digits = load_digits()
x = jnp.float32(digits.data / 16)
x, y = jfog.shard((x, jnp.int32(digits.target)), RANKS)
random = np.random.RandomState(0)
params = jfog.stack(
  {
    "hidden": jnp.float32(random.randn(64, 256) / 6),
    "bias": jnp.zeros(256),
    "out": jnp.float32(random.randn(256, 10) / 12),
  },
  RANKS,
)


def fit(map_ranks, params, steps=100):
  """Trains on the ranks of `map_ranks`; returns the parameters and the loss."""
  state = jax.jit(map_ranks(tx.init))(params)
  step = jax.jit(map_ranks(train_step), donate_argnums=(0, 1))
  for _ in range(steps):
    params, state, loss = step(params, state, x, y)
  return params, loss[0]


split = {
  name: jax.device_put(value, NamedSharding(mesh, SPLITS[name]))
  for name, value in params.items()
}
split, loss = fit(lambda fun: jfog.spmd(fun, mesh), split)
print(f"{mesh.devices.shape[0]} ranks x {PARTS} parts: loss {loss:.4f}")
for name, value in split.items():
  part = value.addressable_shards[0].data.shape
  print(f"{name}: {value.shape[1:]} on a rank, {part[1:]} on a device")
halves = [value.addressable_shards[0].data[0] for value in split.values()]
print(f"a device sends {bytes_per_step(graph, halves):,.0f} bytes in a step")
_, loss = fit(lambda fun: jfog.simulate(fun, RANKS), params)
print(f"{RANKS} virtual ranks on one device: loss {loss:.4f}")
