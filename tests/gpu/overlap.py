"""Exchanges beside computation, and training steps with and without averaging.

Stage 6. On one GPU the ranks share its processors as well as its memory, so that
computation of one rank slows that of the other equally in every form: ratios count.
"""

import sys

import ranks

world = ranks.World(timeout=60)

import _measure  # noqa: E402  (after the rank has its GPU)
import gpu  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import jfog  # noqa: E402

N = world.size
RING = jfog.topology.ring(N)
SMALL = ranks.REHEARSAL
WIDTH = 64 if SMALL else 4096
BYTES = 2**14 if SMALL else 64 * 2**20
TARGET = 0.02 if SMALL else 0.2  # seconds of one timing
ROUNDS = 3 if SMALL else 5


def times_of(programs):
  """Median seconds of one call of each `(function, argument)`, alternating.

  A function returns the next argument.
  """
  held = {name: argument for name, (_, argument) in programs.items()}

  def seconds(name, calls):
    function = programs[name][0]
    held[name], taken = _measure.timed(
      function, held[name], calls, world.Barrier
    )
    return world.slowest(taken) / calls

  for name in programs:
    seconds(name, 1)  # compiles
  calls = {
    name: _measure.calls_for(seconds(name, 2), TARGET) for name in programs
  }
  times = _measure.alternate(
    {name: name for name in programs},
    ROUNDS,
    lambda name: seconds(name, calls[name]),
  )
  return {name: float(np.median(values)) for name, values in times.items()}


def products(count):
  """A chain of matrix products that XLA cannot shorten."""

  def chain(a):
    return jax.lax.fori_loop(0, count, lambda _, a: (a @ a) * 0.01, a)

  return chain


def exchange_beside_products():
  """The split form: started, computed, waited for, in one program."""
  x = jnp.ones(BYTES // 4)
  a = jnp.full((WIDTH, WIDTH), 1 / WIDTH, jnp.bfloat16)
  average = jax.jit(lambda x: jfog.neighbor_allreduce(x, RING))
  alone = times_of(
    {"exchange": (average, x), "ten": (jax.jit(products(10)), a)}
  )
  count = max(1, round(10 * alone["exchange"] / alone["ten"]))
  count = int(world.slowest(count))  # the same on all ranks
  multiply = products(count)

  def split(state):
    x, a = state
    handle = jfog.neighbor_allreduce_start(x, RING)
    a = multiply(a)
    return jfog.wait(handle), a

  def fused(state):
    x, a = state
    return jfog.neighbor_allreduce(x, RING), multiply(a)

  times = times_of(
    {
      "exchange": (average, x),
      "products": (jax.jit(multiply), a),
      "fused": (jax.jit(fused), (x, a)),
      "split": (jax.jit(split), (x, a)),
    }
  )
  longer = max(times["exchange"], times["products"])
  return {
    **{f"{name} ms": 1e3 * seconds for name, seconds in times.items()},
    "split by the longer": times["split"] / longer,
    "fused by the longer": times["fused"] / longer,
    "split by the sum": times["split"]
    / (times["exchange"] + times["products"]),
  }


def optimizers_beside_gradients():
  """Steps of `adapt_with_combine` against their gradient and their average."""
  layers = 2 if SMALL else 8
  side = 32 if SMALL else 1448  # 8 MB of float32 a layer
  batch = jnp.ones((16 if SMALL else 8192, side), jnp.bfloat16)
  params = [jnp.eye(side) for _ in range(layers)]

  def loss(params):
    x = batch
    for layer in params:
      x = jnp.tanh(x @ layer.astype(x.dtype))
    return x.astype(jnp.float32).mean()

  def step_of(tx):
    def step(state):
      params, opt_state = state
      gradient = jax.grad(loss)(params)
      updates, opt_state = tx.update(gradient, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    return jax.jit(step), (params, tx.init(params))

  sgd = optax.sgd(1e-3)
  average = jax.jit(lambda p: jfog.neighbor_allreduce(p, RING))
  build = jfog.optimizers
  times = times_of(
    {
      "gradient": step_of(sgd),
      "average": (average, params),
      "adapt_with_combine": step_of(build.adapt_with_combine(sgd, RING)),
      "adapt_then_combine": step_of(build.adapt_then_combine(sgd, RING)),
    }
  )
  longer = max(times["gradient"], times["average"])
  return {
    **{f"{name} ms": 1e3 * seconds for name, seconds in times.items()},
    "with by the longer": times["adapt_with_combine"] / longer,
    "then by the sum": times["adapt_then_combine"]
    / (times["gradient"] + times["average"]),
  }


def training(name):
  """A model's step with averaging by the same without."""
  model, arguments, samples = gpu.MODELS[name]
  if SMALL:
    arguments, samples = REHEARSED[name], 2
  job = {"rounds": ROUNDS, "target": TARGET / 5}
  count, times = gpu.times_of_training(
    job, (model, arguments, samples), world, world.slowest
  )
  median = {form: float(np.median(values)) for form, values in times.items()}
  return {
    "parameters": count,
    **{f"{form} ms": 1e3 * seconds for form, seconds in median.items()},
    "with by without": median["adapt_then_combine"] / median["without"],
  }


REHEARSED = {
  "ResNet-50": {
    "blocks": (1,),
    "width": 4,
    "classes": 4,
    "side": 16,
    "dtype": jnp.float32,
  },
  "transformer": {
    **{"layers": 2, "width": 16, "heads": 2, "length": 8, "words": 16},
    "dtype": jnp.float32,
  },
}
CASES = {
  "products": {"exchange beside products": exchange_beside_products},
  "optimizers": {"optimizers beside gradients": optimizers_beside_gradients},
  "training": {
    name: (lambda name=name: training(name))
    for name in ("transformer", "ResNet-50")
  },
}
cases = {}
for part in sys.argv[1:] or CASES:
  cases |= CASES[part]
sys.exit(1 if world.run(cases) else 0)
