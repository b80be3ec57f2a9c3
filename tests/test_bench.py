"""`jfog bench`: its options, table, plot and JSON, and one job."""

import argparse
import json

import matplotlib
import numpy as np
import pytest

from jfog import cli
from jfog.bench import command, measure, peers


def _results():
  """Times of two numbers of ranks, with jfog twice as fast as raw MPI."""
  return [
    {
      "ranks": ranks,
      "operation": operation,
      "bytes": size,
      "seconds": {
        "jfog": [1e-6 * ranks + size / 1e9] * 3,
        "raw MPI": [2e-6 * ranks + 2 * size / 1e9] * 3,
        "copy": [size / 5e9] * 3,
      },
    }
    for ranks in (2, 4)
    for operation in ("neighbor_allreduce, ring", "allreduce")
    for size in (8, 2**20)
  ]


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (["--operations", "gossip"], "--operations gossip is not one of neighbor"),
    (["--bytes", "7"], "--bytes 7 is not one of 8, 512"),
    (["-np", "1"], "-np 1: there is nothing to send"),
  ],
)
def test_bad_options(capsys, arguments, text):
  assert cli.main(["bench", *arguments]) == 2
  assert text in capsys.readouterr().err


def test_cases_are_the_chosen_operations_and_sizes():
  parser = argparse.ArgumentParser()
  command.add_arguments(parser)
  words = ["-np", "2", "4", "--operations", "win_put", "--bytes", "8", "4096"]
  options = parser.parse_args(words)
  assert options.ranks == [2, 4]
  assert command._cases(options) == [("win_put", 8), ("win_put", 4096)]
  sizes = {size for _, size in command._cases(parser.parse_args([]))}
  assert sizes <= set(peers.CHUNKS)
  assert set(command._ALL_SIZES) == set(peers.CHUNKS)


def test_the_table_has_ratios():
  lines = command._report(_results())
  rows = [line for line in lines if line.startswith("| neighbor_allreduce")]
  assert len(rows) == 4
  assert rows[0] == (
    "| neighbor_allreduce, ring | 2 | 8 B | 2.01 us | 0.00398 | "
    "2.00 [2.00, 2.00] | 0.00 [0.00, 0.00] |"
  )


def test_the_plot_has_three_panels(tmp_path, monkeypatch):
  from matplotlib import pyplot

  matplotlib.use("agg")
  closed = []
  monkeypatch.setattr(pyplot, "close", closed.append)
  command._draw(_results(), str(tmp_path / "bench.png"))
  assert (tmp_path / "bench.png").stat().st_size > 10_000
  (figure,) = closed
  time, bandwidth, scaling = figure.axes
  (first, *_) = time.lines
  np.testing.assert_allclose(
    first.get_ydata(), [4 + 0.008, 4 + 2**20 / 1e3], rtol=1e-6
  )
  assert bandwidth.get_ylabel() == "GB/s"
  assert sorted(scaling.lines[0].get_xdata()) == [2, 4]
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  assert "neighbor_allreduce, ring, raw MPI" in labels
  monkeypatch.undo()
  pyplot.close(figure)


def test_peers_take_turns():
  order = []

  def measured(peer):
    order.append(peer)
    return float(len(order))

  times = measure.alternate({"a": 1, "b": 2}, 2, measured)
  assert order == [1, 2, 2, 1]
  assert times == {"a": [1.0, 4.0], "b": [2.0, 3.0]}
  assert measure.ratios(times["b"], times["a"]) == [2.0, 0.75]


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_job_measures_and_checks_every_operation(tmp_path, capfd, ranks):
  """A job; with 4 ranks another one, of two pretended machines."""
  path = tmp_path / "bench.json"
  words = ["bench", "--quick", "--yield", "-np", str(ranks), "--bytes", "8"]
  assert cli.main([*words, "--json", str(path)]) == 0
  written = json.loads(path.read_text())
  assert written["mpi"]
  found = {each["operation"]: each["seconds"] for each in written["results"]}
  assert list(found) == [
    "neighbor_allreduce, ring",
    "neighbor_allreduce, one-peer exponential",
    "allreduce",
    "win_put",
    *(["hierarchical_neighbor_allreduce"] if ranks == 4 else []),
  ]
  for name, seconds in found.items():
    assert {"jfog", "copy"} <= set(seconds)
    assert ("raw MPI" in seconds) == (name != "win_put")
    assert all(len(times) == 3 and min(times) > 0 for times in seconds.values())
  assert f"| allreduce | {ranks} | 8 B |" in capfd.readouterr().out
