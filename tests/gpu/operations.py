"""Each operation and its `_start` form against dense NumPy, on the ranks there are.

Stages 2 and 3 run it on one rank and on several: values, dtypes, trees, `jit`,
`scan`, gradients, and schedules whose step is traced.
"""

import functools
import sys

import ranks

world = ranks.World()

import jax  # noqa: E402  (after the rank has its GPU)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from support import reference  # noqa: E402

import jfog  # noqa: E402
from jfog import topology  # noqa: E402

N, RANK = world.size, world.rank
RING, EXPONENTIAL = topology.ring(N), topology.exponential(N)
# Directed: rank 0 receives from all, the others from the rank before. No two rows
# are equal, so that a matrix and its transpose differ on two ranks already.
edges = np.roll(np.eye(N), 1, axis=0) if N > 1 else np.zeros((1, 1))
edges[0, 1:] = 1
weights = edges + np.diag(1.0 + np.arange(N))
DIRECTED = topology.Topology(weights / weights.sum(axis=1, keepdims=True))
ONE_PEER = topology.one_peer_exponential(N)
DTYPES = {"float32": 1e-6, "bfloat16": 2e-2, "int32": 0}  # and the tolerance
LARGE = 2**16 if ranks.REHEARSAL else 2**24  # elements


def stacked(dtype, *shape, seed=0):
  """All ranks' values, equal on all ranks; small integers where exact."""
  draw = np.random.RandomState(seed).randint(-9, 10, (N, *shape))
  return jnp.asarray(draw).astype(dtype)


def dense(matrix, x):
  """`sum_j matrix[i, j] x_j` of the stacked `x`, in float64."""
  x = np.asarray(x.astype(jnp.float32), np.float64)
  return np.tensordot(matrix, x, 1)


def close(actual, truth, tolerance=1e-6):
  """Asserts that a value is the truth, and of finite numbers."""
  actual = np.asarray(jnp.asarray(actual).astype(jnp.float32), np.float64)
  assert actual.shape == np.shape(truth), (actual.shape, np.shape(truth))
  np.testing.assert_allclose(actual, truth, rtol=tolerance, atol=tolerance * 9)


def both(operation, start, jit=True):
  """An operation, and the form of it that is started and waited for."""
  forms = [operation, lambda *args: jfog.wait(start(*args))]
  return [jax.jit(form) for form in forms] if jit else forms


# Values and dtypes.


def averages(dtype, tolerance):
  x = stacked(dtype, 3, 5)
  for graph in (RING, EXPONENTIAL, DIRECTED):
    for form in both(
      lambda x, g=graph: jfog.neighbor_allreduce(x, g),
      lambda x, g=graph: jfog.neighbor_allreduce_start(x, g),
    ):
      y = form(x[RANK])
      assert y.dtype == x.dtype
      close(y, dense(reference.mixing(graph), x)[RANK], tolerance)


def reductions(dtype, tolerance):
  x = stacked(dtype, 7, seed=1)
  exact = np.asarray(x.astype(jnp.float32), np.float64)
  truths = {
    "sum": exact.sum(0),
    "min": exact.min(0),
    "max": exact.max(0),
    "prod": exact.prod(0),
  }
  if dtype != "int32":
    truths["mean"] = exact.mean(0)
  for op, truth in truths.items():
    for form in both(
      lambda x, op=op: jfog.allreduce(x, op),
      lambda x, op=op: jfog.allreduce_start(x, op),
    ):
      close(form(x[RANK]), truth, tolerance)


def copies(dtype, tolerance):
  x = stacked(dtype, 2, 3, seed=2)
  root = N - 1
  for form in both(
    lambda x: jfog.broadcast(x, root), lambda x: jfog.broadcast_start(x, root)
  ):
    close(form(x[RANK]), dense(np.eye(N)[root], x), tolerance)
  for form in both(jfog.allgather, jfog.allgather_start):
    close(form(x[RANK]), dense(np.eye(N), x).reshape(-1, 3), tolerance)


def gathers(dtype, tolerance):
  x = stacked(dtype, 2, 3, seed=3)
  ranks.require(N > 1, "a rank alone has no neighbors")
  for graph in (RING, DIRECTED):
    for form in both(
      lambda x, g=graph: jfog.neighbor_allgather(x, g),
      lambda x, g=graph: jfog.neighbor_allgather_start(x, g),
    ):
      sources = list(graph.in_neighbors(RANK))
      truth = dense(np.eye(N), x)[sources].reshape(-1, 3)
      close(form(x[RANK]), truth, tolerance)


def tree_of_60_leaves():
  shapes = [(), (0,), (1,), (3, 4), (257,), (2, 0, 3)]
  dtypes = ["float32", "bfloat16"]
  tree = {
    f"{i:02}": stacked(dtypes[i % 2], *shapes[i % len(shapes)], seed=i)
    for i in range(60)
  }
  mine = jax.tree.map(lambda x: x[RANK], tree)
  matrix = reference.mixing(RING)
  for form in both(
    lambda x: jfog.neighbor_allreduce(x, RING),
    lambda x: jfog.neighbor_allreduce_start(x, RING),
  ):
    for name, y in form(mine).items():
      close(y, dense(matrix, tree[name])[RANK], 2e-2)
  sums = jax.jit(lambda x: jfog.allreduce(x, "sum"))(mine)
  for name, y in sums.items():
    close(y, dense(np.ones(N), tree[name]), 2e-2)


