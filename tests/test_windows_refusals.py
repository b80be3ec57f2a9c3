"""Arguments that windows refuse, mutexes, and derivatives between processes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.windows import (
  free,
  neighbors,
)

import jfog
from jfog import topology


@pytest.mark.mpi(2)
def test_bad_arguments(place, rng):
  n = place.size
  graph = topology.ring(n)
  x = rng.randn(n, 3).astype(np.float32)
  schedule = topology.one_peer_exponential(n)

  def raises(error, text, fun):
    # Before anything is communicated or compiled.
    with pytest.raises(error, match=text):
      jax.eval_shape(place.map(lambda x: fun(jfog.win_create(x, graph), x)), x)

  for operation in (
    lambda x: jfog.win_put(x, x),
    lambda x: jfog.win_accumulate(x, x),
    jfog.win_get,
    lambda x: jfog.win_update(x, x),
    lambda x: jfog.win_update_then_collect(x, x),
    jfog.win_version,
    jfog.win_associated_p,
    jfog.win_free,
    lambda x: jfog.win_mutex(x).__enter__(),
    lambda x: jfog.win_put_start(x, x),
  ):
    raises(TypeError, "not a window", lambda win, x, f=operation: f(x))

  def write_after_the_end(win, x):
    jfog.win_free(win)
    jfog.win_put(win, x)

  raises(ValueError, "was freed", write_after_the_end)

  for operation in (
    jfog.win_put,
    jfog.win_accumulate_start,
    jfog.win_update,
    jfog.win_update_then_collect,
  ):
    for wrong, text in (
      (lambda x: {"a": x}, "structure"),
      (lambda x: x[1:], "shape"),
      (lambda x: x.astype(jnp.float16), "dtype float16"),
    ):
      raises(
        ValueError, text, lambda win, x, f=operation, w=wrong: f(win, w(x))
      )

  for error, text, weights in (
    (ValueError, "not an out-neighbor", {n: 1.0}),
    (TypeError, "keys are ranks", {0.5: 1.0}),
    (TypeError, "keys are ranks", {True: 1.0}),
    (ValueError, "shape", np.ones(n + 1)),
    (ValueError, "shape", np.ones((n, 1))),
    (TypeError, "real numbers", True),
    (TypeError, "real numbers", 1j),
  ):
    raises(
      error,
      text,
      lambda win, x, w=weights: jfog.win_put(win, x, dst_weights=w),
    )
    raises(
      error,
      text.replace("out", "in"),
      lambda win, x, w=weights: jfog.win_update(win, x, src_weights=w),
    )
  raises(
    ValueError,
    "self_weight has shape",
    lambda win, x: jfog.win_update(win, x, self_weight=np.ones(2)),
  )
  if n > 1:
    raises(
      ValueError,
      "pass a scalar",
      lambda win, x: jfog.win_get(
        win,
        src_weights=dict.fromkeys(neighbors(graph.in_neighbors), np.ones(1)),
      ),
    )
  raises(
    ValueError,
    "win_associated_p: this window has none",
    lambda win, x: jfog.win_associated_p(win),
  )

  def whole(operation):
    return lambda win, x: operation(
      jfog.win_create(x.astype(int), graph), x.astype(int)
    )

  for operation in (
    lambda win, x: jfog.win_put(win, x, dst_weights=0.5),
    lambda win, x: jfog.win_get(win, src_weights=np.full(n, 0.5)),
    jfog.win_update,
  ):
    raises(TypeError, "truncates fractions", whole(operation))

  for error, text, wrong in (
    (TypeError, "Schedule", schedule),
    (TypeError, "ndarray", graph.mixing_matrix),
    (ValueError, f"{n + 1} ranks", topology.ring(n + 1)),
  ):
    raises(error, text, lambda win, x, g=wrong: jfog.win_create(x, g))
  raises(TypeError, "bool", lambda win, x: jfog.win_create(x > 0, graph))
  raises(TypeError, "str", lambda win, x: jfog.win_create("x", graph))
  wrong_delays = (
    (TypeError, "float", 0.5),
    (TypeError, "bool", True),
    (ValueError, "-1", -1),
    (ValueError, "shape", np.ones(n, int)),
    (ValueError, "shape", np.ones((n, n + 1), int)),
    (ValueError, "shape", np.ones((0, n, n), int)),
  )
  if place.kind == "mpi":
    wrong_delays = ((ValueError, "between processes", 1),)
  else:
    raises(
      TypeError, "traced", lambda win, x: jfog.win_create(x, graph, delay=x[0])
    )
  for error, text, delay in wrong_delays:
    raises(
      error, text, lambda win, x, d=delay: jfog.win_create(x, graph, delay=d)
    )


@pytest.mark.places("single", "mpi-2")
def test_a_mutex(place):
  n = place.size
  win = jfog.win_create(jnp.ones(2), topology.ring(n))
  for ranks in (None, [0], range(n), [], [n - 1, 0]):
    with jfog.win_mutex(win, ranks):
      _, win = jfog.win_update(win, jnp.ones(2))
  with pytest.raises(KeyError), jfog.win_mutex(win):
    raise KeyError  # and the mutex is free again
  with jfog.win_mutex(win):
    pass
  wrong: list[tuple[type, Any]] = [
    (ValueError, [n]),
    (ValueError, [-1]),
    (TypeError, [0.5]),
  ]
  for error, ranks in wrong:
    with pytest.raises(error, match="mutex: rank"), jfog.win_mutex(win, ranks):
      pass

  @jax.jit
  def traced(win):
    with jfog.win_mutex(win):
      return win

  with pytest.raises(ValueError, match="around the jitted function"):
    traced(win)
  free(win)


@pytest.mark.places("mpi-2")
def test_neither_derivatives_nor_batches_between_processes(place):
  graph = topology.ring(place.size)
  x = jnp.ones(3)

  def total(x):
    win = jfog.win_put(jfog.win_create(jnp.zeros(3), graph), x)
    return jfog.win_update(win, x)[0].sum()

  with pytest.raises(TypeError, match="win_put has no derivative"):
    jax.make_jaxpr(jax.grad(total))(x)
  with pytest.raises(ValueError, match="win_put under vmap"):
    jax.make_jaxpr(jax.vmap(total))(jnp.ones((2, 3)))
