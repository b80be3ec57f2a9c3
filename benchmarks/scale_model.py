"""The model of `jfog.lab.predict_step` at 8 to 10 000 ranks, and its error.

Run it as `python benchmarks/scale_model.py`. It computes and starts no job. With a table
of `scaling.py` (`--measured`) it fits rate and delay of each link to all numbers of
ranks but the largest, and predicts that one.
"""

import argparse
import pathlib
import re

import _measure
import numpy as np

from jfog import lab

SCRIPT = pathlib.Path(__file__).resolve()
MODEL = 102.4e6  # bytes of a ResNet-50 in float32
PER_HOST = 8
# 4310.6 images a second on 16 GPUs with 64 images each, by BlueFog's page on
# performance: at most so long takes the computation.
COMPUTE = {64: 64 * 16 / 4310.6, 32: 32 * 16 / 4310.6}
LINK = {
  "latency": 50e-6,
  "bandwidth": 25e9 / 8,
  "inner_latency": 5e-6,
  "inner_bandwidth": 100e9,
}
# Of the chart: ranks, images of a rank, efficiency.
PUBLISHED = {
  "BlueFog (over)": (128, 64, 0.95),
  "Horovod (around)": (128, 64, 0.66),
}
METHODS = {
  "hierarchical one-peer": "hierarchical_one_peer_exponential",
  "one-peer exponential": "one_peer_exponential",
  "exponential": "exponential",
  "ring": "ring",
  "grid": "mesh_grid_2d",
  "ring allreduce": "ring_allreduce",
  "tree allreduce": "tree_allreduce",
  "halving-doubling allreduce": "halving_doubling_allreduce",
}
# Rounds of METHODS with other bytes or less often: factor of bytes, steps between.
VARIANTS = {
  "hierarchical one-peer, 1 % of the bytes": (
    *("hierarchical_one_peer_exponential", 0.01, 1),
  ),
  "local SGD or DiLoCo, 16 steps, ring allreduce": ("ring_allreduce", 1, 16),
}
SLOW = {"latency": 20e-3, "bandwidth": 1e9 / 8}  # a host for each rank


def main():
  """Computes the tables and the plot."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--ranks", type=int, nargs="+", default=[8, 16, 32, 128, 1024, 10_000]
  )
  parser.add_argument(
    "--measured",
    type=pathlib.Path,
    default=_measure.FOLDER / "results" / "scaling.md",
    help="a table of scaling.py to fit to, if it is there",
  )
  parser.add_argument(
    "--out", type=pathlib.Path, default=_measure.FOLDER / "results"
  )
  options = parser.parse_args()
  if any(ranks % PER_HOST for ranks in options.ranks):
    parser.error(f"every number of --ranks must be a multiple of {PER_HOST}.")
  lines = _measure.header(
    "Steps at scale by the alpha-beta model",
    "seconds and efficiency of a training step as jfog.lab.predict_step computes "
    "them; nothing here is measured but for the last section",
    SCRIPT,
    [
      f"chart of BlueFog: {MODEL / 1e6:g} MB of parameters (ResNet-50), "
      f"{PER_HOST} ranks a host, 25 Gbit/s and 50 us between hosts; 100 GB/s and "
      "5 us inside, which are assumed",
      f"computation: {1000 * COMPUTE[64]:.0f} ms with 64 images a rank, half of it "
      "with 32",
    ],
  )
  lines += chart_lines(options.ranks)
  lines += published_lines()
  lines += slow_lines(options.ranks)
  lines += crossover_lines()
  if options.measured.exists():
    lines += measured_lines(options.measured.read_text())
  _measure.write(options.out, "scale_model", lines, draw(options.ranks))


def chart_step(name, ranks, images, overlap=0.0):
  """A step on the hardware of the chart; `overlap` is a share of computation."""
  method, share, every = VARIANTS.get(name) or (METHODS[name], 1, 1)
  return lab.predict_step(
    method,
    share * MODEL,
    size=ranks,
    ranks_per_host=PER_HOST,
    compute=COMPUTE[images],
    overlap=overlap * COMPUTE[images],
    every=every,
    **LINK,
  )


def slow_step(name, ranks):
  """A step between hosts of one rank with 1 Gbit/s and 20 ms."""
  method, share, every = VARIANTS.get(name) or (METHODS[name], 1, 1)
  return lab.predict_step(
    method, share * MODEL, size=ranks, compute=1.0, every=every, **SLOW
  )


def chart_lines(all_ranks):
  """Communication and efficiencies on the hardware of BlueFog's chart."""
  lines = [
    "## Hardware of BlueFog's chart",
    "",
    "Seconds of a step's communication; behind them its efficiency with 64 and with "
    "32 images a rank if nothing is hidden behind the computation.",
    "",
  ]
  rows = []
  for name in (*METHODS, *VARIANTS):
    row = [name]
    for ranks in all_ranks:
      steps = [chart_step(name, ranks, images) for images in (64, 32)]
      row.append(
        f"{_measure.duration(steps[0].communication)}, "
        + ", ".join(f"{step.efficiency:.0%}" for step in steps)
      )
    rows.append(row)
  return lines + _measure.table(
    ["step", *(f"{ranks} ranks" for ranks in all_ranks)], rows
  )


