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
from jfog.optimizers._windows import WindowGetState as WindowGetState
from jfog.optimizers._windows import WindowPushSumState as WindowPushSumState
from jfog.optimizers._windows import WindowPutState as WindowPutState
from jfog.optimizers._windows import window_get as window_get
from jfog.optimizers._windows import window_push_sum as window_push_sum
from jfog.optimizers._windows import window_put as window_put
