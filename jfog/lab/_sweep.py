"""Sweeps: one program of a rank over seeds, step sizes, graphs and the like."""

import functools
import hashlib
import itertools
import numbers
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfog import _validation
from jfog.runtime import Attack, simulate

Point = dict[str, Any]  # values by the name of the axis


class _Axis(NamedTuple):
  """The values of an axis, and how a table shows them."""

  labels: Sequence[Any]
  values: Any  # an array along axis 0, or a list of objects
  is_static: bool


def sweep(
  program: Callable[..., Mapping[str, Any]],
  axes: Mapping[str, Any],
  size: int,
  *,
  local_size: int = 1,
  reduce: Callable[[jax.Array], jax.Array] | None = None,
  memory: int = 2**26,
  folder: str | os.PathLike[str] | None = None,
  attackers: Mapping[int, Attack] | str | None = None,
) -> Any:
  """Runs a program on virtual ranks at every point of a grid, and tabulates it.

  Numbers are vectorized: the points of a block are one `jax.vmap` around
  `jfog.simulate`, compiled once. Other values (graphs, compressors, functions)
  are constants of the program, which is compiled once for each of them.

  Args:
    program: of one rank, as for `jfog.simulate`; called with one keyword for each
      axis, and returns arrays by name, such as the loss of every step. Its shapes
      are equal at all points.
    axes: by name, a number k for 0 to k - 1; a sequence of numbers; an array, of
      which each point gets an entry along axis 0, such as which ranks are alive
      at which step; a sequence of other values; or a dict of these by label.
    size: the number of virtual ranks.
    local_size: consecutive ranks that form a pretended machine.
    reduce: from a result of all ranks, stacked along axis 0, to what is kept; by
      default the mean over ranks.
    memory: bytes that the points of a block take together. The number of points
      in it, at least one, follows from what the compiler needs for one.
    folder: keeps the results of each point in a file there. A further sweep reads
      what it finds for the same program at the same point, and runs the rest.
    attackers: as for `jfog.simulate`; or the name of an axis whose values are such
      dicts, and which the program does not get.

  Returns:
    An `xarray.Dataset` whose variables are the results, with a dimension for each
    axis, then "step" for the first axis of the results, if all have one of the
    same length, and others named after the variable.

  Raises:
    ModuleNotFoundError: without xarray.
    TypeError: if the program does not return a dict of arrays by name.
    ValueError: for an axis without values, for results whose shapes differ from
      point to point or that are named as an axis, if `attackers` is not the name
      of an axis of dicts, and as `jfog.simulate` does.

  Example:
    >>> import jax, jax.numpy as jnp, jfog
    >>> def consensus(seed, graph):
    ...   x = jax.random.normal(jax.random.key(seed + 100 * jfog.rank()))
    ...   def step(x, k):
    ...     x = jfog.neighbor_allreduce(x, graph)
    ...     return x, (x - jfog.allreduce(x)) ** 2
    ...   return {"variance": jax.lax.scan(step, x, jnp.arange(5))[1]}
    >>> graphs = {"ring": jfog.topology.ring(8),
    ...           "exponential": jfog.topology.exponential(8)}
    >>> table = jfog.lab.sweep(consensus, {"seed": 3, "graph": graphs}, 8)
    >>> dict(table.sizes)
    {'seed': 3, 'graph': 2, 'step': 5}
    >>> last = table["variance"].mean("seed").isel(step=-1)
    >>> bool(last.sel(graph="exponential") < last.sel(graph="ring"))
    True
  """
  xarray = _xarray()
  _validation.positive(memory, "memory")
  if not axes:
    raise ValueError(
      "sweep: axes is empty; name at least one, as {'seed': 10}."
    )
  grid = {name: _axis(name, given) for name, given in axes.items()}
  static = [name for name, axis in grid.items() if axis.is_static]
  numeric = [name for name in grid if name not in static]
  if isinstance(attackers, str):
    _check_attackers(attackers, grid)
  store = _Store(pathlib.Path(folder)) if folder is not None else None

  results: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
  for chosen in itertools.product(
    *(range(len(grid[n].labels)) for n in static)
  ):
    constants = {
      name: grid[name].values[i] for name, i in zip(static, chosen, strict=True)
    }
    attacking = (
      constants.pop(attackers) if isinstance(attackers, str) else attackers
    )
    on_ranks = functools.partial(
      simulate, size=size, local_size=local_size, attackers=attacking
    )
    fun = _on_ranks(program, constants, size, on_ranks, reduce)
    indices = list(
      itertools.product(*(range(len(grid[n].labels)) for n in numeric))
    )
    points = [
      {n: grid[n].values[i] for n, i in zip(numeric, index, strict=True)}
      for index in indices
    ]
    for index, found in zip(
      indices, _run(fun, points, memory, store), strict=True
    ):
      place = dict(zip(static + numeric, chosen + index, strict=True))
      results[tuple(place[name] for name in grid)] = found
  return _table(xarray, grid, results)


