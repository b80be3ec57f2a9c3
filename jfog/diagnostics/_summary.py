"""The summary of a run over all ranks."""

import jax

from jfog import runtime
from jfog.diagnostics._counters import of_processes
from jfog.runtime import Communicator, RankSummary, Summary, resolve


def summary(*, comm: Communicator | None = None) -> Summary:
  """Operations, bytes and waits of all ranks, and the slowest rank. Collective.

  Its `str` is a table. A rank waits where an operation that the program needs has
  not completed for lack of a message; time of less than 0.1 ms, or 1 ms with more
  ranks than cores, is not counted, and several operations that wait at once count
  each. The wait is counted for every rank of which a message is missing. That of a
  collective counts for no rank, since its route through the ranks is up to MPI,
  and on GPUs, where the stream waits, no wait is counted.

  With `jfog run --summary` or `JFOG_SUMMARY=1` rank 0 prints the table on stderr at
  the end of the program.

  Args:
    comm: the communicator; by default the one in reach, see `jfog.init`. All its
      ranks call this.

  Returns:
    A `Summary`: `ranks`, a `RankSummary` for each rank, and `slowest_rank`, for
    which the others have waited longest, or None.

  Raises:
    ValueError: on a mesh, where XLA moves the data without counters.
    NotInitializedError: without a communicator.
    RuntimeError: if a rank does not come within the timeout.

  Example:
    >>> import jfog
    >>> comm = jfog.init(backend="single")
    >>> print(jfog.diagnostics.summary())
    rank  operations  sent  received  messages   waited  waited by others  waited most for
       0           0   0 B       0 B         0  0.000 s           0.000 s                -
    1 ranks, 0.0 s
  """
  comm = resolve(comm)
  if comm.backend == "single":
    return Summary((RankSummary(0, 0, 0, 0, 0, 0.0, 0.0, {}),))
  # Operations in flight are counted when they complete.
  jax.effects_barrier()
  return runtime.gathered_summary(of_processes(comm))
