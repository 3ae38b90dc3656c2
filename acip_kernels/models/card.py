"""The README.md of a saved model: what it is and how it was made."""

from __future__ import annotations

import pathlib

from torch import nn

from ..ops.quantize import Scheme


def model_card(model: nn.Module, result, base_model: str | None) -> str:
    """A model card for the Hugging Face Hub. `result` is the `CompressionResult` that holds `model`."""
    fields = getattr(model.config, "quantization_config", None) or {}
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    elastic = any(hasattr(module, "set_live") for module in model.modules())
    # A directory of one machine means nothing elsewhere; its last part may be a name.
    name = pathlib.Path(base_model).name if base_model and pathlib.Path(base_model).exists() else base_model
    lines = ["---", "library_name: transformers", "tags: [acip, compressed, low-rank]"]
    if name and name == base_model:
        lines.append(f"base_model: {name}")
    title = name or type(model).__name__
    lines += ["---", "", f"# {title}, compressed with ACIP", ""]
    if elastic:
        lines += [
            "An elastic checkpoint: the factors of every linear layer in the order of their scores, so that a model of",
            "any size is cut from it when it is loaded.",
            "",
            "```python",
            "import acip_kernels",
            'model = acip_kernels.load("this directory", size_ratio=0.6)',
            "```",
        ]
    else:
        size = f"{100 * fields['size_ratio']:.0f} %" if "size_ratio" in fields else "full size"
        lines += [
            f"The linear layers are low-rank, at {size} of their size{_quantization(fields)}.",
            "",
            "```python",
            "import acip_kernels  # knows the low-rank layers; without it, loading stops with a size mismatch",
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("this directory")',
            "```",
        ]
    rows = [
        (f"size ratio, {count} count", f"{fields[count]:.4f}") for count in ("factorized", "stored") if count in fields
    ]
    if "adapters" in fields:
        rows.append(("adapters", fields["adapters"]))
    if fields.get("quantized"):
        quantized = {key: value for key, value in fields["quantized"].items() if key != "dense"}
        rows.append(("weights of these layers", str(Scheme.from_dict(quantized))))
    if fields.get("embeddings"):
        rows.append(("embedding and output head", str(Scheme.from_dict(fields["embeddings"]))))
    if fields.get("ranks"):
        ranks = list(fields["ranks"].values())
        rows.append(("low-rank layers", f"{len(ranks)}, of rank {min(ranks)} to {max(ranks)}"))
    if result.config is not None:
        rows.append(("run ended at", f"{result.size_ratio:.4f}"))
        rows += [(key, value) for key, value in result.config.to_dict().items() if value not in (None, (), [])]
    if rows:
        lines += ["", "| made with | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    source = "[Choose Your Model Size](https://arxiv.org/abs/2502.01717)"
    lines += ["", f"Method: ACIP, {source}. `size_ratio` is what is left of the dense model.", ""]
    return "\n".join(lines)


def _quantization(fields: dict) -> str:
    return f", with weights of {fields['quantized']['bits']} bits" if fields.get("quantized") else ""
