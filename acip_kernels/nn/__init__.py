"""Modules: a linear layer kept as two factors, and one that ACIP prunes."""

from .lowrank_linear import LowRankLinear
from .svd_linear import SVDLinear

__all__ = ["LowRankLinear", "SVDLinear"]
