"""DeepSqueeze: averaging of compressed parameters with error compensation."""

import warnings
from typing import Any, NamedTuple

import jax
import optax

from jfog import _validation
from jfog.optimizers import _requirements, _tree
from jfog.optimizers._compressed_gossip import compressed_exchange
from jfog.optimizers._transformation import wrap_inner
from jfog.optimizers.compressors._base import Compressor
from jfog.optimizers.compressors._sparsify import Sparsifier
from jfog.runtime import Communicator
from jfog.topology import Topology


class DeepSqueezeState(NamedTuple):
  """State of `deep_squeeze`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  compressor_state: Any
  e: Any  # the compression error; like the parameters, float32 for 16-bit


def deep_squeeze(
  inner: optax.GradientTransformation,
  topology: Topology,
  compressor: Compressor,
  eta: float,
  *,
  seed: int = 0,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Averages compressed parameters with error feedback.

  With `u` the inner transformation's updates and `C` the compressor,

      v[i] = x[i] + u[i] + e[i]
      c[i] = C(v[i])                                           sent
      e[i] <- v[i] - c[i]
      x[i] <- c[i] + eta (sum_j W[i, j] c[j] - c[i])

  from `e = 0`. The parameters themselves are compressed. They do not vanish, so
  neither does the error: use a quantizer of many bits. With a sparsifier,
  `top_k` or `random_k`, most parameters are 0 in every step and the method does
  not converge. Messages and random numbers are those of `choco`.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    topology: the mixing graph: one row-stochastic `Topology`.
    compressor: the encoding of the parameters, the same on all ranks.
    eta: the consensus step size, in (0, 1]; may be traced.
    seed: seed of the compressor's random numbers, the same on all ranks.
    check: whether the topology must be row-stochastic, and whether to warn
      of a sparsifier.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not row-stochastic, or `eta` is out of range;
      in `init` and `update`, if the compressor refuses the parameters.
    TypeError: as in `choco`.

  Example:
    >>> import jax, jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.fully_connected(2)
    >>> compressor = jfog.optimizers.quantize(8)
    >>> tx = jfog.optimizers.deep_squeeze(optax.sgd(0.5), graph, compressor, 1.0)
    >>> def step(x, grad):
    ...   updates, _ = tx.update(grad, tx.init(x), x)
    ...   return optax.apply_updates(x, updates)
    >>> x, grad = jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0])
    >>> jax.jit(jfog.simulate(step, 2))(x, grad)
    Array([1.5, 1.5], dtype=float32)

  Source: Tang et al., "DeepSqueeze: decentralization meets error-compensated
  compression", 2019.
  """
  name = "deep_squeeze"
  exchange = compressed_exchange(
    _requirements.AVERAGING,
    topology,
    compressor,
    seed,
    check,
    comm,
    name,
  )
  eta = _validation.fraction(eta, f"{name}: eta")
  if check and isinstance(compressor, Sparsifier):
    warnings.warn(
      f"{name}: top_k and random_k drop most parameters in every step, so {name} "
      f"does not converge with them; use quantize(bits=8), choco, or "
      f"check=False.",
      UserWarning,
      stacklevel=2,
    )

  def start(params: optax.Params) -> tuple:
    return compressor.init(_tree.widen(params)), _tree.zeros_like(params)

  def combine(h: Any, state: Any) -> tuple:
    v = _tree.add(h, state.e)
    c, mixed, compressor_state = exchange(v, state.compressor_state, state.step)
    new = _tree.add(c, _tree.scale(eta, _tree.subtract(mixed, c)))
    # Error feedback: v - c is added to the next value.
    return new, compressor_state, _tree.subtract(v, c)

  return wrap_inner(name, inner, DeepSqueezeState, start, combine)
