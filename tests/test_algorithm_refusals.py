"""Arguments that the decentralized optimizers refuse, with their error texts."""

from typing import Any

import jax.numpy as jnp
import optax
import pytest
from support.algorithms import EVERY, alternating
from support.problems import RATE, chords

import jfog
from jfog import optimizers, topology


def refused(
  method: str,
  *args: Any,
  error: type[Exception] = ValueError,
  match: str = "",
  **options: Any,
):
  return pytest.param(
    method, args, options, error, match, id=f"{method}: {match}"
  )


SCHEDULE = topology.one_peer_exponential(8)
RIGHT = topology.ring(8, "right")
ROWS = chords(8, "uniform_in")
COLUMNS = chords(8, "uniform_out")
RING = topology.ring(8)
PLAIN = optax.sgd(RATE)
SWAP = topology.Topology([[0.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize(
  ("method", "args", "options", "error", "match"),
  [
    refused("d2", PLAIN, RING, match="lambda_min"),
    refused("d2", PLAIN, alternating(8), match="lambda_min = -0.6"),
    refused("d2", PLAIN, topology.hypercube(8), match="lambda_min = -0.5"),
    refused(
      "d2", PLAIN, topology.torus_2d(16, (4, 4)), match="lambda_min = -0.6"
    ),
    refused("d2", PLAIN, topology.mesh_grid_2d(8), match="lambda_min = -0.3"),
    refused("d2", PLAIN, topology.exponential(8), match="not symmetric"),
    refused("extra", RATE, SWAP, match="lambda_min = -1"),
    *(
      refused(method, first, graph, match=text)
      for method, first in (
        ("exact_diffusion", PLAIN),
        ("extra", RATE),
        ("nids", RATE),
      )
      for graph, text in ((RIGHT, "not symmetric"), (ROWS, "not doubly"))
    ),
    refused("decentlam", RATE, 0.9, RIGHT, match="not symmetric"),
    refused("decentlam", RATE, 1.0, RING, match="momentum=1.0"),
    refused(
      "decentlam", RATE, 0.9, SCHEDULE, error=TypeError, match="Schedule"
    ),
    *(
      refused(method, first, SCHEDULE, error=TypeError, match="Schedule")
      for method, first in (
        ("exact_diffusion", PLAIN),
        ("d2", PLAIN),
        ("extra", RATE),
        ("nids", RATE),
      )
    ),
    refused("push_sum", PLAIN, ROWS, match="not column-stochastic"),
    refused("push_diging", RATE, ROWS, match="not column-stochastic"),
    refused("push_pull", RATE, COLUMNS, COLUMNS, match="pull: .*not row"),
    refused("push_pull", RATE, ROWS, ROWS, match="push: .*not column"),
    refused("gradient_tracking", PLAIN, ROWS, match="not doubly"),
    refused("gradient_tracking", PLAIN, COLUMNS, match="not doubly"),
    refused("gradient_tracking", PLAIN, RING, "cta", match="form='cta'"),
    refused("gossip_pga", PLAIN, ROWS, 4, match="not doubly"),
    refused("gossip_pga", PLAIN, RING, 0, match="every=0"),
    refused(
      "gossip_pga",
      PLAIN,
      topology.Schedule([RING, ROWS]),
      4,
      match="not doubly",
    ),
    refused("slow_momentum", PLAIN, ROWS, 4, 1.0, 0.5, match="not doubly"),
    refused("slow_momentum", PLAIN, None, 0, 1.0, 0.5, match="every=0"),
    refused("slow_momentum", PLAIN, None, 2, 1.0, -0.5, match="slow_momentum="),
    refused("quasi_global_momentum", RATE, 0.9, ROWS, match="not doubly"),
    refused("quasi_global_momentum", RATE, 0.9, RING, 1.5, match="mu=1.5"),
    refused("dmsgd_sync", RATE, 0.9, COLUMNS, match="not row-stochastic"),
    refused("diloco", PLAIN, PLAIN, 4, ROWS, match="not doubly"),
    refused("diloco", PLAIN, PLAIN, 0, match="every=0"),
    refused(
      "diloco", PLAIN, PLAIN, 4, RING, mean=topology.ceca(8), match="leave out"
    ),
    refused("local_sgd", PLAIN, 0, match="every=0"),
    refused("local_sgd", PLAIN, 2, mean=RING, match="never reaches"),
    refused("local_sgd", PLAIN, 2, mean=8, error=TypeError, match="mean=8"),
    refused(
      "nids", "fast", RING, error=TypeError, match="learning_rate='fast'"
    ),
    refused("extra", None, RING, error=TypeError, match="learning_rate=None"),
    refused("exact_diffusion", PLAIN, 8, error=TypeError, match="graph=8"),
    refused(
      "gradient_tracking",
      PLAIN,
      topology.ceca(8),
      error=TypeError,
      match="several rounds",
    ),
  ],
)
def test_refusals(method, args, options, error, match):
  make = getattr(optimizers, method)
  with pytest.raises(error, match=f"(?s){method}.*{match}"):
    make(*args, **options)
  if "every" in match or "=" in match.replace("lambda_min =", ""):
    return
  if "graph" in match or "rounds" in match or "mean" in options:
    return
  make(*args, check=False, **options)


def test_integer_leaves_are_refused():
  for name, make in EVERY.items():
    tx = make(2)

    def step(x, tx=tx):
      return tx.update(x, tx.init(x), x)

    with pytest.raises(TypeError, match=r"params.* dtype int32"):
      jfog.simulate(step, 2)(jnp.arange(2))
    assert name in EVERY