def _xarray() -> Any:
  try:
    import xarray
  except ModuleNotFoundError:
    raise ModuleNotFoundError(
      "jfog.lab.sweep returns a table of xarray, which is not installed: "
      "pip install xarray"
    ) from None
  return xarray


def _axis(name: str, given: Any) -> _Axis:
  """The values of an axis."""
  labels: Sequence[Any] = ()
  if isinstance(given, numbers.Integral) and not isinstance(given, bool):
    given = np.arange(int(given))
  if isinstance(given, Mapping):
    labels, given = [str(label) for label in given], list(given.values())
  if isinstance(given, (str, bytes)) or not hasattr(given, "__len__"):
    raise ValueError(
      f"sweep: axis {name!r} is {given!r}; give a number of values, or a sequence "
      f"or a dict of them."
    )
  if len(given) == 0:
    raise ValueError(f"sweep: axis {name!r} has no values; leave it out.")
  is_numeric = hasattr(given, "dtype") or all(
    isinstance(value, (numbers.Number, np.ndarray, jax.Array))
    for value in given
  )
  if not is_numeric:
    given = list(given)
    return _Axis(labels or _names(given), given, True)
  try:
    values = np.asarray(given)
  except ValueError as error:
    raise ValueError(
      f"sweep: the arrays of axis {name!r} have several shapes; give equal ones."
    ) from error
  if not labels:
    labels = values.tolist() if values.ndim == 1 else list(range(len(values)))
  return _Axis(labels, values, False)


def _check_attackers(name: str, grid: Mapping[str, _Axis]) -> None:
  if name not in grid or not all(
    isinstance(value, Mapping) for value in grid[name].values
  ):
    raise ValueError(
      f"sweep: attackers={name!r} is not an axis of dicts from ranks to attacks; "
      f"name one, such as axes={{{name!r}: {{'none': {{}}, 'one': {{0: "
      f"jfog.attacks.sign_flip()}}}}}}."
    )


def _names(values: Sequence[Any]) -> list[str]:
  """Labels of objects in a table: strings, names of functions, or their repr."""
  names = [
    value if isinstance(value, str) else getattr(value, "__name__", repr(value))
    for value in values
  ]
  if len(set(names)) == len(names):
    return names
  return [f"{k}: {name}" for k, name in enumerate(names)]


def _on_ranks(
  program: Callable[..., Mapping[str, Any]],
  constants: Point,
  size: int,
  on_ranks: Callable[..., Any],
  reduce: Callable[[jax.Array], jax.Array] | None,
) -> Callable[[Point], dict[str, jax.Array]]:
  """The function from a point to the reduced results of all ranks."""
  reduce = reduce or functools.partial(jnp.mean, axis=0)

  def run(point: Point) -> dict[str, jax.Array]:
    def of_rank(_: jax.Array) -> dict[str, Any]:
      results = program(**constants, **point)
      if not isinstance(results, Mapping):
        raise TypeError(
          f"sweep: the program returned {type(results).__name__}; return a dict "
          f"of arrays by name, such as {{'loss': losses}}."
        )
      return dict(results)

    # The argument only carries the axis over ranks.
    stacked = on_ranks(of_rank)(jnp.arange(size))
    return {name: reduce(jnp.asarray(x)) for name, x in stacked.items()}

  return run


