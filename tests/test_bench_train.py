"""`jfog bench train`: its options, its table, and trainings in one process and in jobs."""

import json
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import jfog
from jfog import cli, launch, runtime
from jfog.bench import models, train, train_job

needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
JOB = {
  **{"model": "transformer", "size": "tiny", "dtype": None, "batch": 2},
  **{"optimizers": ["adapt_then_combine"], "graph": "one_peer_exponential"},
  **{"every": 2, "steps": 3, "rounds": 2},
}


@pytest.fixture
def alone():
  """A world of one rank."""
  jfog.shutdown()
  yield jfog.init(backend="single")
  jfog.shutdown()


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (["--batch", "0"], "--batch 0 must be at least 1"),
    (["--steps", "-1"], "--steps -1 must be at least 1"),
    (["--rounds", "0"], "--rounds 0 must be at least 1"),
    (["--every", "0"], "--every 0 must be at least 1"),
    (["-np", "2", "0"], "-np 0 must be at least 1"),
  ],
)
def test_bad_numbers(capsys, arguments, text):
  assert cli.main(["bench", "train", *arguments]) == 2
  assert text in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments",
  [["--optimizer", "adam"], ["--graph", "tree"], ["--model", "vgg"]],
)
def test_unknown_names_are_refused_with_the_known_ones(capsys, arguments):
  with pytest.raises(SystemExit):
    cli.main(["bench", "train", *arguments])
  assert "invalid choice" in capsys.readouterr().err


def test_a_rank_takes_its_number_from_the_launcher(capsys, monkeypatch):
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
  assert cli.main(["bench", "train", "-np", "2"]) == 2
  assert "-np belongs to `jfog run` here" in capsys.readouterr().err


def test_the_options_of_both_commands_stay_apart():
  parser = cli._parser()
  words = ["bench", "-np", "4", "--operations", "win_put", "allreduce"]
  options = parser.parse_args(words)
  assert options.action is cli.command.main
  assert options.operations == ["win_put", "allreduce"]
  options = parser.parse_args(["bench", "train", "-np", "4", "8"])
  assert options.action is train.main
  assert (options.ranks, options.model) == ([4, 8], "resnet50")


def test_the_table_has_rates_and_ratios():
  result = {
    **{"ranks": 4, "device": "cpu", "dtype": "float32", "parameters": 1234},
    **{"unit": "images", "units": 8},
    "seconds": {"none": [0.1, 0.1], "local_sgd": [0.2, 0.4]},
  }
  text = train.lines(JOB, [result])
  assert "transformer, tiny: 1,234 parameters, 8 images a rank" in "\n".join(
    text
  )
  assert (
    "| ranks | optimizer | step | images/s a rank | images/s | by none's |"
    in text
  )
  assert "| 4 | none | 100 ms | 80 | 320 | 1.00 [1.00, 1.00] |" in text
  assert (
    "| 4 | local_sgd | 300 ms | 26.67 | 106.7 | 0.38 [0.31, 0.44] |" in text
  )


def test_a_training_of_one_rank(alone):
  found = train_job.run(JOB)
  assert found is not None
  assert found["parameters"] == models.count(
    jax.eval_shape(
      train_job.model("transformer", "tiny", "float32").init,
      jax.eval_shape(lambda: jax.random.key(0)),
    )
  )
  assert (found["ranks"], found["units"], found["unit"]) == (1, 64, "tokens")
  assert found["dtype"] == "float32"
  assert list(found["seconds"]) == ["none", "adapt_then_combine"]
  assert all(
    len(times) == 2 and min(times) > 0 for times in found["seconds"].values()
  )


def test_a_loss_that_is_not_finite_is_an_error(alone, monkeypatch):
  broken = models.Model(
    init=lambda key: jax.random.normal(key, (3,)),
    loss=lambda params, batch: params.sum() * np.nan,
    batch=lambda key, samples: jax.random.normal(key, (samples,)),
    unit="rows",
    units=1,
  )
  monkeypatch.setattr(train_job, "model", lambda *_: broken)
  with pytest.raises(RuntimeError, match="none: the loss is nan"):
    train_job.run(JOB)


@pytest.mark.parametrize(
  ("name", "graph"),
  [
    *((name, train._GRAPHS[0]) for name in train._OPTIMIZERS),
    *(("adapt_then_combine", graph) for graph in train._GRAPHS[1:]),
  ],
)
def test_the_mean_of_all_ranks_goes_the_way_of_momentum(name, graph):
  """Two steps on quadratic losses, whose gradients are linear."""

  def on_rank(center):
    tx = train_job.transformation(name, graph, 2, runtime.resolve(None))
    x = jax.numpy.zeros(3)
    state = tx.init(x)
    for _ in range(2):
      updates, state = tx.update(x - center, state, x)
      x = optax.apply_updates(x, updates)
    return x

  centers = np.random.RandomState(0).standard_normal((4, 3)).astype(np.float32)
  found = jax.jit(jfog.simulate(on_rank, 4, local_size=2))(centers)
  rate, momentum = 1e-3, 0.9
  way = rate + rate * (1 + momentum - rate)
  if name == "diloco":  # one outer step by Nesterov's momentum
    way *= 0.7 * (1 + momentum)
  np.testing.assert_allclose(
    found.mean(axis=0), way * centers.mean(axis=0), rtol=1e-4
  )


def test_resnet18_has_its_parameters():
  model = train_job.model("resnet18", "full", "float32")
  params = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
  assert models.count(params) == 11_689_512
  assert len(jax.tree.leaves(params)) == 62


@needs_mpi
@pytest.mark.full
def test_jobs_of_its_own_and_ranks_of_another(tmp_path, capfd):
  path = tmp_path / "train.json"
  words = ["bench", "train", "--size", "tiny", "--batch", "2"]
  words += ["--steps", "2", "--rounds", "2"]
  more = ["--model", "resnet18", "-np", "2", "--json", str(path)]
  assert cli.main([*words, *more]) == 0
  written = json.loads(path.read_text())
  assert [each["ranks"] for each in written["results"]] == [2]
  assert list(written["results"][0]["seconds"]) == [
    "none",
    "adapt_then_combine",
  ]
  assert "| 2 | adapt_then_combine |" in capfd.readouterr().out
  words += ["--model", "transformer", "--graph", "hierarchical"]
  done = subprocess.run(
    launch.command_line(
      ["--no-tag-output", "-np", "2", sys.executable, "-m", "jfog", *words]
    ),
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("| 2 | adapt_then_combine |") == 1
