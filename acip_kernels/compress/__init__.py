"""The ACIP run: factorize a model, prune it in one gradient run, cut it to any size, materialize it."""

from .config import CompressionConfig
from .factorize import factorize
from .materialize import materialize
from .run import CompressionResult, compress
from .sizing import Sizing

__all__ = ["CompressionConfig", "CompressionResult", "Sizing", "compress", "factorize", "materialize"]
