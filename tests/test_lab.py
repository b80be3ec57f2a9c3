"""Sweeps against single runs, splits of data, and times against a plain event list."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import suite

import jfog
from jfog import lab, topology
from jfog.lab import _sweep

N = 6
STEPS = 7
GRAPHS = {"ring": topology.ring(N), "complete": topology.fully_connected(N)}


def training(seed, learning_rate, graph):
  """Least squares with other data on each rank."""
  tx = jfog.optimizers.adapt_then_combine(optax.sgd(learning_rate), graph)
  key = jax.random.fold_in(jax.random.key(seed), jfog.rank())
  center = jax.random.normal(key, (3,))
  x = jnp.zeros(3)

  def step(carry, _):
    x, state = carry
    updates, state = tx.update(x - center, state, x)
    x = jnp.asarray(optax.apply_updates(x, updates))
    mean = jfog.allreduce(x)
    return (x, state), (jnp.sum((x - mean) ** 2), x[0])

  (x, _), (spread, first) = jax.lax.scan(step, (x, tx.init(x)), length=STEPS)
  return {"spread": spread, "first": first, "last": x}


AXES = {"seed": 3, "graph": GRAPHS, "learning_rate": [0.1, 0.5]}


def truth(seed, graph, learning_rate):
  weights = np.asarray(GRAPHS[graph].mixing_matrix)
  centers = np.stack(
    [
      jax.random.normal(jax.random.fold_in(jax.random.key(seed), r), (3,))
      for r in range(N)
    ]
  )
  x, spread = np.zeros((N, 3)), []
  for _ in range(STEPS):
    x = weights @ (x - learning_rate * (x - centers))
    spread.append(np.mean(np.sum((x - x.mean(axis=0)) ** 2, axis=1)))
  return np.array(spread), x.mean(axis=0)


@pytest.mark.parametrize("memory", [2**30, 1])
def test_each_point_is_the_dense_recursion(memory):
  table = lab.sweep(training, AXES, N, memory=memory)
  assert dict(table.sizes) == {
    **{"seed": 3, "graph": 2, "learning_rate": 2},
    **{"spread_dim_0": STEPS, "first_dim_0": STEPS, "last_dim_0": 3},
  }
  assert list(table["graph"].values) == list(GRAPHS)
  for seed in range(3):
    for graph in GRAPHS:
      for rate in (0.1, 0.5):
        spread, last = truth(seed, graph, rate)
        found = table.sel(seed=seed, graph=graph, learning_rate=rate)
        np.testing.assert_allclose(found["spread"], spread, atol=1e-5)
        np.testing.assert_allclose(found["last"], last, atol=1e-5)


def test_arrays_machines_and_all_ranks():
  def program(alive, power):
    x = jnp.where(alive[jfog.rank()], 1.0, 0.0)
    return {
      "x": jfog.allreduce(x, "sum") ** power,
      "machine": jfog.machine_rank(),
    }

  alive = np.array([[True] * 6, [False] * 5 + [True]])
  table = lab.sweep(
    program,
    {"alive": alive, "power": (1, 2)},
    6,
    local_size=2,
    reduce=lambda x: x,
  )
  assert table["x"].dims == ("alive", "power", "step")
  np.testing.assert_array_equal(table["x"][:, :, 0], [[6, 36], [1, 1]])
  np.testing.assert_array_equal(table["machine"][0, 0], [0, 0, 1, 1, 2, 2])


def test_a_resumed_sweep_repeats_nothing(tmp_path, monkeypatch):
  axes = {"seed": [0, 1], "graph": GRAPHS, "learning_rate": [0.1]}
  first = lab.sweep(training, axes, N, folder=tmp_path)
  files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  assert len(files) == 4
  ran = []
  write = _sweep._Store.write
  monkeypatch.setattr(
    _sweep._Store,
    "write",
    lambda self, path, results: (ran.append(path), write(self, path, results)),
  )
  again = lab.sweep(training, axes, N, folder=tmp_path)
  assert not ran and again.equals(first)
  more = lab.sweep(training, {**axes, "seed": [1, 2, 0]}, N, folder=tmp_path)
  assert len(ran) == 2  # a new seed on two graphs
  assert {p: p.stat().st_mtime_ns for p in files} == files
  assert more.sel(seed=[0, 1]).equals(first)  # from the files

  # Another program, or a file that was cut off, is not taken for a result.
  def other(seed, learning_rate, graph):
    return training(seed, 2 * learning_rate, graph)

  lab.sweep(other, axes, N, folder=tmp_path)
  assert len(ran) == 6
  victim = next(iter(files))
  victim.write_bytes(victim.read_bytes()[:100])
  # A block of another length may round otherwise.
  xarray = pytest.importorskip("xarray")
  xarray.testing.assert_allclose(
    lab.sweep(training, axes, N, folder=tmp_path), first
  )
  assert ran[6:] == [victim]


@pytest.mark.parametrize(
  "program, axes, error, text",
  [
    (lambda: {}, {}, ValueError, "axes is empty"),
    (lambda a: {"x": a}, {"a": []}, ValueError, "axis 'a' has no values"),
    (lambda a: {"x": a}, {"a": 0}, ValueError, "axis 'a' has no values"),
    (lambda a: {"x": a}, {"a": "ring"}, ValueError, "axis 'a' is 'ring'"),
    (lambda a: {"x": a}, {"a": 0.5}, ValueError, "axis 'a' is 0.5"),
    (
      lambda a: {"x": a},
      {"a": [np.zeros(2), np.zeros(3)]},
      ValueError,
      "several shapes",
    ),
    (lambda a: a, {"a": 2}, TypeError, "return a dict"),
    (lambda a: {"a": a}, {"a": 2}, ValueError, "a is an axis and a result"),
    (
      lambda a: {"x": jnp.zeros(len(a))},
      {"a": ["b", "cc"]},
      ValueError,
      "equal at all points",
    ),
  ],
)
def test_bad_sweeps(program, axes, error, text):
  with pytest.raises(error, match=text):
    lab.sweep(program, axes, 4)


def test_objects_of_one_name_are_numbered():
  functions = [lambda x: x, lambda x: 2 * x]
  table = lab.sweep(lambda f: {"y": f(3.0)}, {"f": functions}, 2)
  assert list(table["f"].values) == ["0: <lambda>", "1: <lambda>"]
  np.testing.assert_array_equal(table["y"], [3, 6])


@pytest.mark.places("mpi")
@pytest.mark.mpi(2, 3, soak=(8,))
def test_a_program_of_the_laboratory_on_ranks_of_their_own(place):
  suite.require("xarray")  # machines with GPUs may lack it
  graph = topology.ring(place.size)
  curve = lab.sweep(
    training,
    {"seed": [5], "learning_rate": [0.3], "graph": [graph]},
    place.size,
  )["spread"].values.ravel()

  def on_rank(_):
    spread = training(5, 0.3, graph)["spread"]
    return jfog.allreduce(spread)

  found = place.run(on_rank, np.arange(place.size))
  np.testing.assert_allclose(np.asarray(found), curve, rtol=1e-5, atol=1e-7)


LABELS = np.random.RandomState(1).randint(0, 10, 1003)


@pytest.mark.parametrize(
  "split",
  [
    lab.split_by_label,
    lab.split_shards,
    lambda labels, size: lab.split_dirichlet(labels, size, 0.5),
    lambda labels, size: lab.split_dirichlet(labels, size, 1e-4),
    lambda labels, size: lab.split_dirichlet(labels, size, 1e4),
  ],
)
@pytest.mark.parametrize("size", [1, 7, 20])
def test_splits_have_each_example_once(split, size):
  indices = split(LABELS, size)
  assert indices.shape[0] == size
  assert indices.size > len(LABELS) - 2 * size
  assert len(np.unique(indices)) == indices.size


def test_splits_are_as_uneven_as_asked_for():
  labels_of = lambda split: [len(np.unique(LABELS[i])) for i in split]  # noqa: E731
  assert max(labels_of(lab.split_by_label(LABELS, 5))) <= 3
  assert max(labels_of(lab.split_shards(LABELS, 10))) <= 4
  few = labels_of(lab.split_dirichlet(LABELS, 5, 1e-3))
  many = lab.split_dirichlet(LABELS, 5, 1e4)
  assert np.median(few) <= 4 and min(labels_of(many)) == 10
  shares = np.stack([np.bincount(LABELS[i], minlength=10) for i in many])
  assert np.abs(shares / shares.sum(axis=1, keepdims=True) - 0.1).max() < 0.1
  again = lab.split_dirichlet(LABELS, 5, 1e4)
  np.testing.assert_array_equal(many, again)


def test_bad_splits():
  with pytest.raises(ValueError, match=r"alpha=0 is not positive"):
    lab.split_dirichlet(LABELS, 4, 0)
  with pytest.raises(ValueError, match="there are 3 examples for 4 parts"):
    lab.split_by_label([0, 1, 2], 4)
  with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
    lab.split_shards([[0], [1]], 1)


def events(graph, size, message, compute, latency, bandwidth):
  """The times step by step, edge by edge."""
  now, ends = [0.0] * size, []
  for k, seconds in enumerate(compute):
    ready = [now[i] + seconds[i] for i in range(size)]
    if graph is None:
      end = max(ready) + 2 * (size - 1) * (
        message / size / min(bandwidth) + latency.max()
      )
      now = [end] * size
    else:
      each = graph.rounds[k % len(graph.rounds)]
      ins = [list(each.in_neighbors(i)) for i in range(size)]
      outs = [list(each.out_neighbors(i)) for i in range(size)]
      now = [
        max(
          [ready[i]]
          + [
            ready[j]
            + latency[i][j]
            + message
            * max(len(outs[j]) / bandwidth[j], len(ins[i]) / bandwidth[i])
            for j in ins[i]
          ]
        )
        for i in range(size)
      ]
    ends.append(now)
  return np.array(ends)


@pytest.mark.parametrize(
  "graph",
  [
    None,
    topology.ring(5, "right"),
    topology.star(5),
    topology.one_peer_exponential(5),
  ],
  ids=["allreduce", "directed ring", "star", "one-peer"],
)
def test_network_times_are_those_of_an_event_list(graph, rng):
  compute = rng.exponential(1e-2, (9, 5))
  latency = rng.uniform(0, 1e-2, (5, 5))
  bandwidth = rng.uniform(1e8, 1e9, 5)
  found = lab.network_times(
    graph, 1e6, compute, latency=latency, bandwidth=bandwidth
  )
  expected = events(graph, 5, 1e6, compute, latency, bandwidth)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_late_rank_delays_its_neighbors_only():
  compute = np.ones((2, 8))
  compute[0, 0] = 10.0
  ring = topology.ring(8, "right")
  times = lab.network_times(ring, 0, compute, latency=0, bandwidth=1)
  np.testing.assert_array_equal(times[1] > 2, np.arange(8) <= 2)
  late = lab.network_times(None, 0, compute, latency=0, bandwidth=1)
  np.testing.assert_array_equal(late[1], np.full(8, 11.0))


@pytest.mark.parametrize(
  "change, text",
  [
    ({"compute": np.ones(4)}, r"compute has shape \(4,\)"),
    ({"compute": np.ones((2, 5))}, "the graph has 4 ranks and compute 5"),
    ({"latency": np.ones(4)}, r"latency has shape \(4,\)"),
    ({"latency": -1.0}, "latency has a value below 0"),
    ({"bandwidth": 0.0}, "bandwidth=0.0 must be above 0"),
    ({"message_bytes": -1}, "message_bytes=-1 not below"),
  ],
)
def test_bad_networks(change, text):
  given = {
    **{
      "graph": topology.ring(4),
      "message_bytes": 8,
      "compute": np.ones((2, 4)),
    },
    **{"latency": 0.0, "bandwidth": 1.0},
    **change,
  }
  with pytest.raises(ValueError, match=text):
    lab.network_times(**given)
