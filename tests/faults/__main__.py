"""The long form: `python tests/faults --count 500` injects faults by the hundreds."""

import argparse
import concurrent.futures
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from faults import check


def inject(seed, by_peers):
  """Runs the plan of a seed; returns what went wrong, or ""."""
  plan, begin = check.Plan.of_seed(seed, by_peers), time.monotonic()
  try:
    check.run(plan)
    wrong = ""
  except (AssertionError, subprocess.TimeoutExpired) as error:
    text = f"{type(error).__name__}: {error}"
    wrong = text if len(text) < 6000 else f"{text[:3000]}\n...\n{text[-3000:]}"
  took = f"{time.monotonic() - begin:.1f} s"
  print(seed, "WRONG" if wrong else "right", took, plan, flush=True)
  if wrong:
    print(wrong, flush=True)
  return wrong


def main():
  """Runs random plans, and prints each that goes wrong."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0, help="the first one")
  parser.add_argument("--jobs", type=int, default=1, help="at a time")
  parser.add_argument(
    "--by-peers", action="store_true", help="averages over jfog.Peers"
  )
  options = parser.parse_args()
  seeds = range(options.seed, options.seed + options.count)
  with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
    ends = pool.map(lambda seed: inject(seed, options.by_peers), seeds)
    failed = sum(map(bool, ends))
  print(f"{options.count - failed} of {options.count} are right")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
