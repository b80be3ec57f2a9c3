"""Decentralized optimizers, as optax transformations."""

from jfog.optimizers._allreduce import (
  GradientAllreduceState as GradientAllreduceState,
)
from jfog.optimizers._allreduce import gradient_allreduce as gradient_allreduce
from jfog.optimizers._combine import (
  AdaptThenCombineState as AdaptThenCombineState,
)
from jfog.optimizers._combine import (
  AdaptWithCombineState as AdaptWithCombineState,
)
from jfog.optimizers._combine import adapt_then_combine as adapt_then_combine
from jfog.optimizers._combine import adapt_with_combine as adapt_with_combine
