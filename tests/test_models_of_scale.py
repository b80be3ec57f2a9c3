"""The parts of scale_model.py, convergence.py and laboratory.py that compute results."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
  """A function that imports a module of the benchmarks."""
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  return importlib.import_module


def test_a_table_of_measurements_is_read_and_fitted(benchmark):
  model = benchmark("scale_model")
  latency, rate, megabytes = 2e-3, 100e6, 25.0
  lines = [f"- compared: one step of averages of {megabytes:g} MB (1e6 B)", ""]
  lines += ["## 125 MB/s, 1 ms", "", "| ranks | form | step | rest |"]
  for ranks in (2, 4, 8):
    for form, method in {**model.MEASURED, "XLA with gloo": "ring"}.items():
      seconds = jfog.lab.predict_step(
        method,
        megabytes * 1e6,
        size=ranks,
        compute=0.0,
        latency=latency,
        bandwidth=rate,
      ).communication
      shown = f"{seconds:.6f} s" if ranks > 2 else f"{1e3 * seconds:.3f} ms"
      lines.append(f"| {ranks} | {form} | {shown} | 1.0 |")
  text = "\n".join([*lines, ""])
  links, found = model.read(text)
  assert (list(links), found) == ([(125.0, 1.0)], megabytes)
  np.testing.assert_allclose(
    model.fitted(links[125.0, 1.0], megabytes, [2, 4]),
    [latency, rate],
    rtol=1e-3,
  )
  table = "\n".join(model.measured_lines(text))
  assert "| 125 MB/s, 1 ms | 100 MB/s, 2 ms | exponential | 8 |" in table
  assert table.count("0% |") == 3  # an allreduce is another formula


def test_from_which_size_on_an_allreduce_is_faster(benchmark):
  model = benchmark("scale_model")
  assert model.crossover("one_peer_exponential", 128) is None
  latency, rate = model.LINK["latency"], model.LINK["bandwidth"]
  # L + 7 M/B = 14 L + 2 (127/128) M/B, of the allreduce by halving and doubling
  expected = 13 * latency * rate / (7 - 2 * 127 / 128)
  assert model.crossover("exponential", 128) == pytest.approx(expected)


def test_when_a_curve_stays_below_a_target(benchmark):
  convergence = benchmark("convergence")
  curve = np.array([1.0, 0.1, 0.5, 0.1, 0.1])
  assert convergence.first_below(curve, 0.2) == 4 * convergence.RECORD
  assert convergence.first_below(curve, 2.0) == convergence.RECORD
  assert convergence.first_below(curve, 0.05) is None
  np.testing.assert_allclose(
    convergence.smooth(np.array([1.0, 100.0, 100.0]), width=2), [1, 10, 100]
  )


def test_the_problem_of_the_convergence_benchmark(benchmark):
  convergence = benchmark("convergence")
  made = convergence.problems(4, 1)
  assert made.shape[:2] == (2, 4)
  rows = made[1, :, :-1, :-1].reshape(-1, convergence.DIMENSION)
  labels, best = made[1, :, :-1, -1].ravel(), made[1, 0, -1, :-1]

  def loss(x):
    margins = jnp.logaddexp(0.0, -labels * (rows @ x)).mean()
    return margins + convergence.REGULARIZATION / 2 * jnp.sum(x**2)

  np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("trains", [False, True])
def test_simulate_and_a_loop_over_ranks_are_the_dense_product(
  benchmark, trains
):
  times = benchmark("laboratory").against_loop(8, 16, trains, rounds=1)
  assert {form: len(seconds) for form, seconds in times.items()} == {
    **{"simulate": 1, "loop": 1}
  }
