"""Decentralized algorithms as matrix recursions, in the forms of the papers.

Each takes the gradients of all ranks as a function, the start with one row per
rank, and the number of steps, and returns all iterates without the start. A
matrix argument is a list of rounds.
"""

import numpy as np


def lazy(w):
  return (np.eye(len(w)) + w) / 2


def at(matrices, k):
  return matrices[k % len(matrices)]


def constant(rate):
  return rate if callable(rate) else lambda k: rate


def psi_form(gradient, x, steps, rate, matrices):
  """`psi+ = x - a g; x+ = W (psi+ + x - psi)`."""
  psi, out = x, []
  for k in range(steps):
    new = x - constant(rate)(k) * gradient(x)
    x, psi = at(matrices, k) @ (new + x - psi), new
    out.append(x)
  return np.array(out)


def exact_diffusion(gradient, x, steps, rate, matrices):
  return psi_form(gradient, x, steps, rate, [lazy(w) for w in matrices])


def d2(gradient, x, steps, rate, w):
  """`X+ = W (2 X - X_before - a (G - G_before))`, the first step `W (X - a G)`."""
  g = gradient(x)
  out = [x, w @ (x - rate * g)]
  for _ in range(steps - 1):
    before, g_before, g = out[-2], g, gradient(out[-1])
    out.append(w @ (2 * out[-1] - before - rate * (g - g_before)))
  return np.array(out[1:])


def nids(gradient, x, steps, rate, w):
  g = gradient(x)
  out = [x, x - rate * g]
  for _ in range(steps - 1):
    before, g_before, g = out[-2], g, gradient(out[-1])
    out.append(lazy(w) @ (2 * out[-1] - before - rate * (g - g_before)))
  return np.array(out[1:])


def extra(gradient, x, steps, rate, w):
  """`X+ = (I + W) X - Wb X_before - a (G - G_before)`, first `W X - a G`."""
  g = gradient(x)
  out = [x, w @ x - rate * g]
  for _ in range(steps - 1):
    x, before, g_before, g = out[-1], out[-2], g, gradient(out[-1])
    out.append(x + w @ x - lazy(w) @ before - rate * (g - g_before))
  return np.array(out[1:])


def tracking_awc(gradient, x, steps, rate, matrices):
  g = q = gradient(x)
  out = []
  for k in range(steps):
    w = at(matrices, k)
    x = w @ x - rate * q
    g, g_before = gradient(x), g
    q = w @ q + g - g_before
    out.append(x)
  return np.array(out)


def tracking_atc(gradient, x, steps, rate, matrices, step=None):
  """`step` is the local optimizer; `-rate q` by default."""
  step = step or (lambda q, x: -rate * q)
  g = q = gradient(x)
  out = []
  for k in range(steps):
    w = at(matrices, k)
    x = w @ (x + step(q, x))
    g, g_before = gradient(x), g
    q = w @ (q + g - g_before)
    out.append(x)
  return np.array(out)


def push_pull(gradient, x, steps, rate, rows, columns):
  g = y = gradient(x)
  out = []
  for k in range(steps):
    x = at(rows, k) @ (x - constant(rate)(k) * y)
    g, g_before = gradient(x), g
    y = at(columns, k) @ (y + g - g_before)
    out.append(x)
  return np.array(out)


def push_sum(gradient, x, steps, inner, matrices):
  biased, weight, out = x, np.ones((len(x), 1)), []
  for k in range(steps):
    a = at(matrices, k)
    biased = a @ (biased + inner(gradient(x), x))
    weight = a @ weight
    x = biased / weight
    out.append(x)
  return np.array(out)


def push_diging(gradient, x, steps, rate, matrices):
  biased, weight, out = x, np.ones((len(x), 1)), []
  g = y = gradient(x)
  for k in range(steps):
    a = at(matrices, k)
    biased, weight = a @ (biased - constant(rate)(k) * y), a @ weight
    x = biased / weight
    g, g_before = gradient(x), g
    y = a @ y + g - g_before
    out.append(x)
  return np.array(out)


def decentlam(gradient, x, steps, rate, b, matrices):
  m, out = 0 * x, []
  for k in range(steps):
    a = constant(rate)(k)
    m = b * m + (x - at(matrices, k) @ (x - a * gradient(x))) / a
    x = x - a * m
    out.append(x)
  return np.array(out)


def quasi_global_momentum(
  gradient, x, steps, rate, b, matrices, mu=None, nesterov=False, decay=0.0
):
  mu = b if mu is None else mu
  trace, out = 0 * x, []
  for k in range(steps):
    a = constant(rate)(k)
    g = gradient(x) + decay * x
    m = b * trace + g
    y = at(matrices, k) @ (x - a * (g + b * m if nesterov else m))
    trace = mu * trace + (1 - mu) * (x - y) / a
    x = y
    out.append(x)
  return np.array(out)


def dmsgd_sync(gradient, x, steps, rate, b, matrices):
  m, out = 0 * x, []
  for k in range(steps):
    w = at(matrices, k)
    x, m = w @ (x - constant(rate)(k) * m), w @ (b * m + gradient(x))
    out.append(x)
  return np.array(out)


def periodic(gradient, x, steps, inner, every, matrices=None):
  """Gossip-PGA; without matrices, local SGD."""
  out = []
  for k in range(steps):
    x = x + inner(gradient(x), x)
    if (k + 1) % every == 0:
      x = np.broadcast_to(x.mean(axis=0), x.shape)
    elif matrices is not None:
      x = at(matrices, k) @ x
    out.append(x)
  return np.array(out)


def slow_momentum(gradient, x, steps, inner, every, rate, b, matrices=None):
  z, momentum, out = x, 0 * x, []
  for k in range(steps):
    x = x + inner(gradient(x), x)
    if (k + 1) % every == 0:
      momentum = b * momentum + z - x.mean(axis=0)
      x = z = z - constant(rate)(k // every) * momentum
    elif matrices is not None:
      x = at(matrices, k) @ x
    out.append(x)
  return np.array(out)


def diloco(gradient, x, steps, inner, outer, every, matrices=None):
  """Averages by the matrices, or by the mean of all ranks without them."""
  z, out = x, []
  for k in range(steps):
    x = x + inner(gradient(x), x)
    if (k + 1) % every == 0:
      mixed = (
        np.broadcast_to(x.mean(axis=0), x.shape)
        if matrices is None
        else at(matrices, k // every) @ x
      )
      x = z = z + outer(z - mixed, z)
    out.append(x)
  return np.array(out)
