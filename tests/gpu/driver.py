"""Runs the stages of the GPU check: deadlines, logs, and results on disk.

Needs nothing but the standard library, for it starts before jfog is installed.
A stage is a list of jobs, each of which is a command with a deadline of its own.
Whatever a job does, it costs only its own result: it runs in a session of its own,
and at its end or its deadline all processes that it has started are killed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence

_MARK = "JFOG_GPU_JOB"  # in the environment of every process of a job
_TAIL = 2000  # characters of a failed job's log in the results


@dataclasses.dataclass(frozen=True)
class Job:
  """One command of a stage.

  Attributes:
    name: what the results call it.
    command: the words of the command.
    deadline: seconds, after which it is killed.
    environment: variables that it gets in addition.
    text: `(log)` to facts, for a command that records none itself.
  """

  name: str
  command: Sequence[str]
  deadline: float
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  text: Callable[[str], dict] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
  """Jobs that answer one question, in their order."""

  number: int
  title: str
  jobs: Sequence[Job]


def run(
  stages: Sequence[Stage],
  out: pathlib.Path,
  limit: float,
  facts: Mapping[str, object] | None = None,
) -> dict:
  """Runs stages, and writes the results after every job.

  Args:
    stages: in the order in which they run.
    out: the folder of `results.json`, `results.md` and `logs.zip`; made if it is
      missing. What is there of an earlier run is replaced.
    limit: seconds, after which no job starts and the running one is killed.
    facts: what is known beforehand, for the head of the results.

  Returns:
    What `results.json` holds.
  """
  out.mkdir(parents=True, exist_ok=True)
  (out / "logs.zip").unlink(missing_ok=True)
  begin = time.monotonic()
  results: dict = {"facts": dict(facts or {}), "stages": []}
  for stage in stages:
    done: dict = {"number": stage.number, "title": stage.title, "jobs": []}
    results["stages"].append(done)
    for job in stage.jobs:
      left = limit - (time.monotonic() - begin)
      ended = _run_job(job, left)
      log = ended.pop("log")
      done["jobs"].append(ended)
      done["outcome"] = _outcome(done["jobs"])
      done["seconds"] = sum(each["seconds"] for each in done["jobs"])
      results["seconds"] = time.monotonic() - begin
      with zipfile.ZipFile(
        out / "logs.zip", "a", zipfile.ZIP_DEFLATED
      ) as archive:
        name = job.name.replace(" ", "-").replace("/", "-")
        archive.writestr(f"stage-{stage.number}-{name}.log", log)
      _replace(out / "results.json", json.dumps(results, indent=1))
      _replace(out / "results.md", table(results))
      counts = _counts(ended["cases"])
      print(
        f"stage {stage.number}, {job.name}: {ended['outcome']}, "
        f"{ended['seconds']:.1f} s{', ' if counts else ''}{counts}",
        flush=True,
      )
  return results


def succeeded(results: Mapping) -> bool:
  """Whether every stage has passed."""
  return all(stage["outcome"] == "passed" for stage in results["stages"])


def _run_job(job: Job, left: float) -> dict:
  """Runs a job; returns its outcome, seconds, cases and log."""
  if left < 1:
    return {
      "name": job.name,
      "outcome": "not run: no time is left",
      "seconds": 0.0,
      "cases": [],
      "log": "",
    }
  with tempfile.TemporaryDirectory() as folder:
    facts = pathlib.Path(folder) / "facts"
    log = pathlib.Path(folder) / "log"
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    environment = {
      **os.environ,
      **job.environment,
      "JFOG_GPU_FACTS": str(facts),
      _MARK: mark,
    }
    begin = time.monotonic()
    outcome = ""
    with log.open("wb") as file:
      try:
        process = subprocess.Popen(
          job.command,
          env=environment,
          stdin=subprocess.DEVNULL,
          stdout=file,
          stderr=subprocess.STDOUT,
          start_new_session=True,
        )
      except OSError as error:
        outcome = f"failed: {error}"
      else:
        deadline = min(job.deadline, left)
        try:
          code = process.wait(deadline)
          outcome = "passed" if code == 0 else _end(code)
        except subprocess.TimeoutExpired:
          outcome = f"timed out after {deadline:.0f} s"
        _kill(mark)
        # A process that hangs in the driver of a stuck GPU cannot be killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(5)
    seconds = time.monotonic() - begin
    text = log.read_text(errors="replace")
    cases = []
    if facts.exists():
      lines = facts.read_text(errors="replace").splitlines()
      cases = [case for line in lines if (case := _parsed(line))]
  if outcome == "passed" and job.text is not None:
    try:
      cases.append({"case": job.name, "outcome": "measured", **job.text(text)})
    except Exception as error:
      outcome = f"failed: its output was not understood: {error!r}"
  result = {"name": job.name, "outcome": outcome, "seconds": seconds}
  result["cases"] = cases
  if outcome != "passed":
    result["tail"] = text[-_TAIL:]
  return {**result, "log": text}


def _end(code: int) -> str:
  if code > 0:
    return f"failed with exit code {code}"
  try:
    return f"crashed by {signal.Signals(-code).name}"
  except ValueError:
    return f"crashed by signal {-code}"


def _parsed(line: str) -> dict | None:
  """A line of facts; None if its program was killed within it."""
  try:
    return json.loads(line)
  except ValueError:
    return None


def _kill(mark: str) -> None:
  """Kills all processes of a job, also those in sessions of their own."""
  wanted = f"{_MARK}={mark}".encode()
  for _ in range(50):
    found = False
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
      try:
        if wanted not in path.read_bytes().split(b"\0"):
          continue
        state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        if state in "ZX":
          continue
        found = True
        os.kill(int(path.parent.name), signal.SIGKILL)
      except (OSError, ProcessLookupError):
        continue  # it has ended meanwhile, or is not ours
    if not found:
      return
    time.sleep(0.1)


def _outcome(jobs: Sequence[Mapping]) -> str:
  """That of a stage: the first of its jobs that has not passed."""
  for job in jobs:
    if job["outcome"] != "passed":
      return f"{job['name']}: {job['outcome']}"
  return "passed"


def _counts(cases: Sequence[Mapping]) -> str:
  """How many cases have which outcome, e.g. "3 passed, 1 failed"."""
  outcomes = [case.get("outcome", "measured") for case in cases]
  return ", ".join(
    f"{outcomes.count(each)} {each}" for each in dict.fromkeys(outcomes)
  )


def _replace(path: pathlib.Path, text: str) -> None:
  """Writes a file as a whole, or leaves the one there is."""
  part = path.with_suffix(".part")
  part.write_text(text, encoding="utf-8")
  part.replace(path)


def table(results: Mapping) -> str:
  """The results in Markdown: a row for a job, the failures, the figures."""
  lines = ["# GPU check", ""]
  lines += [f"- {name}: {value}" for name, value in results["facts"].items()]
  lines += ["", "| stage | job | outcome | time | cases |"]
  lines += ["| --- | --- | --- | --- | --- |"]
  failures, figures = [], []
  for stage in results["stages"]:
    for job in stage["jobs"]:
      lines.append(
        f"| {stage['number']}. {stage['title']} | {job['name']} "
        f"| {job['outcome']} | {job['seconds']:.1f} s "
        f"| {_counts(job['cases'])} |"
      )
      for case in job["cases"]:
        head = f"{stage['number']}, {job['name']}: {case['case']}"
        outcome = case.get("outcome")
        if outcome == "failed":
          failures += [f"- **{head}**", "", "```"]
          failures += [
            f"{who}: {error.strip().splitlines()[-1][:600]}"
            for who, error in case["errors"].items()
          ]
          failures += ["```", ""]
        elif outcome == "measured":
          hidden = ("case", "outcome", "seconds")
          values = {k: v for k, v in case.items() if k not in hidden}
          shown = ", ".join(f"{k}: {_shown(v)}" for k, v in values.items())
          figures.append(f"| {head} | {shown} |")
  if failures:
    lines += ["", "## Failures", "", *failures]
  if figures:
    lines += ["", "## Figures", "", "| case | figures |", "| --- | --- |"]
    lines += figures
  return "\n".join([*lines, ""])


def _shown(value: object) -> str:
  text = f"{value:.4g}" if isinstance(value, float) else str(value)
  return text.replace("|", "/").replace("\n", " ")
