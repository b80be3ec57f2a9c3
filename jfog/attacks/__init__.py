"""Attacks: what faulty ranks send in `jfog.simulate(..., attackers={rank: attack})`.

An attacking rank runs the same program as the others. What it sends in
`jfog.neighbor_allreduce` and `jfog.neighbor_allgather` is chosen by its attack, leaf by
leaf; its own part in its own results stays what it holds. Attackers know what all ranks
hold. `H` is the set of the honest ranks, those that take part and do not attack.

`Attack` makes an attack of a function.
"""

from jfog.attacks._attacks import alie as alie
from jfog.attacks._attacks import dissensus as dissensus
from jfog.attacks._attacks import inner_product as inner_product
from jfog.attacks._attacks import noise as noise
from jfog.attacks._attacks import sign_flip as sign_flip
from jfog.runtime import Attack as Attack
from jfog.runtime import Message as Message

__all__ = [
  "Attack",
  "Message",
  "alie",
  "dissensus",
  "inner_product",
  "noise",
  "sign_flip",
]
