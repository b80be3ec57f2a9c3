"""`jfog bench`: latency, bandwidth and scaling of the operations on this machine."""

from jfog.bench.command import add_arguments as add_arguments
from jfog.bench.command import main as main
