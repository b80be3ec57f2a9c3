"""The examples run, and give on MPI what they give in simulation."""

import json
import os
import pathlib
import re
import shutil
import sys

import jax
import matplotlib
import matplotlib.pyplot
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support import jobs, suite

from jfog import launch, runtime

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
DOCS = EXAMPLES.parent / "docs"
DEADLINE = 300.0  # seconds; each takes about ten when all is quiet
needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
needs_ulfm = pytest.mark.skipif(
  "Open MPI v5" not in runtime.build().MPI_LIBRARY,
  reason="a job outlives its ranks with Open MPI 5",
)
simulated_and_on_mpi = pytest.mark.parametrize(
  "ranks", [0, pytest.param(2, marks=needs_mpi)], ids=["simulate", "mpi-2"]
)


def run(name, folder, *arguments, ranks=0, devices=0, options=()):
  """Runs an example, alone, on devices or on MPI ranks; returns what it printed."""
  words = ["--no-tag-output", *options, "-np", str(ranks)]
  prefix = launch.command_line(words) if ranks else []
  flags = os.environ["XLA_FLAGS"].split()  # those that save time
  flags = [flag for flag in flags if "device_count" not in flag]
  if devices:
    flags.append(f"--xla_force_host_platform_device_count={devices}")
  return jobs.printed(
    [*prefix, sys.executable, EXAMPLES / name, *arguments],
    deadline=DEADLINE,
    folder=folder,
    environment={**os.environ, "XLA_FLAGS": " ".join(flags)},
  )


def curves(path):
  """The curves of the linear model of `linear_models.py`, by method."""
  return json.loads(path.read_text())["linear"]


def is_png(path):
  return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def rows(text):
  """The table's last column by the name of the graph."""
  found = {}
  for line in text.splitlines():
    words = line.rsplit(None, 1)
    if len(words) == 2 and re.fullmatch(r"\d\.\de[-+]\d\d", words[1]):
      found[re.split(r"  +| \*", line)[0]] = words[1]
  return found


def test_average_consensus(tmp_path):
  text = run("average_consensus.py", tmp_path, "--ranks", "6", "--rounds", "12")
  errors = rows(text)
  for name in ("fully connected", "base-2", "base-3", "hyper-hypercube"):
    assert float(errors[name]) < 1e-6
  for name in ("ring", "chain", "one-peer exponential", "star"):
    assert 1e-6 < float(errors[name]) < 0.9
  assert "left out: hypercube" in text
  assert is_png(tmp_path / "average_consensus.png")


@needs_mpi
def test_average_consensus_on_mpi(tmp_path):
  graphs = ("ring", "star", "one-peer exponential", "base-2", "CECA")
  name, arguments = (
    "average_consensus.py",
    ("--rounds", "4", "--graphs", *graphs),
  )
  on_mpi = rows(run(name, tmp_path, *arguments, ranks=3))
  simulated = rows(run(name, tmp_path, *arguments, "--ranks", "3"))
  assert set(on_mpi) == set(simulated) == set(graphs)
  for graph in simulated:
    difference = abs(float(on_mpi[graph]) - float(simulated[graph]))
    # The table shows two digits, and rounding may turn on the last one.
    assert difference < 0.11 * float(simulated[graph]) + 1e-6, graph


def test_digits_on_virtual_ranks(tmp_path):
  methods = ("static exponential", "no communication")
  run(
    "digits.py",
    tmp_path,
    *("--ranks", "5", "--epochs", "5", "--json", "sim.json"),
    *("--methods", *methods),
  )
  curves = json.loads((tmp_path / "sim.json").read_text())
  shared, alone = (curves[method] for method in methods)
  assert shared["accuracy"][-1] > 0.9
  assert shared["accuracy"][-1] > alone["accuracy"][-1]
  assert shared["consensus_distance"][-1] < alone["consensus_distance"][-1]
  assert alone["bytes_per_step"] == 0
  assert is_png(tmp_path / "digits.png")


def test_minimal_trains_on_virtual_ranks_and_devices(tmp_path):
  text = run("minimal.py", tmp_path)
  assert "on 8 ranks" in text
  assert re.search(r"y = (2\.99|3\.0[01]) x \+ (0\.99|1\.0[01])", text)
  assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 50
  on_devices = run("minimal.py", tmp_path, devices=8)
  assert on_devices.splitlines()[-1] == text.splitlines()[-1]


@needs_mpi
def test_minimal_trains_on_mpi(tmp_path):
  text = run("minimal.py", tmp_path, ranks=3)
  assert "on 3 ranks" in text
  assert re.search(r"y = (2\.99|3\.0[01]) x \+ (0\.99|1\.0[01])", text)


