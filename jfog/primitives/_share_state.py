"""The state of a training, from a rank that has it to one that joins the world."""

import hashlib
import pickle
import struct
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jfog.primitives._allgather import allgather
from jfog.primitives._neighbor_allgather import neighbor_allgather
from jfog.runtime import ProcessCommunicator, resolve, take_state
from jfog.topology import Schedule, Topology

_HEADER = struct.Struct(
  "<32sqq"
)  # digest, bytes of the description and the state
_CHUNK = 256 * 2**20  # bytes of one message


def share_state(tree: Any, graph: Topology | Schedule | None = None) -> Any:
  """Brings a state to the ranks that `jfog.recover` has taken in, bit for bit.

  Collective over the world after `jfog.recover`, and after the `jfog.init` of a rank
  that has come in: all ranks pass a tree of the same structure, such as `(step,
  params, opt_state)`. A rank of `world.joined_ranks` gets the leaves of one rank that
  has the state, its source; any other rank gets its own tree back. Where no rank has
  joined, nothing is sent, so that a program may call it after every `jfog.init`.

  The source is the first in-neighbor that has the state, or without one, or without
  a graph, the nearest rank below, around the ring. It sends all leaves in one
  message of bytes (in several of 256 MiB, for more), the joined ranks wait for
  theirs, and before that all ranks gather 48 bytes of each.

  Arrays come as the kind of array that the rank passes, `jax.Array` on the devices
  of its own leaf, with keys of `jax.random` among them, or NumPy's. Any other leaf
  is a Python object and comes by `pickle`. A rank that has come in counts as joined
  until a call has ended on it, so pass the whole state at once.

  Args:
    tree: the state: a pytree. Arrays have equal shapes and dtypes on all ranks, and
      other leaves equal types.
    graph: the graph of the training, a `Topology`, or a `Schedule`, whose rounds are
      looked through in order.

  Returns:
    The state, a tree like the given one.

  Raises:
    ValueError: on a joined rank alone, if its tree is another than that of its source,
      naming the first leaf that differs; the others go on. Or if the graph has
      another size than the world.
    TypeError: for a traced leaf (call it outside of `jax.jit`), and for one that
      cannot be pickled.
    RuntimeError: if no rank is left that has the state.
    NotInitializedError: without a world.
    jax.errors.JaxRuntimeError: if a rank fails meanwhile; `jfog.is_rank_failure`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> world = jfog.init()
    >>> jfog.share_state({"step": 3, "w": jnp.ones(2)})
    {'step': 3, 'w': Array([1., 1.], dtype=float32)}
  """
  world = resolve()
  if not isinstance(world, ProcessCommunicator):
    return tree
  flat, structure = jax.tree_util.tree_flatten_with_path(tree)
  names = [f"tree{jax.tree_util.keystr(path)}" for path, _ in flat]
  leaves = [leaf for _, leaf in flat]
  for name, leaf in zip(names, leaves, strict=True):
    if isinstance(leaf, jax.core.Tracer):
      raise TypeError(
        f"share_state: {name} is traced; call it outside of jax.jit, between steps."
      )
  if graph is not None and graph.size != world.size:
    raise ValueError(
      f"share_state: the graph has {graph.size} ranks and the world {world.size}; "
      f"make it anew for the size of the world."
    )
  if not world.joined_ranks:
    return tree
  sources = _sources(world.size, world.joined_ranks, graph)
  description = _description(names, leaves, structure)
  state = np.empty(0, np.uint8)
  if world.rank in sources.values():
    state = _to_bytes(names, leaves)
  header = _HEADER.pack(
    hashlib.sha256(description.tobytes()).digest(), len(description), len(state)
  )
  gathered = allgather(jnp.asarray(_bytes(header))[None], comm=world)
  headers = [_HEADER.unpack(row.tobytes()) for row in np.asarray(gathered)]
  # Those of another structure learn what differs, and get no state.
  others = {
    joined: source
    for joined, source in sources.items()
    if headers[joined][0] != headers[source][0]
  }
  if others:
    lengths = [length for _, length, _ in headers]
    theirs = _send(world, others, description, lengths)
    if world.rank in others:
      raise ValueError(_difference(theirs, description, others[world.rank]))
  sources = {j: s for j, s in sources.items() if j not in others}
  lengths = [
    length if rank in sources.values() else 0
    for rank, (_, _, length) in enumerate(headers)
  ]
  received = _send(world, sources, state, lengths)
  if world.rank not in sources:
    return tree
  taken = jax.tree_util.tree_unflatten(structure, _from_bytes(received, leaves))
  take_state()
  return taken