class _Store:
  """Results of points in the files of a folder."""

  def __init__(self, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder

  def path(self, text: str, point: Point) -> pathlib.Path:
    """The file of a point, named by the program's text and the point's values."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(point):
      value = np.asarray(point[name])
      digest.update(f"{name} {value.dtype} {value.shape}".encode())
      digest.update(value.tobytes())
    return self._folder / f"{digest.hexdigest()[:32]}.npz"

  def read(self, path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The results in a file; None if it is missing or was not written to its end."""
    try:
      with open(path, "rb") as file, np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
      return None

  def write(
    self, path: pathlib.Path, results: Mapping[str, np.ndarray]
  ) -> None:
    """Writes a file whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as file:
      np.savez(file, allow_pickle=False, **results)
    os.replace(part, path)


def _run(
  fun: Callable[[Point], dict[str, jax.Array]],
  points: Sequence[Point],
  memory: int,
  store: _Store | None,
) -> list[dict[str, np.ndarray]]:
  """The results of all points, of which a block at a time runs."""

  # An array without elements carries the axis over points if there is none.
  def block(count: int, given: Sequence[Point]) -> Any:
    stacked = {n: np.stack([p[n] for p in given]) for n in given[0]}
    return stacked, np.zeros((count, 0))

  vectorized = jax.jit(jax.vmap(lambda point, _: fun(point)))
  one = vectorized.lower(*block(1, points[:1]))
  found: list[dict[str, np.ndarray] | None] = [None] * len(points)
  paths: list[pathlib.Path] = []
  if store is not None:
    text = one.as_text()
    paths = [store.path(text, point) for point in points]
    found = [store.read(path) for path in paths]
  missing = [k for k, results in enumerate(found) if results is None]
  if missing:
    length = len(missing)
    if length > 1:
      length = min(length, max(1, memory // _bytes_of(one)))
    # Blocks of nearly one length waste the fewest repetitions of the last point.
    length = -(-len(missing) // -(-len(missing) // length))
    for begin in range(0, len(missing), length):
      chosen = missing[begin : begin + length]
      padded = chosen + chosen[-1:] * (length - len(chosen))
      out = vectorized(*block(length, [points[k] for k in padded]))
      host = {name: np.asarray(values) for name, values in out.items()}
      for position, k in enumerate(chosen):
        results = {name: values[position] for name, values in host.items()}
        found[k] = results
        if store is not None:
          store.write(paths[k], results)
  return [results for results in found if results is not None]


def _bytes_of(lowered: Any) -> int:
  """The bytes that XLA takes for one point, its results included."""
  analysis = lowered.compile().memory_analysis()
  if analysis is None:  # not on every backend
    return 1
  return max(1, analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def _table(
  xarray: Any,
  grid: Mapping[str, _Axis],
  results: Mapping[tuple[int, ...], dict[str, np.ndarray]],
) -> Any:
  """The dataset of all results."""
  first = next(iter(results.values()))
  shapes = {name: x.shape for name, x in first.items()}
  if taken := set(shapes) & set(grid):
    raise ValueError(
      f"sweep: {', '.join(sorted(taken))} is an axis and a result; rename one."
    )
  for place, found in results.items():
    if {name: x.shape for name, x in found.items()} != shapes:
      raise ValueError(
        f"sweep: at {place} the results have shapes "
        f"{ {name: x.shape for name, x in found.items()} }, elsewhere {shapes}; "
        f"they must be equal at all points."
      )
  lengths = {shape[0] if shape else None for shape in shapes.values()}
  has_steps = len(lengths) == 1 and None not in lengths and "step" not in grid
  variables = {}
  for name, shape in shapes.items():
    dims = [f"{name}_dim_{k}" for k in range(len(shape))]
    if has_steps:
      dims[0] = "step"
    values = np.stack([results[place][name] for place in _places(grid)])
    values = values.reshape(
      *(len(axis.labels) for axis in grid.values()), *shape
    )
    variables[name] = ((*grid, *dims), values)
  coordinates = {name: list(axis.labels) for name, axis in grid.items()}
  return xarray.Dataset(variables, coordinates)


def _places(grid: Mapping[str, _Axis]) -> itertools.product:
  """The indices of all points, the last axis fastest."""
  return itertools.product(*(range(len(axis.labels)) for axis in grid.values()))