@needs_mpi
def test_a_job_of_one_rank_trains_one_rank(tmp_path):
  arguments = ("--epochs", "1", "--methods", "ring")
  assert "1 ranks (MPI)" in run("digits.py", tmp_path, *arguments, ranks=1)


@needs_mpi
def test_digits_are_equal_on_mpi_and_in_simulation(tmp_path):
  methods = ("one-peer exponential", "gradient allreduce")
  arguments = ("--epochs", "4", "--split", "label", "--methods", *methods)
  text = run("digits.py", tmp_path, *arguments, "--json", "mpi.json", ranks=3)
  assert all(method in text for method in methods)
  assert is_png(tmp_path / "digits.png")
  run("digits.py", tmp_path, *arguments, "--ranks", "3", "--json", "sim.json")
  on_mpi = json.loads((tmp_path / "mpi.json").read_text())
  simulated = json.loads((tmp_path / "sim.json").read_text())
  for method in methods:
    got, truth = on_mpi[method], simulated[method]
    # One of the 357 test images may fall on the other side by rounding.
    assert got["accuracy"] == pytest.approx(truth["accuracy"], abs=0.003)
    assert got["consensus_distance"] == pytest.approx(
      truth["consensus_distance"], rel=1e-3, abs=1e-5
    )
    assert got["bytes_per_step"] == truth["bytes_per_step"] > 0
    assert got["accuracy"][-1] > 0.85


def test_async_push_sum_on_virtual_ranks(tmp_path):
  text = run(
    "async_push_sum.py",
    tmp_path,
    *("--ranks", "4", "--steps", "60", "--slow-factor", "2"),
    *("--json", "sim.json"),
  )
  results = json.loads((tmp_path / "sim.json").read_text())
  names = ("synchronous, even", "asynchronous, even", "asynchronous, late")
  assert "asynchronous, rank 0 late" in text
  for problem in ("average", "digits"):
    assert tuple(results[problem]) == names
  errors = [results["average"][name]["error"] for name in names]
  assert max(errors[:2]) < 1e-12
  assert errors[2] < 1e-3  # lateness costs steps
  in_step, in_order, late = (results["digits"][name] for name in names)
  # One of the 357 test images may fall on the other side by rounding.
  assert in_order["accuracy"] == pytest.approx(in_step["accuracy"], abs=0.003)
  assert min(in_step["accuracy"], late["accuracy"]) > 0.75
  assert is_png(tmp_path / "async_push_sum.png")


@pytest.mark.soak
@needs_mpi
def test_async_push_sum_on_mpi(tmp_path):
  """How fast a rank is depends on the machine; that all end well does not."""
  text = run(
    "async_push_sum.py",
    tmp_path,
    *("--quick", "--pause", "5", "--slow-rank", "1", "--json", "mpi.json"),
    ranks=4,
  )
  results = json.loads((tmp_path / "mpi.json").read_text())
  for problem in ("average", "digits"):
    runs = results[problem]
    assert len(runs) == 4
    for name, result in runs.items():
      row = "\n" + name.replace("slow", "rank 1 slow")
      assert text.count(row) == 2  # one in each table
      rates = result["rates"]
      if name.startswith("synchronous"):
        assert max(rates) < 2 * min(rates)
    rates = runs["asynchronous, slow"]["rates"]
    assert rates[1] < max(rates)
  assert all(run["error"] < 1e-6 for run in results["average"].values())
  assert all(run["accuracy"] > 0.5 for run in results["digits"].values())
  assert is_png(tmp_path / "async_push_sum.png")


@pytest.fixture(scope="module")
def linear_models(tmp_path_factory):
  """The output of a simulation of three ranks, and its curves."""
  folder = tmp_path_factory.mktemp("linear_models")
  methods = ("adapt_then_combine", "exact_diffusion", "relay_sum")
  text = run(
    "linear_models.py",
    folder,
    *("--ranks", "3", "--quick", "--json", "sim.json"),
    *("--methods", *methods, "choco:top_k"),
  )
  assert is_png(folder / "linear_models.png")
  return text, curves(folder / "sim.json")


def test_exact_methods_find_the_minimizer(linear_models):
  text, seen = linear_models
  assert all(f"\n{method} " in text for method in seen)
  last = {method: curve["distance"][-1] for method, curve in seen.items()}
  assert last["exact_diffusion"] < 1e-9
  assert last["relay_sum"] < 1e-6
  assert 1e-5 < last["adapt_then_combine"] < 1e-1  # the ring of 3 is complete
  assert 1e-3 < last["choco:top_k"] < 1


