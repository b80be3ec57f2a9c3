"""Every decentralized optimizer with its recursion in NumPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from jfog import optimizers, topology
from support import recursions, reference
from support.problems import RATE, chords

SMALL = 0.04  # a step size at which all methods converge on all graphs here


class Case(NamedTuple):
  """A transformation for `n` ranks, and its iterates in NumPy."""

  make: Callable[[int], optax.GradientTransformationExtraArgs]
  truth: Callable[[Callable, Any, int, int], Any]  # (gradient, x, steps, n)


def rounds(graph):
  """The matrices of a graph, from its accessors."""
  return [reference.mixing(graph, t) for t in range(len(graph))]


def one(graph):
  """The matrix of a topology."""
  return reference.mixing(graph)


def falling(start):
  """A schedule of step sizes, for optax and for NumPy."""
  return lambda k: start / (1 + 0.1 * k)


def directed(n):
  """Column-stochastic, not row-stochastic."""
  return chords(n, "uniform_out")


def pushing(n):
  """A schedule of directed, column-stochastic graphs."""
  return topology.Schedule(
    [directed(n), topology.ring(n, "right"), chords(n, "uniform_out")]
  )


def grid(n):
  """Symmetric, irregular, all eigenvalues above -1/3."""
  return topology.mesh_grid_2d(n).lazy()


def alternating(n):
  """A circulant graph whose least eigenvalue is -0.6 on 8 ranks."""
  return topology.Topology(reference.circulant(n, {0: 0.2, 1: 0.4, -1: 0.4}))


def static(static_graph, method, *args, name=None, **options):
  """The `Case` of a method with arguments `(learning_rate, .., topology)`."""
  name = name or method

  def make(n):
    return getattr(optimizers, method)(*args, static_graph(n), **options)

  def truth(gradient, x, steps, n):
    return getattr(recursions, name)(
      gradient, x, steps, *args, one(static_graph(n))
    )

  return Case(make, truth)


def changing(graph, method, *args, name=None, given=(), **options):
  """The same for `(learning_rate, .., graph)` with a topology or a schedule."""
  name = name or method

  def make(n):
    return getattr(optimizers, method)(*args, graph(n), *given, **options)

  def truth(gradient, x, steps, n):
    keep = {k: v for k, v in options.items() if k != "check"}
    return getattr(recursions, name)(
      gradient, x, steps, *args, rounds(graph(n)), **keep
    )

  return Case(make, truth)


def wrapping(method, graph=None, every=None, name=None, more=(), **options):
  """The same for methods that wrap gradient descent with momentum."""
  name = name or method

  def make(n):
    given = [graph(n)] if graph else []
    given += [every] if every else []
    inner = optax.sgd(SMALL, momentum=0.5)
    return getattr(optimizers, method)(inner, *given, *more, **options)

  def truth(gradient, x, steps, n):
    inner = reference.sgd(SMALL, momentum=0.5)
    given = [every] if every else []
    given += more
    given += [rounds(graph(n))] if graph else []
    return getattr(recursions, name)(gradient, x, steps, inner, *given)

  return Case(make, truth)


def wrapped_rate(method, graph, name=None, rate=RATE, form=()):
  """Methods that wrap plain gradient descent; NumPy takes the step size."""

  def make(n):
    return getattr(optimizers, method)(optax.sgd(rate), graph(n), *form)

  def truth(gradient, x, steps, n):
    return getattr(recursions, name or method)(
      gradient, x, steps, rate, rounds(graph(n))
    )

  return Case(make, truth)


def _adam_tracking(n):
  return optimizers.gradient_tracking(
    optax.adam(SMALL), topology.exponential(n), "atc"
  )


def _diloco(graph):
  def make(n):
    return optimizers.diloco(
      optax.sgd(SMALL, momentum=0.5),
      optax.sgd(0.7, momentum=0.9, nesterov=True),
      4,
      graph and graph(n),
    )

  def truth(gradient, x, steps, n):
    return recursions.diloco(
      gradient,
      x,
      steps,
      reference.sgd(SMALL, momentum=0.5),
      reference.sgd(0.7, momentum=0.9, nesterov=True),
      4,
      graph and rounds(graph(n)),
    )

  return Case(make, truth)


def _slow(graph, rate):
  def make(n):
    return optimizers.slow_momentum(
      optax.sgd(SMALL), graph and graph(n), 3, rate, 0.6
    )

  def truth(gradient, x, steps, n):
    inner = reference.sgd(SMALL)
    matrices = graph and rounds(graph(n))
    return recursions.slow_momentum(
      gradient, x, steps, inner, 3, rate, 0.6, matrices
    )

  return Case(make, truth)


def _push_pull(pull, push, rate):
  def make(n):
    return optimizers.push_pull(rate, pull(n), push(n))

  def truth(gradient, x, steps, n):
    return recursions.push_pull(
      gradient, x, steps, rate, rounds(pull(n)), rounds(push(n))
    )

  return Case(make, truth)


def one_peer(n):
  """A schedule, doubly stochastic and directed."""
  return topology.one_peer_exponential(n)


def base(n):
  """A symmetric schedule with idle ranks."""
  return topology.base_k(n, 1)


def pulling(n):
  """Row-stochastic, not column-stochastic."""
  return chords(n, "uniform_in")


STATIC = {
  "exact_diffusion": wrapped_rate("exact_diffusion", topology.ring),
  "exact_diffusion, star": wrapped_rate("exact_diffusion", topology.star),
  "d2": Case(
    lambda n: optimizers.d2(optax.sgd(RATE), grid(n)),
    lambda g, x, steps, n: recursions.d2(g, x, steps, RATE, one(grid(n))),
  ),
  "nids": static(topology.ring, "nids", RATE),
  "nids, grid": static(topology.mesh_grid_2d, "nids", RATE),
  "extra": static(topology.ring, "extra", RATE),
  "extra, grid": static(topology.mesh_grid_2d, "extra", RATE),
  "tracking awc": wrapped_rate(
    "gradient_tracking", topology.exponential, "tracking_awc", SMALL
  ),
  "tracking atc": wrapped_rate(
    "gradient_tracking", topology.star, "tracking_atc", SMALL, ("atc",)
  ),
  "tracking adam": Case(
    _adam_tracking,
    lambda g, x, steps, n: recursions.tracking_atc(
      g,
      x,
      steps,
      None,
      rounds(topology.exponential(n)),
      reference.adam(SMALL),
    ),
  ),
  "push_sum": wrapping("push_sum", directed),
  "push_diging": changing(directed, "push_diging", SMALL / 4),
  "push_pull": _push_pull(pulling, directed, SMALL / 4),
  "decentlam": changing(topology.ring, "decentlam", SMALL, 0.9),
  "quasi_global": changing(
    topology.exponential, "quasi_global_momentum", SMALL, 0.9
  ),
  "quasi_global, all options": changing(
    topology.star,
    "quasi_global_momentum",
    SMALL,
    0.8,
    mu=0.7,
    nesterov=True,
    name="quasi_global_momentum",
  ),
  "dmsgd_sync": changing(topology.exponential, "dmsgd_sync", SMALL, 0.8),
  "local_sgd": wrapping("local_sgd", every=5, name="periodic"),
  "gossip_pga": wrapping("gossip_pga", topology.ring, 4, name="periodic"),
  "slow_momentum": _slow(topology.ring, 0.9),
  "slow_momentum, local": _slow(None, falling(1.0)),
  "diloco": _diloco(None),
  "diloco, graph": _diloco(topology.ring),
}

CHANGING = {
  "tracking awc": wrapped_rate(
    "gradient_tracking", one_peer, "tracking_awc", SMALL / 2
  ),
  "tracking atc": wrapped_rate(
    "gradient_tracking", base, "tracking_atc", SMALL / 2, ("atc",)
  ),
  "push_sum": wrapping("push_sum", pushing),
  "push_diging": changing(pushing, "push_diging", falling(SMALL / 4)),
  "push_pull": _push_pull(base, pushing, falling(SMALL / 4)),
  "quasi_global": changing(
    one_peer, "quasi_global_momentum", falling(SMALL), 0.9
  ),
  "dmsgd_sync": changing(one_peer, "dmsgd_sync", falling(SMALL), 0.8),
  "gossip_pga": wrapping("gossip_pga", one_peer, 4, name="periodic"),
  "slow_momentum": _slow(one_peer, 1.0),
  "diloco, graph": _diloco(one_peer),
  "exact_diffusion": Case(
    lambda n: optimizers.exact_diffusion(
      optax.sgd(falling(RATE)), base(n), check=False
    ),
    lambda g, x, steps, n: recursions.exact_diffusion(
      g, x, steps, falling(RATE), rounds(base(n))
    ),
  ),
  "d2": Case(
    lambda n: optimizers.d2(optax.sgd(RATE), base(n).lazy(), check=False),
    lambda g, x, steps, n: recursions.exact_diffusion(
      g, x, steps, RATE, rounds(base(n))
    ),
  ),
  "decentlam": changing(base, "decentlam", falling(SMALL), 0.3, check=False),
}

# Optimizers as functions of the number of ranks, for tests of their states.
EVERY = {
  "exact_diffusion": lambda n: optimizers.exact_diffusion(
    optax.adam(RATE), topology.ring(n)
  ),
  "d2": lambda n: optimizers.d2(optax.adam(RATE), topology.ring(n).lazy()),
  "nids": lambda n: optimizers.nids(RATE, topology.ring(n)),
  "extra": lambda n: optimizers.extra(RATE, topology.ring(n)),
  "tracking awc": lambda n: optimizers.gradient_tracking(
    optax.adam(RATE), one_peer(n)
  ),
  "tracking atc": lambda n: optimizers.gradient_tracking(
    optax.adam(RATE), one_peer(n), "atc"
  ),
  "push_sum": lambda n: optimizers.push_sum(optax.adam(RATE), pushing(n)),
  "push_diging": lambda n: optimizers.push_diging(RATE, pushing(n)),
  "push_pull": lambda n: optimizers.push_pull(RATE, pulling(n), directed(n)),
  "decentlam": lambda n: optimizers.decentlam(RATE, 0.9, topology.ring(n)),
  "quasi_global": lambda n: optimizers.quasi_global_momentum(
    RATE, 0.9, one_peer(n), weight_decay=0.1
  ),
  "dmsgd_sync": lambda n: optimizers.dmsgd_sync(RATE, 0.9, one_peer(n)),
  "local_sgd": lambda n: optimizers.local_sgd(optax.adam(RATE), 2),
  "gossip_pga": lambda n: optimizers.gossip_pga(
    optax.adam(RATE), one_peer(n), 3
  ),
  "slow_momentum": lambda n: optimizers.slow_momentum(
    optax.adam(RATE), one_peer(n), 2, 1.0, 0.5
  ),
  "diloco": lambda n: optimizers.diloco(
    optax.adamw(RATE), optax.sgd(0.7, momentum=0.9, nesterov=True), 2
  ),
}
