"""The long form: `python tests/faults --count 500` injects faults by the hundreds."""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from faults import check


def main():
  """Runs random plans one after the other, and prints each that goes wrong."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  failed = 0
  for seed in range(options.seed, options.seed + options.count):
    plan = check.Plan.of_seed(seed, ("reweight", "error")[seed % 2])
    try:
      check.run(plan)
      print(seed, "right", plan, flush=True)
    except Exception as error:
      failed += 1
      print(seed, "WRONG", repr(error)[:3000], flush=True)
  print(f"{options.count - failed} of {options.count} are right")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
