"""The check that updates are applied as an optimizer returned them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jfog
from jfog import diagnostics, optimizers, topology

N = 4
PARAMS = {
  "w": np.random.default_rng(1).standard_normal((N, 20)).astype(np.float32),
  "b": np.arange(N, dtype=np.float32),
  "half": np.full((N, 3), 0.1, np.float16),
  "none": np.zeros((N, 0), np.float32),
}


def train(chain, steps=3):
  """The parameters after some steps of `chain(averaging optimizer)`."""
  graph = topology.ring(N)
  average = optimizers.adapt_then_combine(optax.sgd(0.1), graph)
  tx = chain(average)

  def program(params):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(
        jax.tree.map(lambda x: 0.3 * x, params), state, params
      )
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, steps)[0][0]

  found = jax.jit(jfog.simulate(program, N))(PARAMS)
  jax.effects_barrier()
  return found


def test_updates_that_are_applied_pass(capfd):
  checked = train(diagnostics.check_applied_updates, 40)
  plain = train(lambda tx: tx, 40)
  for name, value in plain.items():
    eps = np.finfo(value.dtype).eps  # the two programs may round otherwise
    np.testing.assert_allclose(checked[name], value, rtol=100 * eps)
  assert "check_applied_updates" not in capfd.readouterr().err


@pytest.mark.parametrize(
  "behind",
  [optax.scale(-0.1), optax.clip(1e-3), optax.add_decayed_weights(0.1)],
  ids=["scale", "clip", "decay"],
)
def test_changed_updates_are_nan(behind, capfd):
  chain = lambda tx: optax.chain(  # noqa: E731
    diagnostics.check_applied_updates(tx), behind
  )
  found = train(chain)
  assert np.isnan(found["w"]).all()
  assert "inner transformation" in capfd.readouterr().err


def test_params_are_required():
  tx = diagnostics.check_applied_updates(optax.sgd(0.1))
  state = tx.init(jnp.ones(2))
  with pytest.raises(ValueError, match="params is missing"):
    tx.update(jnp.ones(2), state)