def published_lines():
  """The points of the chart beside the model, and what would explain them."""
  lines = [
    "## Published points",
    "",
    "At 128 GPUs and 64 images. *Hidden*: the share of the computation behind which "
    "the exchange may go on: all of it for averages of parameters, the backward, "
    "two thirds, for gradients.",
    "",
  ]
  rows = [
    ["published: BlueFog over, Horovod around", "", "95 %", "66 %"],
    *(
      [
        f"model, {gigabits:g} Gbit/s",
        hidden,
        f"{at_rate('hierarchical_one_peer_exponential', share, gigabits):.0%}",
        f"{at_rate('ring_allreduce', share and 2 / 3, gigabits):.0%}",
      ]
      for gigabits in (25, 10, 5)
      for hidden, share in (("nothing", 0.0), ("as above", 1.0))
    ),
  ]
  lines += _measure.table(
    ["", "hidden", "one-peer by hosts", "ring allreduce"], rows
  )
  rates = [
    explaining_rate("ring_allreduce", 0.66, share) for share in (0.0, 2 / 3)
  ]
  return [
    *lines,
    f"A ring allreduce with 66 % means a rate of {rates[0]:.1f} Gbit/s if nothing "
    f"of it is hidden, and {rates[1]:.1f} Gbit/s if the whole backward hides it.",
    "",
  ]


def at_rate(method, overlap, gigabits):
  """The efficiency at 128 ranks of the chart on a link of another rate."""
  return lab.predict_step(
    method,
    MODEL,
    size=128,
    ranks_per_host=PER_HOST,
    compute=COMPUTE[64],
    overlap=overlap * COMPUTE[64],
    **{**LINK, "bandwidth": gigabits * 1e9 / 8},
  ).efficiency


def explaining_rate(method, efficiency, overlap):
  """The gigabits a second at which a method has an efficiency, by bisection."""
  low, high = 0.01, 100.0
  for _ in range(60):
    middle = (low * high) ** 0.5
    if at_rate(method, overlap, middle) < efficiency:
      low = middle
    else:
      high = middle
  return high


def slow_lines(all_ranks):
  """Communication on a slow network with a host for each rank."""
  lines = [
    "## Hosts of one rank with 1 Gbit/s and 20 ms",
    "",
    "Seconds of a step's communication, and its efficiency with 1 s of computation "
    "that hides nothing.",
    "",
  ]
  rows = []
  for name in (*METHODS, *VARIANTS):
    if METHODS.get(name) == "hierarchical_one_peer_exponential":
      continue  # with one rank a host it is one-peer
    steps = [slow_step(name, ranks) for ranks in all_ranks]
    rows.append(
      [
        name.replace("hierarchical ", ""),
        *(
          f"{_measure.duration(step.communication)}, {step.efficiency:.0%}"
          for step in steps
        ),
      ]
    )
  return lines + _measure.table(
    ["step", *(f"{ranks} ranks" for ranks in all_ranks)], rows
  )


def crossover_lines():
  """Messages from which a halving-doubling allreduce is faster than a graph."""
  lines = [
    "## Where allreduce is faster",
    "",
    "Bytes from which the fastest allreduce takes less time than a round of the "
    "graph, 25 Gbit/s and 50 us, one rank a host (-: from none on).",
    "",
  ]
  rows = []
  for name in ("one-peer exponential", "ring", "grid", "exponential"):
    row = [name]
    for ranks in (8, 128, 1024):
      found = crossover(METHODS[name], ranks)
      row.append(
        "-" if found is None else f"{float(f'{found / 1e6:.2g}'):g} MB"
      )
    rows.append(row)
  return lines + _measure.table(
    ["graph", *(f"{ranks} ranks" for ranks in (8, 128, 1024))], rows
  )


def crossover(method, ranks):
  """The smallest message for which an allreduce is faster; None if none is."""
  allreduces = [name for name in METHODS.values() if "allreduce" in name]

  def graph_is_faster(size):
    times = {
      name: lab.predict_step(
        name,
        size,
        size=ranks,
        compute=0.0,
        latency=LINK["latency"],
        bandwidth=LINK["bandwidth"],
      ).communication
      for name in (method, *allreduces)
    }
    return times.pop(method) <= min(times.values())

  low, high = 1.0, 1e13
  if graph_is_faster(high):
    return None
  for _ in range(60):
    middle = (low * high) ** 0.5
    if graph_is_faster(middle):
      low = middle
    else:
      high = middle
  return high


# The measurements of scaling.py.

