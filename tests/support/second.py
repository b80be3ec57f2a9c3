"""A second process for a session's tests, so that a second core has work.

Both processes collect the same tests. The first runs them in their order, the second
in the opposite one, each claims a test before it runs it, and they meet where no
test is left. The second writes its reports to a file, from which the first repeats
them as its own: results, skips, durations and `-x` are those of one session.
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

# Set in the second process; not for sessions that its tests start.
FOLDER = os.environ.pop("JFOG_TEST_SECOND", "")
_LEAST = 100  # tests; with fewer the second start takes longer than it saves


def unit(item: pytest.Item) -> str:
  """The tests that one process runs: this one, or all with a module's fixture."""
  fixtures = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[reportAttributeAccessIssue]
  if any(found[-1].scope in ("class", "module") for found in fixtures):
    return str(item.path)
  return item.nodeid


class _Claims:
  """One empty file for each unit, made by the process that runs the unit."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._own: dict[str, bool] = {}

  def take(self, item: pytest.Item) -> bool:
    """Whether the item is this process's."""
    name = hashlib.sha1(unit(item).encode()).hexdigest()
    if name not in self._own:
      try:
        (self._folder / name).touch(exist_ok=False)
        self._own[name] = True
      except FileExistsError:
        self._own[name] = False
    return self._own[name]


def _leave_out(item: pytest.Item, nextitem: pytest.Item | None) -> None:
  """Ends the fixtures that a test left open for this one."""
  item.session._setupstate.teardown_exact(nextitem)


class Second:
  """Plugin of the second process: claims, runs, and writes reports."""

  def __init__(self, config: pytest.Config):
    folder = pathlib.Path(FOLDER)
    self._config = config
    self._claims = _Claims(folder / "claims")
    self._reports = folder / "reports"

  @pytest.hookimpl(tryfirst=True)
  def pytest_runtest_protocol(self, item, nextitem):
    """Passes over a test that the first process has claimed."""
    if self._claims.take(item):
      return None
    _leave_out(item, nextitem)
    return True

  def pytest_runtest_logreport(self, report):
    """Writes a report as one line."""
    values = self._config.hook.pytest_report_to_serializable(
      config=self._config, report=report
    )
    with self._reports.open("a") as file:
      file.write(json.dumps(values) + "\n")


class First:
  """Plugin of the first process: starts the second, and repeats its reports."""

  def __init__(self, config: pytest.Config, folder: str):
    self._config = config
    self._folder = pathlib.Path(folder) / "second"
    (self._folder / "claims").mkdir(parents=True)
    self._claims = _Claims(self._folder / "claims")
    self._shared: dict[str, pytest.Item] = {}
    self._process: subprocess.Popen | None = None
    self._lock = threading.Lock()  # of `_process` and `_ended`
    self._ended = False
    self._read = 0  # bytes of the reports that are in `_found`
    self._found: dict[str, list] = {}
    self._missing = 0

  def share(self, items: list[pytest.Item]) -> None:
    """Names the tests that may run in either process."""
    options = self._config.option
    alone = options.usepdb or options.capture == "no" or options.one_process
    if not alone and (os.cpu_count() or 1) > 1 and len(items) >= _LEAST:
      self._shared = {item.nodeid: item for item in items}

  def start(self, options: list[str], environment: dict[str, str]) -> None:
    """Starts the second process, unless there is too little left to share."""
    claimed = len(list((self._folder / "claims").iterdir()))
    if len(self._shared) - claimed < _LEAST:
      return
    tests = self._folder / "tests"
    tests.write_text("\n".join(reversed(self._shared)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    with self._lock:
      if self._ended:
        return
      with (self._folder / "output").open("wb") as output:
        self._process = subprocess.Popen(
          [*command, *options, f"@{tests}"],
          cwd=self._config.rootpath,
          env={**environment, "JFOG_TEST_SECOND": str(self._folder)},
          stdin=subprocess.DEVNULL,
          stdout=output,
          stderr=subprocess.STDOUT,
        )

  def wait(self) -> None:
    """Waits until the second process has ended, if there is one."""
    if self._process:
      self._process.wait()

  def _read_reports(self) -> None:
    """Takes the whole lines that came since the last call."""
    path = self._folder / "reports"
    if not path.exists():
      return
    with path.open("rb") as file:
      file.seek(self._read)
      lines = file.read()
    lines = lines[: lines.rfind(b"\n") + 1]
    self._read += len(lines)
    for line in lines.splitlines():
      report = self._config.hook.pytest_report_from_serializable(
        config=self._config, data=json.loads(line)
      )
      if report.skipped and isinstance(report.longrepr, list):
        report.longrepr = tuple(report.longrepr)  # JSON has no tuples
      self._found.setdefault(report.nodeid, []).append(report)

  def _reports_of(self, nodeid: str) -> list | None:
    """A test's reports, up to that of its teardown; None if they never come."""
    assert self._process
    while True:
      # First, so that what the process wrote before its end is read.
      over = self._process.poll() is not None
      self._read_reports()
      found = self._found.get(nodeid, [])
      if found and found[-1].when == "teardown":
        return found
      if over:
        return None
      time.sleep(0.02)

  @pytest.hookimpl(tryfirst=True)
  def pytest_runtest_protocol(self, item, nextitem):
    """Repeats the reports of a test that the second process has claimed."""
    if item.nodeid not in self._shared or self._claims.take(item):
      return None
    reports = self._reports_of(item.nodeid)
    if reports is None:  # the process died: the test runs here
      self._missing += 1
      return None
    _leave_out(item, nextitem)
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports:
      hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True

  def pytest_sessionfinish(self):
    """Ends the second process, which an interrupt leaves at work."""
    with self._lock:
      self._ended = True
    if self._process and self._process.poll() is None:
      self._process.terminate()
      self._process.wait()

  def pytest_terminal_summary(self, terminalreporter):
    """Shows the output of a process that left tests to this one."""
    if self._missing:
      assert self._process
      output = (self._folder / "output").read_text(errors="replace")
      terminalreporter.write_line(
        f"NOTE: the second process ended with {self._process.returncode} and left "
        f"{self._missing} tests to this one; its output ends:\n{output[-6000:]}"
      )
