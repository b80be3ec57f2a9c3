"""RelaySGD and PowerGossip, with a separate message for every edge."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from support import reference
from support.problems import INNERS, RATE, WIDTH, Quadratic

import jfog
from jfog import optimizers, topology
from jfog.optimizers.contrib._edge_exchange import edges_of

STEPS = 200
EVERYWHERE = pytest.mark.places(
  "single", "simulate-2", "simulate-8", "mesh", "mpi"
)


def scan(makers, gradient, steps):
  """A scan from a rank's problem to its iterates and last states, by name."""

  @jax.jit
  def program(problem, start):
    def update(carry, _):
      new = {}
      for name, tx in makers.items():
        x, state = carry[name]
        updates, state = tx.update(gradient(problem, x), state, x)
        new[name] = optax.apply_updates(x, updates), state
      return new, {name: x for name, (x, _) in new.items()}

    carry = {name: (start, tx.init(start)) for name, tx in makers.items()}
    last, iterates = jax.lax.scan(update, carry, length=steps)
    return iterates, {name: state for name, (_, state) in last.items()}

  return program


def assert_iterates(place, found, truth, name=""):
  """Compares with a truth of shape (steps, ranks, ...)."""
  assert np.isfinite(truth).all(), name
  expected = place.mine(truth.swapaxes(0, 1))
  np.testing.assert_allclose(
    found, expected, rtol=1e-10, atol=1e-10, err_msg=name
  )


@contextlib.contextmanager
def counted(place):
  """On MPI, records the bytes sent to each neighbor."""
  sent: dict[int, int] = {}
  if place.kind == "mpi":
    jfog.diagnostics.reset_counters()
  yield sent
  if place.kind == "mpi":
    peers = jfog.diagnostics.counters()["peers"]
    peers.pop(jfog.rank(), None)  # collectives
    sent |= {peer: counts["bytes_sent"] for peer, counts in peers.items()}
    assert sent == {p: c["bytes_received"] for p, c in peers.items()}


# The exchange itself.


def graphs(n):
  """Trees and other graphs with unequal degrees."""
  shuffled = nx.relabel_nodes(
    nx.path_graph(n), dict(enumerate(np.random.RandomState(1).permutation(n)))
  )
  return {
    "binary": topology.from_networkx(nx.full_rary_tree(2, n)),
    "chain": topology.from_networkx(shuffled),
    "star": topology.star(n),
    "ring": topology.ring(n),
    "exponential": topology.symmetric_exponential(n),
  }


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_slots_are_numbered_alike_at_both_ends(n):
  for name, graph in graphs(n).items():
    edges = edges_of(graph, "test")
    most = graph.degree if name in TREES else graph.degree + 1
    assert 1 <= edges.slots <= max(1, most)
    for i, row in enumerate(edges.partners):
      assert sorted(row[row >= 0]) == list(graph.in_neighbors(i))
      for slot, j in enumerate(row):
        assert j < 0 or edges.partners[j, slot] == i


# RelaySGD.

TREES = ("binary", "chain", "star")


def relay_sum(inner, tree, gradient, x, steps):
  """All iterates; `m[i, q]`, `c[i, q]` are the last values from `q` to `i`."""
  n, start = len(x), x
  near = np.zeros((n, n), bool)
  for i in range(n):
    near[i, list(tree.in_neighbors(i))] = True
  m, c = np.zeros((n, *x.shape)), np.zeros((n, n))
  iterates = []
  for _ in range(steps):
    h = x + inner(gradient(x), x)
    sent = h[:, None] + m.sum(axis=1, keepdims=True) - m
    m = near[..., None] * sent.swapaxes(0, 1)
    c = near * (1 + c.sum(axis=1, keepdims=True) - c).T
    missing = n - 1 - c.sum(axis=1, keepdims=True)
    x = (h + m.sum(axis=1) + missing * start) / n
    iterates.append(x)
  return np.array(iterates)


