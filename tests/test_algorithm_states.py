"""Optimizer states: wrappers, checkpoints, dtypes, donation, bytes sent."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, PartitionSpec
from support.algorithms import EVERY, directed, one_peer, pulling, pushing

import jfog
from jfog import topology


def wrapped(tx):
  """The transformation of one leaf, clipped, in every second update."""
  masked = optax.masked(tx, {"b": False, "w": True})
  chained = optax.chain(optax.clip(0.25), masked)
  return optax.MultiSteps(chained, 2).gradient_transformation()


@functools.cache
def stepper(place, wrap):
  """Jitted init and step of all methods, over all ranks."""
  makers = {name: make(place.size) for name, make in EVERY.items()}
  if place.kind == "mesh":  # where the types of `cond` branches are checked
    makers = {k: makers[k] for k in ("nids", "tracking atc", "diloco")}
  if wrap:
    makers = {name: wrapped(tx) for name, tx in makers.items()}

  def init(x):
    return {name: (x, tx.init(x)) for name, tx in makers.items()}

  def step(carry, g):
    new = {}
    for name, (x, state) in carry.items():
      updates, state = makers[name].update(g, state, x)
      new[name] = optax.apply_updates(x, updates), state
    return new

  return jax.jit(place.map(init)), jax.jit(place.map(step))


def float32(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


@pytest.mark.places("simulate-5", "mesh-4")
def test_chained_masked_and_in_several_steps(place, rng):
  n = place.size
  x = float32({"b": rng.randn(n), "w": rng.randn(n, 2, 2)})
  g = float32({"b": rng.randn(6, n), "w": rng.randn(6, n, 2, 2)})
  init, step = stepper(place, wrap=True)
  carry = init(x)
  for k in range(6):
    carry = step(carry, jax.tree.map(lambda g, k=k: g[k], g))
  init, step = stepper(place, wrap=False)
  plain = init(x["w"])
  for k in range(3):
    mean = (g["w"][2 * k] + g["w"][2 * k + 1]) / 2
    plain = step(plain, np.clip(mean, -0.25, 0.25))
  for name, (truth, _) in plain.items():
    np.testing.assert_allclose(
      carry[name][0]["w"], truth, rtol=1e-5, atol=1e-5, err_msg=name
    )
    assert abs(truth - x["w"]).max() > 0.01, name


@pytest.mark.places("simulate-5")
def test_a_restored_state_goes_on_bit_for_bit(place, rng, tmp_path):
  """Saved between the two mini-steps of one update."""
  n = place.size
  x = float32({"b": rng.randn(n), "w": rng.randn(n, 2, 2)})
  g = float32({"b": rng.randn(7, n), "w": rng.randn(7, n, 2, 2)})
  init, step = stepper(place, wrap=True)
  carry = init(x)
  for k in range(3):
    carry = step(carry, jax.tree.map(lambda g, k=k: g[k], g))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", carry)
    checkpointer.wait_until_finished()
    blank = jax.tree.map(jnp.zeros_like, carry)
    restored = checkpointer.restore(tmp_path / "state", blank)
  assert jax.tree.structure(restored) == jax.tree.structure(carry)
  for k in range(3, 7):
    gradient = jax.tree.map(lambda g, k=k: g[k], g)
    carry, restored = step(carry, gradient), step(restored, gradient)
  jax.tree.map(np.testing.assert_array_equal, restored, carry)


@pytest.mark.places("simulate-5")
def test_half_parameters_have_float32_states(place, rng):
  """With half gradients too, the iterates stay near those of float32."""
  n = place.size
  x, g = float32((rng.randn(n, 2, 2), rng.randn(6, n, 2, 2)))
  init, step = stepper(place, wrap=False)
  ends = []
  for dtype in (jnp.bfloat16, jnp.float32):
    carry = init(jnp.asarray(x, dtype))
    for k in range(6):
      carry = step(carry, jnp.asarray(g[k], dtype))
    ends.append(carry)
  for name, (truth, _) in ends[1].items():
    y, state = ends[0][name]
    assert y.dtype == jnp.bfloat16, name
    own = {k: v for k, v in state._asdict().items() if "inner" not in k}
    for leaf in jax.tree.leaves(own):
      assert leaf.dtype in (jnp.int32, jnp.float32), name
    np.testing.assert_allclose(
      np.asarray(y, np.float32), truth, rtol=0.1, atol=0.1, err_msg=name
    )


@pytest.mark.parametrize("name", ["extra", "push_diging", "quasi_global"])
def test_updates_of_halves_are_float32(name):
  tx = EVERY[name](2)

  def step(x):
    return tx.update(x, tx.init(x), x)[0]

  updates = jax.eval_shape(jfog.simulate(step, 2), jnp.ones(2, jnp.bfloat16))
  assert updates.dtype == jnp.float32


@pytest.mark.parametrize("name", ["extra", "tracking awc", "push_pull"])
def test_gradients_may_be_wider_or_narrower_than_parameters(name, x64):
  """The dtypes of the state follow the parameters."""
  tx = EVERY[name](2)

  def run(x):
    state: Any = tx.init(x)
    for dtype in ("float64", "float32", "bfloat16"):
      before = state
      updates, state = tx.update(x.astype(dtype), state, x)
      x = optax.apply_updates(x, updates)
      own = {k: v for k, v in state._asdict().items() if "inner" not in k}
      for key, leaf in own.items():
        assert leaf.dtype == getattr(before, key).dtype, key
    return x

  for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
    jax.eval_shape(jfog.simulate(run, 2), jnp.ones([2, 3], dtype))


def test_a_start_that_is_one_value_on_all_devices(rng):
  """`shard_map` tracks that it is replicated; branches must have equal types."""
  names = ("nids", "tracking atc", "local_sgd", "slow_momentum", "diloco")

  def one_step(x, g):
    ends = []
    for tx in (EVERY[name](4) for name in names):
      updates, _ = tx.update(g, tx.init(x), x)
      ends.append(x + updates)
    return ends

  x, g = float32((rng.randn(3), rng.randn(4, 3)))
  mesh = Mesh(np.array(jax.devices()[:4]), (jfog.AXIS_NAME,))
  own = PartitionSpec(jfog.AXIS_NAME)
  found = jax.jit(
    jax.shard_map(
      lambda x, g: jax.tree.map(lambda y: y[None], one_step(x, g[0])),
      mesh=mesh,
      in_specs=(PartitionSpec(), own),
      out_specs=own,
    )
  )(x, g)
  truth = jfog.simulate(one_step, 4, in_axes=(None, 0))(x, g)
  for name, x, expected in zip(names, found, truth, strict=True):
    np.testing.assert_allclose(x, expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", EVERY)
def test_parameters_and_state_may_be_overwritten_together(name):
  """A step that donates both must not get one buffer twice."""
  x = jnp.ones(3)
  leaves = jax.tree.leaves((x, EVERY[name](2).init(x)))
  assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


# Bytes sent, against the formulas of the documentation.

# By method: copies of the parameters in one message, scalars of 8 bytes in it,
# and the graph of that message in the second update.
MESSAGES = {
  "exact_diffusion": [(1, 0, topology.ring)],
  "d2": [(1, 0, topology.ring)],
  "nids": [(1, 0, topology.ring)],
  "extra": [(1, 0, topology.ring)],
  "tracking awc": [(2, 0, lambda n: one_peer(n)[1])],
  "tracking atc": [
    (1, 0, lambda n: one_peer(n)[0]),
    (1, 0, lambda n: one_peer(n)[1]),
  ],
  "push_sum": [(1, 1, lambda n: pushing(n)[1])],
  "push_diging": [(2, 1, lambda n: pushing(n)[1])],
  "push_pull": [(1, 0, directed), (1, 0, pulling)],
  "decentlam": [(1, 0, topology.ring)],
  "quasi_global": [(1, 0, lambda n: one_peer(n)[1])],
  "dmsgd_sync": [(2, 0, lambda n: one_peer(n)[1])],
}


@pytest.mark.places("mpi-3")
def test_bytes_counted_are_those_of_the_formula(place, rng, x64):
  """In the second updates; values sent together are one operation."""
  n, rank = place.size, jfog.rank()
  x, g = rng.randn(2, 50)
  makers = {name: EVERY[name](n) for name in MESSAGES}

  @jax.jit
  def update_all(states):
    return {k: tx.update(g, states[k], x)[1] for k, tx in makers.items()}

  states = update_all({name: tx.init(x) for name, tx in makers.items()})
  jax.block_until_ready(states)
  jfog.diagnostics.reset_counters()
  jax.block_until_ready(update_all(states))
  counted = jfog.diagnostics.counters()
  messages = [message for found in MESSAGES.values() for message in found]
  assert counted["operations"] == len(messages)
  assert counted["bytes_sent"] == sum(
    (400 * copies + 8 * scalars) * len(graph(n).out_neighbors(rank))
    for copies, scalars, graph in messages
  )
