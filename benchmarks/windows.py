"""Windows: the cost of a write, writes to a busy rank, and ranks of two paces.

Run it as `python benchmarks/windows.py`; it starts the jobs itself.
"""

import json
import pathlib
import time

import _measure
import numpy as np

SCRIPT = pathlib.Path(__file__).resolve()
# Bytes of the array, and the operations of one jitted loop: as many as make the
# half millisecond small that JAX takes to call it.
CHUNKS = {8: 2000, 4096: 2000, 64 * 2**10: 500, 2**20: 100, 4 * 2**20: 25}
LONG = {**CHUNKS, 40 * 2**20: 4}
OURS = ("win_put", "win_accumulate", "win_get")
PEERS = ("mpi4py Put, Flush", "mpi4py Lock, Put, Unlock")
LINKS = {"one machine": None, "two machines, TCP": 2000.0}
BUSY_BYTES = 4 * 2**20
BUSY = ("resting", "computing", "sleeping")
SECONDS = 2.0  # of the work of a busy rank
PACES = ("alone", "asynchronous", "synchronous")


def main():
  """Starts the jobs, or does the work of one rank of a job."""
  parser = _measure.arguments(__doc__.splitlines()[0], ranks=[4])
  parser.add_argument(
    "--slow-factor", type=float, default=4, help="of the slow rank's step"
  )
  options = parser.parse_args()
  if options.job:
    return on_mpi(json.loads(options.job))
  job = {
    "sizes": list(CHUNKS if options.quick else LONG),
    "rounds": 5 if options.quick else 11,
    "target": 0.1 if options.quick else 0.5,
    "writes": 20,
    "factor": options.slow_factor,
    "steps": 60 if options.quick else 200,
  }
  measured = {
    name: _measure.mpi_job(
      SCRIPT,
      2,
      {**job, "part": "writes"},
      machines=1 if link is None else 2,
      link=link,
    )
    for name, link in LINKS.items()
  }
  paces = {
    ranks: _measure.mpi_job(SCRIPT, ranks, {**job, "part": "paces"})
    for ranks in options.ranks
  }
  report(measured, paces, job, options.out)


def on_mpi(job):
  """One rank of a job."""
  comm, slowest = _measure.start_mpi()
  if job["part"] == "writes":
    found = {"cost": cost(comm, job), "busy": busy(comm, job)}
  else:
    found = paces(comm, job, slowest)
  if comm.rank == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


class Loop:
  """Operations of jfog's in a jitted loop; rank 0 calls it."""

  def __init__(self, name, window, x, chunk):
    import jax

    import jfog

    operation = getattr(jfog, name)
    arguments = () if name == "win_get" else (x,)

    def body(i, window):
      del i
      return operation(window, *arguments)

    self._run = jax.jit(lambda w: jax.lax.fori_loop(0, chunk, body, w))
    self._window = window
    self.chunk = chunk

  def seconds(self, calls):
    """The seconds of so many calls."""
    import jax

    start = time.perf_counter()
    for _ in range(calls):
      self._window = self._run(self._window)
    jax.block_until_ready(jax.tree.leaves(self._window))
    return time.perf_counter() - start


class Raw:
  """The same by mpi4py on a window of its own."""

  def __init__(self, name, comm, size, chunk):
    from mpi4py import MPI

    self._window = MPI.Win.Allocate(size, 1, comm=comm)
    self._locks = "Lock" in name
    self._x = np.ones(size, np.uint8)
    self._exclusive = MPI.LOCK_EXCLUSIVE
    self.chunk = chunk
    if not self._locks:
      self._window.Lock_all()

  def seconds(self, calls):
    """The seconds of so many calls."""
    window, x = self._window, self._x
    start = time.perf_counter()
    for _ in range(calls * self.chunk):
      if self._locks:
        window.Lock(1, self._exclusive)
        window.Put(x, 1)
        window.Unlock(1)
      else:
        window.Put(x, 1)
        window.Flush(1)
    return time.perf_counter() - start

  def free(self):
    """Collective."""
    if not self._locks:
      self._window.Unlock_all()
    self._window.Free()


