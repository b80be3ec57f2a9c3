"""ResNets and a small transformer in plain JAX, and steps that train them."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax


class Model(NamedTuple):
  """A model to train; `units` is the weight of one sample in the rates."""

  init: Callable[[jax.Array], Any]  # key -> parameters, float32
  loss: Callable[[Any, Any], jax.Array]  # (parameters, batch) -> shape=()
  batch: Callable[[jax.Array, int], Any]  # (key, samples) -> batch
  unit: str
  units: int


def count(params: Any) -> int:
  """The number of parameters."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def train_step(
  loss: Callable[[Any, Any], jax.Array], tx: optax.GradientTransformation
) -> Callable[[Any, Any, Any], tuple]:
  """A jitted step `(params, state, batch) -> (params, state, loss)`, in place."""

  def step(params: Any, state: Any, batch: Any) -> tuple:
    value, gradient = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  return jax.jit(step, donate_argnums=(0, 1))


def resnet(
  blocks: Sequence[int] = (3, 4, 6, 3),
  width: int = 64,
  classes: int = 1000,
  side: int = 224,
  dtype: Any = jnp.bfloat16,
  bottleneck: bool = True,
) -> Model:
  """A ResNet, by default the one of 50 layers, that computes in `dtype`.

  Without `bottleneck` a block has two 3x3 convolutions, as in the one of 18 layers,
  whose `blocks` are 2, 2, 2, 2.

  Normalization is by the batch at hand; running averages, which training does
  not read, are left out. The stride of a block is in its 3x3 convolution.

  Source: He et al. 2015, https://arxiv.org/abs/1512.03385, table 1.
  """

  expansion = 4 if bottleneck else 1

  def shapes(inputs: int, inner: int) -> dict[str, tuple[int, int, int]]:
    """Side, inputs and outputs of the convolutions of a block, in order."""
    if not bottleneck:
      return {"first": (3, inputs, inner), "second": (3, inner, inner)}
    return {
      "narrow": (1, inputs, inner),
      "spatial": (3, inner, inner),
      "widen": (1, inner, expansion * inner),
    }

  def convolution(
    keys: Iterator[jax.Array], side: int, inputs: int, outputs: int
  ) -> dict[str, jax.Array]:
    scale = math.sqrt(2 / (side * side * inputs))
    kernel = jax.random.normal(next(keys), (side, side, inputs, outputs))
    return {
      "kernel": scale * kernel,
      "scale": jnp.ones(outputs),
      "bias": jnp.zeros(outputs),
    }

  def init(key: jax.Array) -> Any:
    keys = iter(jax.random.split(key, 4 * sum(blocks) + 2))
    params: dict[str, Any] = {"stem": convolution(keys, 7, 3, width)}
    params["stages"] = []
    inputs = width
    for stage, depth in enumerate(blocks):
      inner = width * 2**stage
      made = []
      for block in range(depth):
        layers = {
          name: convolution(keys, *shape)
          for name, shape in shapes(inputs, inner).items()
        }
        outputs = expansion * inner
        if block == 0 and (inputs != outputs or stage):
          layers["shortcut"] = convolution(keys, 1, inputs, outputs)
        made.append(layers)
        inputs = outputs
      params["stages"].append(made)
    head = jax.random.normal(next(keys), (inputs, classes))
    params["head"] = {
      "kernel": head / math.sqrt(inputs),
      "bias": jnp.zeros(classes),
    }
    return params

  def normalized(x: jax.Array, layer: Any, stride: int = 1) -> jax.Array:
    x = lax.conv_general_dilated(
      x,
      layer["kernel"].astype(dtype),
      (stride, stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).astype(jnp.float32)
    mean = x.mean((0, 1, 2))
    variance = jnp.square(x - mean).mean((0, 1, 2))
    x = (x - mean) * lax.rsqrt(variance + 1e-5)
    return (x * layer["scale"] + layer["bias"]).astype(dtype)

  def loss(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    x = jax.nn.relu(normalized(images.astype(dtype), params["stem"], 2))
    window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
    x = lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME")
    for stage, made in enumerate(params["stages"]):
      for block, layers in enumerate(made):
        stride = 2 if stage > 0 and block == 0 else 1
        *inner, last = shapes(0, 0)
        strided = "spatial" if bottleneck else "first"
        y = x
        for name in inner:
          y = normalized(y, layers[name], stride if name == strided else 1)
          y = jax.nn.relu(y)
        y = normalized(y, layers[last])
        if "shortcut" in layers:
          x = normalized(x, layers["shortcut"], stride)
        x = jax.nn.relu(x + y)
    x = x.astype(jnp.float32).mean((1, 2))
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return _cross_entropy(logits, labels)

  def batch(key: jax.Array, samples: int) -> Any:
    one, other = jax.random.split(key)
    images = jax.random.normal(one, (samples, side, side, 3))
    return images, jax.random.randint(other, (samples,), 0, classes)

  return Model(init, loss, batch, "images", 1)


def transformer(
  layers: int = 8,
  width: int = 512,
  heads: int = 8,
  length: int = 512,
  words: int = 8192,
  dtype: Any = jnp.bfloat16,
) -> Model:
  """A decoder that predicts the next token, and computes in `dtype`.

  Its layers are stacked, one array for each kind of weight.
  """
  size = {
    "attention": (width, 3 * width),
    "output": (width, width),
    "up": (width, 4 * width),
    "down": (4 * width, width),
  }

  def init(key: jax.Array) -> Any:
    keys = iter(jax.random.split(key, len(size) + 3))
    stacked = {
      name: jax.random.normal(next(keys), (layers, *shape))
      / math.sqrt(shape[0])
      for name, shape in size.items()
    }
    stacked["scales"] = jnp.ones((layers, 2, width))
    return {
      "words": 0.02 * jax.random.normal(next(keys), (words, width)),
      "places": 0.02 * jax.random.normal(next(keys), (length, width)),
      "layers": stacked,
      "head": jax.random.normal(next(keys), (width, words)) / math.sqrt(width),
    }

  def norm(x: jax.Array, scale: Any = 1.0) -> jax.Array:
    x = x.astype(jnp.float32)
    mean = jnp.square(x).mean(-1, keepdims=True)
    return (x * lax.rsqrt(mean + 1e-6) * scale).astype(dtype)

  def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
    first, second = weights["scales"]
    weights = {name: weights[name].astype(dtype) for name in size}
    parts = (norm(x, first) @ weights["attention"]).reshape(
      *x.shape[:2], 3, heads, width // heads
    )
    query, key, value = jnp.moveaxis(parts, 2, 0)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + mixed.reshape(x.shape) @ weights["output"]
    hidden = jax.nn.gelu(norm(x, second) @ weights["up"])
    return x + hidden @ weights["down"], None

  def loss(params: Any, tokens: jax.Array) -> jax.Array:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = (params["words"][inputs] + params["places"]).astype(dtype)
    x, _ = lax.scan(layer, x, params["layers"])
    logits = norm(x) @ params["head"].astype(dtype)
    return _cross_entropy(logits.astype(jnp.float32), targets)

  def batch(key: jax.Array, samples: int) -> jax.Array:
    return jax.random.randint(key, (samples, length + 1), 0, words)

  return Model(init, loss, batch, "tokens", length)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
