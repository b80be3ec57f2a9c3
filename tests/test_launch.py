"""`jfog run`: exit codes, who failed first, the end of a job, environments."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from support.launcher import (
  DEADLINE,
  ENDS_WITHIN,
  copy_launcher,
  finish,
  python,
  run,
  shell,
  start,
  write_build,
)

from jfog import launch
from jfog.launch import output


def is_running(pid):
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return False
  return stat.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds=20.0):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.05)
  return condition()


def pids_in(directory, count):
  files = [*directory.glob("*.pid")]
  read = [file.read_text().split() for file in files]
  return [int(pid) for pids in read for pid in pids if len(read) == count]


def test_every_rank_is_in_one_world_also_beyond_the_cores(program):
  job = run(
    program, "-np", 5, *python("barrier(); print(rank, size, flush=True)")
  )
  assert job.returncode == 0, job.err
  assert sorted(job.out.split("\n")[:-1]) == [f"{rank} 5" for rank in range(5)]


def test_ranks_may_end_at_different_times(program):
  job = run(program, "-np", 3, *shell("sleep 0.$((rank * 4)); say end"))
  assert (job.returncode, job.out.count("end"), job.err) == (0, 3, "")


def test_exit_code_of_the_failing_rank_is_passed_on(program):
  job = run(program, "-np", 3, *shell("[ $rank = 2 ] && exit 3; sleep 100"))
  assert job.returncode == 3
  assert job.err.endswith("jfog run: rank 2 failed first (exit code 3)\n")
  assert job.seconds < ENDS_WITHIN


def test_first_traceback_comes_last(program):
  job = run(
    program,
    *("-np", 3),
    *python("""
    barrier()
    if rank == 1:
      raise ValueError("broken on one")
    time.sleep(1000)
    """),
  )
  assert job.returncode == 1
  head, _, report = job.err.rpartition("jfog run: ")
  assert head == "\n", head  # neither the traceback nor a text of Open MPI
  lines = report.strip().split("\n")
  assert lines[0] == "rank 1 failed first (exit code 1):"
  assert lines[1] == "Traceback (most recent call last):"
  assert lines[-1] == "ValueError: broken on one"
  assert job.seconds < ENDS_WITHIN


def test_tracebacks_of_all_ranks_on_request(program):
  job = run(
    program,
    *("--all-tracebacks", "-np", 2),
    *python("""
    def end(*error):
      sys.__excepthook__(*error)
      sys.stderr.flush()
      barrier()  # mpirun ends a rank as soon as the other one has failed
      os._exit(1)
    sys.excepthook = end
    raise ValueError(f"broken on {rank}")
    """),
  )
  assert job.err.count("Traceback") == 2, job.err
  assert set(re.findall(r"broken on (\d)", job.err)) == {"0", "1"}
  last = job.err.split("jfog run: ")[-1]
  assert re.fullmatch(
    r"rank \d failed first \(exit code 1\), by the traceback above that ends "
    r"with:\nValueError: broken on \d\n",
    last,
  ), job.err


def test_ranks_that_fail_later_have_one_line_each(program):
  job = run(
    program,
    *("-np", 3),
    *python("barrier(); raise ValueError(f'broken on {rank}')"),
  )
  reported = re.findall(r"broken on (\d)\n", job.err)
  assert len(reported) == len(set(reported))
  assert job.err.count("Traceback") == 1
  assert job.err.count("failed first") == 1
  # Those that mpirun has ended before their own failure are left out.
  assert job.err.count("failed later") == len(reported) - 1


def test_a_traceback_of_a_program_that_goes_on_is_shown(program):
  job = run(
    program,
    *("-np", 1),
    *python("""
    import traceback
    print("before", file=sys.stderr)
    try:
      1 / 0
    except ZeroDivisionError:
      traceback.print_exc()
    print("after", file=sys.stderr)
    """),
  )
  assert job.returncode == 0
  first, *_, error, last = job.err.splitlines()
  assert (first, last) == ("before", "after")
  assert error == "ZeroDivisionError: division by zero"


def test_a_traceback_appears_while_the_program_goes_on(program, tmp_path):
  seen = tmp_path / "seen"
  job = start(
    program,
    *("-np", 1),
    *python(f"""
    import pathlib, traceback
    try:
      1 / 0
    except ZeroDivisionError:
      traceback.print_exc()
    end = time.monotonic() + {DEADLINE}
    while not pathlib.Path({str(seen)!r}).exists() and time.monotonic() < end:
      time.sleep(0.05)
    print("seen", pathlib.Path({str(seen)!r}).exists(), flush=True)
    """),
  )
  assert job.stderr is not None
  lines = iter(job.stderr.readline, "")
  assert any("ZeroDivisionError: " in line for line in lines)
  seen.touch()
  assert finish(job).out.endswith("seen True\n")


def test_a_traceback_by_which_a_program_ends_is_kept_back_for_longer():
  text = b"one\n" + output.TRACEBACK + b"\nKeyError\n"
  for is_failing in (False, True):
    kept = output.WithoutTraceback(b"", lambda fails=is_failing: fails)
    assert kept.feed(text) == b"one\n"
    first = kept.until
    assert kept.feed(b"two\n") == b""
    gone_on = kept.expire()
    if is_failing:
      assert gone_on == b"" and kept.until > first
    else:
      assert gone_on == text[4:] + b"two\n" and kept.feed(b"three") == b"three"


@pytest.mark.parametrize(
  "others", ["barrier()", "time.sleep(1000)", "while True: pass"]
)
def test_killed_rank_ends_the_job(program, others):
  job = run(
    program,
    *("-np", 3),
    *python(f"""
    barrier()
    if rank == 1:
      os.kill(os.getpid(), signal.SIGKILL)
    {others}
    """),
  )
  assert job.returncode == 128 + signal.SIGKILL
  assert job.err.endswith("jfog run: rank 1 was killed by SIGKILL\n")
  assert job.seconds < ENDS_WITHIN


def test_a_rank_that_leaves_mpi_unfinished_ends_the_job(program):
  job = run(
    program,
    *("-np", 2),
    *python("""
    barrier()
    if rank == 1:
      os._exit(0)
    barrier()
    """),
  )
  assert job.returncode != 0
  assert job.seconds < ENDS_WITHIN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_launcher_ends_every_process(program, tmp_path, number):
  script = f"sleep 1000 & say $$ $! $PPID > {tmp_path}/$rank.pid; wait"
  job = start(program, "-np", 2, *shell(script))
  assert wait_for(lambda: pids_in(tmp_path, 2))
  pids = pids_in(tmp_path, 2)
  job.send_signal(number)
  finish(job)
  assert job.returncode == 128 + number
  assert wait_for(lambda: not any(map(is_running, pids)))


def test_no_process_outlives_a_killed_launcher(program, tmp_path):
  script = f"sleep 1000 & say $$ $! $PPID > {tmp_path}/$rank.pid; wait"
  job = start(program, "-np", 2, *shell(script))
  assert wait_for(lambda: pids_in(tmp_path, 2))
  pids = pids_in(tmp_path, 2)
  job.kill()
  finish(job)
  assert wait_for(lambda: not any(map(is_running, pids)))


def test_no_process_outlives_a_killed_rank(program, tmp_path):
  script = f"say $$ > {tmp_path}/$rank.pid; exec sleep 1000"
  job = start(program, "-np", 2, *shell(script))
  assert wait_for(lambda: pids_in(tmp_path, 2))
  pids = pids_in(tmp_path, 2)
  os.kill(pids[0], signal.SIGKILL)
  finish(job)
  assert job.returncode == 128 + signal.SIGKILL
  assert not any(map(is_running, pids))


def test_mpirun_that_does_not_end_is_ended(tmp_path):
  copy_launcher(tmp_path)
  mpirun = tmp_path / "mpirun"
  mpirun.write_text(
    "#!/usr/bin/env bash\n"
    "trap '' TERM; export OMPI_COMM_WORLD_RANK=0\n"
    'while [ "$1" != "' + sys.executable + '" ]; do shift; done\n'
    '"$@"; while true; do sleep 0.2; done\n'
  )
  mpirun.chmod(0o755)
  write_build(tmp_path, launch.Mpi(str(mpirun), "openmpi", ""))
  job = run(tmp_path / "launch", "-np", 1, *shell("exit 4"))
  assert job.returncode == 4
  assert job.err.endswith("jfog run: rank 0 failed first (exit code 4)\n")


@pytest.mark.parametrize("fault_tolerant", [False, True])
@pytest.mark.parametrize("how", ["exit 213", "kill -SEGV $$"])
def test_mpirun_that_fails_without_a_rank(tmp_path, how, fault_tolerant):
  copy_launcher(tmp_path)
  mpirun = tmp_path / "mpirun"
  mpirun.write_text(f"#!/bin/sh\necho no memory >&2\n{how}\n")
  mpirun.chmod(0o755)
  write_build(tmp_path, launch.Mpi(str(mpirun), "openmpi", "Open MPI v5.0.8"))
  option = ["--fault-tolerant"] if fault_tolerant else []
  job = run(tmp_path / "launch", *option, "-np", 2, *shell("exit 0"))
  if how == "exit 213":
    assert job.returncode == 213
    text = "mpirun ended with exit code 213"
  else:
    assert job.returncode == 128 + signal.SIGSEGV
    text = "mpirun was killed by SIGSEGV, and its ranks with it"
  again = "jfog run: no rank has begun; mpirun is started once more"
  tries = f"no memory\n\njfog run: {text}\n"
  assert job.err == f"{tries}{again}\n{tries}"


def test_mpirun_that_fails_once(tmp_path):
  copy_launcher(tmp_path)
  mpirun = tmp_path / "mpirun"
  real = launch.installed_mpi().launcher
  mpirun.write_text(
    f"#!/bin/sh\n[ -e {tmp_path}/before ] && "
    f'exec {real} "$@"\ntouch {tmp_path}/before\nkill -SEGV $$\n'
  )
  mpirun.chmod(0o755)
  write_build(tmp_path, launch.installed_mpi()._replace(launcher=str(mpirun)))
  job = run(tmp_path / "launch", "-np", 2, *shell("echo begun"))
  assert job.returncode == 0, job.err
  assert job.out.count("begun") == 2
  assert job.err.endswith("no rank has begun; mpirun is started once more\n")


def test_timeout_ends_the_job(program):
  job = run(program, "-np", 2, "--timeout", 1, "sleep", 1000)
  assert job.returncode == 124
  assert job.seconds < ENDS_WITHIN


def test_tagged_output(program):
  job = run(
    program,
    *("-np", 2, "--tag-output"),
    *shell('printf "one\\ntwo"; say three >&2'),
  )
  assert job.returncode == 0
  assert sorted(job.out.split("\n")[:-1]) == [
    *("[0] one", "[0] two", "[1] one", "[1] two")
  ]
  assert sorted(job.err.split("\n")[:-1]) == ["[0] three", "[1] three"]


def test_output_of_several_ranks_is_tagged_by_default(program):
  words = [sys.executable, "-I", "-S", str(program)]
  for ranks, text in ((2, "[0] one\n[1] one\n"), (1, "one\n")):
    done = subprocess.run(
      [*words, "-np", str(ranks), "echo", "one"],
      stdout=subprocess.PIPE,
      text=True,
      timeout=DEADLINE,
    )
    assert "".join(sorted(done.stdout.splitlines(keepends=True))) == text


def test_a_warning_about_the_process_group_of_ssh_is_dropped():
  banner = output.WithoutBanner()
  text = (
    b"before\n[vm:25076] plm:ssh: Warning: setpgid(25081,25081) failed in parent "
    b"with errno=Permission denied(13)\nssh: no such host\n"
  )
  assert banner.feed(text) == b"before\nssh: no such host\n"
  assert banner.dropped.startswith(b"[vm:25076] plm:ssh")


def test_filters_of_output():
  """Carriage returns end lines; what looks like a text of Open MPI passes."""
  lines = output.Prefixed(b"[1] ")
  assert lines.feed(b"10%\r20%") == b"[1] 10%\r"
  assert lines.feed(b"\rend\npart") == b"[1] 20%\r[1] end\n"
  assert lines.finish() == b"[1] part\n"
  banner = output.WithoutBanner()
  rule = b"-" * 74 + b"\n"
  own = rule + b"results\n" + rule
  theirs = rule + b"prterun detected that one or more processes exited\n" + rule
  text = b"a\n" + own + theirs + b"b\n"
  parts = [text[k : k + 50] for k in range(0, len(text), 50)]
  found = b"".join(map(banner.feed, parts)) + banner.finish()
  assert found == b"a\n" + own + b"b\n"
  assert banner.dropped == theirs
  assert banner.feed(b"c\n" + rule + b"open") == b"c\n"
  assert banner.until < float("inf")
  assert banner.expire() == rule + b"open"


def test_marked_lines_are_taken_out():
  for size in (1, 2, 7, 100):
    found = []
    lines = output.Extracted(b"\x1emark ", found.append)
    text = b"a\n\x1emark one\nb\x1emark two\n\x1emar\nc\x1e"
    parts = [text[k : k + size] for k in range(0, len(text), size)]
    passed = b"".join(map(lines.feed, parts)) + lines.finish()
    assert found == [b"one", b"two"]
    assert passed == b"a\nb\x1emar\nc\x1e"


def test_failure_on_a_host_without_the_folder_of_records(tmp_path):
  """As on another host: the record comes in the rank's stderr."""
  copy_launcher(tmp_path)
  mpi = launch.installed_mpi()
  elsewhere = tmp_path / "mpirun"
  elsewhere.write_text(
    f'#!/bin/sh\nJFOG_RUN_DIR={tmp_path}/gone exec {mpi.launcher} "$@"\n'
  )
  elsewhere.chmod(0o755)
  write_build(tmp_path, mpi._replace(launcher=str(elsewhere)))
  job = run(
    tmp_path / "launch",
    *("-np", 3),
    *python("""
      barrier()
      if rank == 1:
        print("x" * 100_000, file=sys.stderr, flush=True)
        time.sleep(1)  # mpirun drops output that it has not passed on at the end
        raise FileNotFoundError("the samples of rank 1")
      time.sleep(60)
    """),
  )
  assert job.returncode == 1
  assert job.seconds < DEADLINE / 2
  assert "x" * 100_000 in job.err and "jfog-record" not in job.err
  assert job.err.count("Traceback") == 1
  assert job.err.endswith(
    "jfog run: rank 1 failed first (exit code 1), by the traceback above that "
    "ends with:\nFileNotFoundError: the samples of rank 1\n"
  )


