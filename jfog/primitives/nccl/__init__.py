"""Operations on GPUs: NCCL calls between two pieces of XLA arithmetic."""

from jfog.primitives.nccl._exchange import at_step as at_step
from jfog.primitives.nccl._exchange import average as average
from jfog.primitives.nccl._exchange import (
  common_attributes as common_attributes,
)
from jfog.primitives.nccl._exchange import exchange as exchange
from jfog.primitives.nccl._exchange import fingerprint as fingerprint
from jfog.primitives.nccl._exchange import rounds_of as rounds_of
from jfog.primitives.nccl._exchange import row_of_graph as row_of_graph
from jfog.primitives.nccl._exchange import scaled as scaled
from jfog.primitives.nccl._exchange import slots_of as slots_of
from jfog.primitives.nccl._lowering import Mode as Mode
from jfog.primitives.nccl._lowering import Reduction as Reduction
from jfog.primitives.nccl._lowering import Rendition as Rendition
from jfog.primitives.nccl._lowering import Send as Send
from jfog.primitives.nccl._packing import Packing as Packing