def _sources(
  size: int, joined: tuple[int, ...], graph: Topology | Schedule | None
) -> dict[int, int]:
  """For each rank that has joined, the one that sends it the state."""
  if len(joined) == size:
    raise RuntimeError(
      "share_state: no rank is left that has the state, all have joined; start "
      "again from the last checkpoint."
    )
  sources = {}
  for rank in joined:
    rounds = [] if graph is None else [graph[t] for t in range(len(graph))]
    neighbors = [src for each in rounds for src in each.in_neighbors(rank)]
    below = [(rank - distance) % size for distance in range(1, size)]
    sources[rank] = next(
      src for src in [*neighbors, *below] if src not in joined
    )
  return sources


def _send(
  world: ProcessCommunicator,
  sources: Mapping[int, int],
  own: np.ndarray,
  lengths: list[int],
) -> np.ndarray:
  """Sends bytes from each source; returns those for this rank. Collective.

  Args:
    world: the communicator.
    sources: the source of each rank that receives.
    own: the bytes of this rank, used if it is a source.
    lengths: of the bytes of each rank, used of the sources.
  """
  matrix = np.eye(world.size)
  for dst, src in sources.items():
    matrix[dst, [dst, src]] = 0.5
  graph = Topology(matrix, connected=False)
  lengths = [
    length if rank in sources.values() else 0
    for rank, length in enumerate(lengths)
  ]
  own = own[: lengths[world.rank]]
  parts = [np.empty(0, np.uint8)]
  for begin in range(0, max(lengths, default=0), _CHUNK):
    sizes = [min(max(length - begin, 0), _CHUNK) for length in lengths]
    part = own[begin : begin + sizes[world.rank]]
    gathered = neighbor_allgather(
      jnp.asarray(part), graph, axis_sizes=sizes, comm=world
    )
    parts.append(np.asarray(gathered))
  return np.concatenate(parts)


def _bytes(text: bytes) -> np.ndarray:
  return np.frombuffer(text, np.uint8)


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, (jax.Array, np.ndarray)) and leaf.dtype != object


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _description(names: list[str], leaves: list[Any], structure: Any) -> Any:
  """The structure as bytes, a line for each leaf and one for the containers."""
  lines = [
    f"{name}: {leaf.dtype}{list(leaf.shape)}"
    if _is_array(leaf)
    else f"{name}: {type(leaf).__qualname__}"
    for name, leaf in zip(names, leaves, strict=True)
  ]
  return _bytes("\n".join([*lines, str(structure)]).encode())


def _difference(theirs: np.ndarray, own: np.ndarray, source: int) -> str:
  lines = theirs.tobytes().decode().split("\n")
  mine = own.tobytes().decode().split("\n")
  there, here = next(
    (pair for pair in zip(lines, mine, strict=False) if pair[0] != pair[1]),
    (lines[-1], mine[-1]),
  )
  return (
    f"share_state: this rank has {here}, and rank {source}, which has the state, "
    f"{there}; pass trees of one structure on all ranks."
  )


def _to_bytes(names: list[str], leaves: list[Any]) -> np.ndarray:
  """The state as bytes: the length of the pickled leaves, these, and the arrays."""
  objects, arrays = [], []
  for name, leaf in zip(names, leaves, strict=True):
    if _is_array(leaf):
      array = jax.random.key_data(leaf) if _is_key(leaf) else leaf
      array = np.ascontiguousarray(array)
      arrays.append(array.reshape(-1).view(np.uint8))
      continue
    try:
      objects.append(pickle.dumps(leaf))
    except Exception as error:
      raise TypeError(
        f"share_state: {name} of type {type(leaf).__name__} cannot be pickled; pass "
        f"a tree without it."
      ) from error
  pickled = pickle.dumps(objects)
  head = struct.pack("<q", len(pickled)) + pickled
  return np.concatenate([_bytes(head), *arrays])


def _from_bytes(received: np.ndarray, leaves: list[Any]) -> list[Any]:
  """The leaves of the source, in the kinds of this rank's own."""
  (length,) = struct.unpack("<q", received[:8].tobytes())
  objects = iter(pickle.loads(received[8 : 8 + length].tobytes()))
  begin = 8 + length
  taken = []
  for leaf in leaves:
    if not _is_array(leaf):
      taken.append(pickle.loads(next(objects)))
      continue
    is_key = _is_key(leaf)
    like = jax.random.key_data(leaf) if is_key else leaf
    array = np.empty(like.shape, like.dtype)
    end = begin + array.nbytes
    array.reshape(-1).view(np.uint8)[:] = received[begin:end]
    begin = end
    if isinstance(leaf, jax.Array):
      placed = jax.device_put(array, like.sharding)
      if is_key:
        placed = jax.random.wrap_key_data(
          placed, impl=jax.random.key_impl(leaf)
        )
      taken.append(placed)
      continue
    taken.append(array)
  return taken
