"""The models of the benchmarks, which `jfog bench train` trains as well."""

from jfog.bench.models import Model as Model
from jfog.bench.models import count as count
from jfog.bench.models import resnet as resnet
from jfog.bench.models import train_step as train_step
from jfog.bench.models import transformer as transformer
