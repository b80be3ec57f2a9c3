"""One rank of a job of `jfog bench`: `python -m jfog.bench JOB`."""

import json
import pathlib
import sys


def main() -> None:
  """Runs the rank's part of a job: of operations, or of trainings under `train`."""
  given = json.loads(sys.argv[1])
  if "train" in given:
    from jfog.bench import train_job

    found = train_job.run(given["train"])
    if found:
      pathlib.Path(given["result"]).write_text(json.dumps(found))
    return
  from jfog.bench import job

  job.run(given)


if __name__ == "__main__":
  main()
