"""Attackers of a simulation, against a loop over ranks in NumPy."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import attacks, lab, topology

N = 6
LIARS = [1, 4]
HONEST = [0, 2, 3, 5]


def irregular(n, seed=0):
  """A directed graph, rows that sum to 1, all ranks receive from rank 1."""
  random = np.random.RandomState(seed)
  weights = random.uniform(0.5, 1.5, (n, n)) * (random.rand(n, n) < 0.5)
  weights[np.arange(n), np.arange(n)] = 1
  weights[:, 1] = weights[0, 2] = 1
  return topology.Topology(weights / weights.sum(axis=1, keepdims=True))


GRAPHS = [irregular(N), irregular(N, 1), topology.fully_connected(N)]


def alie(x, i, sender, weights):
  del i, sender, weights
  # n = 6, m = 2: s = 4 - 2, (6 - 2 - 2) / (6 - 2)
  z = statistics.NormalDist().inv_cdf(0.5)
  return x[HONEST].mean(axis=0) - z * x[HONEST].std(axis=0)


def dissensus(x, i, sender, weights):
  del sender
  honest = [k for k in HONEST if k != i]
  liars = [k for k in LIARS if k != i]
  pull = sum(weights[k] * (x[k] - x[i]) for k in honest)
  total = sum(weights[k] for k in liars)
  return x[i] - 1.5 * pull / (total or 1)


# By name: the attack, and what rank `sender` sends to rank `i`, of rows `x`.
ATTACKS = {
  "sign_flip": (
    attacks.sign_flip(3.0),
    lambda x, i, sender, weights: -3 * x[sender],
  ),
  "alie": (attacks.alie(), alie),
  "alie with z": (
    attacks.alie(1.5),
    lambda x, i, sender, weights: (
      x[HONEST].mean(axis=0) - 1.5 * x[HONEST].std(axis=0)
    ),
  ),
  "inner_product": (
    attacks.inner_product(0.4),
    lambda x, i, sender, weights: -0.4 * x[HONEST].mean(axis=0),
  ),
  "dissensus": (attacks.dissensus(1.5), dissensus),
  "own": (
    attacks.Attack("own", lambda m: m.values[0] * m.sender),
    lambda x, i, sender, weights: sender * x[0],
  ),
}


def average(x, graph, send, present=None):
  """The averages of all ranks as a loop; each keeps its own value."""
  present = np.ones((N, N), bool) if present is None else present
  result = np.zeros_like(x)
  for i in range(N):
    weights = np.where(present[i], graph.mixing_matrix[i], 0)
    for j in range(N):
      # A rank adds the weights of what is missing to its own.
      if j == i or not present[i, j]:
        result[i] += graph.mixing_matrix[i, j] * x[i]
        continue
      sent = send(x, i, j, weights) if j in LIARS else x[j]
      result[i] += graph.mixing_matrix[i, j] * sent
  return result


def attackers(attack) -> dict[int, attacks.Attack]:
  return {rank: attack for rank in LIARS}


@pytest.mark.parametrize("rounds", [2, 3], ids=["equal degrees", "branches"])
@pytest.mark.parametrize("name", ATTACKS)
def test_averages_of_what_is_sent(name, rounds, rng):
  """Jitted, with a traced step and traced weights, of a tree, under a scan."""
  attack, send = ATTACKS[name]
  x = rng.randn(N, 7)
  schedule = topology.Schedule(GRAPHS[:rounds])
  tree = {
    "empty": jnp.zeros((N, 0)),
    "matrix": jnp.asarray(x[:, :6].reshape(N, 2, 3), jnp.float32),
    "scalar": jnp.asarray(x[:, 6], jnp.float32),
  }

  @jax.jit
  def run(tree, weights):
    mix = jax.jit(lambda x, k: jfog.neighbor_allreduce(x, schedule, k))

    def program(x):
      def step(x, k):
        y = jfog.neighbor_allreduce(x, GRAPHS[0], weights=weights[0])
        return x, (mix(x, k), y)

      return jax.lax.scan(step, x, jnp.arange(rounds))[1]

    return jfog.simulate(program, N, attackers=attackers(attack))(tree)

  weights = np.stack([graph.mixing_matrix for graph in GRAPHS])
  by_step, by_weights = run(tree, jnp.asarray(weights, jnp.float32))

  def rows(found, k):
    matrix, scalar = found["matrix"][:, k], found["scalar"][:, k]
    return np.hstack([matrix.reshape(N, 6), scalar[:, None]])

  for k, graph in enumerate(GRAPHS[:rounds]):
    expected = average(x, graph, send)
    np.testing.assert_allclose(rows(by_step, k), expected, rtol=1e-4, atol=1e-5)
  expected = average(x, GRAPHS[0], send)
  np.testing.assert_allclose(
    rows(by_weights, 0), expected, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("name", ATTACKS)
def test_gathers_of_what_is_sent(name, rng):
  attack, send = ATTACKS[name]
  x = rng.randn(N, 2)
  graph = GRAPHS[0]
  run = jfog.simulate(
    lambda x: jfog.neighbor_allgather(x[None], graph, pad=True),
    N,
    attackers=attackers(attack),
  )
  found = jax.jit(run)(jnp.asarray(x, jnp.float32))
  for i in range(N):
    for slot, j in enumerate(graph.in_neighbors(i)):
      sent = send(x, i, j, graph.mixing_matrix[i]) if j in LIARS else x[j]
      np.testing.assert_allclose(found[i, slot], sent, rtol=1e-4, atol=1e-5)
    assert not found[i, len(graph.in_neighbors(i)) :].any()


@pytest.mark.parametrize("name", ["sign_flip", "alie with z", "dissensus"])
def test_missing_ranks_and_messages(name, rng):
  """Ranks that are missing are not among the honest ones."""
  attack, _ = ATTACKS[name]
  x = rng.randn(N, 3)
  x[3] = np.nan
  there = [0, 2, 5]
  alive = np.arange(N) != 3
  edge_ok = rng.rand(N, N) > 0.3
  present = edge_ok & alive[:, None] & alive[None, :]
  graph = GRAPHS[0]

  def send(x, i, sender, weights):
    if name == "sign_flip":
      return -3 * x[sender]
    if name == "dissensus":
      pull = sum(weights[k] * (x[k] - x[i]) for k in there if k != i)
      total = sum(weights[k] for k in LIARS if k != i)
      return x[i] - 1.5 * pull / (total or 1)
    return x[there].mean(axis=0) - 1.5 * x[there].std(axis=0)

  @jax.jit
  def run(x, alive, edge_ok):
    return jfog.simulate(
      lambda x: jfog.neighbor_allreduce(x, graph),
      N,
      alive=alive,
      edge_ok=edge_ok,
      attackers=attackers(attack),
    )(x)

  found = run(jnp.asarray(x, jnp.float32), alive, edge_ok)
  expected = average(x, graph, send, present)
  np.testing.assert_allclose(
    found[alive], expected[alive], rtol=1e-4, atol=1e-5
  )


def test_noise_repeats_and_differs():
  graph = topology.fully_connected(N)
  gather = jax.jit(
    jfog.simulate(
      lambda x: jfog.neighbor_allgather(x, graph),
      N,
      attackers={1: attacks.noise(2.0, seed=3), 4: attacks.noise(2.0, seed=3)},
    )
  )
  x = jnp.zeros((N, 1, 2000))
  first, again, other = gather(x), gather(x), gather(x + 1)
  np.testing.assert_array_equal(first, again)
  drawn = [first[0, 0], first[0, 3], other[0, 0] - 1]
  np.testing.assert_array_equal(first[2, 1], first[0, 0])  # one for all
  for k, sample in enumerate(drawn):
    assert abs(sample.mean()) < 0.2 and abs(sample.std() - 2) < 0.2
    for another in drawn[:k]:
      assert abs(jnp.corrcoef(sample, another)[0, 1]) < 0.1
  assert not first[0, 1:3].any()  # the honest ones


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_other_dtypes(dtype, rng):
  parts = rng.randn(2, N, 3)
  x = parts[0] + (1j * parts[1] if dtype == "complex64" else 0)
  x = jnp.asarray(x).astype(dtype)
  graph = topology.fully_connected(N)
  liars = {1: attacks.alie(2.0), 4: attacks.noise(0.0)}
  run = jfog.simulate(
    lambda x: jfog.neighbor_allgather(x[None], graph), N, attackers=liars
  )
  found = jax.jit(run)(x)
  assert found.dtype == x.dtype
  wide = np.asarray(x, np.complex128)[HONEST]
  expected = wide.mean(axis=0) - 2 * wide.real.std(axis=0)
  if dtype == "complex64":
    expected = expected - 2j * wide.imag.std(axis=0)
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    np.asarray(found[0, 0], np.complex128), expected, rtol=2 * eps, atol=1e-5
  )
  np.testing.assert_array_equal(found[0, 3], x[4])


def test_simulations_do_not_share_what_is_jitted_inside():
  graph = topology.ring(N)
  mix = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
  x = jnp.arange(1.0, N + 1)
  plain = jfog.simulate(mix, N)(x)
  one = jfog.simulate(mix, N, attackers={1: attacks.sign_flip()})(x)
  two = jfog.simulate(mix, N, attackers={2: attacks.sign_flip()})(x)
  np.testing.assert_allclose(
    one - plain, [-4 / 3, 0, -4 / 3, 0, 0, 0], atol=1e-6
  )
  np.testing.assert_allclose(two - plain, [0, -2, 0, -2, 0, 0], atol=1e-6)
  np.testing.assert_array_equal(jfog.simulate(mix, N)(x), plain)
  assert (jfog.simulate(mix, N, attackers={})(x) == plain).all()


def test_machines_of_several_ranks(rng):
  graph = GRAPHS[0]
  x = rng.randn(N, 2)
  attack, send = ATTACKS["alie with z"]
  run = jfog.simulate(
    lambda x: jfog.neighbor_allreduce(x, graph),
    N,
    local_size=2,
    attackers=attackers(attack),
  )
  found = jax.jit(run)(jnp.asarray(x, jnp.float32))
  expected = average(x, graph, send)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_scales_are_traced_and_differentiated():
  graph = topology.ring(N)

  def loss(scale):
    run = jfog.simulate(
      lambda x: jfog.neighbor_allreduce(x, graph),
      N,
      attackers={1: attacks.sign_flip(scale)},
    )
    return jnp.sum(run(jnp.ones(N)))

  assert jax.grad(loss)(2.0) == pytest.approx(-2 / 3)
  np.testing.assert_allclose(
    jax.vmap(loss)(jnp.array([-1.0, 0.0, 2.0])), [6, 6 - 2 / 3, 4], rtol=1e-6
  )


def test_sweeps():
  pytest.importorskip("xarray")
  graph = topology.fully_connected(N)

  def program(start, mix):
    x = (jfog.rank() + start).astype(jnp.float32)

    def step(x, _):
      x = mix(x, 0)
      return x, x

    return {"x": jax.lax.scan(step, x, length=2)[1]}

  def plain(x, step):
    return jfog.neighbor_allreduce(x, graph)

  median = jfog.optimizers.coordinate_median(graph)
  axes = {
    "start": [0.0, 10.0, 20.0],
    "liars": {"none": {}, "one": {5: attacks.sign_flip(100.0)}},
    "mix": {"plain": plain, "median": median},
  }
  table = lab.sweep(
    program, axes, N, attackers="liars", reduce=lambda x: x[:5].mean(axis=0)
  )
  first = table["x"][..., 0]
  for start in (0.0, 10.0, 20.0):
    x = start + np.arange(N)
    found = first.sel(start=start)
    np.testing.assert_allclose(found.sel(liars="none", mix="plain"), x.mean())
    lied = [*x[:5], -100 * x[5]]
    np.testing.assert_allclose(
      found.sel(liars="one", mix="plain"), np.mean(lied), rtol=1e-5
    )
    np.testing.assert_allclose(
      found.sel(liars="one", mix="median"), np.median(lied), rtol=1e-5
    )
  fixed = lab.sweep(
    program,
    {"start": [0.0], "mix": {"plain": plain}},
    N,
    attackers={5: attacks.sign_flip(100.0)},
  )
  assert fixed["x"][0, 0, 0] < -50
  for name in ("start", "other"):
    with pytest.raises(ValueError, match="is not an axis of dicts"):
      lab.sweep(program, axes, N, attackers=name)


@pytest.mark.parametrize(
  "given, error, text",
  [
    ([1], TypeError, r"attackers=\[1\] is list; pass a dict"),
    ({6: attacks.alie()}, ValueError, "rank=6 is out of range"),
    ({-1: attacks.alie()}, ValueError, "pass a rank from 0 to 5"),
    ({"1": attacks.alie()}, TypeError, "rank='1' must be an int"),
    ({1: attacks.alie}, TypeError, r"attackers\[1\]=<function alie"),
    ({1: None}, TypeError, r"such as jfog.attacks.sign_flip\(\)"),
    (
      dict.fromkeys(range(N), attacks.alie()),
      ValueError,
      "names all 6 ranks; leave at least one",
    ),
  ],
)
def test_bad_attackers_name_the_values(given, error, text):
  with pytest.raises(error, match=text):
    jfog.simulate(lambda x: x, N, attackers=given)


@pytest.mark.parametrize(
  "make, text",
  [
    (lambda: attacks.sign_flip("1"), "sign_flip: scale='1' must be"),
    (lambda: attacks.noise(None), "noise: scale=None"),
    (lambda: attacks.noise(1.0, seed=0.5), "seed=0.5 must be an integer"),
    (lambda: attacks.alie(1j), "alie: z=1j"),
    (lambda: attacks.inner_product([1.0]), "inner_product: scale"),
    (lambda: attacks.Attack("zero", jnp.zeros(2)), "send=Array"),  # type: ignore[arg-type]
    (lambda: attacks.dissensus(True), "dissensus: scale=True"),
  ],
)
def test_bad_arguments_of_attacks(make, text):
  with pytest.raises(TypeError, match=text):
    make()


def test_what_is_refused_in_operations():
  graph = topology.ring(N)
  liars = {1: attacks.sign_flip()}

  def run(fun, x=None, attackers=liars, **options):
    x = jnp.ones((N, 1)) if x is None else x
    return jfog.simulate(fun, N, attackers=attackers, **options)(x)

  for operation in (jfog.allreduce, jfog.broadcast, jfog.allgather):
    with pytest.raises(ValueError, match="simulate has attackers="):
      run(operation)
  with pytest.raises(
    ValueError, match="peer_allreduce: simulate has attackers"
  ):
    run(lambda x: jfog.pair_gossip(x, jfog.rank() ^ 1))
  with pytest.raises(ValueError, match="finite_time_average"):
    run(lambda x: jfog.finite_time_average(x, topology.ceca(N)))
  with pytest.raises(ValueError, match="win_put"):
    run(lambda x: jfog.win_put(jfog.win_create(x, graph), x))
  with pytest.raises(TypeError, match="leaf 0 has dtype int32"):
    run(
      lambda x: jfog.neighbor_allgather(x, graph), jnp.ones((N, 1), jnp.int32)
    )
  with pytest.raises(
    ValueError, match="neighbor_allgather: simulate has alive"
  ):
    run(
      lambda x: jfog.neighbor_allgather(x, graph), alive=jnp.ones(N, jnp.bool_)
    )
  # The attackers are among all ranks, not among those of a machine.
  for part in ("local", "machines"):
    with pytest.raises(ValueError, match=r"this communicator has [23]; use"):
      run(
        lambda x, part=part: jfog.neighbor_allgather(
          x,
          topology.ring({"local": 2, "machines": 3}[part]),
          comm=getattr(jfog.Axis("jfog", "jfog_local"), part),
        ),
        local_size=2,
      )
  wrong = attacks.Attack("wrong", lambda m: m.values)
  with pytest.raises(ValueError, match="attack wrong sends an array of shape"):
    run(lambda x: jfog.neighbor_allreduce(x, graph), attackers={1: wrong})
  with pytest.raises(ValueError, match="allreduce: simulate has attackers"):
    run(
      lambda x: jfog.hierarchical_neighbor_allreduce(x, topology.ring(3)),
      local_size=2,
    )


def test_the_formula_of_alie():
  def sent(n, m):
    gather = jfog.simulate(
      lambda x: jfog.neighbor_allgather(x, topology.fully_connected(n)),
      n,
      attackers=dict.fromkeys(range(n - m, n), attacks.alie()),
    )
    return jax.jit(gather)(jnp.arange(n, dtype=jnp.float32)[:, None])[0, -1]

  # The paper's example: 50 ranks, 24 attackers, s = 2, quantile 24 / 26.
  honest = np.arange(26)
  expected = honest.mean() - 1.4260768722 * honest.std()
  assert sent(50, 24) == pytest.approx(expected, rel=1e-5)
  for n, m in ((2, 1), (5, 3), (6, 5)):
    with pytest.raises(ValueError, match=f"{m} of {n} ranks attack"):
      sent(n, m)