def large_leaf():
  x = RANK + jnp.arange(LARGE, dtype=jnp.float32) % 1000
  y = jax.jit(lambda x: jfog.neighbor_allreduce(x, RING))(x)
  own = reference.mixing(RING)[RANK] @ np.arange(N)
  close(jnp.max(jnp.abs(y - own - (x - RANK))), 0.0, 1e-3)


def other_operations():
  x = stacked("float32", 4, seed=4)
  partner = RANK ^ 1 if RANK ^ 1 < N else RANK
  gossip = jax.jit(lambda x, peer: jfog.pair_gossip(x, peer))
  half = (dense(np.eye(N), x)[RANK] + dense(np.eye(N), x)[partner]) / 2
  close(gossip(x[RANK], jnp.int32(partner)), half)
  jfog.barrier()
  mean = dense(np.ones(N) / N, x)
  finite = topology.ceca(N)
  for form in both(
    lambda x: jfog.finite_time_average(x, finite),
    lambda x: jfog.finite_time_average_start(x, finite),
  ):
    close(form(x[RANK]), mean)


def peers():
  x = stacked("float32", 4, seed=5)
  after, before = (RANK + 1) % N, (RANK - 1) % N
  ranks.require(N > 1, "a rank alone has no peers")
  chosen = jfog.Peers(0.25, {before: 0.75}, {after: 1.0})
  y = jax.jit(lambda x: jfog.neighbor_allreduce(x, chosen))(x[RANK])
  close(y, dense(0.25 * np.eye(N)[RANK] + 0.75 * np.eye(N)[before], x))


# Transformations.


def eager():
  x = stacked("float32", 6, seed=6)
  y = jfog.neighbor_allreduce(x[RANK], RING)
  close(y, dense(reference.mixing(RING), x)[RANK])


def scan_of_a_schedule():
  """The step is traced: each round has other neighbors."""
  x, steps = stacked("float32", 5, seed=7), 7

  def body(x, step):
    return jfog.neighbor_allreduce(x, ONE_PEER, step), None

  y, _ = jax.jit(lambda x: jax.lax.scan(body, x, jnp.arange(steps)))(x[RANK])
  matrices = [reference.mixing(ONE_PEER, t) for t in range(steps)]
  close(y, dense(reference.product(matrices), x)[RANK])


def scan_of_handles():
  """A handle is the carry of a scan."""
  x, steps = stacked("float32", 5, seed=8), 5

  def body(handle, step):
    y = jfog.wait(handle)
    return jfog.neighbor_allreduce_start(y, ONE_PEER, step), None

  def program(x):
    handle = jfog.neighbor_allreduce_start(x, ONE_PEER, 0)
    handle, _ = jax.lax.scan(body, handle, jnp.arange(1, steps))
    return jfog.wait(handle)

  matrices = [reference.mixing(ONE_PEER, t) for t in range(steps)]
  truth = dense(reference.product(matrices), x)[RANK]
  close(jax.jit(program)(x[RANK]), truth)


def while_loop():
  x = stacked("float32", 3, seed=9)

  def body(carry):
    x, i = carry
    return jfog.neighbor_allreduce(x, RING), i + 1

  def program(x):
    return jax.lax.while_loop(lambda c: c[1] < 4, body, (x, 0))[0]

  truth = dense(np.linalg.matrix_power(reference.mixing(RING), 4), x)[RANK]
  close(jax.jit(program)(x[RANK]), truth)


def gradients():
  """The transpose is the average on the graph with all edges turned around."""
  x, c = stacked("float32", 4, seed=10), stacked("float32", 4, seed=11)

  def loss(x):
    return jnp.vdot(jfog.neighbor_allreduce(x, DIRECTED), c[RANK])

  close(
    jax.jit(jax.grad(loss))(x[RANK]),
    dense(reference.mixing(DIRECTED).T, c)[RANK],
  )
  primal, tangent = jax.jit(
    lambda x, t: jax.jvp(lambda x: jfog.neighbor_allreduce(x, RING), [x], [t])
  )(x[RANK], c[RANK])
  close(primal, dense(reference.mixing(RING), x)[RANK])
  close(tangent, dense(reference.mixing(RING), c)[RANK])


def batches():
  x = stacked("float32", 3, 4, seed=12)
  y = jax.jit(jax.vmap(lambda x: jfog.neighbor_allreduce(x, RING)))(x[RANK])
  close(y, dense(reference.mixing(RING), x)[RANK])


def handles_between_programs():
  x = stacked("float32", 1000, seed=13)
  start = jax.jit(lambda x: jfog.neighbor_allreduce_start(x, RING))
  handle = start(x[RANK])
  other = jax.jit(lambda x: jfog.allreduce(x, "max"))(x[RANK])
  close(other, dense(np.eye(N), x).max(0))
  while not bool(jfog.poll(handle)):
    pass
  close(jax.jit(jfog.wait)(handle), dense(reference.mixing(RING), x)[RANK])


