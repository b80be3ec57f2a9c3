"""A known optax loop, made decentralized: the same script in four places.

    python examples/minimal.py              # 8 virtual ranks
    jfog run -np 4 python examples/minimal.py  # 4 processes; NCCL on GPUs
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/minimal.py

Each rank fits a line to samples of its own; averaging makes it everyone's line.
"""

import jax
import jax.numpy as jnp
import optax

import jfog

SIZE = jfog.num_ranks(8)  # the number of processes under `jfog run`
graph = jfog.topology.one_peer_exponential(SIZE)
tx = jfog.optimizers.adapt_then_combine(optax.sgd(0.1), graph)


def loss_fn(params, x, y):
  return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)


def train_step(params, opt_state, x, y):
  loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, jfog.allreduce(loss)


key, noise = jax.random.split(jax.random.key(0))
x = jax.random.normal(key, (800,))
y = 3 * x + 1 + 0.1 * jax.random.normal(noise, x.shape)
x, y = jfog.shard((x, y), SIZE)  # a part for each rank

params = jfog.stack({"slope": jnp.zeros(()), "offset": jnp.zeros(())}, SIZE)
opt_state = jfog.map_ranks(tx.init, SIZE)(params)
step = jax.jit(jfog.map_ranks(train_step, SIZE))
for epoch in range(101):
  params, opt_state, loss = step(params, opt_state, x, y)
  if epoch % 25 == 0 and jfog.rank() == 0:
    print(f"epoch {epoch:3}: loss {loss[0]:.4f} on {SIZE} ranks")
if jfog.rank() == 0:
  print(f"y = {params['slope'][0]:.2f} x + {params['offset'][0]:.2f}")
