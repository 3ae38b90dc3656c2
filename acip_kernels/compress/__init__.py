"""The ACIP run: factorize a model, prune it in one gradient run, cut it to any size, materialize it."""

from .config import CompressionConfig
from .factorize import factorize
from .materialize import materialize
from .methods import RankingConfig
from .nested import NestedConfig
from .result import CompressionResult
from .run import compress
from .sizing import Sizing

__all__ = [
    "CompressionConfig",
    "CompressionResult",
    "NestedConfig",
    "RankingConfig",
    "Sizing",
    "compress",
    "factorize",
    "materialize",
]