def values(count):
  """An array that XLA does not make anew in each round of a loop."""
  import jax.numpy as jnp

  return jnp.asarray(np.random.RandomState(0).randn(count), jnp.float32)


def cost(comm, job):
  """Seconds of one operation, by size and form, one for each round."""
  import jfog

  cases = {}
  for size in job["sizes"]:
    x = values(size // 4)
    window = jfog.win_create(x, jfog.topology.ring(2))
    peers = {n: Loop(n, window, x, LONG[size]) for n in OURS}
    raw = {n: Raw(n, comm, size, LONG[size]) for n in PEERS}
    peers |= raw
    if comm.rank == 0:
      calls = {}
      for name, peer in peers.items():
        peer.seconds(1)  # compiles, and connects
        calls[name] = _measure.calls_for(peer.seconds(1), job["target"])
      cases[size] = _measure.alternate(
        peers,
        job["rounds"],
        lambda peer, peers=peers, calls=calls: (
          peer.seconds(c := calls[_name(peers, peer)]) / (c * peer.chunk)
        ),
      )
    comm.Barrier()
    for peer in raw.values():
      peer.free()
    jfog.win_free(window)
  return cases


def _name(peers, peer):
  return next(name for name, other in peers.items() if other is peer)


def busy(comm, job):
  """Seconds of single writes while rank 1 rests, computes and sleeps."""
  import jax
  import jax.numpy as jnp

  import jfog

  x = values(BUSY_BYTES // 4)
  window = jfog.win_create(x, jfog.topology.ring(2))
  forms = {name: Loop(name, window, x, 1) for name in OURS}
  matrix = jnp.eye(1000)
  work = jax.jit(lambda a, n: jax.lax.fori_loop(0, n, lambda i, a: a @ a, a))
  jax.block_until_ready(work(matrix, 1))
  begun = time.perf_counter()
  jax.block_until_ready(work(matrix, 5))
  rounds = int(5 * SECONDS / (time.perf_counter() - begun)) + 1
  if comm.rank == 0:
    for form in forms.values():
      form.seconds(2)
  found = {}
  for kind in BUSY:
    comm.Barrier()
    if comm.rank == 1:
      start = time.perf_counter()
      if kind == "computing":
        jax.block_until_ready(work(matrix, rounds))
      elif kind == "sleeping":
        time.sleep(SECONDS)
      comm.send(time.perf_counter() - start, 0)
    else:
      time.sleep(0.1)
      start = time.perf_counter()
      found[kind] = {
        name: [form.seconds(1) for _ in range(job["writes"])]
        for name, form in forms.items()
      }
      took = 0.1 + time.perf_counter() - start
      found[kind]["all ended before rank 1"] = took < comm.recv(source=1)
  comm.Barrier()
  jfog.win_free(window)
  return found


def paces(comm, job, slowest):
  """Steps a second of a fast rank and of the slow one, by form and round."""
  import jax
  import jax.numpy as jnp

  import jfog

  graph = jfog.topology.ring(comm.size)
  x = jnp.ones(100_000)
  window = jfog.win_create(x, graph)
  forms = {
    "alone": lambda w, x: (x, w),
    "asynchronous": lambda w, x: jfog.win_update(jfog.win_put(w, x), x),
    "synchronous": lambda w, x: (jfog.neighbor_allreduce(x, graph), w),
  }
  slow = comm.rank == comm.size - 1
  nap = 0.02 * (job["factor"] if slow else 1)

  def rate(form):
    run = jax.jit(form)
    jax.block_until_ready(run(window, x)[0])
    steps = job["steps"]
    if slow and form is not forms["synchronous"]:
      steps = int(steps / job["factor"])
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(steps):
      time.sleep(nap)
      jax.block_until_ready(run(window, x)[0])
    seconds = time.perf_counter() - start
    # The slowest of the fast ranks, and the slow one.
    fast = 0.0 if slow else seconds / steps
    pair = slowest(fast), slowest(seconds / steps if slow else 0.0)
    return [1 / step for step in pair]

  found = _measure.alternate(forms, 3, rate)
  comm.Barrier()
  jfog.win_free(window)
  return found


def report(measured, paces, job, out):
  """Writes the tables and the plot."""
  lines = _measure.header(
    "Windows",
    "one-sided operations of `jfog` in jitted loops, against mpi4py's on a "
    "window of MPI",
    SCRIPT,
  )
  lines += [
    "Rank 0 writes to or reads from rank 1, which waits in MPI. Seconds"
  ]
  lines += ["of one operation by those of `win_put`, median [quartiles]; above"]
  lines += [
    "1 `win_put` is faster. Put and Flush let a reader see half a put:",
    "",
  ]
  cases = [
    (link, size, found["cost"][str(size)])
    for link, found in measured.items()
    for size in job["sizes"]
  ]
  others = [*OURS[1:], *PEERS]
  lines += _measure.table(
    ["between", "array", "win_put", *others],
    [
      [
        link,
        _measure.size_name(size),
        _measure.duration(np.median(times["win_put"])),
        *(
          _measure.spread(_measure.ratios(times[peer], times["win_put"]))
          for peer in others
        ),
      ]
      for link, size, times in cases
    ],
  )
  lines += [f"Single calls of {_measure.size_name(BUSY_BYTES)} while rank 1 is"]
  lines += [
    f"busy for {SECONDS:g} s, median and longest of {job['writes']}:",
    "",
  ]
  lines += _measure.table(
    ["between", "rank 1 is", *OURS, "all ended before rank 1"],
    [
      [
        link,
        kind,
        *(
          f"{_measure.duration(np.median(found['busy'][kind][name]))}, "
          f"{_measure.duration(max(found['busy'][kind][name]))}"
          for name in OURS
        ),
        "" if kind == "resting" else found["busy"][kind][_ENDED],
      ]
      for link, found in measured.items()
      for kind in BUSY
    ],
  )
  lines += ["Step rates with one rank that is slow by a sleep "]
  lines[-1] += (
    f"({job['factor']:g} times the others' 20 ms), by the rate alone:"
  )
  lines += [""]
  lines += _measure.table(
    ["ranks", "form", "fast ranks", "slow rank"],
    [
      [
        ranks,
        form,
        *(
          f"{np.median([pair[i] for pair in found[form]]) / alone[i]:.2f}"
          for i in (0, 1)
        ),
      ]
      for ranks, found in paces.items()
      for alone in [np.median(np.array(found["alone"]), axis=0)]
      for form in PACES[1:]
    ],
  )
  figure, axes = _measure.panels(1, len(measured) + 1)
  for panel, link in zip(axes[0], measured, strict=False):
    here = [(size, times) for of, size, times in cases if of == link]
    for peer in others:
      medians = [
        np.median(_measure.ratios(times[peer], times["win_put"]))
        for _, times in here
      ]
      panel.loglog([size for size, _ in here], medians, "o-", label=peer)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set(title=link, xlabel="bytes", ylabel="time by win_put's")
  axes[0][0].legend(fontsize=7)
  panel = axes[0][-1]
  ranks, found = next(iter(paces.items()))
  alone = np.median(np.array(found["alone"]), axis=0)
  for i, label in enumerate(("fast ranks", "slow rank")):
    values = [
      np.median([pair[i] for pair in found[form]]) / alone[i]
      for form in PACES[1:]
    ]
    panel.bar(np.arange(2) + 0.4 * i - 0.2, values, 0.35, label=label)
  panel.set_xticks([0, 1], PACES[1:])
  panel.set(title=f"step rate, {ranks} ranks", ylabel="by the rate alone")
  panel.legend(fontsize=7)
  _measure.write(out, "windows", lines, figure)


_ENDED = "all ended before rank 1"

if __name__ == "__main__":
  main()
