"""One rank of a job of `jfog bench`: `python -m jfog.bench JOB`."""

import json
import sys

from jfog.bench import job

if __name__ == "__main__":
  job.run(json.loads(sys.argv[1]))