def test_output_is_untouched_without_tags(program):
  job = run(program, "-np", 1, *shell('printf "one\\ntwo"; printf three >&2'))
  assert (job.out, job.err) == ("one\ntwo", "three")


SHOW = (
  "say $OMP_NUM_THREADS $OPENBLAS_NUM_THREADS $MKL_NUM_THREADS $NPROC "
  "$OMPI_MCA_btl_sm_eager_limit"
)


def test_cores_are_divided_between_ranks(program, environ):
  job = run(program, "-np", 3, *shell(SHOW), environ=environ)
  threads = max(1, len(os.sched_getaffinity(0)) // 3)
  assert job.out.split("\n")[:-1] == [f"{f'{threads} ' * 4}65536"] * 3


def test_what_the_user_has_set_is_kept(program, environ):
  environ |= {"OMP_NUM_THREADS": "7", "OMPI_MCA_btl_sm_eager_limit": "8192"}
  job = run(program, "-np", 1, *shell(SHOW), environ=environ)
  threads = len(os.sched_getaffinity(0))
  assert job.out == f"7 {f'{threads} ' * 3}8192\n"


def test_each_rank_sees_one_gpu():
  def visible(local, **environ):
    environ |= {"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": str(local)}
    environ = launch.rank_environment(environ, cores=8, gpus=2)
    assert environ["NPROC"] == "2"
    return environ["CUDA_VISIBLE_DEVICES"]

  assert [visible(local) for local in range(4)] == ["0", "1", "0", "1"]
  assert visible(1, CUDA_VISIBLE_DEVICES="5,3") == "3"
  assert visible(1, CUDA_VISIBLE_DEVICES="") == ""


def test_command_not_found(program):
  job = run(program, "-np", 2, "no-such-command")
  assert job.returncode == 127
  assert "command not found: no-such-command" in job.err


def test_script_without_python(program, tmp_path):
  script = tmp_path / "train.py"
  script.write_text("")
  job = run(program, "-np", 2, script, "--epochs", 3)
  assert job.returncode == 126
  assert f"`python {script} --epochs 3`" in job.err


def test_installation_without_mpi_names_the_remedy(tmp_path):
  with pytest.raises(RuntimeError, match="installed without MPI: reinstall"):
    launch.installed_mpi(str(tmp_path))
  write_build(tmp_path, launch.Mpi("", "", ""))
  with pytest.raises(RuntimeError, match="installed without MPI: reinstall"):
    launch.installed_mpi(str(tmp_path))
  write_build(tmp_path, launch.Mpi("../gone/mpirun", "openmpi", ""))
  with pytest.raises(RuntimeError, match="built with is gone"):
    launch.installed_mpi(str(tmp_path))


def test_hosts_are_passed_on():
  for family in ("openmpi", "mpich"):
    mpi = launch.Mpi("mpirun", family, "")
    words = launch.mpirun_command(mpi, 4, ["true"], host="a:2,b:2")
    assert "a:2,b:2" in words
    words = launch.mpirun_command(mpi, 4, ["true"], hostfile="hosts")
    assert "hosts" in words


def test_first_failure_is_not_a_victim_of_the_end_of_the_job():
  def record(rank, at, torn_down=False):
    return {"rank": rank, "time": at, "torn_down": torn_down}

  records = [record(0, 2.0), record(1, 1.0, torn_down=True), record(2, 3.0)]
  assert launch.first_failure(records) == records[0]
  assert launch.first_failure(records[1:2]) is None
  # A rank of Open MPI sees the end of a connection before the wrapper of the other
  # end sees that of its process.
  lost = {**record(3, 0.5), "code": 14, "stderr": ""}
  assert launch.first_failure([*records, lost]) == records[0]
  assert launch.first_failure([lost]) == lost


def test_report_shows_a_chained_traceback_whole():
  program = """
    print("noise", file=sys.stderr)
    try:
      1 / 0
    except ZeroDivisionError as error:
      raise ValueError("outer") from error
  """
  body = "import sys\n" + textwrap.dedent(program)
  done = subprocess.run(
    [sys.executable, "-c", body], stderr=subprocess.PIPE, text=True
  )
  record = {"rank": 0, "code": 1, "signal": "", "is_shown": False}
  record["stderr"] = done.stderr
  report = launch.failure_report(record)
  assert report.count("Traceback") == 2
  assert report.endswith("ValueError: outer\n")
  assert "noise" not in report
  record.update(code=9, stderr="reason\n", is_shown=True)
  assert launch.failure_report(record).endswith("(exit code 9):\nreason\n")


def test_command_jfog_runs_a_job():
  words = [sys.executable, "-m", "jfog.cli"]
  done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=60)
  assert done.returncode == 0
  assert "doctor" in done.stdout
  words += ["run", "-np", "0", "true"]
  done = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=60)
  assert done.returncode == 2
  assert "-np must be at least 1, got 0." in done.stderr