def quadratic(problem, x):
  """The gradient of one rank of `Quadratic`."""
  hessian, linear = problem
  return hessian @ x - linear


@EVERYWHERE
@pytest.mark.mpi(4, 8)
def test_relay_sum_is_the_dense_recursion_and_exact(place, rng, x64):
  steps = {"mesh": 40, "mpi": STEPS}.get(place.kind, 1500)
  problem = Quadratic(place.size, rng)
  start = np.broadcast_to(problem.start[0], problem.start.shape)
  trees = graphs(place.size)
  makers, truths = {}, {}
  kinds = [("binary", "sgd")]
  if place.name == "simulate-8":
    kinds += [("chain", "sgd"), ("star", "sgd"), ("chain", "adamw")]
  for name, kind in kinds:
    make, truth = INNERS[kind]
    makers[name, kind] = optimizers.relay_sum(make(), trees[name])
    truths[name, kind] = relay_sum(
      truth(), trees[name], problem.gradient, start, STEPS
    )
  with counted(place) as sent:
    found, _ = place.run(
      scan(makers, quadratic, steps), (problem.hessian, problem.linear), start
    )
  if place.kind == "mpi":
    neighbors = trees["binary"].in_neighbors(jfog.rank())
    assert sent == dict.fromkeys(neighbors, 8 * WIDTH * steps)
  minimizer = problem.minimizer()
  for (name, kind), truth in truths.items():
    x = found[name, kind]
    seen = min(steps, STEPS)
    assert_iterates(place, x[..., :seen, :], truth[:seen], name)
    if kind == "sgd" and steps > STEPS:
      last = x[..., -1, :]
      expected = np.broadcast_to(minimizer, last.shape)
      np.testing.assert_allclose(last, expected, rtol=0, atol=1e-9)


def test_constant_values_are_averaged_after_diameter_steps(rng, x64):
  targets = rng.randn(8, 3)
  trees = {name: graphs(8)[name] for name in TREES}
  makers = {
    name: optimizers.relay_sum(optax.sgd(1.0), tree)  # h is the target
    for name, tree in trees.items()
  }
  program = scan(makers, lambda target, x: x - target, 8)
  found: Any = jfog.simulate(program, 8)(targets, np.zeros((8, 3)))[0]
  for name, tree in trees.items():
    diameter = nx.diameter(tree.to_networkx().to_undirected())
    error = np.abs(found[name] - targets.mean(axis=0)).max(axis=(0, 2))
    assert (error[: diameter - 1] > 1e-3).all()
    assert (error[diameter - 1 :] < 1e-14).all()


def test_relay_sum_does_not_drift(rng):
  """Sums of 7 values and their eighths are inexact in float32."""
  tx = optimizers.relay_sum(optax.set_to_zero(), topology.chain(7))
  x = np.broadcast_to(rng.randn(50).astype(np.float32), (7, 50))
  program = scan({"x": tx}, lambda _, x: jnp.zeros_like(x), 3000)
  found: Any = jfog.simulate(program, 7)(np.zeros(7), x)[0]["x"]
  np.testing.assert_allclose(found[:, -1], x, rtol=1e-6)


@pytest.mark.places("single", "simulate", "mesh", "mpi")
@pytest.mark.mpi(4)
def test_debug_refuses_different_starts_on_all_ranks(place):
  tree = topology.star(place.size)
  tx = optimizers.relay_sum(optax.sgd(1.0), tree, debug=True)

  program = scan({"x": tx}, lambda _, x: x, 2)

  def last(w):
    x = {"same": jnp.ones(2, jnp.complex64), "w": w}
    return program(0, x)[0]["x"]["w"][-1]

  run = jax.jit(place.map(last))
  x = np.ones((place.size, 2), np.float32)
  np.testing.assert_array_equal(run(x), place.mine(0 * x))
  x[-1, 1] = 2
  if place.size == 1:
    run(x)
    return
  text = r"relay_sum: the ranks start .*\(params\['w'\]\).*jfog.broadcast"
  with pytest.raises(Exception, match=text):
    jax.block_until_ready(run(x))
  np.testing.assert_array_equal(run(0 * x), place.mine(0 * x))


