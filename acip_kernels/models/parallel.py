"""Tensor parallelism: what transformers' plan for a model's dense layers means for factorized ones.

A layer that the plan divides by its outputs (column-wise) keeps `Vh` whole and divides `U` in that way; one that it
divides by its inputs (row-wise) divides `Vh`, so that what the processes add up is as wide as the rank, and keeps `U`
whole. A pivoted layer that is divided by its inputs divides `P` likewise. By its outputs it cannot be divided: each
needs all of `P`'s outputs, and they are not side by side. So every process computes such a layer whole and goes on
with its own part of the outputs; `forms=("dense", "factors")` makes models without pivoted layers.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import TensorParallelLayer

from ..nn import LowRankLinear, PivotLinear
from ..nn.quantized_linear import QuantizedLinear
from .quantizer import PARALLEL_PREFIX

_COLUMN_WISE = ("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise")
_ROW_WISE = ("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise")


class ByForm(TensorParallelLayer):
    """The style `name` of transformers for layers of which some are dense, and some factorized.

    The dense ones it divides as ever; of the factorized ones their children, by rules of their own in the plan.
    """

    def __init__(self, name: str):
        self.name, self.style = name, ALL_PARALLEL_STYLES[name]

    def validate_param(self, module, param, mesh, parameter_name=None):
        if not isinstance(module, PivotLinear):
            self.style.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module, param, mesh):
        if not isinstance(module, PivotLinear):  # its bias is added to all outputs
            self.style.shard_param(module, param, mesh)

    def install_forward(self, module, mesh):
        if any(isinstance(each, QuantizedLinear) for each in module.modules()):
            raise ValueError(
                "quantized layers cannot be divided among processes: load the model in one, which takes a quarter to "
                "half of the bytes, or materialize it without quantize and quantize_embeddings"
            )
        if isinstance(module, LowRankLinear) or (isinstance(module, PivotLinear) and self.name in _ROW_WISE):
            return module
        if not isinstance(module, PivotLinear):
            return self.style.install_forward(module, mesh)
        if self.name == "packed_colwise":
            raise ValueError(
                "a pivoted layer of several projections in one cannot be divided among processes: materialize the "
                "model with forms=('dense', 'factors')"
            )
        return super().install_forward(module, mesh)

    def transform_output_post_forward(self, module, output, mesh):
        """A pivoted layer's outputs, which every process has all of, as the style leaves those of a dense one."""
        whole = DTensor.from_local(output, mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[self.style.output_layouts]).to_local()


for _name in (*_COLUMN_WISE, *_ROW_WISE):
    ALL_PARALLEL_STYLES.register(PARALLEL_PREFIX + _name, ByForm(_name))


def divide_factors(model: nn.Module, plan: dict[str, str]) -> None:
    """Extend transformers' `plan`, in place, to the factorized layers of `model`."""
    forms: dict[str, set[type]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear | PivotLinear | QuantizedLinear):
            forms.setdefault(replace_layer_number_by_wildcard(name), set()).add(type(module))
    for name, style in list(plan.items()):
        if name not in forms or style not in (*_COLUMN_WISE, *_ROW_WISE):
            continue
        plan[name] = PARALLEL_PREFIX + style
        by_rows = style in _ROW_WISE
        if LowRankLinear in forms[name]:
            plan[f"{name}.Vh" if by_rows else f"{name}.U"] = style
        if PivotLinear in forms[name] and by_rows:
            plan[f"{name}.P"] = style
