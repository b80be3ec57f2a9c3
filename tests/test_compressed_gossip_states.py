"""Compressed averaging: one step, dtypes, states and wrappers."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import reference
from support.compressed import (
  COMPRESSORS,
  ETA,
  GAMMA,
  SEED,
  SIGN,
  SQUEEZED,
  side_by_side,
)
from support.problems import RATE

import jfog
from jfog import optimizers, topology


def test_what_does_not_travel_is_kept(rng):
  """`c + e = v`, with `c` as decoded by all ranks."""
  compressor = side_by_side({**SQUEEZED, "top_k": COMPRESSORS["top_k"]})
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    tx = optimizers.deep_squeeze(
      optax.sgd(1.0), topology.ring(3), compressor, 1.0, seed=SEED
    )

  def program(x, g):
    state: Any = tx.init(x)
    state = state._replace(e=g, step=jnp.asarray(4))
    e: Any = tx.update(g, state, x)[1]
    key = jax.random.fold_in(jax.random.key(SEED), 4)
    key = jax.random.fold_in(key, jfog.rank())
    # v = x - g + e = x up to rounding.
    v = jax.tree.map(lambda x, g: (x - g) + g, x, g)
    message, _ = compressor.encode(key, v, compressor.init(v))
    return v, compressor.decode(message, v), e[-1]

  x, g = (
    {name: rng.randn(3, 33).astype(np.float32) for name in (*SQUEEZED, "top_k")}
    for _ in range(2)
  )
  v, c, e = jax.jit(jfog.simulate(program, 3))(x, g)
  for name in v:
    np.testing.assert_allclose(c[name] + e[name], v[name], rtol=0, atol=1e-6)
  np.testing.assert_array_equal(c["top_k"] + e["top_k"], v["top_k"])


def test_states_are_arrays_and_can_be_restored(rng):
  names = ("low_rank", "random_k")
  tx = optimizers.choco(
    optax.sgd(RATE), topology.ring(3), side_by_side(COMPRESSORS), GAMMA
  )
  x, g = (
    {name: rng.randn(3, 4, 3).astype(np.float32) for name in names}
    for _ in range(2)
  )
  state: Any = jax.jit(jfog.simulate(tx.init, 3))(x)
  assert isinstance(state, optimizers.ChocoState)
  assert state.step.dtype == jnp.int32
  assert all(len(leaf) == 3 for leaf in jax.tree.leaves(state))
  update = jax.jit(jfog.simulate(tx.update, 3))
  straight = packed = state
  for _ in range(3):
    expected, straight = update(g, straight, x)
    leaves, structure = jax.tree.flatten(packed)
    saved = [np.asarray(leaf) for leaf in leaves]
    result, packed = update(g, jax.tree.unflatten(structure, saved), x)
    for one, other in zip(
      jax.tree.leaves((result, packed)),
      jax.tree.leaves((expected, straight)),
      strict=True,
    ):
      np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(packed.step, np.full(3, 3))
  assert jax.tree.structure(packed) == jax.tree.structure(state)


def test_half_parameters_have_float32_buffers(rng):
  graph, sign = topology.ring(3), optimizers.sign()
  choco = optimizers.choco(optax.sgd(0.5), graph, sign, GAMMA)
  deep_squeeze = optimizers.deep_squeeze(optax.sgd(0.5), graph, sign, ETA)

  def program(x, g):
    results = []
    for tx in (choco, deep_squeeze):
      updates, state = tx.update(g, tx.init(x), x)
      results.append((updates, state, optax.apply_updates(x, updates)))
    return results

  x, g = jnp.asarray(rng.randn(2, 3, 40), jnp.bfloat16)
  first, second = jax.jit(jfog.simulate(program, 3))(x, g)
  x, g = np.asarray(x, float), np.asarray(g, float)
  h = x - 0.5 * g
  c = np.where(h >= 0, 1, -1) * np.abs(h).mean(axis=1, keepdims=True)
  moved = reference.mean(3) @ c - c
  for (updates, state, new), truth in (
    (first, h + GAMMA * moved),
    (second, c + ETA * moved),
  ):
    assert updates.dtype == jnp.float32
    assert new.dtype == jnp.bfloat16
    kept = state[3:]
    assert {buffer.dtype for buffer in kept} == {jnp.dtype("float32")}
    np.testing.assert_allclose(updates, truth - x, rtol=1e-5, atol=1e-5)


@pytest.mark.places("mesh")
def test_wrapped_by_other_transformations(place, rng):
  def choco(rate):
    compressor = side_by_side({"b": optimizers.sign(), "w": optimizers.sign()})
    graph = topology.ring(place.size)
    return optimizers.choco(optax.sgd(rate), graph, compressor, GAMMA)

  known = {
    "plain": choco(RATE),
    "chained": optax.chain(optax.scale(2.0), choco(RATE / 2)),
    "masked": optax.masked(choco(RATE), {"b": False, "w": True}),
    "several": optax.MultiSteps(choco(RATE), 2).gradient_transformation(),
  }

  @jax.jit
  def program(x, g):
    def update(carry, _):
      new = {}
      for name, (params, state) in carry.items():
        for _ in range(2 if name == "several" else 1):
          updates, state = known[name].update(g, state, params)
          params = optax.apply_updates(params, updates)
        new[name] = params, state
      return new, None

    carry = {name: (x, tx.init(x)) for name, tx in known.items()}
    carry = jax.lax.scan(update, carry, length=3)[0]
    return {name: params for name, (params, _) in carry.items()}

  x, g = (
    {name: rng.randn(place.size, 4).astype(np.float32) for name in "bw"}
    for _ in range(2)
  )
  result = place.run(program, x, g)
  for name in ("chained", "several"):
    for leaf in "bw":
      np.testing.assert_allclose(
        result[name][leaf], result["plain"][leaf], rtol=1e-5, atol=1e-6
      )
  np.testing.assert_allclose(
    result["masked"]["w"], result["plain"]["w"], rtol=1e-5, atol=1e-6
  )
  untouched = place.mine(
    x["b"] + 3 * g["b"]
  )  # masked returns the gradient unchanged
  np.testing.assert_allclose(result["masked"]["b"], untouched, rtol=1e-5)


def test_an_axis_of_the_users_own_and_a_traced_rate(rng):
  def program(x, gamma):
    tx = optimizers.choco(
      optax.sgd(RATE), topology.ring(3), SIGN, gamma, comm=jfog.Axis("data")
    )
    updates, _ = tx.update(x, tx.init(x), x)
    return updates

  x = rng.randn(3, 4).astype(np.float32)
  ranks = jax.vmap(program, in_axes=(0, None), axis_name="data")
  h = (1 - RATE) * x
  c = np.sign(h) * np.abs(h).mean(axis=1, keepdims=True)
  truth = h + GAMMA * (reference.mean(3) @ c - c) - x
  result = jax.jit(ranks)(x, GAMMA)
  np.testing.assert_allclose(result, truth, rtol=1e-5, atol=1e-5)


def test_extra_arguments_reach_the_inner_transformation():
  def update(updates, state, params=None, *, factor, **extra):
    del params, extra
    return jax.tree.map(lambda g: factor * g, updates), state

  wants_factor: Any = update  # optax annotates only the common arguments
  inner = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), wants_factor
  )
  one, exact = topology.fully_connected(1), optimizers.identity()
  jfog.init(backend="single")
  for method in (optimizers.choco, optimizers.deep_squeeze):
    tx = method(inner, one, exact, 0.5)
    x = jnp.zeros(2)
    updates, _ = tx.update(jnp.ones(2), tx.init(x), x, factor=-3.0, other=1)
    np.testing.assert_array_equal(updates, np.full(2, -3.0))
  jfog.shutdown()