# PowerGossip.

SHAPES = {"b": (3,), "k": (3, 2, 2), "s": (), "w": (2, 3)}  # leaves in order


def matrices(shapes):
  """The shapes of the matrices, by leaf."""
  return {
    name: (shape[0], int(np.prod(shape[1:])))
    for name, shape in shapes.items()
    if len(shape) > 1
  }


def cases_of(place):
  """By name: a graph, and the rank of the factors."""
  n = place.size
  cases = {
    "ring": (topology.ring(n), 1),
    "star": (topology.star(n), 2),
    "exponential": (topology.symmetric_exponential(n), 9),
  }
  some = {
    "simulate-5": ("ring",),
    "simulate-8": ("exponential",),
  }
  return {name: cases[name] for name in some.get(place.name, ("star",))}


def drawn(low, high, step, rank, shapes, seed=0):
  """The factors drawn at both ends of an edge, `{leaf: (P, Q)}`."""
  key = jax.random.key(seed, impl="threefry2x32")
  for word in (low, high, step):
    key = jax.random.fold_in(key, word)
  sizes = [(x, min(rank, *mn)) for mn in shapes.values() for x in mn]
  numbers = jax.random.normal(key, (sum(x * r for x, r in sizes),), jnp.float64)
  cut = np.split(np.asarray(numbers), np.cumsum([x * r for x, r in sizes]))
  factors = [f.reshape(s) for f, s in zip(cut[:-1], sizes, strict=True)]
  pairs = zip(factors[0::2], factors[1::2], strict=True)
  return dict(zip(shapes, pairs, strict=True))


def orth(x):
  """An orthonormal basis of the columns."""
  return np.linalg.qr(x)[0]


def power_gossip(inner, matrix, rank, gradient, x, steps):
  """All iterates by leaf; the factors track the difference of each edge."""
  n = len(matrix)
  edges = [(i, j) for i in range(n) for j in range(i + 1, n) if matrix[i, j]]
  shapes = matrices({name: leaf.shape[1:] for name, leaf in x.items()})
  factors = {edge: drawn(*edge, 0, rank, shapes) for edge in edges}
  iterates = []
  for k in range(steps):
    h = {name: x[name] + u for name, u in inner(gradient(x)).items()}
    x = {name: np.tensordot(matrix, h[name], 1) for name in h}
    for name, shape in shapes.items():
      full = h[name].reshape(n, *shape)
      new = full.copy()
      for low, high in edges:
        gap = full[high] - full[low]
        p, q = factors[low, high][name]
        if k % 2 == 0:
          q = orth(q)
          p = gap @ q
        else:
          p = orth(p)
          q = gap.T @ p
        factors[low, high][name] = p, q
        new[low] += matrix[low, high] * p @ q.T
        new[high] -= matrix[low, high] * p @ q.T
      x[name] = new.reshape(h[name].shape)
    iterates.append(x)
  return {name: np.array([x[name] for x in iterates]) for name in x}


def leaves(rng, n, shapes):
  """One value of each leaf for every rank."""
  return {name: rng.randn(n, *shape) for name, shape in shapes.items()}


def diagonal(problem, x):
  """The gradient of a quadratic without mixed terms."""
  return jax.tree.map(lambda a, c, x: a * x - c, *problem, x)


