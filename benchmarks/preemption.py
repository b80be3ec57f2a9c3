"""Goodput under preemptions: one rank after the other is killed, and replaced.

    python benchmarks/preemption.py --ranks 4 --seconds 300 --every 30

Starts a job of `jfog run --fault-tolerant` with a spare for each preemption. Every 30
seconds the next rank is killed, rank 0 among them; a spare takes its place. Goodput is
the number of steps that ranks have made, by that of the steps that they could have made
in their time in the job at the pace before the first preemption.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jfog
import jfog.launch

_FIELDS = (
  "begin",
  "end",
  "steps",
  "place",
  "quiet_begin",
  "quiet_end",
  "quiet_steps",
)


def arguments():
  """The parsed command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--ranks", type=int, default=4)
  parser.add_argument("--seconds", type=float, default=300.0)
  parser.add_argument("--every", type=float, default=30.0)
  parser.add_argument(
    "--spares", type=int, help="by default one for each preemption"
  )
  parser.add_argument(
    "--width", type=int, default=512, help="of the two hidden layers"
  )
  parser.add_argument("--job", help=argparse.SUPPRESS)  # inside of a job
  options = parser.parse_args()
  if options.every >= options.seconds:
    parser.error("--every must be shorter than --seconds.")
  return options


def preemptions(options):
  """The times of the preemptions, in seconds from the first step."""
  count = int((options.seconds - 1) // options.every)
  return [options.every * (k + 1) for k in range(count)]


def make(size):
  """The optimizer, the step and the graph for a number of ranks."""
  graph = jfog.topology.exponential(size)
  tx = jfog.optimizers.adapt_then_combine(optax.adam(1e-3), graph)

  def loss(params, x, y):
    for name in ("first", "second"):
      x = jax.nn.relu(x @ params[name])
    return jnp.mean((x @ params["out"] - y) ** 2)

  @jax.jit
  def train_step(params, state, x, y):
    grads = jax.grad(loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return tx, train_step, graph


class Record:
  """Numbers of one process in a file, which outlives it."""

  def __init__(self, folder):
    path = os.path.join(folder, f"{os.getpid()}.npy")
    self.values = np.lib.format.open_memmap(
      path, "w+", np.float64, (len(_FIELDS),)
    )

  def __setitem__(self, name, value):
    self.values[_FIELDS.index(name)] = value

  def __getitem__(self, name):
    return self.values[_FIELDS.index(name)]


def die_at(when):
  """Kills this process at a time, wherever it is then."""

  def later():
    time.sleep(max(0.0, when - time.time()))
    os.kill(os.getpid(), signal.SIGKILL)

  threading.Thread(target=later, daemon=True).start()


def train(options, folder):
  """One rank of the job."""
  random = np.random.RandomState(0)
  width = options.width
  shapes = {"first": (64, width), "second": (width, width), "out": (width, 8)}
  params = {
    name: jnp.asarray(random.randn(*shape) / shape[0] ** 0.5, jnp.float32)
    for name, shape in shapes.items()
  }
  x = jnp.asarray(random.randn(256, 64), jnp.float32)
  y = jnp.asarray(random.randn(256, 8), jnp.float32)
  record = Record(folder)
  times = preemptions(options)
  state, step, start, is_new = None, 0, np.zeros(1), True
  world = jfog.init(on_missing="reweight")
  joined_at = time.time()
  while True:
    try:
      if is_new:
        places = world.launched_ranks or tuple(range(world.size))
        place = places[world.rank]
        tx, train_step, graph = make(world.size)
        state = tx.init(params) if state is None else state
        is_first = not world.launched_ranks
        step, params, state, start = jfog.share_state(
          (step, params, state, start), graph
        )
        step = int(jfog.allreduce(jnp.int32(step), "max"))
        state = state._replace(step=jnp.int32(step))
        if is_first:
          jax.block_until_ready(train_step(params, state, x, y))  # compiles
          jfog.barrier()
          start = np.array([time.time()])
          joined_at = start[0]
          record["quiet_begin"] = start[0]
        if not record["begin"]:
          record["begin"], record["place"] = joined_at, place
          for k, after in enumerate(times):
            if k % options.ranks == place and start[0] + after > time.time():
              die_at(start[0] + after)
              break
        is_new = False
      ended = (
        jfog.allreduce(
          jnp.int32(time.time() > start[0] + options.seconds), "max"
        )
        if step % 50 == 49 and not jfog.missing_ranks()
        else 0
      )
      if int(ended):
        break
      if jfog.missing_ranks():
        world, is_new = jfog.recover(), True
        continue
      done = jax.block_until_ready(train_step(params, state, x, y))
    except jax.errors.JaxRuntimeError as error:
      if not jfog.is_rank_failure(error):
        raise
      world, is_new = jfog.recover(), True
      continue
    params, state = done
    step += 1
    now = time.time()
    record["steps"] += 1
    record["end"] = now
    if now < start[0] + times[0]:
      record["quiet_end"] = now
      record["quiet_steps"] += 1


def main():
  """Starts the job and prints its goodput; or is a rank of it."""
  options = arguments()
  if options.job:
    train(options, options.job)
    return
  times = preemptions(options)
  spares = len(times) if options.spares is None else options.spares
  with tempfile.TemporaryDirectory() as folder:
    command = jfog.launch.command_line(
      [
        *("--fault-tolerant", "-np", str(options.ranks)),
        *("--spares", str(spares), sys.executable, __file__),
        *sys.argv[1:],
        *("--job", folder),
      ]
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
      command, env=environment, check=True, timeout=3 * options.seconds + 300
    )
    records = [
      dict(zip(_FIELDS, np.load(path).tolist(), strict=True))
      for path in pathlib.Path(folder).glob("*.npy")
    ]
  print(json.dumps(summary(records, options.ranks, len(times)), indent=2))


def summary(records, ranks, preempted):
  """The goodput, and what it is computed of."""
  records = [each for each in records if each["begin"]]
  first = [
    each for each in records if each["quiet_steps"] and each["quiet_begin"]
  ]
  pace = np.median(
    [
      (each["quiet_end"] - each["quiet_begin"]) / each["quiet_steps"]
      for each in first
    ]
  )
  end = max(each["end"] for each in records)
  begin = min(each["begin"] for each in records)
  made = sum(each["steps"] for each in records)
  lived = sum(each["end"] - each["begin"] for each in records)
  return {
    "ranks": ranks,
    "preemptions": preempted,
    "replacements": len(records) - ranks,
    "seconds": round(end - begin, 1),
    "step_ms": round(1e3 * float(pace), 3),
    "steps": int(made),
    # Of the living ranks, and of all places over the whole time.
    "goodput": round(float(made * pace / lived), 4),
    "goodput_of_all_places": round(
      float(made * pace / (ranks * (end - begin))), 4
    ),
  }


if __name__ == "__main__":
  main()
