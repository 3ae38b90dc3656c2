"""Every constant of an ACIP run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from ..plan import ROUTES

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}

# How a layer may be stored (ACIP.md section 4): one matrix, two factors, or pivot rows and what combines them.
FORMS = ("dense", "factors", "pivoted")


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """The constants of an ACIP run (arXiv 2502.01717), with the values of its published implementation.

    What is factorized:
        targets, exclude: which linear layers (see `factorize`); the output head never is.
        mask_scale: start value `c` of every mask parameter.
        adapter_rank, adapter_alpha, adapter_dropout: the LoRA adapter beside every factorized layer.
        basis: "weights", the plain SVD; or "activations", which the inputs of each layer whiten, so that what is cut
            is what the output misses least (needs a fraction of the steps). calibration_batches: batches that the
            inputs are taken from, the first ones of the run's.

    The pruning phase, until the size ratio of the factorized layers (adapters not counted, as they are not
    merged yet) is at or below `stop_ratio`:
        mask_learning_rate, adapter_learning_rate, betas, eps: AdamW's, without weight decay.
        lambda_start, lambda_growth, lambda_every: the l1 penalty λ on the masks, multiplied by
            `lambda_growth` every `lambda_every` steps.
        penalty: "entries", the same λ for every singular value, as the paper has it; or "numbers", λ times the numbers
            that the value's two vectors hold, over their mean: what costs more to store is pushed harder.
        max_prune_steps: at this step what is still too large is cut at once, lowest masks first. None: prune on
            until λ has done it.

        forms: how layers will be stored, which is how the size ratio counts them. The paper's two; with "pivoted" as
            well a run stops, and its cuts are made, by that form's smaller size.

    The tuning phase:
        tune_steps: steps with the masks frozen, on the task loss alone. tune_learning_rate: None for
            `adapter_learning_rate`.

    How it is computed:
        dtype: "auto" (see `compute_dtype`), or the name of a torch dtype for the model and its factors; masks,
            scores and adapters are float32 in any case.
        gradient_accumulation: batches a step, in each process. gradient_checkpointing: recompute activations to save
            memory.
        compact_every: steps between two checks whether pruned ranks are worth leaving out; 0 for never.
        route: "auto", for each layer the cheaper of the two ways to compute it; or "factored" or "effective" for all
            (see `acip_kernels.plan`). save_z: keep `x Vhᵀ` of every layer for the backward pass, as much memory as
            the layers' inputs; False computes it again. lean_loss: never store all logits, where that is the same loss.
        cuda_graph: on a GPU, launch a batch's forward and backward pass as one CUDA graph, captured again when enough
            has died; not with gradient_checkpointing, `shard`, or batches of changing shapes.
        shard: of several processes, each holds a part of the factors, put together layer by layer as they are computed
            with (FSDP); otherwise each holds all. Dead ranks are then computed to the end, as if `compact_every` were
            0, and every layer goes by `route` "factored".
        checkpoint_seconds: time between two checkpoints of the run.
        seed: of the adapters' start and of dropout.
    """

    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    mask_scale: float = 0.02
    adapter_rank: int = 32
    adapter_alpha: float = 16.0
    adapter_dropout: float = 0.05
    basis: str = "weights"
    calibration_batches: int = 16

    mask_learning_rate: float = 5e-5
    adapter_learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lambda_start: float = 1e-3
    lambda_growth: float = 1.01
    lambda_every: int = 4
    penalty: str = "entries"
    stop_ratio: float = 0.4
    max_prune_steps: int | None = None
    forms: tuple[str, ...] = ("dense", "factors")

    tune_steps: int = 1000
    tune_learning_rate: float | None = None

    dtype: str = "auto"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    compact_every: int = 1
    route: str = "auto"
    save_z: bool = True
    lean_loss: bool = True
    cuda_graph: bool = True
    shard: bool = False
    checkpoint_seconds: float = 120.0
    seed: int = 0

    def __post_init__(self):
        # Lists come from JSON and from users; a frozen run's constants are tuples.
        for name in ("targets", "exclude", "betas", "forms"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for name, value, low, high in (
            ("mask_scale", self.mask_scale, 0, math.inf),
            ("mask_learning_rate", self.mask_learning_rate, 0, math.inf),
            ("adapter_learning_rate", self.adapter_learning_rate, 0, math.inf),
            ("eps", self.eps, 0, math.inf),
            ("lambda_start", self.lambda_start, 0, math.inf),
            ("stop_ratio", self.stop_ratio, 0, 1),
        ):
            if not low < value <= high or math.isinf(value):
                raise ValueError(
                    f"{name} must be above {low}{'' if high == math.inf else f' and at most {high}'}, got {value}"
                )
        for name, value, low in (
            ("adapter_rank", self.adapter_rank, 0),
            ("lambda_every", self.lambda_every, 1),
            ("tune_steps", self.tune_steps, 0),
            ("gradient_accumulation", self.gradient_accumulation, 1),
            ("compact_every", self.compact_every, 0),
            ("calibration_batches", self.calibration_batches, 1),
            ("max_prune_steps", 1 if self.max_prune_steps is None else self.max_prune_steps, 1),
        ):
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")
        if self.route not in ("auto", *ROUTES):
            raise ValueError(f"route must be 'auto' or one of {', '.join(ROUTES)}, got {self.route!r}")
        object.__setattr__(self, "forms", check_forms(self.forms))
        if self.basis not in ("weights", "activations"):
            raise ValueError(f"basis must be 'weights' or 'activations', got {self.basis!r}")
        if self.penalty not in ("entries", "numbers"):
            raise ValueError(f"penalty must be 'entries' or 'numbers', got {self.penalty!r}")
        if not self.lambda_growth >= 1:
            raise ValueError(f"lambda_growth must be at least 1, got {self.lambda_growth}")
        if not 0 <= self.adapter_dropout < 1:
            raise ValueError(f"adapter_dropout must be in [0, 1), got {self.adapter_dropout}")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be 'auto' or one of {sorted(DTYPES)}, got {self.dtype!r}")
        if self.max_prune_steps is None and self.lambda_growth == 1:
            raise ValueError("lambda_growth of 1 may never reach stop_ratio: set max_prune_steps")

    @classmethod
    def short(cls, steps: int, stop_ratio: float = 0.4, **changes: Any) -> CompressionConfig:
        """A run that reaches `stop_ratio` in `steps` pruning steps, with a schedule scaled to their number.

        AdamW moves a mask by at most its learning rate a step. In a run this short the rate is such that an entry that
        nothing but the penalty moves dies after 70 % of the steps, and an important one cannot die of its gradient's
        noise, a random walk of length √steps: with a few dozen steps of 5e-5 × (reference steps / steps), it does.
        λ begins where the masks' gradients are and ends above most of them. What the penalty has not driven to zero
        by the last step is then cut by that step, lowest masks first. `tune_steps` is a quarter of `steps`. `changes`
        are fields that take precedence.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an int of at least 1, got {steps!r}")
        default = cls()
        mask_scale = changes.get("mask_scale", default.mask_scale)
        settings = {
            "mask_learning_rate": max(mask_scale / (0.7 * steps), default.mask_learning_rate),
            "adapter_learning_rate": 5e-4,
            "lambda_start": 0.01,
            "lambda_growth": 20 ** (1 / steps),
            "lambda_every": 1,
            "stop_ratio": stop_ratio,
            "max_prune_steps": steps,
            "tune_steps": steps // 4,
        }
        return cls(**settings | changes)

    def lambda_at(self, step: int) -> float:
        """λ of the pruning phase's step number `step`, from 0."""
        exponent = (step // self.lambda_every) * math.log(self.lambda_growth)
        return self.lambda_start * math.exp(min(exponent, 500.0))

    def to_dict(self) -> dict:
        """The fields, for JSON, and which class they are of."""
        return {"config": type(self).__name__} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> CompressionConfig:
        """The configuration of `to_dict`. Raises `ValueError` for a field that does not exist."""
        return cls(**known_fields(cls, fields))

    @property
    def rebuilds(self) -> bool:
        """Whether the base model alone gives the factors again."""
        return self.basis == "weights"


def known_fields(cls, fields: dict) -> dict:
    """`fields` of a configuration's `to_dict`, which must be fields of `cls`."""
    fields = {name: value for name, value in fields.items() if name != "config"}
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    return fields


def check_forms(forms) -> tuple[str, ...]:
    """`forms` as a tuple. Raises `ValueError` for one that does not exist."""
    forms = (forms,) if isinstance(forms, str) else tuple(forms)
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise ValueError(f"forms must be some of {', '.join(FORMS)}, got {', '.join(map(repr, unknown)) or 'none'}")
    return forms


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype that `dtype` names; "auto" is bfloat16 where the device multiplies it natively, else float32."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = True
    return torch.bfloat16 if fast else torch.float32


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)`, in place, but for the buffers that no file holds, as `from_pretrained` leaves them.

    Those are constants like the frequencies of rotary embeddings: in bfloat16 they would turn by a wrong angle, at a
    thousand tokens by a radian, while the saved model, loaded again, has the right ones.
    """
    kept = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    ]
    model.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer
    return model
