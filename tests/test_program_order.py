"""The effect ends at the border of programs: its limits, and the strict order."""

import os
import subprocess
import sys
import textwrap

import pytest
from support import jobs

from jfog import runtime

pytestmark = [
  pytest.mark.full,
  pytest.mark.skipif(
    not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
  ),
]
DEADLINE = 240.0  # seconds; each of these takes a few when all is quiet

HEAD = """
import sys, threading, time, warnings
import jax, jax.numpy as jnp, numpy as np, jfog
from jfog import _compat
world = jfog.init(timeout=60)
rank, size = world.rank, world.size
graph = jfog.topology.ring(size)
average = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
"""


def run(program, ranks=2, head=HEAD, **environment):
  """Runs a program on ranks; returns its exit code, stdout and stderr."""
  return jobs.run_program(
    head + textwrap.dedent(program),
    ranks,
    deadline=DEADLINE,
    environment=environment,
  )


@pytest.mark.parametrize("order", ["", "strict"])
def test_python_may_end_right_after_a_dispatch(order):
  code, out, err = run(
    """
    x = average(jnp.full(100_000, float(rank)))
    if rank:
      time.sleep(0.5)  # rank 0 leaves before the others start
    for _ in range(5):
      x = average(x)
    print("DISPATCHED", flush=True)
    """,
    ranks=3,
    JFOG_ORDER=order,
  )
  assert code == 0, err
  assert out.count("DISPATCHED") == 3
  assert "error" not in err.lower(), err


def test_a_barrier_of_effects_waits_for_programs():
  code, out, err = run("""
    average(jnp.ones(3)).block_until_ready()
    jfog.diagnostics.reset_counters()
    if rank == 0:
      time.sleep(0.5)
    for _ in range(7):
      average(jnp.ones(1000))  # results are dropped
    jax.effects_barrier()
    print("OPERATIONS", jfog.diagnostics.counters()["operations"], flush=True)
    """)
  assert code == 0, err
  assert out.count("OPERATIONS 7") == 2, out


def test_shutdown_waits_for_programs_and_reports_a_failure():
  code, out, err = run("""
    average(jnp.ones(3)).block_until_ready()
    for _ in range(5):
      average(jnp.ones(1000))
    jfog.shutdown()  # with programs in flight
    jfog.init(timeout=60)
    average = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
    average(jnp.ones(3 + rank))  # a mismatch whose error is dropped
    jfog.shutdown()
    jfog.init(timeout=60)
    y = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))(jnp.ones(3))
    print("WELL", float(y.sum()), flush=True)
    """)
  assert code == 0, err
  assert out.count("WELL 3.0") == 2, out
  assert "before the shutdown: FAILED_PRECONDITION: jfog:" in err, err


def test_an_error_keeps_its_code_through_later_programs():
  _, out, err = run("""
    x = jnp.ones((100, 1 + rank))
    for k in range(5):
      x = average(x)
    try:
      jax.block_until_ready(x)
    except jax.errors.JaxRuntimeError as error:
      text = str(error)
      print("CODE", "[FAILED_PRECONDITION]" in text, "rank 1" in text, flush=True)
    """)
  assert out.count("CODE True True") == 2, (out, err)


def test_a_barrier_of_effects_raises_a_dropped_failure():
  """Once per wait, until the communicator is shut down."""
  code, out, err = run("""
    average(jnp.ones(3)).block_until_ready()
    average(jnp.ones(3 + rank))
    for attempt in range(2):
      try:
        jax.effects_barrier()
      except jax.errors.JaxRuntimeError as error:
        print("RAISED", str(error)[:25], flush=True)
    jfog.shutdown()
    jfog.init(timeout=60)
    jax.effects_barrier()
    print("WELL", flush=True)
    """)
  assert code == 0, err
  assert out.count("RAISED FAILED_PRECONDITION: jfog") == 4, (out, err)
  assert out.count("WELL") == 2, (out, err)


def test_a_dropped_failure_is_reported_at_exit():
  _, out, err = run("""
    average(jnp.ones(3)).block_until_ready()
    average(jnp.ones(3 + rank))
    print("DISPATCHED", flush=True)
    """)
  assert out.count("DISPATCHED") == 2
  assert "mpi4jax" in err or "Traceback" not in err, err
  assert "an operation failed at exit: FAILED_PRECONDITION: jfog:" in err, err


@pytest.mark.parametrize(
  ("form", "elements"),
  [("jit", 1), ("aot", 100_000), ("eager", 1), ("eager", 100_000)],
)
def test_errors_have_one_class(elements, form):
  """A program of few operations fails as one of many does."""
  _, out, err = run(f"""
    x = jnp.ones(({elements}, 1 + rank))
    plain = lambda x: jfog.neighbor_allreduce(x, graph)
    call = {{
      "jit": jax.jit(plain), "aot": jax.jit(plain).lower(x).compile(), "eager": plain
    }}["{form}"]
    for attempt in range(2):  # the second one is refused at once
      try:
        jax.block_until_ready(call(x))
      except jax.errors.JaxRuntimeError as error:
        print("CAUGHT", str(error)[:19], flush=True)
    """)
  assert out.count("CAUGHT FAILED_PRECONDITION") == 4, (out, err)


