"""Options of `jfog run`: hosts, variables, modules, files, and what it refuses."""

import os
import pathlib
import re
import subprocess

import pytest
from support.launcher import (
  DEADLINE,
  python,
  run,
  shell,
)

from jfog import launch
from jfog.launch import options


@pytest.mark.parametrize(
  "words",
  [
    ["-np", "0", "true"],
    ["-np", "many", "true"],
    ["true"],
    ["-np", "2"],
    ["-np", "2", "-H", "a:1", "--hostfile", "b", "true"],
    ["-np", "2", "--timeout", "0", "true"],
    ["-np", "2", "--no-such-option", "true"],
    ["-np", "2", "--op-timeout", "soon", "true"],
    ["-np", "2", "-x", "NOT_SET_ANYWHERE", "true"],
    ["-np", "2", "-x", "1=2", "true"],
    ["-np", "2", "-m"],
    ["-np", "2", "--spares", "1", "true"],
    ["-np", "2", "--fault-tolerant", "--spares", "-1", "true"],
    ["-np", "auto", "-H", "a:many", "true"],
    ["-np", "auto", "--hostfile", "no-such-file", "true"],
  ],
  ids=" ".join,
)
def test_bad_arguments(words, capsys):
  with pytest.raises(SystemExit) as error:
    launch.main(words)
  assert error.value.code == 2
  assert capsys.readouterr().err.startswith("usage: jfog run -np N")


def test_variables_on_other_hosts():
  """All that a command line can carry, but what describes this host."""
  environ = {
    **{"XLA_FLAGS": "--a --b", "JFOG_ORDER": "strict", "PATH": "/bin"},
    **{
      "HOME": "/root",
      "TMPDIR": "/tmp",
      "SSH_TTY": "1",
      "OMPI_MCA_btl": "self",
    },
    **{"BASH_FUNC_f%%": "() {", "a b": "1", "_": "python"},
  }
  names = options.exported(environ)
  assert names == ["JFOG_ORDER", "PATH", "XLA_FLAGS"]
  mpi = launch.Mpi("mpirun", "openmpi", "")
  words = launch.mpirun_command(mpi, 2, ["true"], host="a,b", exported=names)
  passed = [words[k + 1] for k, word in enumerate(words) if word == "-x"]
  assert passed == ["JFOG_RUN_DIR", *names]
  words = launch.mpirun_command(mpi, 2, ["true"], exported=names)
  assert "-x" not in words  # on this host all are inherited


def test_a_host_that_cannot_be_reached(program):
  job = run(program, "-np", 2, "-H", "no-such-host:2", "true")
  assert job.returncode not in (0, 124)
  lines = [line for line in job.err.splitlines() if line]
  assert lines[-1] == (
    "jfog run: cannot start ranks on no-such-host; `ssh "
    "no-such-host true` has to work"
  )
  assert len(lines) <= 2, job.err  # that of ssh, if there is one


def test_ssh_and_the_interface():
  def variables(*words):
    return options.given_variables(options.parse(["-np", "2", *words, "true"]))

  found = variables("-H", "a", "--ssh-port", "2222", "--ssh-key", "id")
  agent = found["PRTE_MCA_plm_ssh_agent"]
  assert agent.startswith("ssh -o BatchMode=yes") and agent.endswith(
    "-p 2222 -i id"
  )
  found = variables("-H", "a", "--interface", "eth1")
  assert found["OMPI_MCA_btl_tcp_if_include"] == "eth1"
  assert found["NCCL_SOCKET_IFNAME"] == "eth1"
  assert variables() == {}
  with pytest.raises(SystemExit):
    variables("--ssh-port", "2222")


def test_dry_run_prints_a_command_that_runs(program, tmp_path):
  words = ("-np", 2, "--mpi-args", "--display allocation", "-x", "GREETING=a b")
  script = shell("say $GREETING $OMPI_MCA_osc")
  job = run(program, *words, "--dry-run", *script)
  assert job.returncode == 0 and not job.err
  (line,) = job.out.splitlines()
  assert "--display allocation" in line and "'GREETING=a b'" in line
  here = tmp_path / "here"
  here.mkdir()
  shell_line = ["bash", "-c", line]
  done = subprocess.run(
    shell_line, capture_output=True, text=True, timeout=DEADLINE, cwd=here
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("a b ^ucx\n") == 2
  assert not [*here.iterdir()]  # marks of ranks are for a launcher
  job = run(program, *words, "--verbose", *script)
  assert line in job.err
  assert re.search(r"ended with exit code 0 after \d+\.\d s\n$", job.err)


def test_number_of_ranks_by_itself(program, tmp_path):
  def ranks(*words):
    job = run(program, "-np", "auto", *words, "--dry-run", "true")
    return int(re.findall(r"-np (\d+)", job.out)[0])

  environ = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
  job = run(
    program, "-np", "auto", *shell("say $OMPI_COMM_WORLD_SIZE"), environ=environ
  )
  cores = len(os.sched_getaffinity(0))
  gpus = pathlib.Path("/proc/driver/nvidia/gpus")
  expected = len([*gpus.iterdir()]) if gpus.exists() else cores
  assert set(job.out.split()) == {str(expected)}
  assert ranks("-H", "a:3,b,c:2") == 6
  hosts = tmp_path / "hosts"
  hosts.write_text("# ours\na slots=2  # two\n\nb:3\nc\n")
  assert ranks("--hostfile", hosts) == 6


def test_a_module_is_run(program, tmp_path):
  (tmp_path / "trainer.py").write_text("import sys; print(*sys.argv[1:])")
  environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
  words = ("-np", 2, "-m", "trainer", "--epochs", 3, "-m", ":")
  job = run(program, *words, environ=environ)
  assert (job.returncode, job.out) == (0, "--epochs 3 -m :\n" * 2), job.err


@pytest.mark.parametrize("tag", ["--tag-output", "--no-tag-output"])
def test_a_file_for_the_output_of_each_rank(program, tmp_path, tag):
  """Also tracebacks that the terminal does not show."""
  folder = tmp_path / "made" / "logs"
  job = run(
    program,
    *("-np", 2, tag, "--output-dir", folder),
    *python("""
      print("of", rank, flush=True)
      barrier()
      time.sleep(2)  # at the end of a job mpirun may drop what it has not passed on
      raise ValueError(f"wrong on {rank}")
    """),
  )
  assert job.returncode == 1
  for rank in range(2):
    assert (folder / f"rank-{rank}.out").read_text() == f"of {rank}\n"
    text = (folder / f"rank-{rank}.err").read_text()
    if text:  # a rank may be ended before its own error
      assert text.startswith("Traceback")
  assert len([*folder.iterdir()]) == 4
  assert "of 0" in job.out and "of 1" in job.out


def test_timeout_of_operations_for_programs_without_one(program):
  job = run(
    program, *("-np", 1, "--op-timeout", "1.5"), *shell("say $JFOG_TIMEOUT")
  )
  assert job.out == "1.5\n"
