"""Compressors: pytrees encoded as small messages of static shape."""

from jfog.optimizers.compressors._base import Compressor as Compressor
from jfog.optimizers.compressors._base import identity as identity
from jfog.optimizers.compressors._base import message_bytes as message_bytes
from jfog.optimizers.compressors._low_rank import low_rank as low_rank
from jfog.optimizers.compressors._quantize import quantize as quantize
from jfog.optimizers.compressors._quantize import sign as sign
from jfog.optimizers.compressors._sparsify import random_k as random_k
from jfog.optimizers.compressors._sparsify import top_k as top_k

__all__ = [name for name in dir() if not name.startswith("_")]
