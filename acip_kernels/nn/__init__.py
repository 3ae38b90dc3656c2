"""Modules: a linear layer kept as two factors, pivoted or quantized, and one that ACIP prunes."""

from .lowrank_linear import LowRankLinear
from .pivot_linear import PivotLinear
from .quantized_embedding import QuantizedEmbedding, QuantizedHead
from .quantized_linear import QuantizedLinear
from .svd_linear import SVDLinear

__all__ = ["LowRankLinear", "PivotLinear", "QuantizedEmbedding", "QuantizedHead", "QuantizedLinear", "SVDLinear"]
