"""Where a training step's time goes: `python -m bench.training_profile`. Time of each kind of operation, by torch's
profiler, for this package's step at several live sizes."""

from __future__ import annotations

import functools
import json
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from acip_kernels import files, report
from acip_kernels.plan import training_memory

from .training_step import Ours, Setting, markdown, name_of, result_path

# The first kind whose prefix fits has it. Self time only, so nothing counts twice.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_"),
    # Batched products are attention's alone.
    "attention": (
        "aten::_scaled_dot_product", "aten::_flash_attention", "aten::bmm", "acip::causal_", "acip::softmax_gradient_",
        "torch::autograd::CppNode<(anonymous namespace)::CausalAttention>",
    ),
    # A layer's call, and its node of the engine, but for the products in them.
    "our kernels: dropout, scaling, mask gradient": (
        "acip::masked_svd", "torch::autograd::CppNode<(anonymous namespace)::Masked>",
        "acip::dropout", "acip::scale_ranks", "acip::mask_gradient_",
    ),
    "our kernels: cross-entropy": ("acip::cross_entropy_",),
    "optimizer and norm": ("aten::_fused_adamw", "aten::_foreach_norm", "Optimizer"),
    "norms, rotations, activations, residuals": (
        "aten::mul", "aten::add", "aten::silu", "aten::pow", "aten::mean", "aten::rsqrt", "aten::cat", "aten::neg",
        "aten::sum", "aten::sub", "aten::div", "aten::embedding", "acip::rms_norm", "acip::gated_silu", "acip::rotary",
        # Their backward passes, which are nodes of the engine and no operators.
        "torch::autograd::CppNode<(anonymous namespace)::RmsNorm>",
        "torch::autograd::CppNode<(anonymous namespace)::Rotary>",
        "torch::autograd::CppNode<(anonymous namespace)::GatedSilu>",
    ),
    "copies and fills": ("aten::copy_", "aten::fill_", "aten::zero_", "aten::clone", "aten::contiguous"),
}  # fmt: skip
REST = "Python, dispatch and everything else"


def kind_of(name: str) -> str:
    return next((kind for kind, names in KINDS.items() if name.startswith(names)), REST)


def profiled(step) -> dict[str, float]:
    """Seconds by kind of one call of `step`."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds = dict.fromkeys((*KINDS, REST), 0.0)
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return seconds


def table(results: dict[str, dict[str, float]]) -> str:
    """Milliseconds, and shares of the step, by the kinds that it was measured by."""
    sizes = list(results)
    totals = {size: sum(results[size].values()) for size in sizes}
    lines = [
        [kind, *(f"{1e3 * results[s][kind]:,.0f} ({100 * results[s][kind] / totals[s]:.0f} %)" for s in sizes)]
        for kind in results[sizes[0]]
    ]
    lines.append(["total", *(f"{1e3 * totals[size]:,.0f}" for size in sizes)])
    return markdown(["ms of one step", *(f"live size {100 * float(size):.0f} %" for size in sizes)], lines)


def formula(ours: Ours, setting: Setting) -> dict[str, int]:
    """Bytes by `plan.training_memory`, over all layers."""
    total = dict.fromkeys(("frozen", "trained", "kept"), 0)
    for layer in ours.layers:
        one = training_memory(
            setting.tokens, layer.in_features, layer.out_features, layer.full_rank, layer.computed_rank,
            layer.adapter_rank, route=layer.route, dropout=setting.dropout > 0, itemsize=setting.dtype.itemsize,
        )  # fmt: skip
        for name in total:
            total[name] += getattr(one, name)
    return total


def main(dropout: Annotated[float, typer.Option(help="On the adapters' input.")] = 0.05):
    """Time of one training step by kind of operation, at live sizes 1.0 and 0.4."""
    from acip_kernels.compress.config import compute_dtype

    device = torch.device("cpu")
    setting = Setting(
        model=None, device=device, dtype=compute_dtype("auto", device), batch=2, length=512, dropout=dropout
    )
    ours, ids, results, memory = Ours(setting), setting.first_ids(), {}, {}
    for ratio in (1.0, 0.4):
        ours.resize(ratio)
        ours.step(ids)
        results[str(ratio)] = profiled(functools.partial(ours.step, ids))
        memory[str(ratio)] = formula(ours, setting)
    print(table(results))
    about = report.device_description(device) | {"dtype": name_of(setting.dtype)}
    step_path = result_path(about["device"], setting.dtype)
    path = step_path.with_name(step_path.name.replace("training_step", "training_profile"))
    files.write_text(path, json.dumps({"device": about, "seconds": results, "formula_bytes": memory}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
