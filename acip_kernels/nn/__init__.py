"""Modules: a linear layer kept as two factors, and one that ACIP prunes."""

from .lowrank_linear import LowRankLinear
from .pivot_linear import PivotLinear
from .svd_linear import SVDLinear

__all__ = ["LowRankLinear", "PivotLinear", "SVDLinear"]
