"""The attacks of the literature on averages with faulty ranks."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _validation
from jfog.runtime import Attack, Message


def sign_flip(scale: Any = 1.0) -> Attack:
  """Sends the negative of what the rank holds: `-scale x[sender]`.

  Args:
    scale: a real number, traced or not.

  Raises:
    TypeError: if `scale` is not a real scalar.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> average = lambda x: jfog.neighbor_allreduce(x, jfog.topology.ring(3))
    >>> run = jfog.simulate(average, 3, attackers={2: jfog.attacks.sign_flip()})
    >>> run(jnp.array([3.0, 6.0, 9.0]))
    Array([0., 0., 6.], dtype=float32)

  Source: Li et al., "RSA: Byzantine-robust stochastic aggregation methods for
  distributed learning from heterogeneous datasets", 2019.
  """
  _require_scalar(scale, "sign_flip: scale")

  def send(message: Message) -> jax.Array:
    own = message.values[message.sender]
    return -_times(scale, own)

  return Attack(f"sign_flip(scale={scale})", send)


def noise(scale: Any = 1.0, seed: Any = 0) -> Attack:
  """Sends what the rank holds plus Gaussian noise: `x[sender] + scale N(0, I)`.

  The draws follow from the seed, the rank, the number of the leaf and the bits of
  `x[sender]`: they repeat from run to run, and change as the value does. All
  receivers get the same. For a complex leaf the noise is a standard complex
  normal, of variance 1 in all.

  Args:
    scale: the standard deviation, a real number, traced or not.
    seed: an integer, traced or not.

  Raises:
    TypeError: if `scale` is not a real scalar or `seed` not an integer.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> average = lambda x: jfog.neighbor_allreduce(x, jfog.topology.ring(3))
    >>> run = jfog.simulate(average, 3, attackers={2: jfog.attacks.noise(100.0)})
    >>> x = jnp.zeros(3)
    >>> bool(jnp.abs(run(x)[0]) > 1), bool((run(x) == run(x)).all())
    (True, True)

  Source: the Gaussian attack of Blanchard et al., "Machine learning with
  adversaries: Byzantine tolerant gradient descent", 2017, whose draws are around 0.
  """
  _require_scalar(scale, "noise: scale")
  _require_scalar(seed, "noise: seed")
  if not jnp.issubdtype(jnp.result_type(seed), jnp.integer):
    raise TypeError(f"noise: seed={seed!r} must be an integer.")

  def send(message: Message) -> jax.Array:
    own = message.values[message.sender]
    key = jax.random.fold_in(jax.random.key(seed), message.sender)
    key = jax.random.fold_in(key, message.leaf)
    key = jax.random.fold_in(key, _digest(own))
    return own + _times(scale, jax.random.normal(key, own.shape, own.dtype))

  return Attack(f"noise(scale={scale}, seed={seed})", send)


def alie(z: Any = None) -> Attack:
  """A little is enough: sends what is barely within the honest ranks' spread.

  Coordinate by coordinate, with the mean and the (population) standard deviation
  over `H`:

      mean - z std

  The real and imaginary parts of a complex leaf are coordinates of their own.

  Args:
    z: a real number, traced or not. By default the formula of the paper for `n`
      ranks with `m` attackers: with `s = floor(n / 2 + 1) - m`, the quantile of
      the standard normal at `(n - m - s) / (n - m)`. It counts all ranks, not the
      neighbors of one.

  Raises:
    TypeError: if `z` is not a real scalar.
    ValueError: without `z`, in the first operation, where the formula has no
      finite value: if more than half of the ranks attack, or one of two.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> gather = lambda x: jfog.neighbor_allgather(x, jfog.topology.ring(3))
    >>> run = jfog.simulate(gather, 3, attackers={2: jfog.attacks.alie(z=1.5)})
    >>> run(jnp.array([1.0, 3.0, 9.0]))
    Array([[3. , 0.5],
           [1. , 0.5],
           [1. , 3. ]], dtype=float32)

  Source: Baruch et al., "A little is enough: circumventing defenses for distributed
  learning", 2019, section 3.
  """
  if z is not None:
    _require_scalar(z, "alie: z")

  def send(message: Message) -> jax.Array:
    deviations = z
    if z is None:
      deviations = _largest_z(len(message.values), message.attackers)
    mean = _mean(message.values, message.honest)
    return mean - _times(deviations, _deviation(message, mean))

  return Attack(f"alie(z={z})", send)


def inner_product(scale: Any = 0.5) -> Attack:
  """Inner-product manipulation: sends `-scale mean_H(x)`.

  With a small `scale` it lies near to the honest values where these are small, and
  turns the average around all the same.

  Args:
    scale: a real number, traced or not.

  Raises:
    TypeError: if `scale` is not a real scalar.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> gather = lambda x: jfog.neighbor_allgather(x, jfog.topology.ring(3))
    >>> run = jfog.simulate(gather, 3, attackers={2: jfog.attacks.inner_product()})
    >>> run(jnp.array([1.0, 3.0, 9.0]))
    Array([[ 3., -1.],
           [ 1., -1.],
           [ 1.,  3.]], dtype=float32)

  Source: Xie et al., "Fall of empires: breaking Byzantine-tolerant SGD by inner
  product manipulation", 2019.
  """
  _require_scalar(scale, "inner_product: scale")

  def send(message: Message) -> jax.Array:
    return -_times(scale, _mean(message.values, message.honest))

  return Attack(f"inner_product(scale={scale})", send)


def dissensus(scale: Any = 1.0) -> Attack:
  """Drives each receiver away from its honest neighbors.

  To rank `i`, with `B` the attackers among the in-neighbors of `i`, it sends

      x[i] - scale sum_{k in H} W[i, k] (x[k] - x[i]) / sum_{b in B} W[i, b]

  so that the weighted sum over all in-neighbors is `1 - scale` times what the honest
  ones alone would do: with `scale = 1` rank `i` keeps its own value. Every receiver
  gets a message of its own, which takes `size` times the memory of the other attacks.

  Args:
    scale: a real number, traced or not.

  Raises:
    TypeError: if `scale` is not a real scalar.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> average = lambda x: jfog.neighbor_allreduce(x, jfog.topology.ring(3))
    >>> run = jfog.simulate(average, 3, attackers={2: jfog.attacks.dissensus()})
    >>> run(jnp.array([3.0, 6.0, 9.0]))
    Array([3., 6., 6.], dtype=float32)

  Source: He, Karimireddy and Jaggi, "Byzantine-robust decentralized learning via
  ClippedGossip", 2022, arXiv 2202.01545.
  """
  _require_scalar(scale, "dissensus: scale")

  def send(message: Message) -> jax.Array:
    own = message.values[message.receiver]
    weights = message.weights
    attacking = jnp.sum(jnp.where(message.honest, 0, weights))
    pull = _weighted(
      jnp.where(message.honest, weights, 0), message.values - own
    )
    return own - _times(scale / jnp.where(attacking == 0, 1, attacking), pull)

  return Attack(f"dissensus(scale={scale})", send)


def _require_scalar(value: Any, label: str) -> None:
  if not _validation.is_scalar(value):
    raise TypeError(f"{label}={value!r} must be a real number.")


def _largest_z(size: int, attackers: int) -> float:
  """The formula of Baruch et al. for the number of standard deviations."""
  honest = size - attackers
  supporters = (
    size // 2 + 1 - attackers
  )  # honest ranks that have to be deceived
  quantile = (honest - supporters) / honest
  if not 0 < quantile < 1:
    raise ValueError(
      f"alie: {attackers} of {size} ranks attack, for which the formula of the "
      f"paper has no finite z; pass z=, or let fewer of them attack."
    )
  return statistics.NormalDist().inv_cdf(quantile)


def _times(factor: Any, x: jax.Array) -> jax.Array:
  """The product in the dtype of `x`."""
  return jnp.asarray(factor, jnp.finfo(x.dtype).dtype) * x


def _along(values: jax.Array, x: jax.Array) -> jax.Array:
  """One value for each entry along axis 0 of `x`."""
  return values.reshape(values.shape + (1,) * (x.ndim - 1))


def _mean(values: jax.Array, honest: jax.Array) -> jax.Array:
  """The mean over the honest ranks, 0 without any."""
  # Not a product: what a missing rank holds may be NaN.
  total = jnp.sum(jnp.where(_along(honest, values), values, 0), axis=0)
  count = jnp.maximum(jnp.sum(honest), 1)
  return total / count.astype(jnp.finfo(values.dtype).dtype)


def _deviation(message: Message, mean: jax.Array) -> jax.Array:
  """The standard deviation over the honest ranks, by coordinate."""
  difference = message.values - mean
  if not jnp.iscomplexobj(difference):
    return jnp.sqrt(_mean(difference**2, message.honest))
  real, imaginary = (
    jnp.sqrt(_mean(part**2, message.honest))
    for part in (difference.real, difference.imag)
  )
  return lax.complex(real, imaginary)


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
  """The weighted sum along axis 0; a weight of 0 leaves no trace of a NaN."""
  weights = _along(weights, values).astype(jnp.finfo(values.dtype).dtype)
  return jnp.sum(jnp.where(weights == 0, 0, weights * values), axis=0)


def _digest(x: jax.Array) -> jax.Array:
  """A number that follows from the bits of `x`, and changes with any of them."""
  if jnp.iscomplexobj(x):
    x = jnp.stack([x.real, x.imag])
  bits = lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
  # Odd factors, so that no bit is lost and equal parts do not cancel.
  factors = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
  return jnp.sum(bits * factors * np.uint32(2654435761), dtype=jnp.uint32)
