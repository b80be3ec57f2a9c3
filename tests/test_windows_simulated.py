"""Windows in a simulation: missing ranks and messages, and delays of all windows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import windows

import jfog
from jfog import optimizers, topology

SIZE = 5
ROUNDS = 12


class Missing(windows.Model):
  """Windows without some ranks and messages, which change from step to step."""

  def see(self, alive, edge_ok):
    """Sets who is there, and which messages arrive."""
    both = alive[:, None] & alive[None, :]
    self.there = both | np.eye(SIZE, dtype=bool)
    self.arrives = edge_ok & both

  def _post(self, dst, src, value, accumulate):
    if self.arrives[dst, src]:
      super()._post(dst, src, value, accumulate)

  def reduced(self, x, self_weights, weights, reset):
    """An update whose missing ranks count for the own value, or not at all."""
    lost = weights * (self.edges & ~self.there)
    own = self_weights + (0 if reset else lost.sum(axis=1))
    edges, self.edges = self.edges, self.edges & self.there
    y = self.update(x, own, weights, reset=reset)
    self.edges = edges
    return y


def trace(rng):
  alive = rng.rand(ROUNDS, SIZE) > 0.25
  return alive, rng.rand(ROUNDS, SIZE, SIZE) > 0.25


@pytest.mark.parametrize("delay", [None, 2], ids=["at once", "late"])
@pytest.mark.parametrize("reset", [False, True], ids=["averages", "collects"])
@pytest.mark.parametrize("defaults", [True, False], ids=["graph", "given"])
def test_windows_go_on_without_ranks_and_messages(rng, delay, reset, defaults):
  graph = windows.random_graph(SIZE, 1)
  matrix = graph.mixing_matrix
  alive, edge_ok = trace(rng)
  x = rng.randn(SIZE, 3).astype(np.float32)

  def create(x):
    return jfog.win_create(x, graph, zero_init=True, associated_p=True)

  def one_step(win, x, k):
    # In turn, so that slots hold what has come by each of them.
    win = jax.lax.switch(
      k % 3,
      [
        lambda: jfog.win_put(win, x, dst_weights=0.5),
        lambda: jfog.win_accumulate(win, x, dst_weights=0.25),
        lambda: jfog.win_get(win, src_weights=0.75),
      ],
    )
    given = {} if defaults else {"self_weight": 0.5, "src_weights": 0.125}
    y, win = jfog.win_update(win, x, reset=reset, **given)
    return win, (
      y,
      jfog.win_associated_p(win),
      jfog.win_version(win),
      jfog.win_missing(win),
    )

  @jax.jit
  def run(x, alive, edge_ok):
    win = jfog.simulate(create, SIZE, delay=delay)(x)

    def step(carry, masks):
      win, x, k = carry
      win, seen = jfog.simulate(
        # Jitted inside as well: its cache must not ignore who is missing.
        jax.jit(lambda win, x: one_step(win, x, k)),
        SIZE,
        alive=masks[0],
        edge_ok=masks[1],
      )(win, x)
      return (win, seen[0], k + 1), seen

    return jax.lax.scan(step, (win, x, 0), (alive, edge_ok))[1]

  found = run(x, alive, edge_ok)
  model, y = Missing(graph, x, True, delay or 0), x
  ones = np.ones((SIZE, SIZE))
  own, weights = matrix.diagonal(), matrix
  if not defaults:
    own, weights = 0.5 * ones[0], 0.125 * ones
  for k in range(ROUNDS):
    model.see(alive[k], edge_ok[k])
    if k % 3 == 0:
      model.send(y, 0.5 * ones, False)
    elif k % 3 == 1:
      model.send(y, 0.25 * ones, True)
    else:
      model.get(0.75 * ones)
    y = model.reduced(y, own, weights, reset)
    expected = y, model.p, model.versions, ~model.there
    for got, value in zip(found, expected, strict=True):
      np.testing.assert_allclose(got[k], value, rtol=1e-4, atol=1e-5)


def test_push_sum_keeps_the_mass_of_the_ranks_that_are_left():
  graph = topology.exponential(SIZE)
  tx = optimizers.window_push_sum(optax.set_to_zero(), graph)
  params = jnp.arange(float(SIZE))
  state = jfog.simulate(tx.init, SIZE)(params)
  alive = jnp.arange(SIZE) != 3

  def step(params, state):
    updates, state = tx.update(jnp.zeros_like(params), state, params)
    return optax.apply_updates(params, updates), state

  run = jax.jit(jfog.simulate(step, SIZE, alive=alive))
  for _ in range(60):
    params, state = run(params, state)
  p = jfog.simulate(jfog.win_associated_p, SIZE)(state.window)
  left = np.asarray(alive)
  # Nothing of the rank was in slots yet: the mean of the others, whose weights
  # and slots still sum to their number.
  np.testing.assert_allclose(params[left], 7 / 4, rtol=1e-5)
  assert min(p[left]) > 0.2


@pytest.mark.parametrize(
  "delay", [1, np.arange(SIZE * SIZE).reshape(SIZE, -1) % 3]
)
def test_a_delay_of_the_simulation_is_that_of_its_windows(delay):
  graph = topology.ring(SIZE)

  def run(outer, inner):
    def program(x):
      win = jax.jit(lambda x: jfog.win_create(x, graph, delay=inner))(x)

      def step(carry, _):
        win, x = carry
        x, win = jfog.win_update(jfog.win_put(win, x), x)
        return (win, x), x

      return jax.lax.scan(step, (win, x), None, length=6)[1]

    return jfog.simulate(program, SIZE, delay=outer)(jnp.arange(float(SIZE)))

  late = run(None, delay)
  np.testing.assert_array_equal(run(delay, None), late)
  # The window's own goes before that of the simulation.
  np.testing.assert_array_equal(run(3, delay), late)
  np.testing.assert_array_equal(run(delay, 0), run(None, None))
  assert np.any(np.asarray(late) != run(None, None))


def test_delays_and_masks_of_other_ranks_are_refused():
  for error, text, delay in (
    (TypeError, "simulate: delay has dtype float64", 0.5),
    (ValueError, r"simulate: delay has shape \(2,\)", [1, 2]),
    (ValueError, "simulate: delay has an entry -1", -1),
  ):
    with pytest.raises(error, match=text):
      jfog.simulate(lambda x: x, SIZE, delay=delay)
  # Operations of machines alone: the masks and delays are those of all ranks.
  graph = topology.ring(3)

  def machines():
    return jfog.Axis("jfog", "jfog_local").machines

  for name, program in (
    ("win_create", lambda x: jfog.win_create(x, graph, comm=machines())),
    (
      "neighbor_allreduce",
      lambda x: jfog.neighbor_allreduce(x, graph, comm=machines()),
    ),
    ("pair_gossip", lambda x: jfog.pair_gossip(x, [1, 0, 2], comm=machines())),
  ):
    options = {"alive": np.ones(6, bool)}
    if name == "win_create":
      options = {"delay": 1}
    run = jfog.simulate(program, 6, local_size=2, **options)
    with pytest.raises(ValueError, match=f"{name}: simulate has .* has 3; use"):
      run(jnp.arange(6.0))
