"""`jfog run` on several hosts: network namespaces with names and folders of their own.

`benchmarks/slow_link.sh` makes the hosts, in place of ssh. Each has a hostname, a
network and a `/tmp`-like folder that the launcher's host does not see.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from jfog import launch

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEADLINE = 300.0
HOSTS = ("-np", "4", "-H", "machine0:2,machine1:2")
# Hides the launcher's folder of records on the host, before its network is made.
AGENT = (
  'exec unshare --mount sh -c \'mount -t tmpfs none "$HIDDEN" && exec sh "$@"\''
)


def why_not() -> str:
  """The reason why namespaces cannot be hosts here; "" if they can."""
  path = os.environ["PATH"] + ":/usr/sbin:/sbin"
  for name in ("ip", "tc", "unshare", "nsenter"):
    if not shutil.which(name, path=path):
      return f"there is no {name}"
  words = ["unshare", "--net", "--mount", "--uts", "sh", "-c"]
  done = subprocess.run(
    [*words, "mount -t tmpfs none /mnt && hostname x"], capture_output=True
  )
  if done.returncode:
    return "namespaces are not permitted here"
  try:
    if launch.installed_mpi().family != "openmpi":
      return "the hosts of this test are for Open MPI"
  except RuntimeError as error:
    return str(error)
  return ""


WHY_NOT = why_not()
pytestmark = [
  pytest.mark.full,
  pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]


def run_on_hosts(tmp_path, *words, link="10000"):
  """Runs `jfog run` on two hosts; returns its exit code, stdout and stderr."""
  hidden = tmp_path / "records"
  hidden.mkdir()
  agent = tmp_path / "agent.sh"
  script = ROOT / "benchmarks" / "slow_link.sh"
  agent.write_text(f'{AGENT} sh {script} host "$@"\n')
  inherited = {
    k: v
    for k, v in os.environ.items()
    if k not in ("XLA_FLAGS", "JFOG_SHARED_MEMORY", "PRTE_MCA_plm_ssh_agent")
  }
  settings = [
    f"PRTE_MCA_plm_ssh_agent=sh {agent}",
    f"TMPDIR={hidden}",
    f"HIDDEN={hidden}",
    "JAX_PLATFORMS=cpu",
    "GREETING=a b",
  ]
  command = launch.command_line([*HOSTS, *words])
  done = subprocess.run(
    ["sh", str(script), link, "env", *settings, *command],
    env=inherited,
    cwd=tmp_path,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.soak
def test_an_example_trains_on_two_hosts(tmp_path):
  code, out, err = run_on_hosts(
    tmp_path, sys.executable, str(ROOT / "examples" / "minimal.py")
  )
  assert code == 0, out + err
  assert re.search(r"epoch 100: loss 0\.0\d+ on 4 ranks", out), out


def test_hosts_variables_and_the_average_of_their_ranks(tmp_path):
  program = """
import os, pathlib, jax.numpy as jnp, jfog
world = jfog.init()
hidden = pathlib.Path(os.environ["JFOG_RUN_DIR"]).exists()
total = jfog.allreduce(jnp.arange(3.0) * world.rank, "sum")
graph = jfog.topology.ring(world.size)
mean = jfog.neighbor_allreduce(jnp.float32(world.rank), graph)
print(
  world.rank, os.uname().nodename, world.machine_rank, os.environ["GREETING"],
  hidden, *total, mean, flush=True)
"""
  code, out, err = run_on_hosts(
    tmp_path, "--no-tag-output", sys.executable, "-c", program
  )
  assert code == 0, out + err
  means = (4 / 3, 1.0, 2.0, 5 / 3)
  for rank, line in enumerate(sorted(out.splitlines())):
    *words, mean = line.split()
    machine = rank // 2
    greeting = ["a", "b"]
    expected = [
      str(rank),
      f"machine{machine}",
      str(machine),
      *greeting,
      "False",
    ]
    assert words == [*expected, "0.0", "6.0", "12.0"]
    assert float(mean) == pytest.approx(means[rank], rel=1e-6)


def test_a_failure_on_the_second_host_is_one_line(tmp_path):
  program = """
import jfog
world = jfog.init()
jfog.barrier()
if world.rank == 3:
  raise FileNotFoundError("the samples of rank 3")
