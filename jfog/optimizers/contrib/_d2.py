"""D2: exact diffusion with the mixing matrix itself."""

import optax

from jfog.optimizers import _averaging, _requirements
from jfog.optimizers._averaging import Averaging
from jfog.optimizers._bias_corrected import diffusion
from jfog.optimizers._transformation import WrappedCorrectionState
from jfog.runtime import Communicator
from jfog.topology import Schedule, Topology

D2State = WrappedCorrectionState


def d2(
  inner: optax.GradientTransformation,
  topology: Topology | Schedule | Averaging,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Exact diffusion with `W` in place of `(I + W) / 2`: faster, less stable.

  With `u` the inner transformation's updates,

      psi+[i] = x[i] + u[i]
      x[i] <- sum_j W[i, j] (psi+[j] + x[j] - psi[j])

  With `inner = optax.sgd(a)` this is
  `X[k+1] = W (2 X[k] - X[k-1] - a (G[k] - G[k-1]))`. It needs
  `lambda_min > -1/3`; below that the disagreement grows for any data. With
  `topology.lazy()`, which meets the bound for every graph, it equals
  `exact_diffusion`.

  Args:
    inner: the local optimizer, as in `exact_diffusion`. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    topology: the mixing graph: a symmetric `Topology` with
      `lambda_min > -1/3`, or a function `(params, step) -> params`.
    check: whether the topology must meet this and be one `Topology`.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not symmetric and doubly stochastic, or has
      an eigenvalue of -1/3 or less, as rings of even size have.
    TypeError: if `topology` is neither a `Topology` nor a function.

  Example:
    >>> import jfog, optax
    >>> jfog.optimizers.d2(optax.sgd(0.1), jfog.topology.ring(4))
    Traceback (most recent call last):
    ValueError: d2: Topology(size=4, degree=2, spectral_gap=0.6667) has the least\
 eigenvalue lambda_min = -0.333333, and d2 needs one above -0.3333; use\
 topology.lazy(), or check=False.
    >>> tx = jfog.optimizers.d2(optax.sgd(0.1), jfog.topology.ring(4).lazy())

  Source: Tang, Lian, Yan, Zhang and Liu, "D2: Decentralized training over
  decentralized data", 2018, arXiv 1803.07068.
  """
  name = "d2"
  average = _averaging.as_averaging(
    topology,
    name,
    check,
    comm,
    # An eigenvalue l of W gives x+ = W (2 x - x_prev) the roots of z**2 - 2 l z
    # + l, which lie inside the unit circle for l > -1/3.
    _requirements.symmetric_above(-1 / 3, "use topology.lazy()"),
  )
  return diffusion(name, D2State, inner, average)
