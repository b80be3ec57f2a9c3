"""Averages with peers that each rank names for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog

ON_MPI = ("mpi-2", "mpi-3", "mpi-4")


@pytest.fixture
def values(place, rng):
  """A value for each rank, long enough to travel in several chunks."""
  return rng.randn(place.size, 50_001).astype(np.float32)


def test_pair_gossip(place, values):
  n = place.size
  peers = (n - 1) - np.arange(n)
  for weights in ({}, {"self_weight": 0.25, "pair_weight": 2.0}):
    y = place.run(
      jax.jit(
        lambda x, w=weights: jfog.pair_gossip(x, n - 1 - jfog.rank(), **w)
      ),
      values,
    )
    a, b = weights.get("self_weight", 0.5), weights.get("pair_weight", 0.5)
    truth = a * values.astype(np.float64) + b * values[peers]
    np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-5)


def test_pair_gossip_with_a_table_of_peers(place, values):
  n = place.size
  table = [n - 1 - i for i in range(n)]
  table[0], table[-1] = 0, n - 1  # some rank with itself
  fun = jax.jit(lambda x: jfog.pair_gossip(x, table, pair_weight=0.25))
  truth = 0.5 * values + 0.25 * values[table]
  np.testing.assert_allclose(
    place.run(fun, values), place.mine(truth), rtol=1e-6
  )
  cycle = [(i + 1) % n for i in range(n)]
  for bad in ([0] * (n + 1), cycle if n > 2 else [n] * n):
    with pytest.raises(ValueError, match=r"peer=|rank 0 names|out of range"):
      place.run(lambda x, bad=bad: jfog.pair_gossip(x, bad), values)


def test_pair_gossip_with_traced_peers_is_traced_once(place, values):
  n = place.size
  rounds = [np.arange(n) ^ 1, (n - 1) - np.arange(n), np.arange(n)]
  rounds[0] = np.where(rounds[0] < n, rounds[0], np.arange(n))
  traces = 0

  def program(x, peer):
    nonlocal traces
    traces += 1
    return jfog.pair_gossip({"w": x, "b": x[:2]}, peer)

  run = jax.jit(place.map(program))
  truth = values.astype(np.float64)
  x = values
  for peers in rounds:
    y = run(x, peers.astype(np.int32))
    truth = (truth + truth[peers]) / 2
    np.testing.assert_allclose(y["w"], place.mine(truth), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y["b"], y["w"][..., :2])
    if place.kind in ("simulate", "mesh"):
      x = np.asarray(y["w"])
    else:  # the value of every rank, for `map` takes its own of them
      x = np.zeros_like(values)
      x[jfog.rank()] = y["w"]
  assert traces == 1


def test_derivative_of_pair_gossip(place, values):
  n = place.size
  small = values[:, :3]
  scale = np.arange(1.0, n + 1, dtype=np.float32)

  def program(x, scale):
    mix = lambda x: jfog.pair_gossip(  # noqa: E731
      x, n - 1 - jfog.rank(), self_weight=0.25, pair_weight=0.5
    )
    primal, tangent = jax.jvp(mix, (x,), (x * x,))
    return jax.grad(lambda x: jnp.sum(scale * mix(x)))(x), primal, tangent

  gradient, primal, tangent = place.run(program, small, scale)
  peers = n - 1 - np.arange(n)
  truth = 0.25 * scale + 0.5 * scale[peers]
  np.testing.assert_allclose(
    gradient,
    place.mine(np.broadcast_to(truth[:, None], small.shape)),
    rtol=1e-5,
  )
  mixed = lambda x: 0.25 * x + 0.5 * x[peers]  # noqa: E731
  np.testing.assert_allclose(primal, place.mine(mixed(small)), rtol=1e-5)
  np.testing.assert_allclose(
    tangent, place.mine(mixed(small * small)), rtol=1e-5
  )


def test_bad_pairs(place, values):
  mine = jfog.rank  # itself: a pair on every place
  for peer, error, text in (
    (place.size, ValueError, "out of range"),
    (-1, ValueError, "out of range"),
    (0.0, TypeError, "integer scalar"),
    (True, TypeError, "integer scalar"),
  ):
    with pytest.raises(error, match=text):
      place.run(lambda x, p=peer: jfog.pair_gossip(x, p), values)
  with pytest.raises(TypeError, match="expects floating-point"):
    place.run(lambda x: jfog.pair_gossip(x.astype(jnp.int32), 0), values)
  with pytest.raises(ValueError, match="scalar"):
    place.run(
      lambda x: jfog.pair_gossip(x, mine(), pair_weight=jnp.ones(2)), values
    )
  with pytest.raises(TypeError, match="complex"):
    place.run(lambda x: jfog.pair_gossip(x, mine(), pair_weight=1j), values)


@pytest.mark.places("simulate-5", "mesh-4")
def test_ranks_that_do_not_name_each_other_get_nan_on_a_mesh(place, values):
  n = place.size
  small = values[:, :3]
  swap = np.arange(n) ^ 1
  named = {
    "one way": np.where(np.arange(n) == n - 1, 0, swap),
    "out of range": np.where(np.arange(n) == 1, n, swap),
    "negative": np.where(np.arange(n) == 1, -1, swap),
  }
  for peers in named.values():
    peers = peers.astype(np.int32)
    y = place.run(jax.jit(jfog.pair_gossip), small, peers)
    inside = np.clip(peers, 0, n - 1)
    mutual = (inside == peers) & (peers[inside] == np.arange(n))
    truth = np.where(mutual[:, None], (small + small[inside]) / 2, np.nan)
    np.testing.assert_allclose(y, truth, rtol=1e-6)
    assert not mutual.all()
  with pytest.raises(ValueError, match=r"would name rank 1.*jfog\.rank\(\)"):
    place.run(lambda x: jfog.pair_gossip(x, 1), values)


@pytest.mark.places(*ON_MPI)
def test_a_traced_peer_that_is_no_rank(place):
  jfog.shutdown()
  jfog.init(timeout=20)
  gossip = jax.jit(jfog.pair_gossip)
  for peer in (place.size, -1):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
      jax.block_until_ready(gossip(jnp.ones(3), jnp.int32(peer)))
  # Nothing was sent, so nothing is spoiled.
  np.testing.assert_allclose(jfog.allreduce(jnp.ones(2)), 1)
  jfog.shutdown()


@pytest.mark.places(*ON_MPI)
@pytest.mark.parametrize("traced", [False, True])
def test_peers_of_a_random_graph(place, traced):
  """Both sides weight; edges and weights change from round to round."""
  n, rank = place.size, jfog.rank()
  rng = np.random.RandomState(3)
  x = rng.randn(n, 40_000).astype(np.float32)
  run = jax.jit(jfog.neighbor_allreduce) if traced else jfog.neighbor_allreduce
  for _ in range(4):
    edges = rng.rand(n, n) < 0.6  # [dst, src]
    np.fill_diagonal(edges, False)
    own, received, sent = rng.rand(n), rng.rand(n, n), rng.rand(n, n)
    peers = jfog.Peers(
      own[rank],
      {j: received[rank, j] for j in range(n) if edges[rank, j]},
      {j: sent[j, rank] for j in range(n) if edges[j, rank]},
    )
    matrix = np.diag(own) + edges * received * sent
    np.testing.assert_allclose(
      run(jnp.asarray(x[rank]), peers),
      (matrix @ x.astype(np.float64))[rank],
      rtol=1e-4,
      atol=1e-4,
    )


@pytest.mark.places(*ON_MPI)
def test_one_rank_only_sends_another_only_receives(place):
  rank = jfog.rank()
  x = jnp.arange(50_000.0) + rank
  peers = [
    jfog.Peers(1.0, {}, [1]),
    jfog.Peers(0.0, {0: 1.0}, []),
    jfog.Peers(2.0, {}, {}),
  ][min(rank, 2)]
  y = jfog.neighbor_allreduce(x, peers)
  truth = [np.arange(50_000.0), np.arange(50_000.0)]
  expected = truth[rank] if rank < 2 else 2 * np.asarray(x)
  np.testing.assert_array_equal(y, expected)


@pytest.mark.places(*ON_MPI)
def test_derivative_with_peers(place):
  n, rank = place.size, jfog.rank()
  peers = jfog.Peers(0.5, {(rank - 1) % n: 0.25}, {(rank + 1) % n: 2.0 + rank})

  def loss(x):
    return jnp.sum((1.0 + rank) * jfog.neighbor_allreduce(x, peers))

  following = (rank + 1) % n
  truth = 0.5 * (1 + rank) + 0.25 * (2.0 + rank) * (1 + following)
  np.testing.assert_allclose(jax.grad(loss)(jnp.ones(3)), truth, rtol=1e-6)
  with pytest.raises(TypeError, match="no derivative with respect to weights"):
    jax.grad(
      lambda w: jnp.sum(
        jfog.neighbor_allreduce(
          jnp.ones(3),
          jfog.Peers(w, peers.src_weights, peers.dst_weights),
        )
      )
    )(1.0)
  jax.effects_barrier()
  jfog.barrier()


@pytest.mark.parametrize(
  ("arguments", "error", "text"),
  [
    ((1.0, {0.5: 1.0}, {}), TypeError, "float"),
    ((1.0, {True: 1.0}, {}), TypeError, "True"),
    ((1.0, {-1: 1.0}, {}), ValueError, "start at 0"),
    ((1.0, {}, [1, 1]), ValueError, "twice"),
  ],
)
def test_bad_peers(arguments, error, text):
  with pytest.raises(error, match=text):
    jfog.Peers(*arguments)


@pytest.mark.places("single", "simulate", "mpi-2")
def test_peers_out_of_place(place):
  x = np.ones((place.size, 3), np.float32)
  cases = [jfog.Peers(1.0, {place.size: 1.0}, [])]
  text = "use other ranks"
  if place.kind == "simulate":
    text = "on a mesh all ranks run one program"
  for peers in cases:
    with pytest.raises(ValueError, match=text):
      place.run(lambda x, p=peers: jfog.neighbor_allreduce(x, p), x)
  with pytest.raises(ValueError, match="hold their own weights"):
    place.run(
      lambda x: jfog.neighbor_allreduce(
        x, jfog.Peers(1.0, {}, []), weights=np.eye(place.size)
      ),
      x,
    )
  if place.kind == "single":
    y = jfog.neighbor_allreduce(x[0], jfog.Peers(3.0, {}, []))
    np.testing.assert_array_equal(y, 3)
