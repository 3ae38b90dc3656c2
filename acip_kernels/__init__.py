"""Compress a language model to any size in one gradient run, and run it faster than the dense one.

Importing this package registers the weight format "acip" with transformers, so that `from_pretrained` loads what it
has saved.
"""

from .checksums import verify
from .compress import (
    CompressionConfig,
    CompressionResult,
    NestedConfig,
    RankingConfig,
    Sizing,
    compress,
    factorize,
    materialize,
)
from .compress.finetune import finetune
from .compress.recalibrate import recalibrate
from .compress.scores import score_by_singular_values
from .models.export import export_onnx, export_program, save_factors, to_plain
from .models.factors import import_factors
from .models.foreign import import_checkpoint
from .models.fuse import fuse, unfuse
from .models.saving import load, save
from .nn import LowRankLinear, PivotLinear, QuantizedLinear, SVDLinear

# From where they are written: to a type checker `.ops.lowrank_linear` is the folder of that name.
from .ops.linear_cross_entropy.op import linear_cross_entropy
from .ops.lowrank_linear.op import lowrank_linear
from .ops.masked_svd_linear.op import masked_svd_linear
from .version import __version__

__all__ = [
    "CompressionConfig",
    "CompressionResult",
    "LowRankLinear",
    "NestedConfig",
    "PivotLinear",
    "QuantizedLinear",
    "RankingConfig",
    "SVDLinear",
    "Sizing",
    "__version__",
    "compress",
    "export_onnx",
    "export_program",
    "factorize",
    "finetune",
    "fuse",
    "import_checkpoint",
    "import_factors",
    "linear_cross_entropy",
    "load",
    "lowrank_linear",
    "masked_svd_linear",
    "materialize",
    "recalibrate",
    "save",
    "save_factors",
    "score_by_singular_values",
    "to_plain",
    "unfuse",
    "verify",
]
