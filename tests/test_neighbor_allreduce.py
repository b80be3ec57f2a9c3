"""neighbor_allreduce against the dense product, in every place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import topology

# By name, for the number of ranks is the place's.
GRAPHS = {
  "ring": topology.ring,
  "right": lambda n: topology.ring(n, "right"),
  "exponential": topology.exponential,
  "star": topology.star,
  "grid": topology.mesh_grid_2d,
  "complete": topology.fully_connected,
  "uniform_in": lambda n: _irregular(n, "uniform_in"),
  "uniform_out": lambda n: _irregular(n, "uniform_out"),
  "move": lambda n: topology.Topology(np.roll(np.eye(n), 1, axis=0)),
  "one_peer": topology.one_peer_exponential,
  "base": lambda n: topology.base_k(n, 1),
  "one_peer_star": lambda n: topology.one_peer(topology.star(n)),
  # One number of slots, in rounds whose rows differ.
  "alternating": lambda n: topology.Schedule(
    [_irregular(n, "uniform_in"), _irregular(n, "uniform_out")]
  ),
}


def _irregular(n, weights):
  """A directed cycle with chords from rank 0: all degrees differ."""
  import networkx as nx

  graph = nx.DiGraph()
  graph.add_nodes_from(range(n))
  if n > 1:
    graph.add_edges_from((i, (i + 1) % n) for i in range(n))
    graph.add_edges_from((0, i) for i in range(2, n))
  return topology.from_networkx(graph, weights=weights)


def dense(graph, step=0):
  """The mixing matrix of a step."""
  return np.array(graph.rounds[step % len(graph.rounds)].mixing_matrix)


def average(x, graph, step=None, **kwargs):
  """The operation with its graph bound."""
  return jfog.neighbor_allreduce(x, graph, step, **kwargs)


@pytest.fixture
def x(place, rng):
  """A value for each rank."""
  return rng.randn(place.size, 3, 2).astype(np.float32)


def product(matrix, x):
  """The dense truth, in float64."""
  x = np.asarray(x)
  wide = np.complex128 if np.iscomplexobj(x) else np.float64
  flat = x.reshape(len(x), -1).astype(wide)
  return (matrix @ flat).reshape(x.shape)


@pytest.mark.two_axes
@pytest.mark.parametrize("name", GRAPHS)
def test_value_is_the_dense_product(place, x, name):
  graph = GRAPHS[name](place.size)
  fun = jax.jit(lambda x, step: average(x, graph, step))
  for step in (0, 1, len(graph) + 2):
    y = place.run(fun, x, jnp.int32(step), in_axes=(0, None))
    truth = product(dense(graph, step), x)
    np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-6)


@pytest.mark.mpi(2, 5)
def test_eager_value_and_python_step(place, x):
  graph = topology.one_peer_exponential(place.size)
  y = place.run(lambda x: average(x, graph, 1), x)
  truth = product(dense(graph, 1), x)
  np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-6)


@pytest.mark.mpi(3)
@pytest.mark.parametrize(
  "dtype",
  [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "complex64",
    "complex128",
  ],
)
def test_dtypes(place, rng, x64, dtype):
  dtype = jnp.dtype(dtype)
  graph = topology.ring(place.size)
  x = rng.randn(place.size, 5)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    x = x + 1j * rng.randn(place.size, 5)
  x = jnp.asarray(x).astype(dtype)
  y = place.run(lambda x: average(x, graph), x)
  assert y.dtype == dtype
  wide = np.complex128 if jnp.issubdtype(dtype, np.complexfloating) else float
  truth = product(dense(graph), np.asarray(x).astype(wide))
  # The sum is rounded once, so it is off by at most half a unit.
  tolerance = 2 * float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    np.asarray(y).astype(wide),
    place.mine(truth),
    rtol=tolerance,
    atol=tolerance,
  )


@pytest.mark.two_axes
def test_pytree_keeps_structure_shapes_and_dtypes(place, rng):
  n = place.size
  graph = topology.exponential(n)
  tree = {
    "a": rng.randn(n, 2, 3).astype(np.float32),
    "scalar": rng.randn(n).astype(np.float32),
    "empty": np.zeros((n, 0, 4), np.float32),
    "none": None,
    "half": (jnp.asarray(rng.randn(n, 7), jnp.bfloat16),),
    "long": rng.randn(n, 70_001).astype(np.float32),
  }
  out = place.run(lambda t: average(t, graph), tree)
  assert jax.tree.structure(out) == jax.tree.structure(tree)
  truth = jax.tree.map(
    lambda x: product(dense(graph), np.asarray(x).astype(np.float64)), tree
  )
  for y, x, expected in zip(
    jax.tree.leaves(out),
    jax.tree.leaves(tree),
    jax.tree.leaves(place.mine(truth)),
    strict=True,
  ):
    assert y.dtype == x.dtype
    np.testing.assert_allclose(
      np.asarray(y, np.float64), expected, rtol=1e-2, atol=2e-2
    )
    if x.dtype == np.float32:
      np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.mpi(1, 2)
def test_tree_without_leaves(place):
  graph = topology.ring(place.size)
  assert jfog.simulate(lambda: (), 1)() == ()
  out = place.run(
    lambda x: (x, average({"none": None}, graph)),
    np.zeros((place.size, 1), np.float32),
  )
  assert out[1] == {"none": None}


@pytest.mark.two_axes
@pytest.mark.parametrize("name", ["exponential", "uniform_in", "one_peer"])
def test_reverse_derivative_is_the_transposed_product(place, x, rng, name):
  graph = GRAPHS[name](place.size)
  c = rng.randn(*x.shape).astype(np.float32)

  def loss(x, c):
    return jnp.vdot(average(x, graph, 1), c)

  grad = place.run(jax.jit(jax.grad(loss)), x, c)
  truth = product(dense(graph, 1).T, c)
  np.testing.assert_allclose(grad, place.mine(truth), rtol=1e-5, atol=1e-5)


@pytest.mark.mpi(3)
def test_second_derivative(place, x):
  graph = GRAPHS["uniform_in"](place.size)

  def energy(x):
    return (average(x, graph) ** 3).sum() / 6

  def directional(x):
    return jax.grad(lambda x: (jax.grad(energy)(x) ** 2).sum() / 2)(x)

  matrix = dense(graph)
  y = product(matrix, x)
  g = product(matrix.T, y**2 / 2)
  truth = product(matrix.T, y * product(matrix, g))
  result = place.run(jax.jit(directional), x)
  np.testing.assert_allclose(result, place.mine(truth), rtol=1e-4, atol=1e-4)


@pytest.mark.mpi(2, 5)
def test_forward_derivative(place, x, rng):
  graph = topology.exponential(place.size)
  dx = rng.randn(*x.shape).astype(np.float32)
  y, dy = place.run(
    lambda x, dx: jax.jvp(lambda x: average(x, graph), (x,), (dx,)), x, dx
  )
  matrix = dense(graph)
  np.testing.assert_allclose(
    y, place.mine(product(matrix, x)), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
    dy, place.mine(product(matrix, dx)), rtol=1e-5, atol=1e-5
  )


@pytest.mark.mpi(3)
def test_vmap_over_leaves_and_over_steps(place, x):
  graph = topology.one_peer_exponential(place.size)
  y = place.run(
    jax.jit(jax.vmap(lambda x: average(x, graph, 1), in_axes=1, out_axes=1)), x
  )
  truth = product(dense(graph, 1), x)
  np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-5)
  if place.kind == "mesh":
    return  # the step of a mesh is one for all ranks and all examples
  steps = jnp.arange(3)
  y = place.run(lambda x: jax.vmap(lambda s: average(x, graph, s))(steps), x)
  for i in range(3):
    truth = place.mine(product(dense(graph, i), x))
    got = y[:, i] if place.kind == "simulate" else y[i]
    np.testing.assert_allclose(got, truth, rtol=1e-5, atol=1e-5)


def test_control_flow_and_remat(place, x):
  graph = topology.one_peer_exponential(place.size)

  @jax.jit
  def program(x):
    def body(carry, step):
      return average(carry, graph, step), None

    y, _ = jax.lax.scan(body, x, jnp.arange(3))
    y = jax.lax.fori_loop(3, 5, lambda i, y: average(y, graph, i), y)
    _, y = jax.lax.while_loop(
      lambda c: c[0] < 7,
      lambda c: (c[0] + 1, average(c[1], graph, c[0])),
      (5, y),
    )
    y = jax.lax.cond(
      jnp.sum(jnp.arange(3)) > 2,
      lambda y: average(y, graph, 7),
      lambda y: y,
      y,
    )
    return jax.checkpoint(lambda y: average(y, graph, 8))(y)

  truth = x
  for step in range(9):
    truth = product(dense(graph, step), truth)
  np.testing.assert_allclose(
    place.run(program, x), place.mine(truth), rtol=1e-4, atol=1e-5
  )


@pytest.mark.mpi(2, 3)
def test_gradient_through_scan_and_remat(place, x):
  graph = topology.one_peer_exponential(place.size)

  @jax.checkpoint
  def body(carry, step):
    return jnp.tanh(average(carry, graph, step)), None

  def loss(x):
    return jax.lax.scan(body, x, jnp.arange(3))[0].sum()

  def dense_loss(x):
    for step in range(3):
      x = jnp.tanh(jnp.tensordot(jnp.asarray(dense(graph, step)), x, 1))
    return x.sum()

  truth = np.asarray(jax.grad(dense_loss)(jnp.asarray(x)))
  grad = place.run(jax.jit(jax.grad(loss)), x)
  np.testing.assert_allclose(grad, place.mine(truth), rtol=1e-4, atol=1e-5)


@pytest.mark.mpi(3, 5)
@pytest.mark.parametrize("name", ["complete", "uniform_in", "one_peer"])
def test_runtime_weights_replace_the_graphs_on_its_edges(place, x, rng, name):
  graph = GRAPHS[name](place.size)
  weights = rng.randn(place.size, place.size).astype(np.float32)
  fun = jax.jit(lambda x, w: average(x, graph, 1, weights=w))
  y = place.run(fun, x, weights, in_axes=(0, None))
  edges = (dense(graph, 1) != 0) | np.eye(place.size, dtype=bool)
  truth = product(np.where(edges, weights, 0), x)
  np.testing.assert_allclose(y, place.mine(truth), rtol=1e-4, atol=1e-5)


@pytest.mark.mpi(3)
def test_the_derivative_in_weights_follows_the_step(place, x, rng):
  n = place.size
  graph = topology.one_peer_exponential(n)
  weights = rng.randn(n, n).astype(np.float32)
  c = rng.randn(*x.shape).astype(np.float32)

  @jax.jit
  def derivative(x, w, c, step):
    return jax.grad(lambda w: jnp.vdot(average(x, graph, step, weights=w), c))(
      w
    )

  for step in range(len(graph) + 1):
    dw = place.run(
      derivative, x, weights, c, np.int32(step), in_axes=(0, None, 0, None)
    )
    edges = (dense(graph[step]) != 0) | np.eye(n, dtype=bool)
    inner = np.einsum("iab,jab->ij", c.astype(float), x.astype(float)) * edges
    truth = np.eye(n)[:, :, None] * inner[:, None, :]
    np.testing.assert_allclose(dw, place.mine(truth), rtol=1e-4, atol=1e-5)


@pytest.mark.places("mpi-3", "mpi-4")
def test_the_derivative_in_weights_takes_one_gather(place):
  n = place.size
  graph = topology.fully_connected(n)
  x = jnp.ones(5)
  jfog.diagnostics.reset_counters()
  jax.block_until_ready(
    jax.grad(lambda w: average(x, graph, weights=w).sum())(jnp.ones((n, n)))
  )
  assert jfog.diagnostics.counters()["operations"] == 2


@pytest.mark.two_axes
@pytest.mark.mpi(3)
@pytest.mark.parametrize("name", ["complete", "uniform_in"])
def test_derivatives_with_runtime_weights(place, x, rng, name):
  n = place.size
  graph = GRAPHS[name](n)
  weights = rng.randn(n, n).astype(np.float32)
  c = rng.randn(*x.shape).astype(np.float32)

  def loss(x, w, c):
    return jnp.vdot(average(x, graph, weights=w), c)

  dx, dw = place.run(
    jax.jit(jax.grad(loss, argnums=(0, 1))), x, weights, c, in_axes=(0, None, 0)
  )
  edges = (dense(graph) != 0) | np.eye(n, dtype=bool)
  truth = product(np.where(edges, weights, 0).T, c)
  np.testing.assert_allclose(dx, place.mine(truth), rtol=1e-4, atol=1e-5)
  # Rank i weighs by its own row: the derivative fills row i and nothing else.
  inner = np.einsum("iab,jab->ij", c.astype(float), x.astype(float)) * edges
  rows = np.zeros((n, n, n))
  rows[np.arange(n), np.arange(n)] = inner
  np.testing.assert_allclose(dw, place.mine(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.mpi(3, 4)
@pytest.mark.parametrize("name", ["ring", "star", "base", "one_peer_star"])
def test_equal_values_come_back_bit_for_bit(place, rng, name):
  graph = GRAPHS[name](place.size)
  value = rng.randn(101).astype(np.float32)
  x = np.broadcast_to(value, (place.size, 101))
  fun = jax.jit(lambda x, step: average(x, graph, step))
  for step in range(len(graph)):
    y = place.run(fun, x, jnp.int32(step), in_axes=(0, None))
    np.testing.assert_array_equal(y, place.mine(x))


@pytest.mark.mpi(1, 3)
def test_a_pure_move_returns_the_senders_bits(place, rng):
  graph = GRAPHS["move"](place.size)
  x = rng.randn(place.size, 9).astype(np.float32)
  x[:, 0] = np.inf
  x[:, 1] = -0.0
  y = place.run(lambda x: average(x, graph), x)
  truth = np.roll(x, 1, axis=0)
  np.testing.assert_array_equal(
    np.asarray(y).view(np.uint32), place.mine(truth).view(np.uint32)
  )


@pytest.mark.mpi(2)
def test_argument_is_not_changed(place, x):
  graph = topology.ring(place.size)

  def program(x):
    y = average(x, graph)
    return x, y, x + 0 * y

  before, _, after = place.run(jax.jit(program), x)
  np.testing.assert_array_equal(before, place.mine(x))
  np.testing.assert_allclose(after, place.mine(x), rtol=1e-6)


def test_unused_result_still_communicates(place, x):
  """One rank drops its result; the others wait for what it sends."""
  graph = topology.ring(place.size)

  @jax.jit
  def program(x):
    dropped = average(x, graph)
    del dropped
    return average(2 * x, graph)

  y = place.run(program, x)
  truth = product(dense(graph), 2 * x)
  np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-5)


def test_exact_average_with_one_trace(place, rng):
  graph = topology.base_k(place.size, 1)
  x = rng.randn(place.size, 5).astype(np.float32)
  traces = []

  @jax.jit
  def step_once(x, step):
    traces.append(1)
    return average(x, graph, step)

  if place.kind in ("simulate", "mesh"):
    run = jax.jit(place.map(step_once, in_axes=(0, None)))
  else:
    run, x = step_once, place.mine(x)
  y = x
  for step in range(len(graph)):
    y = run(y, jnp.int32(step))
  mean = np.random.RandomState(0).randn(place.size, 5).mean(axis=0)
  np.testing.assert_allclose(
    y, np.broadcast_to(mean, y.shape), rtol=1e-5, atol=1e-6
  )
  assert len(traces) == 1


@pytest.mark.places("mpi-8")
def test_one_peer_exponential_over_eight_processes_is_exact(place, rng):
  graph = topology.one_peer_exponential(8)
  x = rng.randn(8, 1000).astype(np.float32)
  traces = []

  @jax.jit
  def step_once(x, step):
    traces.append(1)
    return average(x, graph, step)

  y = jnp.asarray(place.mine(x))
  for step in range(3):
    y = step_once(y, jnp.int32(step))
  np.testing.assert_allclose(y, x.mean(axis=0), rtol=1e-5, atol=1e-6)
  assert len(traces) == 1


@pytest.mark.places("simulate-5")
def test_a_traced_step_compiles_to_one_branch(place, x):
  """A batched step would compute every branch; it is made uniform first.

  Rounds of equal degrees need no branch: the step indexes their tables.
  """
  n = place.size
  unequal = topology.Schedule([topology.ring(n), topology.exponential(n)])
  for graph, branches in ((unequal, 1), (topology.base_k(n, 1), 0)):
    program = place.map(lambda x, s, graph=graph: average(x, graph, s))
    steps = jnp.zeros(n, jnp.int32)
    text = jax.jit(program).lower(x, steps).as_text()
    assert text.count("stablehlo.case") == branches


# Errors are raised before the first message, on every rank.


@pytest.mark.mpi(2, 3)
def test_size_mismatch_names_both_sizes(place, x):
  graph = topology.ring(place.size + 2)
  with pytest.raises(
    ValueError,
    match=f"{place.size + 2} ranks, the communicator has {place.size}",
  ):
    place.run(lambda x: average(x, graph), x)


@pytest.mark.mpi(2, 3)
def test_schedule_without_step(place, x):
  graph = topology.one_peer_exponential(place.size)
  with pytest.raises(ValueError, match="needs a step"):
    place.run(lambda x: average(x, graph), x)


@pytest.mark.mpi(2)
@pytest.mark.parametrize("step", [1.5, True, "1", np.zeros(2, np.int32)])
def test_step_that_is_no_integer(place, x, step):
  graph = topology.one_peer_exponential(place.size)
  with pytest.raises(TypeError, match=r"step|not a valid JAX"):
    place.run(lambda x: average(x, graph, step), x)


@pytest.mark.mpi(2)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integer_leaf_is_named(place, x, dtype):
  graph = topology.ring(place.size)
  with pytest.raises(TypeError, match=r"x\['count'\].*cast it.*op=\"sum\""):
    place.run(
      lambda x: average({"w": x, "count": x.astype(dtype)}, graph),
      jnp.asarray(x),
    )


@pytest.mark.mpi(2)
@pytest.mark.parametrize("graph", [None, np.eye(3), "ring"])
def test_no_graph(place, x, graph):
  with pytest.raises(TypeError, match="Topology or Schedule"):
    place.run(lambda x: average(x, graph), x)


@pytest.mark.mpi(2)
def test_protocol_is_no_graph(place, x):
  with pytest.raises(TypeError, match="several rounds"):
    place.run(lambda x: average(x, topology.ceca(place.size)), x)


@pytest.mark.mpi(2)
def test_bad_weights(place, x):
  graph = topology.ring(place.size)
  for weights, error in (
    (np.zeros((place.size + 1, place.size)), ValueError),
    (np.zeros((place.size, place.size), np.complex64), TypeError),
  ):
    with pytest.raises(error, match="weights"):
      place.run(functools.partial(average, graph=graph, weights=weights), x)


@pytest.mark.mpi(2)
def test_leaf_that_is_no_array(place, x):
  graph = topology.ring(place.size)
  with pytest.raises(TypeError, match=r"x\['name'\]"):
    place.run(lambda x: average({"name": "text", "x": x}, graph), x)
  with pytest.raises(TypeError, match="key_data"):
    place.run(lambda x: average(jax.random.key(0), graph), x)


@pytest.mark.places("simulate", "mesh")
def test_comm_that_is_none(place, x):
  with pytest.raises(TypeError, match="jfog communicator"):
    place.run(lambda x: average(x, topology.ring(place.size), comm="world"), x)