def test_a_second_device_is_refused():
  code, out, err = run(
    """
    first, second = jax.local_devices()[:2]
    average(jax.device_put(jnp.ones(3), first)).block_until_ready()
    try:
      average(jax.device_put(jnp.ones(3), second)).block_until_ready()
    except jax.errors.JaxRuntimeError as error:
      print("REFUSED", error, flush=True)
    average(jax.device_put(jnp.ones(3), first)).block_until_ready()
    jfog.shutdown()  # another world may use the other device
    jfog.init(timeout=60)
    average = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
    print("WELL", average(jax.device_put(jnp.ones(3), second)), flush=True)
    """,
    XLA_FLAGS="--xla_force_host_platform_device_count=2",
  )
  assert code == 0, err
  assert out.count("WELL [1. 1. 1.]") == 2, out
  assert out.count("REFUSED FAILED_PRECONDITION: jfog: a program that") == 2, (
    out
  )
  assert "JFOG_ORDER=strict" in out


def test_a_program_over_several_devices_is_refused():
  code, out, err = run(
    """
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    mesh = Mesh(np.array(jax.local_devices()), "i")
    x = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("i")))
    try:
      average(x)
    except ValueError as error:
      print("REFUSED", error, flush=True)
    """,
    XLA_FLAGS="--xla_force_host_platform_device_count=2",
  )
  assert code == 0, err
  assert out.count("REFUSED a program over 2 devices") == 2, out


@pytest.mark.parametrize(
  "change",
  [
    "_compat.pxla = types.SimpleNamespace()",
    "_compat.mlir.core_call_lowering = None",
    "_compat.pxla._discharge_refs_jaxpr = lambda *a, **k: Odd(original(*a, **k))",
  ],
  ids=["no name", "another signature", "another result"],
)
def test_another_jax_keeps_its_own_order(change):
  """One line says so, once, and the programs are right."""
  code, out, err = run(f"""
    import types
    original = _compat.pxla._discharge_refs_jaxpr
    class Odd(tuple):
      def __getitem__(self, index):
        raise TypeError("a result of another kind")
    {change}
    for k in range(3):
      x = average(jnp.full(3, float(rank)))
    print("MEAN", float(x[0]), _compat.order_between_programs(), flush=True)
    """)
  assert code == 0, err
  assert out.count("MEAN 0.5 strict") == 2, (out, err)
  assert err.count("RuntimeWarning: jfog keeps JAX's order") == 2, err


def test_an_order_that_does_not_exist_is_refused():
  code, _, err = run("", JFOG_ORDER="chaos")
  assert code != 0
  assert "ValueError: JFOG_ORDER='chaos'" in err, err


def test_suites_pass_in_strict_order():
  done = subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-q", "-k"),
      # Without those of the order that is not chosen here.
      "mpi-3 and not ahead and not without_python",
      *("tests/test_order.py", "tests/test_handles.py"),
    ],
    env={**os.environ, "JFOG_ORDER": "strict"},
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("order", ["", "strict"])
def test_equal_constants_in_jitted_functions_without_arguments(order):
  """XLA of JAX 0.12 inlines their calls, and ended the process by a check."""
  code, out, err = run(
    """
    @jax.jit
    def sums():
      empty = jnp.zeros((3, 0))
      return (jfog.allreduce(jnp.ones(3), "sum"), jfog.allreduce(jnp.ones(4)),
              jfog.allreduce(empty), jfog.allgather(jnp.zeros((3, 0))))
    @jax.jit
    def nested(x):
      y = jax.lax.cond(x[0] > 0, sums, lambda: jax.tree.map(jnp.negative, sums()))
      z, _ = jax.lax.scan(lambda c, _: (c + sums()[0], None), x, length=2)
      return sums(), y, z, jax.grad(lambda x: jnp.sum(x * sums()[0]))(x)
    for k in range(2):
      for found in (sums(), *jax.jit(lambda: (sums(), sums()))(),
                    *nested(jnp.ones(3))[:2]):
        for value, shape, each in zip(
            found, [(3,), (4,), (3, 0), (9, 0)], [3, 1, 0, 0]):
          np.testing.assert_array_equal(value, np.full(shape, float(each)))
      np.testing.assert_array_equal(nested(jnp.ones(3))[2], np.full(3, 7.0))
      np.testing.assert_array_equal(nested(jnp.ones(3))[3], np.full(3, 3.0))
    print("EQUAL", flush=True)
    """,
    ranks=3,
    JFOG_ORDER=order,
  )
  assert code == 0, err
  assert out.count("EQUAL") == 3, out
