"""The command of the soak: `python tests/soak --minutes 60 --seed 1`."""

import argparse
import concurrent.futures
import os
import pathlib
import signal
import sys
import time

TESTS = pathlib.Path(__file__).resolve().parents[1]
# In place of this folder, in which the modules of the package would be found twice.
sys.path[0] = str(TESTS)

from soak import plan, report, runner  # noqa: E402


def _parsed(arguments=None):
  parser = argparse.ArgumentParser(
    prog="python tests/soak", description=__doc__
  )
  parser.add_argument("--minutes", type=float, default=1.0)
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument(
    "--count", type=int, default=60, help="programs in one job"
  )
  parser.add_argument("--jobs", type=int, default=1, help="jobs at a time")
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


def _finished(jobs, at_a_time):
  """Runs jobs, `at_a_time` of them; yields each that has ended with its lines."""
  with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
    running = {}
    for job in jobs:
      running[pool.submit(plan.run, job)] = job
      if len(running) < at_a_time:
        continue
      done, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in done:
        yield running.pop(future), future.result()
    for future, job in running.items():
      yield job, future.result()


def _terminate(number, frame):
  """The handler of SIGTERM: the jobs that run end, too."""
  del frame
  runner.end_all()
  sys.exit(128 + number)


def main() -> int:
  """Runs jobs until the time is over; 1 if there is a finding."""
  signal.signal(signal.SIGTERM, _terminate)
  options = _parsed()
  start, figures = time.monotonic(), report.Report()

  def chosen():
    for job in _chosen(options):
      if time.monotonic() - start > 60 * options.minutes:
        return
      yield job

  for job, lines in _finished(chosen(), options.jobs):
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
  print(figures.table(), *figures.left_out(), sep="\n")
  return 1 if figures.findings else 0


if __name__ == "__main__":
  sys.exit(main())
