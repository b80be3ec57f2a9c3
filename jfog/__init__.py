"""jfog: decentralized training for JAX."""

import lazy_loader

# The names of `__init__.pyi`. The command line and processes that only import jfog
# then do not import JAX.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
