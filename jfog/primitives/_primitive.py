"""Rules of communication primitives: abstract evaluation, AD and batching."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jfog.primitives import _lowering
from jfog.primitives.nccl import Mode, Rendition


def _like_leaves(
  *operands: Any, fixed: int, **params: Any
) -> list[jax.core.ShapedArray]:
  """Results of the shapes and dtypes of the leaves."""
  del params
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in operands[fixed:]]


def zero_tangent(y: jax.Array) -> ad.Zero:
  """Symbolic zero for an absent tangent of `y`."""
  return ad.Zero(jax.typeof(y).to_tangent_aval())


def linear_tangents(
  primitive: Primitive,
  primals: Sequence[Any],
  results: Sequence[Any],
  tangents: Sequence[Any],
  *,
  fixed: int,
  per_leaf: Sequence[str] = (),
  **params: Any,
) -> list[Any]:
  """`y = f(x)` is linear in the leaves: `dy = f(dx)`, one more operation.

  Leaves with a zero tangent are left out of it, and so are their entries of the
  parameters `per_leaf`, tuples with one entry for each leaf.
  """
  out: list[Any] = [zero_tangent(y) for y in results]
  leaves = tangents[fixed:]
  # Leaves without a tangent do not travel. Ranks that trace one program leave
  # out the same ones, so their headers match.
  moving = [i for i, dx in enumerate(leaves) if type(dx) is not ad.Zero]
  if moving:
    for name in per_leaf:
      params[name] = tuple(params[name][i] for i in moving)
    dy = primitive.bind(
      *primals[:fixed], *(leaves[i] for i in moving), fixed=fixed, **params
    )
    for i, tangent in zip(moving, dy, strict=True):
      out[i] = tangent
  return out


# The shape of the number of a handle: 64 bits in two words, since JAX has no longer
# integers by default.
NUMBER = (2,)


@dataclasses.dataclass(frozen=True, eq=False)
class OperationRules:
  """All rules of one operation between processes, and its two primitives.

  The operands are scalar ones (a step, ranks, weights) followed by the leaves;
  the results are one for each leaf. Every rule gets the parameter `fixed`, the
  number of scalar operands. The primitives carry the ordered effect, so calls
  are posted in program order and never dropped. The blocking primitive lowers
  to the handler `jfog_<backend>_<name>`, on GPUs with XLA arithmetic around it.
  `start` has the same operands and parameters and returns the number of the
  operation, weights and placeholders for the results, see `wait_p`.

  Attributes:
    name: the operation's name.
    attributes: `(*shapes of the leaves, **params)` to the handler's
      attributes; the mode is added.
    abstract_eval: `(*operands, **params)` to the results' shapes and dtypes; by
      default those of the leaves.
    tangents: `(primitive, primals, results, tangents, **params)` to the
      results' tangents; by default those of an operation that is linear in its
      leaves and constant in the scalar operands.
    transpose: `(cotangents, *scalar operands, **params)` to the cotangents of
      all leaves; None for an operation without a transpose.
    batch_axis: the position of a batch in a leaf and in a result, 0 or -1: an
      axis whose elements the operation treats independently; None for an
      operation that takes no batches.
    in_place: whether a result may alias the buffer of its leaf.
    on_gpus: the rendition on GPUs; None for the host fallback, which copies to
      host memory and back.
  """

  name: str
  attributes: Callable[..., dict[str, Any]]
  abstract_eval: _lowering.AbstractEval = _like_leaves
  tangents: Callable[..., list[Any]] = linear_tangents
  transpose: Callable[..., Sequence[jax.Array]] | None = None
  batch_axis: int | None = 0
  in_place: bool = False
  on_gpus: Rendition | None = None
  blocking: Primitive = dataclasses.field(init=False)
  start: Primitive = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    object.__setattr__(self, "blocking", Primitive(self.name))
    object.__setattr__(self, "start", Primitive(f"{self.name}_start"))

  def register(self) -> Primitive:
    """Registers the rules with JAX; returns the blocking primitive."""
    blocking, start = self.blocking, self.start
    # `start_of` and `wait_params` find the rules by the primitive's name.
    _rules[self.name] = self
    ad.primitive_jvps[blocking] = self.jvp
    ad.primitive_jvps[start] = self.start_jvp
    # `start` has no transpose: `start_jvp` binds the blocking primitive for the
    # tangents, and that one is transposed.
    if self.transpose is not None:
      ad.primitive_transposes[blocking] = self.transpose_leaves
    batching.primitive_batchers[blocking] = self.batch
    batching.primitive_batchers[start] = self.start_batch
    _lowering.register_operation(
      self.name,
      (blocking, self.abstract_eval),
      (start, self.start_abstract_eval),
      self.handler_attributes,
      self.on_gpus,
      self.in_place,
    )
    return blocking

  def handler_attributes(
    self, mode: Mode, operands: Sequence[Any], fixed: int, params: Any
  ) -> dict[str, Any]:
    """Attributes of the handler, the mode included."""
    # Scalar operands are values of the call; an attribute is known when the
    # program is compiled.
    leaves = operands[fixed:]
    return {"mode": np.int64(mode), **self.attributes(*leaves, **params)}

  def weights(
    self, scalars: Sequence[Any], params: dict[str, Any]
  ) -> tuple[list[jax.core.ShapedArray], Any]:
    """Avals and tree structure of the weights that a handle carries."""
    if self.on_gpus is None:
      return [], None  # the handler on the host computes the results
    on_gpus = self.on_gpus
    # Shapes only: the weights are computed in the lowering.
    tree = jax.eval_shape(lambda *s: on_gpus.weights(s, **params), *scalars)
    leaves, structure = jax.tree.flatten(tree)
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in leaves], structure

  def start_abstract_eval(
    self, *operands: Any, fixed: int, **params: Any
  ) -> list[jax.core.ShapedArray]:
    """Avals of the number, the weights and the placeholders."""
    number = jax.core.ShapedArray((2,), jnp.uint32)  # 64 bits
    weights, _ = self.weights(operands[:fixed], params)
    results = self.abstract_eval(*operands, fixed=fixed, **params)
    return [number, *weights, *results]

  def jvp(
    self, primals: Sequence[Any], tangents: Sequence[Any], **params: Any
  ) -> tuple[Any, Any]:
    """JVP of the blocking form."""
    results = self.blocking.bind(*primals, **params)
    return results, self.tangents(
      self.blocking, primals, results, tangents, **params
    )

  def start_jvp(
    self, primals: Sequence[Any], tangents: Sequence[Any], **params: Any
  ) -> tuple[Any, Any]:
    """JVP of the split form.

    The tangents of the results are computed by a blocking operation at the
    start. The placeholders carry them to `wait`, which returns them.
    """
    # First the operation itself, then that of the tangents: all ranks post the
    # two in this order.
    results = self.start.bind(*primals, **params)
    # The number and the weights precede the placeholders, one for each leaf.
    count = len(results) - (len(primals) - params["fixed"])
    head, placeholders = results[:count], results[count:]
    moved = self.tangents(
      self.blocking, primals, placeholders, tangents, **params
    )
    return results, [*map(zero_tangent, head), *moved]

  def transpose_leaves(
    self,
    cotangents: Sequence[Any],
    *operands: Any,
    fixed: int,
    **params: Any,
  ) -> list[Any]:
    """Transposes all leaves at once, so that every rank runs one operation.

    Which cotangents are zero may differ from rank to rank, so all of them take
    part: the messages have the same shapes everywhere.
    """
    assert self.transpose is not None
    # A symbolic zero on one rank may be a value on another: with real zeros
    # every rank sends the same leaves.
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    results = self.transpose(
      cotangents, *operands[:fixed], fixed=fixed, **params
    )
    return [None] * fixed + [
      ct if ad.is_undefined_primal(x) else None
      for x, ct in zip(operands[fixed:], results, strict=True)
    ]

  def batch(
    self, operands: Sequence[Any], dims: Sequence[Any], **params: Any
  ) -> tuple[Any, Any]:
    """A batch of a leaf is a larger leaf, and travels in one operation.

    Batched scalar operands select different rounds or weights, so they take one
    operation for each element of the batch.
    """
    # Ranks with batches of different sizes send leaves of different sizes, which
    # the headers show.
    axis, fixed = self._batch_axis(self.blocking), params["fixed"]
    if any(dim is not None for dim in dims[:fixed]):
      return _map_batch(self.blocking, operands, dims, **params)
    moved, out = _move_batches(operands[fixed:], dims[fixed:], axis)
    results = self.blocking.bind(*operands[:fixed], *moved, **params)
    return results, out(results)

  def start_batch(
    self, operands: Sequence[Any], dims: Sequence[Any], **params: Any
  ) -> tuple[Any, Any]:
    """Batching of the split form: one number for the whole batch."""
    axis, fixed = self._batch_axis(self.start), params["fixed"]
    if any(dim is not None for dim in dims[:fixed]):
      raise ValueError(
        f"{self.start.name} under vmap with a batched step, peer or weights is "
        f"one operation for each of them; use the blocking form."
      )
    moved, out = _move_batches(operands[fixed:], dims[fixed:], axis)
    results = self.start.bind(*operands[:fixed], *moved, **params)
    # The number and the weights are those of one operation, without a batch.
    count = len(results) - len(moved)
    return results, [None] * count + out(results[count:])

  def _batch_axis(self, primitive: Primitive) -> int:
    if self.batch_axis is None:
      raise ValueError(
        f"{primitive.name} under vmap would be one operation for each element "
        f"of the batch, on one state; make the batch part of the value."
      )
    return self.batch_axis


_rules: dict[str, OperationRules] = {}


def define(name: str, **rules: Any) -> Primitive:
  """Registers the primitives of an operation; see `OperationRules`.

  Returns:
    The blocking primitive, bound with `fixed=` and the operation's parameters.
  """
  return OperationRules(name, **rules).register()


def start_of(primitive: Primitive) -> Primitive:
  """The primitive that starts an operation."""
  return _rules[primitive.name].start


def wait_params(
  primitive: Primitive, scalars: Sequence[Any], params: dict[str, Any]
) -> tuple[tuple[str, Any], ...]:
  """Static parameters of `wait_p`, fixed when the operation starts."""
  rules = _rules[primitive.name]
  weights, structure = rules.weights(scalars, params)
  # Known at the start and nowhere else: `wait` sees neither graph nor scalars.
  static = () if rules.on_gpus is None else rules.on_gpus.static(**params)
  return (
    ("operation", rules.name),
    ("num_weights", len(weights)),
    ("weights_structure", structure),
    ("static", static),
    ("batch_axis", rules.batch_axis or 0),
  )


def _move_batches(
  leaves: Sequence[Any], dims: Sequence[int | None], axis: int
) -> tuple[list[Any], Callable[[Sequence[Any]], list[int | None]]]:
  """Leaves with their batches at `axis`, and the batch axes of results."""
  moved = [
    x if d is None else jnp.moveaxis(x, d, axis)
    for x, d in zip(leaves, dims, strict=True)
  ]

  def out(results: Sequence[Any]) -> list[int | None]:
    return [
      None if d is None else axis % y.ndim
      for y, d in zip(results, dims, strict=True)
    ]

  return moved, out


def _map_batch(
  primitive: Primitive,
  operands: Sequence[Any],
  dims: Sequence[int | None],
  **params: Any,
) -> tuple[Any, list[int]]:
  """One operation for each element of the batch, in their order."""
  # Other ranks may batch other operands: what has to match is the number of
  # operations and their order, which `lax.map` keeps.
  mapped = [d is not None for d in dims]
  moved = [
    jnp.moveaxis(x, d, 0)
    for x, d in zip(operands, dims, strict=True)
    if d is not None
  ]

  def one(batched: Sequence[Any]) -> Any:
    elements = iter(batched)
    merged = [
      next(elements) if m else x for x, m in zip(operands, mapped, strict=True)
    ]
    return primitive.bind(*merged, **params)

  results = jax.lax.map(one, moved)
  return results, [0] * len(results)


# The primitives of `wait` and `poll`. Operands of `wait_p`: the number of the
# operation, the weights of what it receives, and the placeholders, which the
# results take. On GPUs the placeholders hold the own values, and `wait_p`
# computes the results.

wait_p = Primitive("wait")
poll_p = Primitive("poll")


def _check_number(number: Any) -> None:
  if number.shape != NUMBER:
    raise ValueError(
      "wait: the handle was made inside of vmap; wait on it inside of the same "
      "vmap."
    )


def _wait_abstract_eval(
  number: Any, *operands: Any, num_weights: int, **params: Any
) -> list[jax.core.ShapedArray]:
  del params
  _check_number(number)
  return [
    jax.core.ShapedArray(x.shape, x.dtype) for x in operands[num_weights:]
  ]


def _wait_jvp(
  primals: Sequence[Any],
  tangents: Sequence[Any],
  *,
  num_weights: int,
  **params: Any,
) -> tuple[Any, Any]:
  # `start_jvp` has put the tangents of the results into the placeholders.
  results = wait_p.bind(*primals, num_weights=num_weights, **params)
  return results, list(tangents[1 + num_weights :])


def _wait_batch(
  operands: Sequence[Any],
  dims: Sequence[int | None],
  *,
  num_weights: int,
  batch_axis: int,
  **params: Any,
) -> tuple[Any, Any]:
  count = 1 + num_weights
  if dims[0] is not None:
    _check_number(operands[0])
  # Back to the axis at which `start_batch` has put the batches.
  moved, out = _move_batches(operands[count:], dims[count:], batch_axis)
  results = wait_p.bind(
    *operands[:count],
    *moved,
    num_weights=num_weights,
    batch_axis=batch_axis,
    **params,
  )
  return results, out(results)


def _poll_abstract_eval(
  number: Any, **params: Any
) -> list[jax.core.ShapedArray]:
  del params
  _check_number(number)
  return [jax.core.ShapedArray((), jnp.bool_)]


def _poll_jvp(
  primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
  del tangents  # a bool has none
  results = poll_p.bind(*primals, **params)
  return results, [zero_tangent(results[0])]


def _poll_batch(
  operands: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
  del dims  # one operation for the whole batch, so one answer
  return poll_p.bind(*operands, **params), [None]


_lowering.register(
  wait_p,
  _wait_abstract_eval,
  mpi=_lowering.lower_wait_to_handler("jfog_mpi_wait"),
  nccl=_lowering.lower_wait_to_nccl,
)
_lowering.register(
  poll_p,
  _poll_abstract_eval,
  mpi=_lowering.lower_poll("mpi"),
  nccl=_lowering.lower_poll("nccl"),
)
ad.primitive_jvps[wait_p] = _wait_jvp
ad.primitive_jvps[poll_p] = _poll_jvp
batching.primitive_batchers[wait_p] = _wait_batch
batching.primitive_batchers[poll_p] = _poll_batch
