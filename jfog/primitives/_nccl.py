"""The names of `jfog.primitives.nccl` under those they had before."""

from typing import Any

from jfog.primitives import nccl
from jfog.primitives.nccl import Mode as Mode
from jfog.primitives.nccl import Reduction as Reduction
from jfog.primitives.nccl import Send as Send
from jfog.primitives.nccl import average as average
from jfog.primitives.nccl import common_attributes
from jfog.primitives.nccl import exchange as exchange
from jfog.primitives.nccl import scaled as scaled

Packing = nccl.Packing.of
told = common_attributes
_NAMES = {
  "send": "encode",
  "finish": "decode",
  "weigh": "weights",
  "whole": "blocking",
}


def OnGpus(**hooks: Any) -> nccl.Rendition:
  rendition = nccl.Rendition()
  for name, hook in hooks.items():
    setattr(rendition, _NAMES.get(name, name), hook)
  return rendition
