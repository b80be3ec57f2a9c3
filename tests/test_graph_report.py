"""`jfog topology`: its table, JSON, bytes and picture."""

import json

import matplotlib
import pytest
from matplotlib import pyplot

import jfog.topology as jt
from jfog import cli


@pytest.fixture(autouse=True)
def _close_figures():
  matplotlib.use("agg")
  yield
  pyplot.close("all")


def _table(capsys, *arguments):
  """The rows that the command prints."""
  assert cli.main(["topology", *arguments]) == 0
  lines = capsys.readouterr().out.splitlines()
  return {line[:25].strip(): line[25:] for line in lines}


@pytest.mark.parametrize("name", ["ring", "one_peer_exponential", "star"])
def test_numbers_are_those_of_repr(capsys, name):
  rows = _table(capsys, name, "--size", "8")
  graph = getattr(jt, name)(8)
  assert f"spectral_gap={rows['spectral_gap']})" in repr(graph)
  assert f"degree={rows['degree']}," in repr(graph)


def test_json_has_all_digits(capsys):
  assert cli.main(["topology", "ring", "--size", "8", "--json"]) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed["spectral_gap"] == jt.ring(8).spectral_gap


def test_bytes_of_each_round(capsys):
  # Of 6 ranks: three pairs, then two groups of three.
  arguments = ("simple_base", "--size", "6", "--arg", "k=2", "--bytes", "1.5k")
  rows = _table(capsys, *arguments)
  assert rows["bytes_per_round"] == "1.5 kB, 3 kB"
  assert rows["bytes_per_period"] == "4.5 kB"
  rows = _table(capsys, "ring", "--size", "4", "--bytes", "400M")
  assert rows["bytes_per_round"] == "800 MB"


def test_an_exact_average_has_hops(capsys):
  rows = _table(capsys, "ceca", "--size", "7", "--bytes", "10")
  assert rows["sends_per_round"] == "1"
  assert rows["diameter"] == "2"  # hops of 1, 2 and 3 in some order
  assert rows["bytes_per_period"] == "30 B"


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (["ring", "--size", "8", "--bytes", "1Q"], "--bytes 1Q is not a number"),
    (["base_k", "--size", "8"], "base_k needs --arg k=VALUE"),
    (["ring", "--size", "8", "--arg", "k=2"], "ring has no argument k"),
    (["rng", "--size", "8"], "unknown graph rng"),
    (["ring", "--size", "8", "--plot", "a.odd"], "odd"),
    (["ring", "--size", "0"], "size"),
  ],
)
def test_bad_arguments(capsys, arguments, text):
  assert cli.main(["topology", *arguments]) == 2
  captured = capsys.readouterr()
  assert text in captured.err
  assert captured.out == ""


def test_a_panel_for_each_round(tmp_path, capsys):
  path = tmp_path / "graph.svg"
  _table(capsys, "one_peer_exponential", "--size", "8", "--plot", str(path))
  assert path.read_text().lstrip().startswith("<?xml")
  figure = jt.plot_rounds(jt.one_peer_exponential(8))
  titles = [ax.get_title() for ax in figure.axes]
  assert titles == ["round 0", "round 1", "round 2"]
  legend = [text.get_text() for text in figure.legends[0].get_texts()]
  assert "weight 1/2" in legend
  assert "from sender to receiver" in legend
  # Round 1: an arrow and a weight for each of the eight edges, and eight ranks.
  texts = [text.get_text() for text in figure.axes[1].texts]
  assert texts.count("1/2") == 8
  assert len(texts) == 16
  # Round 2: exchanges between opposite ranks are four lines.
  assert [t.get_text() for t in figure.axes[2].texts].count("1/2") == 4


def test_weights_that_differ_by_direction():
  path = jt.Topology([[0.5, 0.5, 0], [0.3, 0.4, 0.3], [0, 0.5, 0.5]])
  (ax,) = jt.plot_rounds(path).axes
  texts = [text.get_text() for text in ax.texts]
  assert texts.count("1/2") == 2
  assert texts.count("3/10") == 2


def test_many_edges_and_many_rounds():
  (ax,) = jt.plot_rounds(jt.exponential(16)).axes
  assert len(ax.texts) == 16  # the ranks alone
  schedule = jt.one_peer_equidyn(6, seed=0, period=20)
  figure = jt.plot_rounds(schedule)
  assert len(figure.axes) == 16
  assert "4 more rounds" in figure.get_suptitle()


def test_one_rank_and_what_is_not_a_graph():
  (ax,) = jt.plot_rounds(jt.ring(1)).axes
  assert [text.get_text() for text in ax.texts] == ["0"]
  assert jt.plot_rounds(jt.ceca(1)).axes
  with pytest.raises(TypeError, match="expects a Topology"):
    jt.plot_rounds([[1.0]])  # type: ignore[arg-type]