@pytest.mark.places("single", "simulate", "mesh", "simulate-8", "mpi")
@pytest.mark.mpi(
  4, soak=(8,)
)  # every rank compiles its own program, which is slow
def test_power_gossip_is_the_dense_recursion(place, rng, x64):
  n, steps = place.size, 40 if place.kind == "mesh" else STEPS
  cases = cases_of(place)
  shapes = SHAPES if place.name == "simulate-8" else {"b": (3,), "k": (3, 2, 2)}
  curvature, linear, start = (leaves(rng, n, shapes) for _ in range(3))
  problem = jax.tree.map(lambda x: np.exp(0.3 * x), curvature), linear
  heterogeneous = "exponential" in cases
  if not heterogeneous:
    # With low rank, lasting differences amplify rounding errors into other
    # directions; ranks with the same data reach consensus.
    problem = jax.tree.map(lambda x: np.broadcast_to(x[0], x.shape), problem)
  makers = {
    name: optimizers.power_gossip(optax.sgd(RATE), graph, rank)
    for name, (graph, rank) in cases.items()
  }
  program = scan(makers, diagonal, steps)

  def with_factors(problem, start):
    iterates, states = program(problem, start)
    factors = {name: (state.p, state.q) for name, state in states.items()}
    return iterates, jfog.allgather(jax.tree.map(lambda x: x[None], factors))

  with counted(place) as sent:
    found, factors = place.run(with_factors, problem, start)
  if place.kind == "mpi":  # b, and P or Q of two columns for the 3x4 of k
    neighbors = cases["star"][0].in_neighbors(jfog.rank())
    total = (3 + 2 * 3) * steps // 2 + (3 + 2 * 4) * steps // 2
    assert sent == dict.fromkeys(neighbors, 8 * total)
  for name, (graph, rank) in cases.items():
    truth = power_gossip(
      lambda g: {name: -RATE * g[name] for name in g},
      reference.mixing(graph),
      rank,
      lambda x: diagonal(problem, x),
      start,
      steps,
    )
    for leaf in shapes:
      assert_iterates(place, found[name][leaf], truth[leaf], f"{name} {leaf}")
    # Both ends of an edge hold bit-identical factors.
    edges = edges_of(graph, "test")
    for factor in jax.tree.leaves(factors[name]):
      factor = np.asarray(factor)
      if place.kind in ("simulate", "mesh"):
        factor = factor[0]
      for slot, partners in enumerate(edges.partners.T):
        has_edge = partners >= 0
        np.testing.assert_array_equal(
          factor[has_edge, slot], factor[partners[has_edge], slot]
        )
        assert not heterogeneous or factor[has_edge, slot].any()


def test_power_gossip_in_full_rank_is_plain_gossip_in_even_steps(rng, x64):
  """Conserves the mean in all steps, also of complex matrices."""
  n, graph = 4, topology.chain(4)
  x = leaves(rng, n, {"b": (2,), "w": (4, 3), "z": (2, 2)})
  x["z"] = x["z"] + 1j * rng.randn(n, 2, 2)
  tx = optimizers.power_gossip(optax.set_to_zero(), graph, 3)
  program = scan({"x": tx}, lambda _, x: jax.tree.map(jnp.zeros_like, x), 100)
  found: Any = jfog.simulate(program, n)(np.zeros(n), x)[0]["x"]
  matrix = reference.mixing(graph)
  for name, start in x.items():
    rows = np.concatenate([start[:, None], found[name]], axis=1)
    means = rows.mean(axis=0)
    reference.assert_close(means, np.broadcast_to(means[0], means.shape), 1e-14)
    mixed = np.tensordot(matrix, rows[:, 0:100:2], 1)
    reference.assert_close(rows[:, 1:101:2], mixed, 1e-13)
    assert np.abs(rows[:, -1] - means[0]).max() < 1e-4


def test_power_gossip_finds_differences_that_come_up_again(rng):
  """Equal matrices give zero factors; later only the last entries differ."""
  n, graph = 4, topology.ring(4)
  tx = optimizers.power_gossip(optax.sgd(1.0), graph, 1)
  gradients = np.zeros((n, 240, 5, 4), np.float32)
  gradients[:, 7, 4, 3] = rng.randn(n)

  @jax.jit
  def program(gradients):
    def update(carry, g):
      x, state = carry
      updates, state = tx.update(g, state, x)
      return (x + updates, state), x

    x = jnp.ones((5, 4))
    (x, _), iterates = jax.lax.scan(update, (x, tx.init(x)), gradients)
    return x, iterates

  last, iterates = jfog.simulate(program, n)(gradients)
  np.testing.assert_array_equal(iterates[:, :8], np.ones((n, 8, 5, 4)))
  truth = np.ones((5, 4)) - gradients.sum(axis=1).mean(axis=0)
  np.testing.assert_allclose(
    last, np.broadcast_to(truth, last.shape), atol=1e-5
  )


