"""The driver of the GPU check: what goes wrong in a job costs that job only."""

import importlib
import json
import pathlib
import struct
import subprocess
import sys
import time
import zipfile

import pytest

FOLDER = pathlib.Path(__file__).resolve().parent / "gpu"
FACT = """
import json, os
with open(os.environ["JFOG_GPU_FACTS"], "a") as file:
  print(json.dumps({"case": "early", "outcome": "passed"}), file=file)
"""
BAD = {
  "fails": ("raise SystemExit('no such luck')", "failed with exit code 1"),
  "crashes": ("import os; os.abort()", "crashed by SIGABRT"),
  "is killed": ("os.kill(os.getpid(), 9)", "crashed by SIGKILL"),
  "hangs": ("import time; time.sleep(600)", "timed out after 3 s"),
  # In a session of its own and deaf to SIGTERM, as a launcher's ranks may be.
  "leaves a process": (
    """
import signal, subprocess, sys, time
loop = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", loop], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(600)
""",
    "timed out after 3 s",
  ),
}


@pytest.fixture
def check(monkeypatch):
  """A function that imports a module of the check."""
  monkeypatch.syspath_prepend(str(FOLDER))
  return importlib.import_module


def program(text):
  return [sys.executable, "-c", text]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_job_costs_only_its_own_result(check, tmp_path, name):
  driver = check("driver")
  text, outcome = BAD[name]
  # Half of a line: what a program that is killed may leave.
  half = "file = open(os.environ['JFOG_GPU_FACTS'], 'a'); file.write('{'); "
  bad = driver.Job("bad", program(f"{FACT}\n{half}\nfile.close()\n{text}"), 3)
  good = driver.Job("good", program(FACT), 60)
  stages = [
    driver.Stage(1, "one", [bad, good]),
    driver.Stage(2, "two", [good]),
  ]
  results = driver.run(stages, tmp_path, 300)
  first, second = results["stages"]
  assert first["outcome"] == f"bad: {outcome}"
  assert second["outcome"] == "passed"
  assert [job["outcome"] for job in first["jobs"]] == [outcome, "passed"]
  for stage in results["stages"]:
    for job in stage["jobs"]:
      assert job["cases"] == [{"case": "early", "outcome": "passed"}]
  assert not driver.succeeded(results)
  assert json.loads((tmp_path / "results.json").read_text()) == results
  assert f"| {outcome} |" in (tmp_path / "results.md").read_text()
  with zipfile.ZipFile(tmp_path / "logs.zip") as logs:
    assert len(logs.namelist()) == 3
    log = logs.read("stage-1-bad.log").decode()
  if name == "leaves a process":
    child = pathlib.Path("/proc", log.split()[1], "stat")
    # Its remains may not have been reaped.
    assert not child.exists() or child.read_text().split()[2] in "ZX"


def test_a_command_that_does_not_exist(check, tmp_path):
  driver = check("driver")
  job = driver.Job("absent", ["/no/such/command"], 10)
  results = driver.run([driver.Stage(1, "one", [job])], tmp_path, 60)
  assert "No such file" in results["stages"][0]["outcome"]


def test_the_limit_ends_the_whole(check, tmp_path):
  """The job in progress is killed, and those after it are not started."""
  driver = check("driver")
  job = driver.Job("long", program("import time; time.sleep(600)"), 300)
  stages = [driver.Stage(number, "long", [job]) for number in (1, 2)]
  begin = time.monotonic()
  results = driver.run(stages, tmp_path, 3)
  assert time.monotonic() - begin < 60
  outcomes = [stage["outcome"] for stage in results["stages"]]
  assert outcomes[0].startswith("long: timed out")
  assert outcomes[1] == "long: not run: no time is left"


def test_figures_and_failures_are_shown(check, tmp_path):
  driver = check("driver")
  lines = [
    {"case": "rate", "outcome": "measured", "GB/s": 12.345678, "seconds": 1},
    {"case": "sum", "outcome": "failed", "errors": {"rank 1": "a\nValueError"}},
  ]
  text = (
    "import os\nfile = open(os.environ['JFOG_GPU_FACTS'], 'w')\n"
    + "".join(f"file.write({json.dumps(line)!r} + chr(10))\n" for line in lines)
  )
  printed = driver.Job("words", program("print('x 1')"), 60, text=dict_of)
  job = driver.Job("figures", program(text + "raise SystemExit(1)"), 60)
  results = driver.run(
    [driver.Stage(4, "four", [job, printed])], tmp_path, 300, {"place": "here"}
  )
  table = driver.table(results)
  assert "- place: here" in table
  assert "| 4, figures: rate | GB/s: 12.35 |" in table
  assert "rank 1: ValueError" in table
  assert "| 4, words: words | x: 1 |" in table
  assert "1 measured, 1 failed" in table


def dict_of(text):
  name, value = text.split()
  return {name: value}


def test_numbers_of_stages(tmp_path):
  cases = (("4,x", "is not numbers"), ("99", "stage 99 does not exist"))
  for words, said in cases:
    command = [sys.executable, str(FOLDER / "check"), "--stages", words]
    done = subprocess.run(
      [*command, "--out", str(tmp_path / "out")],
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert done.returncode == 2
    assert said in done.stderr


def test_without_a_gpu_it_says_so(tmp_path):
  command = [
    sys.executable,
    str(FOLDER / "check"),
    "--out",
    str(tmp_path / "x"),
  ]
  done = subprocess.run(
    command,
    env={"PATH": str(tmp_path)},  # without nvidia-smi
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 2
  assert "no GPU here" in done.stderr and "--rehearse" in done.stderr
  assert not (tmp_path / "x").exists()


def fat_binary(*architectures):
  """A container with an entry for each architecture, of 32 bytes."""
  entries = b""
  for architecture in architectures:
    header = bytearray(64)
    struct.pack_into("<HHIQ", header, 0, 2, 0x101, 64, 32)
    struct.pack_into("<I", header, 28, architecture)
    entries += bytes(header) + bytes([architecture]) * 32
  return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_a_slim_library_keeps_one_architecture(check):
  slim_nccl = check("slim_nccl")
  code = fat_binary(75, 90, 100) + bytes(8) + fat_binary(90)
  names = b"\0.nv_fatbin\0.debug_info\0.text\0.shstrtab\0"
  parts = {".nv_fatbin": code, ".debug_info": b"d" * 16, ".text": b"t" * 16}
  parts[".shstrtab"] = names
  library, headers = bytearray(64), b""
  for name, content in parts.items():
    at = names.index(name.encode())
    headers += struct.pack(
      "<IIQQQQ24x", at, 1, 0, 0, len(library), len(content)
    )
    library += content
  struct.pack_into("<Q", library, 40, len(library))
  struct.pack_into("<HHH", library, 58, 64, 4, 3)
  library += headers
  size = len(library)
  counts = slim_nccl.slim(library, 90)
  assert len(library) == size
  assert counts == {
    ("kept", 2, 90): 2,
    ("left out", 2, 75): 1,
    ("left out", 2, 100): 1,
  }
  for value, kept in ((90, 64), (75, 0), (100, 0)):
    assert library.count(bytes([value]) * 32) == kept // 32
  assert b"d" * 16 not in library and b"t" * 16 in library