@needs_mpi
def test_linear_models_are_equal_on_mpi_and_in_simulation(
  tmp_path, linear_models
):
  """The bytes that MPI has counted are those of the formulas."""
  run(
    "linear_models.py",
    tmp_path,
    *("--quick", "--json", "mpi.json", "--methods"),
    *("exact_diffusion", "choco:top_k"),
    ranks=3,
  )
  _, simulated = linear_models
  for method, got in curves(tmp_path / "mpi.json").items():
    truth = simulated[method]
    assert got["distance"] == pytest.approx(
      truth["distance"], rel=1e-6, abs=1e-11
    )
    assert got["bytes_per_step"] == truth["bytes_per_step"] > 0


def saved(folder, epoch):
  """The arrays that a process of `flax_nnx.py` saved after an epoch."""
  with ocp.CheckpointManager(folder) as checkpoints:
    tree = checkpoints.restore(epoch, args=ocp.args.StandardRestore())
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@simulated_and_on_mpi
def test_flax_network_resumes(tmp_path, ranks):
  """Also where one rank has not saved the last epoch."""
  suite.require("flax", "mlxtend")
  first = run("flax_nnx.py", tmp_path, "--epochs", "3", ranks=ranks)
  assert percentages(first) > 85
  size = ranks or 1  # processes
  folders = [
    tmp_path / "checkpoints" / f"rank{rank}of{size}" for rank in range(size)
  ]
  truth = [saved(folder, 3) for folder in folders]
  shutil.rmtree(folders[-1] / "3")
  again = run("flax_nnx.py", tmp_path, "--epochs", "3", "--resume", ranks=ranks)
  assert again.splitlines() == first.splitlines()[2:]
  for folder, wanted in zip(folders, truth, strict=True):
    assert {len(leaf) for leaf in wanted} == {1 if ranks else 8}
    for got, leaf in zip(saved(folder, 3), wanted, strict=True):
      np.testing.assert_array_equal(got, leaf)


def percentages(text):
  """The percentage in the last line."""
  return float(re.search(r"([\d.]+) %", text.splitlines()[-1])[1])


def accuracies(text, column):
  """A column of numbers of a table by the name in the first column."""
  cells = [re.split(r"  +", line.strip()) for line in text.splitlines()]
  return {
    row[0]: float(row[column].replace(",", ""))
    for row in cells
    if len(row) > 2 and re.fullmatch(r"[\d.,]+", row[column])
  }


def test_data_split_by_label(tmp_path):
  """The gap is 15 points and more over seeds."""
  found = accuracies(run("label_split.py", tmp_path, "--steps", "300"), 2)
  assert list(found) == [
    *("adapt_then_combine", "exact_diffusion", "gradient_tracking"),
  ]
  assert 40 < found["adapt_then_combine"] < 82
  assert found["exact_diffusion"] > 90
  assert found["gradient_tracking"] > 90


@pytest.mark.soak
@needs_mpi
def test_data_split_by_label_on_mpi(tmp_path):
  name, arguments = "label_split.py", ("--steps", "50")
  on_mpi = run(name, tmp_path, *arguments, ranks=3)
  simulated = run(name, tmp_path, *arguments, "--ranks", "3")
  assert accuracies(on_mpi, 1) == accuracies(simulated, 1)
  got, truth = accuracies(on_mpi, 2), accuracies(simulated, 2)
  assert len(truth) == 3
  for method in truth:
    # One of the 357 test images may fall on the other side by rounding.
    assert got[method] == pytest.approx(truth[method], abs=0.3), method


@simulated_and_on_mpi
def test_low_rank_adapters(tmp_path, ranks):
  text = run("low_rank_adapters.py", tmp_path, "--steps", "100", ranks=ranks)
  sent, accuracy = accuracies(text, 1), accuracies(text, 2)
  assert accuracy["pretrained, upright"] > 93
  assert accuracy["pretrained, turned"] < 30
  assert accuracy["adapters, turned"] > 85
  assert accuracy["all weights, turned"] > 93
  # Rank 4 of a network of 64 x 256 x 256 x 10 float32 numbers, to one neighbor.
  assert sent["adapters, turned"] == 4 * 4 * (64 + 4 * 256 + 10)
  assert sent["all weights, turned"] == 4 * 256 * (64 + 256 + 10)