# Both.


def made(method, inner, n, **options):
  """One of the two on a graph of `n` ranks."""
  if method == "relay_sum":
    return optimizers.relay_sum(inner, topology.chain(n), **options)
  return optimizers.power_gossip(inner, topology.ring(n), 1, **options)


METHODS = ("relay_sum", "power_gossip")


def both(n, inner, **options):
  """The two on the same ranks, by name."""
  return {method: made(method, inner, n, **options) for method in METHODS}


def pair(rng):
  """Constant gradients and initial parameters of two ranks.

  By either method both go with the mean of the gradients.
  """
  gradients = leaves(rng, 2, {"b": (2,), "w": (3, 1)})
  return gradients, jax.tree.map(np.ones_like, gradients)


def constant(gradient, x):
  """The problem is the gradient."""
  del x
  return gradient


def test_wrapped_by_other_transformations(rng, x64):
  """Inside of `masked`, behind `chain`, within `MultiSteps`."""
  g, x = pair(rng)
  wrapped: Any = {
    name: optax.MultiSteps(
      optax.chain(
        optax.clip(0.25),
        optax.masked(tx, {"b": False, "w": True}),
        optax.masked(optax.scale(-1.0), {"b": True, "w": False}),
      ),
      every_k_schedule=2,
    )
    for name, tx in both(2, optax.sgd(1.0)).items()
  }
  found: Any = jfog.simulate(scan(wrapped, constant, 6), 2)(g, x)[0]
  b, w = (np.clip(g[name], -0.25, 0.25) for name in ("b", "w"))
  w = np.broadcast_to(w.mean(axis=0), w.shape)
  for iterates in found.values():
    for k in range(1, 4):  # MultiSteps takes means in float32
      reference.assert_close(iterates["b"][:, 2 * k - 1], 1 - k * b, 1e-6)
      reference.assert_close(iterates["w"][:, 2 * k - 1], 1 - k * w, 1e-6)


def test_a_mesh_of_the_users_own(rng, x64):
  """In a `shard_map` that checks replication."""
  spec = PartitionSpec("data")
  makers = both(2, optax.sgd(1.0), comm=jfog.Axis("data"))

  def one(*arguments):
    own = jax.tree.map(lambda leaf: leaf[0], arguments)
    return jax.tree.map(
      lambda leaf: leaf[None, -1], scan(makers, constant, 3)(*own)[0]
    )

  mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
  run = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))
  g, x = pair(rng)
  for last in run(g, x).values():
    for name, leaf in last.items():
      mean = np.broadcast_to(g[name].mean(axis=0), leaf.shape)
      reference.assert_close(leaf, 1 - 3 * mean)