def unused_results():
  """An operation without a reader of its result still communicates."""
  x = stacked("float32", 4, seed=14)

  @jax.jit
  def program(x):
    if RANK % 2:
      jfog.neighbor_allreduce(2 * x, RING)
    else:
      x = x + 0 * jfog.neighbor_allreduce(2 * x, RING)
    return jfog.neighbor_allreduce(x, RING)

  close(program(x[RANK]), dense(reference.mixing(RING), x)[RANK])


def many_in_one_program():
  """A dozen independent operations, some of 800 kB, repeated."""
  sizes = [200_000, 17, 60_001, 3]
  graphs = [RING, EXPONENTIAL, DIRECTED]

  @jax.jit
  def program(seed):
    results = []
    for k in range(12):
      x = jnp.full(sizes[k % 4], seed + 100.0 * k + RANK)
      if (RANK + k) % 3 == 0:
        x = x + 0 * jnp.sort(jnp.sin(x))[0]
      results.append(jfog.neighbor_allreduce(x, graphs[k % 3]))
    return [(y.min(), y.max()) for y in results]

  for repeat in range(5):
    for k, bounds in enumerate(program(jnp.float32(repeat))):
      values = repeat + 100.0 * k + np.arange(N)
      truth = reference.mixing(graphs[k % 3])[RANK] @ values
      close(jnp.stack(bounds), np.full(2, truth), 1e-5)


# Optimizers, windows, machines.


def optimizer(transformation):
  """Ten steps on a quadratic against the dense iterates."""
  rate, steps = 0.1, 10
  target = np.asarray(stacked("float32", 4, seed=15), np.float64)
  dense_step = getattr(reference, transformation)
  truth = dense_step(
    reference.sgd(rate),
    [reference.mixing(ONE_PEER, t) for t in range(len(ONE_PEER))],
    lambda x: x - target,
    np.zeros((N, 4)),
    steps,
  )[-1]
  build = getattr(jfog.optimizers, transformation)
  tx = build(optax.sgd(rate), ONE_PEER)
  mine = jnp.asarray(target[RANK], jnp.float32)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(params - mine, state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(params):
    carry = params, tx.init(params)
    return jax.lax.scan(step, carry, length=steps)[0][0]

  close(train(jnp.zeros(4)), truth[RANK], 1e-5)


def windows():
  x = stacked("float32", 6, seed=16)
  win = jfog.win_create(x[RANK], RING)
  win = jax.jit(jfog.win_put)(win, 2 * x[RANK])
  jfog.barrier()
  y, win = jax.jit(jfog.win_update)(win, x[RANK])
  weights = reference.mixing(RING)
  truth = 2 * weights + np.diag(-np.diag(weights))
  close(y, dense(truth[RANK], x))
  jfog.barrier()
  jfog.win_free(win)


def hierarchical():
  """On pretended machines of two ranks."""
  ranks.require(N % 2 == 0, "machines of two ranks need an even number")
  world.reopen(local_size=2)
  x = stacked("float32", 5, seed=17)
  machines = topology.ring(N // 2)
  inside = np.kron(np.eye(N // 2), np.full((2, 2), 0.5))
  across = np.kron(reference.mixing(machines), np.eye(2))
  truth = dense(across @ inside, x)[RANK]
  for form in both(
    lambda x: jfog.hierarchical_neighbor_allreduce(x, machines),
    lambda x: jfog.hierarchical_neighbor_allreduce_start(x, machines),
  ):
    close(form(x[RANK]), truth)
  world.reopen(local_size=None)


def counters():
  x = jnp.ones(1000)
  average = jax.jit(lambda x: jfog.neighbor_allreduce(x, RING))
  jfog.diagnostics.reset_counters()
  jax.block_until_ready(average(x))
  counted = jfog.diagnostics.counters()
  assert counted["operations"] == 1, counted
  expected = 4000 * len(RING.out_neighbors(RANK))
  assert counted["bytes_sent"] == expected, counted


cases = {"eager": eager}
for name in ("averages", "reductions", "copies", "gathers"):
  for dtype, tolerance in DTYPES.items():
    if (name, dtype) != ("averages", "int32"):  # refused: weights are floats
      case = functools.partial(globals()[name], dtype, tolerance)
      cases[f"{name} of {dtype}"] = case
for case in (
  *(tree_of_60_leaves, large_leaf, other_operations, peers),
  *(scan_of_a_schedule, scan_of_handles, while_loop, gradients, batches),
  *(handles_between_programs, unused_results, many_in_one_program),
):
  cases[case.__name__.replace("_", " ")] = case
for name in ("adapt_then_combine", "adapt_with_combine"):
  cases[name] = functools.partial(optimizer, name)
for case in (windows, counters, hierarchical):
  cases[case.__name__] = case

placed = {str(device) for device in jnp.zeros(()).devices()}
world.record("place", outcome="measured", devices=sorted(placed), ranks=N)
sys.exit(1 if world.run(cases) else 0)