def test_ranks_and_parts_of_a_mesh(tmp_path):
  text = run("two_mesh_axes.py", tmp_path)
  losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
  assert losses[0] == pytest.approx(losses[1], abs=2e-4)
  assert losses[0] < 0.2
  assert "4 ranks x 2 parts" in text
  assert "hidden: (64, 256) on a rank, (64, 128) on a device" in text
  assert "out: (256, 10) on a rank, (128, 10) on a device" in text
  assert f"sends {4 * (64 * 128 + 128 + 128 * 10):,} bytes" in text


def last_errors(text):
  """The last error of each graph of the gallery."""
  return {
    line[:20].strip(): float(line.split()[-1])
    for line in text.splitlines()
    if "last error" in line
  }


def test_graph_gallery(tmp_path):
  text = run("graph_gallery.py", tmp_path, "--ranks", "8", "--rounds", "9")
  errors = last_errors(text)
  assert len(errors) == 8
  for name in ("one-peer exponential", "base-2", "fully connected"):
    assert errors[name] < 1e-6
  assert errors["star"] > errors["ring"] > errors["torus"] > 1e-6
  gap = re.search(r"^ring .*round: (\S+)", text, re.M)[1]
  assert float(gap) == pytest.approx((2 - 2 * np.cos(np.pi / 4)) / 3, abs=1e-3)
  assert is_png(tmp_path / "graph_gallery.png")


@pytest.mark.soak
@needs_mpi
def test_graph_gallery_on_mpi(tmp_path):
  name, arguments = "graph_gallery.py", ("--rounds", "3")
  on_mpi = last_errors(run(name, tmp_path, *arguments, ranks=3))
  simulated = last_errors(run(name, tmp_path, *arguments, "--ranks", "3"))
  assert list(on_mpi) == list(simulated)
  for graph, error in simulated.items():
    assert on_mpi[graph] == pytest.approx(error, rel=0.11, abs=1e-6), graph
  assert is_png(tmp_path / "graph_gallery.png")


@needs_mpi
@needs_ulfm
def test_a_training_survives(tmp_path):
  text = run(
    "survive.py",
    tmp_path,
    *("--steps", "100", "--kill", "1@20", "3@41"),
    ranks=5,
    options=["--fault-tolerant"],
  )
  assert "rank 1 is lost at step 20" in text
  assert re.search(r"rank 3 is lost at step 4[0-3]", text), text
  found = re.search(r"3 of 5 ranks are left: accuracy ([\d.]+)%", text)
  assert found and float(found[1]) > 80, text
  assert is_png(tmp_path / "survive.png")


@needs_mpi
@needs_ulfm
def test_a_killed_rank_comes_back(tmp_path):
  text = run(
    "survive.py",
    tmp_path,
    *("--steps", "80", "--kill", "0@21"),
    ranks=3,
    options=["--fault-tolerant", "--spares", "1"],
  )
  assert re.search("rank 0 is lost at step 2[12]", text), text
  assert re.search("rank 0 is back at step 4[01]", text), text
  found = re.search(r"3 of 3 ranks are left: accuracy ([\d.]+)%", text)
  assert found and float(found[1]) > 70, text


def run_cells(path):
  """Runs a notebook's cells here; returns the names that they define."""
  notebook = json.loads(path.read_text())
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert all(
    cell["outputs"] for cell in cells if "print(" in cell["source"][-1]
  )
  matplotlib.use("Agg")
  names = {}
  try:
    for cell in cells:
      exec("".join(cell["source"]), names)
  finally:
    jax.config.update("jax_enable_x64", False)
    matplotlib.pyplot.close("all")
  return names


def test_resource_allocation():
  """The notebook's cells run, and its exact methods meet the KKT conditions."""
  names = run_cells(EXAMPLES / "resource_allocation.ipynb")
  violations = names["violations"]
  assert len(violations) == 4
  for method, violation in violations.items():
    assert (violation < 1e-10) == (not method.startswith("averaging")), method


def test_quickstart():
  """The notebook's cells run and show what its text says of them."""
  path = DOCS / "quickstart.ipynb"
  names = run_cells(path)
  for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
    assert (DOCS / target).exists(), target
  consensus = names["consensus"]
  assert consensus["one-peer exponential"][2] < 1e-6
  assert consensus["static exponential"][-1] < 1e-3 < consensus["ring"][-1]
  assert names["mean"] > 0.9
  last = {name: curve[0][-1] for name, curve in names["curves"].items()}
  assert len(last) == 6
  best = last["gradient allreduce"]
  assert best > 0.9
  assert abs(last["ring, exact diffusion"] - best) < 0.03
  assert last["no communication"] < 0.3 < last["ring"] < best - 0.05
