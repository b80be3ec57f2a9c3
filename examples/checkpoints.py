"""A training that goes on after a kill, on the same or another number of ranks.

    pip install '.[more-examples]'
    jfog run -np 4 python examples/checkpoints.py  # interrupt it, and start it again
    jfog run -np 2 python examples/checkpoints.py  # goes on with two ranks
    python examples/checkpoints.py                 # or with 8 virtual ranks

Each process saves the ranks that it runs. A job of as many ranks and processes goes
on bit for bit. Another one starts from the mean of the models and of the states of
the inner optimizer; the rest of the state belongs to the old graph, and is made anew.
"""

import argparse
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import jfog

BATCH = 16  # images of a rank in a step

parser = argparse.ArgumentParser()
parser.add_argument("--ranks", type=int, default=8, help="in one process")
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--every", type=int, default=50, help="steps between saves")
parser.add_argument("--folder", type=pathlib.Path, default="checkpoints")
parser.add_argument("--optimizer", default="adapt_then_combine")
arguments = parser.parse_args()

SIZE = jfog.num_ranks(arguments.ranks)
PROCESSES = jfog.size()  # 1, or SIZE under `jfog run`
OPTIMIZERS = {
  "adapt_then_combine": lambda inner: jfog.optimizers.adapt_then_combine(
    inner, jfog.topology.one_peer_exponential(SIZE)
  ),
  "choco": lambda inner: jfog.optimizers.choco(
    inner, jfog.topology.ring(SIZE), jfog.optimizers.top_k(64), 0.3
  ),
  "gradient_tracking": lambda inner: jfog.optimizers.gradient_tracking(
    inner, jfog.topology.ring(SIZE)
  ),
  "relay_sum": lambda inner: jfog.optimizers.contrib.relay_sum(
    inner, jfog.topology.chain(SIZE)
  ),
}
tx = OPTIMIZERS[arguments.optimizer](optax.adam(3e-3))


def init_params(key):
  first, second = jax.random.split(key)
  return {
    "hidden": jax.random.normal(first, (64, 32)) / 8,
    "out": jax.random.normal(second, (32, 10)) / 32**0.5,
  }


def logits(params, x):
  return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def loss_fn(params, x, y):
  scores = logits(params, x)
  return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def train_step(state, step, x, y):
  """One rank's step; its batch depends on the step and the rank alone."""
  key = jax.random.fold_in(jax.random.key(step), jfog.rank())
  batch = jax.random.choice(key, len(y), (BATCH,), replace=False)
  grads = jax.grad(loss_fn)(state["params"], x[batch], y[batch])
  updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  return {"params": params, "opt_state": opt_state}


def accuracy(state, x, y):
  """The mean accuracy of the ranks' networks."""
  guess = logits(state["params"], x).argmax(axis=1)
  return jfog.allreduce(jnp.mean(guess == y))


# A folder for each job, by its ranks and processes, and in it one for each process.
folder = arguments.folder.resolve()
name = f"{SIZE}ranks-{PROCESSES}processes"


def last_step(job):
  """The last step that all processes of a job have saved, None without one."""
  _, processes = map(int, re.findall(r"\d+", job.name))
  saved = []
  for process in range(processes):
    path = job / f"process{process}"
    saved.append(set(ocp.utils.checkpoint_steps(path) if path.exists() else ()))
  return max(set.intersection(*saved), default=None)


def mean_of_ranks(job, step):
  """Parameters and state of the inner optimizer, means over all ranks of a job.

  Args:
    job: the folder of the job.
    step: one that all its processes have saved.
  """
  ranks, processes = map(int, re.findall(r"\d+", job.name))

  def held(leaf):  # by a process of that job
    shape = ranks // processes, *leaf.shape[1:]
    return jax.ShapeDtypeStruct(shape, leaf.dtype)

  inner_state = jax.tree.map(held, state["opt_state"].inner_state)
  left_out = jax.tree.map(lambda _: ocp.PLACEHOLDER, state["opt_state"])
  like = {
    "params": jax.tree.map(held, state["params"]),
    "opt_state": left_out._replace(inner_state=inner_state),
  }
  parts = []
  for process in range(processes):
    with ocp.CheckpointManager(job / f"process{process}") as saved:
      part = saved.restore(
        step,
        args=ocp.args.PyTreeRestore(
          like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
        ),
      )
    parts.append((part["params"], part["opt_state"].inner_state))

  def mean(*leaves):
    values = np.concatenate(leaves)  # ranks along axis 0
    if jnp.issubdtype(values.dtype, jnp.inexact):
      return jnp.asarray(values.mean(axis=0, dtype=np.float64), values.dtype)
    assert (values == values[0]).all()  # counts of steps
    return jnp.asarray(values[0])

  return jax.tree.map(mean, *parts)


def init(params, inner_state=None):
  """One rank's state; without an inner state a fresh one."""
  opt_state = tx.init(params)
  if inner_state is not None:
    opt_state = opt_state._replace(inner_state=inner_state)
  return {"params": params, "opt_state": opt_state}


digits = load_digits()
order = np.random.RandomState(0).permutation(len(digits.target))
x, y = np.float32(digits.data[order] / 16), np.int32(digits.target[order])
train, test = jfog.shard((x[360:], y[360:]), SIZE), (x[:360], y[:360])

init = jfog.map_ranks(init, SIZE)
state = init(jfog.stack(init_params(jax.random.key(0)), SIZE))
train_step = jax.jit(jfog.map_ranks(train_step, SIZE, in_axes=(0, None, 0, 0)))
accuracy = jax.jit(
  jfog.map_ranks(accuracy, SIZE, in_axes=(0, None, None), out_axes=None)
)

steps = {job: last_step(job) for job in folder.glob("*ranks-*processes")}
steps = {job: step for job, step in steps.items() if step is not None}
last = max(steps, key=lambda job: (steps[job], job.name == name), default=None)
jfog.barrier()  # all have read the folders before any of them writes
done = steps[last] if last else 0

options = ocp.CheckpointManagerOptions(max_to_keep=3)
path = folder / name / f"process{jfog.rank()}"
with ocp.CheckpointManager(path, options=options) as checkpoints:
  for step in checkpoints.all_steps():
    if last is None or last.name != name or step > done:
      checkpoints.delete(step)  # other processes have not saved it
  if last and last.name == name:
    state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
  elif last:
    state = init(*jfog.stack(mean_of_ranks(last, done), SIZE))
    checkpoints.save(done, args=ocp.args.StandardSave(state))
  if last and jfog.rank() == 0:
    print(f"goes on after step {done} of {last.name}")
  for step in range(done, arguments.steps):
    state = train_step(state, step, *train)
    if (step + 1) % arguments.every == 0:
      checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
score = float(accuracy(state, *test))
if jfog.rank() == 0:
  print(
    f"step {max(done, arguments.steps)}: {100 * score:.1f} % on {SIZE} ranks"
  )