def test_a_state_from_numpy_goes_on_bit_for_bit(rng):
  """The buffers of half parameters are float32."""
  n = 2
  makers = both(n, optax.sgd(RATE, momentum=0.9))
  g, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), pair(rng))

  @jax.jit
  def step(g, states, x):
    done = {
      name: jfog.simulate(tx.update, n)(g, states[name], x)
      for name, tx in makers.items()
    }
    updates = {name: update for name, (update, _) in done.items()}
    return updates, {name: state for name, (_, state) in done.items()}

  states: Any = {
    name: jfog.simulate(tx.init, n)(x) for name, tx in makers.items()
  }
  for state in states.values():
    assert state.step.dtype == jnp.int32
    assert all(len(leaf) == n for leaf in jax.tree.leaves(state))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state[2:])} == {
      "float32"
    }
  straight = packed = states
  for _ in range(4):
    expected, straight = step(g, straight, x)
    found, packed = step(g, jax.tree.map(np.asarray, packed), x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
  jax.tree.map(np.testing.assert_array_equal, packed, straight)


def test_parameters_and_state_may_be_donated():
  tx = made("relay_sum", optax.sgd(RATE), 2)
  x = jnp.ones((2, 3))
  state = jfog.simulate(tx.init, 2)(x)

  def step(x, state):
    updates, state = jfog.simulate(tx.update, 2)(x, state, x)
    return optax.apply_updates(x, updates), state

  x, state = jax.jit(step, donate_argnums=(0, 1))(x, state)
  np.testing.assert_allclose(x, np.full((2, 3), 0.9), rtol=1e-6)


# Errors when the transformations are built.

PLAIN = optax.sgd(RATE)


@pytest.mark.parametrize("graph", [None, "ring", nx.path_graph(3), np.eye(3)])
def test_no_topology(graph):
  for method, more in (("relay_sum", ()), ("power_gossip", (1,))):
    with pytest.raises(TypeError, match=f"(?s){method}: topology=.*Topology"):
      getattr(optimizers, method)(PLAIN, graph, *more)


def test_a_schedule_is_no_topology():
  schedule = topology.one_peer_exponential(4)
  with pytest.raises(TypeError, match=r"relay_sum: .*Schedule"):
    optimizers.relay_sum(PLAIN, schedule)  # type: ignore[arg-type]
  with pytest.raises(TypeError, match=r"power_gossip: .*Schedule"):
    optimizers.power_gossip(PLAIN, schedule, 1)  # type: ignore[arg-type]


def test_what_is_no_spanning_tree():
  with pytest.raises(ValueError, match=r"has 4 edges.* has 3"):
    optimizers.relay_sum(PLAIN, topology.ring(4))
  optimizers.relay_sum(PLAIN, topology.ring(4), check=False)
  with pytest.raises(ValueError, match="not symmetric"):
    optimizers.relay_sum(PLAIN, topology.ring(4, "right"))
  parts = topology.Topology(
    np.kron(np.eye(2), np.ones((2, 2)) / 2), connected=False
  )
  with pytest.raises(ValueError, match="not connected"):
    optimizers.relay_sum(PLAIN, parts)


def test_power_gossip_needs_a_symmetric_graph_and_a_rank():
  with pytest.raises(ValueError, match=r"power_gossip: .*not symmetric"):
    optimizers.power_gossip(PLAIN, topology.ring(4, "right"), 1)
  pulling = topology.from_networkx(nx.path_graph(3), "uniform_in")
  with pytest.raises(
    ValueError, match=r"power_gossip: .*not doubly stochastic"
  ):
    optimizers.power_gossip(PLAIN, pulling, 1)
  optimizers.power_gossip(PLAIN, pulling, 1, check=False)
  for rank, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
    with pytest.raises(error, match=f"power_gossip: rank={rank}"):
      optimizers.power_gossip(PLAIN, topology.ring(4), rank)  # type: ignore


@pytest.mark.parametrize("method", METHODS)
def test_updates_that_cannot_be(method):
  tx = made(method, PLAIN, 2)
  x = jnp.zeros((2, 3, 2))
  state = jfog.simulate(tx.init, 2)(x)
  with pytest.raises(ValueError, match=f"{method}.*tx.update"):
    jfog.simulate(lambda s, g: tx.update(g, s), 2)(state, x)
  with pytest.raises(jfog.NotInitializedError):
    tx.update(x[0], jax.tree.map(lambda s: s[0], state), x[0])
  other = made(method, PLAIN, 3)
  with pytest.raises(ValueError, match="3 ranks, the communicator has 2"):
    jfog.simulate(lambda x: other.update(x, other.init(x), x), 2)(x)
  whole = jnp.zeros((2, 3, 2), jnp.int32)
  with pytest.raises(TypeError, match="has dtype int32"):
    jfog.simulate(lambda x: tx.update(x, tx.init(x), x), 2)(whole)
