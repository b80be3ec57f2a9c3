"""The command of the soak: `python tests/soak --minutes 60 --seed 1`."""

import argparse
import os
import pathlib
import signal
import sys
import time

TESTS = pathlib.Path(__file__).resolve().parents[1]
# In place of this folder, in which the modules of the package would be found twice.
sys.path[0] = str(TESTS)

from soak import plan, report  # noqa: E402


def _parsed(arguments=None):
  parser = argparse.ArgumentParser(
    prog="python tests/soak", description=__doc__
  )
  parser.add_argument("--minutes", type=float, default=1.0)
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument(
    "--count", type=int, default=60, help="programs in one job"
  )
  parser.add_argument(
    "--long", action="store_true", help="with the long limits and many ranks"
  )
  parser.add_argument(
    "--kind", choices=plan.KINDS, action="append", help="of these kinds only"
  )
  parser.add_argument("--job", type=int, help="only the job of this number")
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("soak.json")
  )
  return parser.parse_args(arguments)


def _chosen(options):
  """The jobs of the command line."""
  if options.job is not None:
    (kind,) = options.kind or [plan.TURNS[options.job % len(plan.TURNS)]]
    yield plan.Job(options.seed, options.job, kind, options.count, options.long)
    return
  for job in plan.jobs(options.seed, options.count, options.long):
    if not options.kind or job.kind in options.kind:
      yield job
    if options.long and job.number % 200 == 100:
      yield plan.Job(options.seed, job.number, "many ranks", 3, True)


def main() -> int:
  """Runs jobs until the time is over; 1 if there is a finding."""
  # Its running job is ended, too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  options = _parsed()
  start, figures = time.monotonic(), report.Report()
  for job in _chosen(options):
    lines = plan.run(job)
    figures.add(lines)
    for line in lines:
      if line["problems"]:
        print(report.describe(line), flush=True)
    seconds = time.monotonic() - start
    cases = sum(line["kind"] != "job" for line in figures.lines)
    print(
      f"{seconds:6.0f} s, job {job.number} ({job.kind}): {cases} cases, "
      f"{len(figures.findings)} findings",
      flush=True,
    )
    figures.write(
      options.output,
      command=f"python tests/soak {' '.join(sys.argv[1:])}",
      seconds=round(seconds),
      cores=os.cpu_count(),
    )
    if seconds > 60 * options.minutes:
      break
  print(figures.table(), *figures.left_out(), sep="\n")
  return 1 if figures.findings else 0


if __name__ == "__main__":
  sys.exit(main())