jfog.barrier()
"""
  code, out, err = run_on_hosts(tmp_path, sys.executable, "-c", program)
  assert code == 1, out + err
  assert "Socket closed" not in err and err.count("Traceback") == 1, err
  assert err.endswith(
    "jfog run: rank 3 failed first (exit code 1), by the traceback above that ends "
    "with:\nFileNotFoundError: the samples of rank 3\n"
  ), err


def test_a_link_delays_messages(tmp_path):
  program = """
import time, jax.numpy as jnp, jfog
world = jfog.init()
step = lambda: jfog.allreduce(jnp.float32(world.rank)).block_until_ready()
step()
begin = time.perf_counter()
mean = step()
print(f"mean {mean} after {time.perf_counter() - begin:.6f} s", flush=True)
"""
  words = ("-x", "JFOG_LOG_LEVEL=info", sys.executable, "-c", program)
  code, out, err = run_on_hosts(
    tmp_path, "--no-tag-output", *words, link="10000,30"
  )
  assert code == 0, out + err
  # As many as fill the link.
  way = "shared memory with rank 0; MPI messages with ranks 2-3, 64 chunks"
  assert way in err, err
  found = re.findall(r"mean 1\.5 after ([\d.]+) s", out)
  assert len(found) == 4 and min(map(float, found)) > 0.03, out


FAULT = """
import os, signal, subprocess, time
import jax, jax.numpy as jnp, jfog
HOW = {how!r}
world = jfog.init(on_missing="reweight", hang_timeout=2.0)
graph = jfog.topology.ring(world.size)
x = jnp.full(3, float(world.rank))
begin = time.monotonic()
for step in range(80):
  if step == 40 and world.rank == 3:
    if HOW == "sleep":
      time.sleep(600)
    if HOW == "daemon":
      process = os.getpid()
      while open(f"/proc/{{process}}/comm").read() != "prted\\n":
        process = int(open(f"/proc/{{process}}/stat").read().split()[3])
      os.kill(process, signal.SIGKILL)
    if HOW == "cut":
      cut = "ip link set wire down; sleep 6; ip link set wire up"
      subprocess.Popen(["sh", "-c", cut])
    else:
      os.kill(os.getpid(), signal.SIGSTOP if HOW == "stop" else signal.SIGKILL)
  time.sleep(0.005)
  x = jax.block_until_ready(jfog.neighbor_allreduce(x, graph))
# Ranks 0 and 1 are on the other host; rank 1 waits for no message of rank 3.
while HOW != "cut" and not jfog.missing_ranks():
  time.sleep(0.01)
print("LEFT", world.rank, jfog.missing_ranks(), flush=True)
time.sleep(1.0)  # until all have come here
world = jfog.recover()
print("NEW", world.rank, float(jfog.allreduce(jnp.float32(1), "sum")), flush=True)
"""


@pytest.mark.parametrize("how", ["kill", "stop", "sleep"])
def test_averages_go_on_without_a_rank_of_the_second_host(tmp_path, how):
  words = ("--fault-tolerant", "--no-tag-output", sys.executable, "-c")
  code, out, err = run_on_hosts(tmp_path, *words, FAULT.format(how=how))
  assert code == 0, out + err
  lines = [f"LEFT {rank} (3,)" for rank in range(3)]
  lines += [f"NEW {rank} 3.0" for rank in range(3)]
  assert sorted(out.splitlines()) == lines, err
  assert ("rank 3 seems stuck" in err) == (how != "kill")


def test_a_link_that_comes_back_costs_no_rank(tmp_path):
  words = ("--fault-tolerant", "--no-tag-output", sys.executable, "-c")
  code, out, err = run_on_hosts(tmp_path, *words, FAULT.format(how="cut"))
  assert code == 0, out + err
  lines = [f"LEFT {rank} ()" for rank in range(4)]
  lines += [f"NEW {rank} 4.0" for rank in range(4)]
  assert sorted(out.splitlines()) == lines, err
  # Each side has taken the other one for stuck meanwhile.
  assert re.search("rank [23] seems stuck", err), err


def test_the_loss_of_a_host_is_one_line(tmp_path):
  words = ("--fault-tolerant", sys.executable, "-c")
  code, out, err = run_on_hosts(tmp_path, *words, FAULT.format(how="daemon"))
  assert code != 0, out + err
  assert "PRTE has lost" not in out + err
  assert "jfog run: Open MPI's daemon on machine1 has ended" in err
