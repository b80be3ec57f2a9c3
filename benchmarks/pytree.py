"""Averaging many leaves against one array of the same bytes, side by side.

Run it as `python benchmarks/pytree.py`; it starts the jobs itself.
"""

import json
import math
import pathlib

import _measure
import numpy as np

SCRIPT = pathlib.Path(__file__).resolve()
GRAPHS = ("ring", "one-peer exponential")
FORMS = ("leaves", "one call a leaf", "raw MPI, one array")  # of "one array"
CHUNK = 32  # steps of one jitted scan, for a call costs some 45 us a leaf


def resnet50():
  """The shapes of a ResNet-50's parameters, 25.6 million in 161 arrays."""
  shapes = [(7, 7, 3, 64), (64,), (64,)]  # convolution, scale and bias
  channels = 64
  for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
    for block in range(blocks):
      convolutions = [(1, channels, width), (3, width, width)]
      convolutions += [(1, width, 4 * width)]
      if block == 0:  # the projection beside it
        convolutions += [(1, channels, 4 * width)]
      for side, inputs, outputs in convolutions:
        shapes += [(side, side, inputs, outputs), (outputs,), (outputs,)]
      channels = 4 * width
  return [*shapes, (channels, 1000), (1000,)]


TREES = {
  "160 equal leaves": [(25_000,)] * 160,
  "ResNet-50": resnet50(),
}


def main():
  """Starts the jobs, or does the work of one rank of a job."""
  parser = _measure.arguments(__doc__.splitlines()[0], ranks=[2, 4])
  options = parser.parse_args()
  if options.job:
    return on_mpi(json.loads(options.job))
  job = {
    "cases": [(tree, graph) for tree in TREES for graph in GRAPHS],
    "rounds": 3 if options.quick else 9,
    "target": 0.01 if options.quick else 0.05,
  }
  measured = {n: _measure.mpi_job(SCRIPT, n, job) for n in options.ranks}
  report(measured, job["cases"], options.out)


def split(flat, shapes):
  """One array as leaves of these shapes."""
  ends = np.cumsum([math.prod(shape) for shape in shapes])
  parts = np.split(flat, ends[:-1])
  return [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]


def on_mpi(job):
  """One rank of a job: the forms alternate within each case."""
  comm, slowest = _measure.start_mpi()
  import _peers

  def forms_of(shapes, graph, chunk):
    flat = _peers.start(comm.rank, sum(map(math.prod, shapes)))
    leaves = split(flat, shapes)
    return {
      "one array": _peers.Jfog(graph, chunk, flat, comm),
      "leaves": _peers.Jfog(graph, chunk, leaves, comm),
      "one call a leaf": _peers.JfogByLeaf(graph, chunk, leaves, comm),
      "raw MPI, one array": _peers.Raw(graph, chunk, flat, comm),
    }

  small = [(3, 5), (), (7,), (2048, 100)]
  for name in GRAPHS:
    graph = _peers.GRAPHS[name](comm.size)
    count = sum(map(math.prod, small))
    wanted = _peers.expected(graph, count, 2)[comm.rank]
    for form, of in forms_of(small, graph, 2).items():
      of.seconds(1)
      value = of.value()
      if isinstance(value, list):
        value = np.concatenate([leaf.ravel() for leaf in value])
      np.testing.assert_allclose(value, wanted, 1e-5, err_msg=form)

  found = {}
  for tree, name in job["cases"]:
    forms = forms_of(TREES[tree], _peers.GRAPHS[name](comm.size), CHUNK)
    for form in forms.values():
      form.seconds(1)  # compiles
    pilot = slowest(forms["one array"].seconds(1))
    calls = _measure.calls_for(pilot, job["target"])

    def step(form, calls=calls):
      return slowest(form.seconds(calls)) / (calls * CHUNK)

    found[f"{tree} {name}"] = _measure.alternate(forms, job["rounds"], step)
  if comm.rank == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


def report(measured, cases, out):
  """Writes the table and the plot."""
  rows = []
  for n, found in measured.items():
    for tree, graph in cases:
      times = found[f"{tree} {graph}"]
      cells = [
        _measure.spread(_measure.ratios(times[form], times["one array"]))
        for form in FORMS
      ]
      shown = _measure.duration(np.median(times["one array"]))
      rows.append([n, tree, graph, shown, *cells])
  lines = _measure.header(
    "Pytrees",
    "one step of `jfog.neighbor_allreduce` on a pytree in a jitted scan, "
    "against the same step on one array of as many bytes",
    SCRIPT,
    [
      *(
        f"{name}: {len(shapes)} arrays of float32, "
        f"{sum(map(math.prod, shapes)) * 4 / 1e6:.1f} MB"
        for name, shapes in TREES.items()
      ),
      "cells: the time by that of one array, median [quartiles]; above 1 it "
      "is slower than one array",
    ],
  )
  lines += _measure.table(["ranks", "tree", "graph", "one array", *FORMS], rows)
  figure, axes = _measure.panels(1, len(measured), sharey=True)
  places = np.arange(len(cases))
  for panel, (n, found) in zip(axes[0], measured.items(), strict=True):
    for i, form in enumerate(FORMS):
      heights = [
        np.median(_measure.ratios(times[form], times["one array"]))
        for times in (found[f"{tree} {graph}"] for tree, graph in cases)
      ]
      panel.bar(places + 0.25 * (i - 1), heights, 0.25, label=form)
    panel.axhline(1, color="black", lw=1)
    panel.set_xticks(places, [f"{t}\n{g}" for t, g in cases], fontsize=6)
    panel.set_title(f"{n} ranks")
  axes[0][0].set_ylabel("time by that of one array")
  axes[0][0].legend(fontsize=8)
  figure.tight_layout()
  _measure.write(out, "pytree", lines, figure)


if __name__ == "__main__":
  main()