MEASURED = {
  "one-peer exponential": "one_peer_exponential",
  "exponential": "exponential",
  "ring": "ring",
}
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def read(text):
  """`{(MB/s, ms): {form: {ranks: seconds}}}` and the megabytes, of a table."""
  megabytes = float(re.search(r"averages of ([\d.]+) MB", text)[1])
  links = {}
  for part in re.split(r"^## ", text, flags=re.M)[1:]:
    head = re.match(r"([\d.]+) MB/s, ([\d.]+) ms\n", part)
    if not head:
      continue
    forms = links.setdefault((float(head[1]), float(head[2])), {})
    for row in re.findall(
      r"^\| (\d+) \| (.+?) \| ([\d.e+]+) (\w+) \|", part, re.M
    ):
      ranks, form, number, unit = row
      forms.setdefault(form, {})[int(ranks)] = float(number) * UNITS[unit]
  return links, megabytes


def fitted(forms, megabytes, of_ranks):
  """Delay and rate of a link, by least squares of relative errors."""
  rows, seconds = [], []
  for form, method in MEASURED.items():
    for ranks in of_ranks:
      if ranks in forms.get(form, {}):
        rows.append([1.0, arrays(method, ranks)])
        seconds.append(forms[form][ranks])
  weights = 1 / np.array(seconds)
  found, *_ = np.linalg.lstsq(
    np.array(rows) * weights[:, None], np.ones(len(rows)), rcond=None
  )
  latency, per_array = np.maximum(found, 1e-9)
  return float(latency), megabytes * 1e6 / float(per_array)


def arrays(method, ranks):
  """How often a round sends the whole array out of a host."""
  return lab.predict_step(
    method, 1.0, size=ranks, compute=0.0, latency=0.0, bandwidth=1.0
  ).communication


def measured_lines(text):
  """The model's error on the largest number of ranks, which the fit leaves out."""
  links, megabytes = read(text)
  lines = [
    "## Against measurements",
    "",
    "Rate and delay of each link are fitted to the averages with neighbors of "
    "`scaling.md` on all numbers of ranks but the largest; errors of the prediction "
    "there. The allreduces, and what is made of them, are not in the fit.",
    "",
  ]
  rows = []
  for (rate, delay), forms in links.items():
    sizes = sorted({ranks for times in forms.values() for ranks in times})
    if len(sizes) < 2:
      continue
    latency, bandwidth = fitted(forms, megabytes, sizes[:-1])
    for form, times in forms.items():
      signs = form.startswith("choco")  # a bit of 32 to both neighbors
      method = "ring" if signs else MEASURED.get(form, "ring_allreduce")
      every = re.search(r"every (\d+)", form)
      if sizes[-1] not in times or form.startswith("hierarchical"):
        continue
      expected = lab.predict_step(
        method,
        megabytes * 1e6 / (32 if signs else 1),
        size=sizes[-1],
        every=int(every[1]) if every else 1,
        compute=0.0,
        latency=latency,
        bandwidth=bandwidth,
      ).communication
      rows.append(
        [
          f"{rate:g} MB/s, {delay:g} ms",
          f"{bandwidth / 1e6:.4g} MB/s, {1000 * latency:.3g} ms",
          *(form, sizes[-1], _measure.duration(times[sizes[-1]])),
          *(
            _measure.duration(expected),
            f"{expected / times[sizes[-1]] - 1:+.0%}",
          ),
        ]
      )
  if not rows:
    return []
  return lines + _measure.table(
    ["link", "fitted", "form", "ranks", "measured", "model", "error"], rows
  )


def draw(all_ranks):
  """Efficiencies over ranks, with the published points."""
  figure, axes = _measure.panels(1, 3, sharey=True)
  ranks = sorted({*all_ranks, *(2**p for p in range(3, 14))})
  cases = [
    (
      "64 images a rank, nothing hidden",
      lambda name, n: chart_step(name, n, 64),
    ),
    (
      "32 images a rank, nothing hidden",
      lambda name, n: chart_step(name, n, 32),
    ),
    ("1 rank a host, 1 Gbit/s, 20 ms, 1 s", slow_step),
  ]
  for panel, (title, step) in zip(axes[0], cases, strict=True):
    for i, name in enumerate(METHODS):
      style = "--" if "allreduce" in name else "-"
      efficiencies = [step(name, n).efficiency for n in ranks]
      panel.semilogx(
        ranks, efficiencies, style, base=2, color=f"C{i}", label=name, lw=1.4
      )
    panel.set(title=title, xlabel="ranks", ylim=(0, 1.02))
    panel.grid(alpha=0.3)
  for (name, (n, _, efficiency)), marker in zip(
    PUBLISHED.items(), "^v", strict=True
  ):
    axes[0][0].plot(
      n, efficiency, marker, color="black", ms=8, label=f"published: {name}"
    )
  axes[0][0].set(ylabel="efficiency of a step")
  handles, labels = axes[0][0].get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc="upper center",
    bbox_to_anchor=(0.5, 0),
    ncols=5,
    fontsize=8,
  )
  figure.tight_layout()
  return figure


if __name__ == "__main__":
  main()
