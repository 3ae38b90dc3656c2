"""Operators on tensors, each in a folder of its own: `reference.py` is the formula, `op.py` the operator."""

from .linear_cross_entropy.op import linear_cross_entropy
from .lowrank_linear.op import lowrank_linear
from .masked_svd_linear.op import masked_svd_linear
from .quantized_linear.op import quantized_linear

__all__ = ["linear_cross_entropy", "lowrank_linear", "masked_svd_linear", "quantized_linear"]
