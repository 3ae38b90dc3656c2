"""What one training step costs: `python -m bench.training_step`, with `--help` for its parts.

It compares, on the same tokens and in one process, round by round in turns:

- "peft": plain LoRA fine-tuning of the dense model, what a step costs if nothing is compressed;
- "peft compiled": the same through `torch.compile`;
- "two products": ACIP's masked layer as one would write it from the paper, in ordinary PyTorch;
- "ours": this package's step, with a part of the singular values pruned ("live size");
- "nested": a step of the default run at that size, which trains updates of both factors with the dense model beside it.

Every measured time stands beside its floor: the operations that must be done, counted by the functions below, over the
rate at which this machine multiplies matrices of the model's own shapes, measured in the same rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import acip_kernels
from acip_kernels import CompressionConfig, SVDLinear, data, files, report
from acip_kernels.compress.config import compute_dtype
from acip_kernels.compress.factorize import svd_layers

ROOT = pathlib.Path(__file__).resolve().parent.parent

VARIANTS = ("peft", "peft compiled", "two products", "ours", "nested")
RATIOS = (1.0, 0.8, 0.6, 0.4)
# It multiplies by all singular values, live or not: its two ends show that.
TWO_PRODUCTS_RATIOS = (1.0, 0.4)
PENALTY = 1e-3
RANK, ALPHA = 32, 16
LEARNING_RATE = 5e-5
LLAMA_8B_LAYERS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # [out, in] of all its linear layers
MEMORY_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all variants share. model: a directory, or None for the demo's model."""

    model: str | None
    device: torch.device
    dtype: torch.dtype
    dropout: float
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @functools.cached_property
    def source(self) -> str:
        return self.model or str(data.demo_model())

    def dense_model(self) -> nn.Module:
        """The dense model in training mode, without the cache for generation, which training never reads."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=self.dtype).to(self.device)
        model.config.use_cache = False
        return model.train()

    def factorized_model(self, adapters: bool = True) -> nn.Module:
        model = self.dense_model()
        acip_kernels.factorize(
            model,
            adapter_rank=RANK if adapters else 0,
            adapter_alpha=ALPHA,
            adapter_dropout=self.dropout,
            dtype=self.dtype,
            svd_cache=data.svd_cache(self.source),
        )
        return model.train()

    def batches(self) -> data.Batches:
        """Batches of the demo's text; of random tokens for another model, whose tokenizer may not exist."""
        from transformers import AutoConfig, AutoTokenizer

        if self.model is None:
            # Twenty articles are more than any run here reads.
            tokens = data.tokenize(AutoTokenizer.from_pretrained(self.source), data.demo_texts()[:20])
        else:
            vocabulary = AutoConfig.from_pretrained(self.source).vocab_size
            tokens = torch.randint(vocabulary, (64 * self.tokens,), generator=torch.Generator().manual_seed(0))
        return data.Batches(tokens, batch_size=self.batch, length=self.length)

    def first_ids(self) -> Tensor:
        return next(iter(self.batches()))["input_ids"].to(self.device)

    def autocast(self):
        """As LoRA is trained in bfloat16: adapters float32, products in bfloat16. Nothing for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


# ---- the variants: `resize(ratio)` puts one at a size, `step(ids)` makes one optimizer step and returns its loss


class Peft:
    """(a), (b): LoRA beside every linear layer of the dense model."""

    def __init__(self, setting: Setting, *, compiled: bool = False, learning_rate: float = LEARNING_RATE):
        from peft import LoraConfig, get_peft_model

        self.setting = setting
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=setting.dropout, target_modules="all-linear")
        model = get_peft_model(setting.dense_model(), lora).train()
        self.forward = torch.compile(model) if compiled else model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)

    def resize(self, ratio: float) -> bool:
        return False

    def step(self, ids: Tensor) -> float:
        with self.setting.autocast():
            loss = self.forward(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class TwoProductsLinear(nn.Module):
    """(c): ACIP's masked layer with a LoRA adapter, as one would write it from the paper."""

    def __init__(self, U, S, Vh, bias, *, dropout: float, mask_scale: float = 0.02):
        super().__init__()
        for name, tensor in (("U", U), ("S", S), ("Vh", Vh), ("bias", bias)):
            self.register_buffer(name, tensor)
        self.mask_scale = mask_scale
        self.mask = nn.Parameter(torch.full_like(S, mask_scale))
        self.register_buffer("scores", self.mask.detach().clone())
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(Vh.shape[1], RANK, bias=False, device=S.device)
        self.lora_B = nn.Linear(RANK, U.shape[0], bias=False, device=S.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        live = (self.mask > 0).to(self.mask.dtype)
        # Straight through: the value is `live`, the gradient for the mask 1/c where it is live.
        beta = live + live * (self.mask - self.mask.detach()) / self.mask_scale
        y = F.linear(F.linear(x, self.Vh) * (self.S * beta), self.U, self.bias)
        return y + self.lora_B(self.lora_A(self.dropout(x))) * (ALPHA / RANK)

    @torch.no_grad()
    def set_live(self, live: Tensor) -> None:
        # Not 0 for what is pruned: AdamW's momentum of an earlier size would bring it back to life.
        self.mask.copy_(torch.where(live, self.mask_scale, -self.mask_scale))
        self.scores.copy_(self.mask)

    @torch.no_grad()
    def update_scores(self) -> Tensor:
        """The new scores, as `acip_kernels.compress.scores`; returns how many singular values are live."""
        pruned = torch.where(self.scores > 0, -torch.ones_like(self.scores), self.scores - 1)
        self.scores = torch.where(self.mask > 0, self.mask, pruned)
        return (self.scores > 0).sum()


class TwoProducts:
    """(c): the whole model with those layers; the scores are updated layer by layer."""

    def __init__(
        self,
        setting: Setting,
        *,
        mask_learning_rate: float = LEARNING_RATE,
        adapter_learning_rate: float = LEARNING_RATE,
    ):
        self.setting, self.model = setting, setting.factorized_model().requires_grad_(False)
        self.layers = []
        for name, layer in svd_layers(self.model).items():
            plain = TwoProductsLinear(layer.U, layer.S, layer.Vh, layer.bias, dropout=setting.dropout)
            self.model.set_submodule(name, plain)
            self.layers.append(plain)
        self.shapes = [(layer.U.shape[0], layer.Vh.shape[1]) for layer in self.layers]
        adapters = [adapter.weight for layer in self.layers for adapter in (layer.lora_A, layer.lora_B)]
        groups = [
            {"params": [layer.mask for layer in self.layers], "lr": mask_learning_rate},
            {"params": adapters, "lr": adapter_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.size_ratio = 1.0

    def resize(self, ratio: float) -> bool:
        for layer, shape in zip(self.layers, self.shapes):
            layer.set_live(live_at(ratio, *shape).to(layer.mask.device))
        return False

    def step(self, ids: Tensor, penalty: float = PENALTY) -> float:
        with self.setting.autocast():
            loss = self.model(input_ids=ids, labels=ids).loss
        penalized = loss + penalty * torch.stack([layer.mask.relu().sum() for layer in self.layers]).sum()
        penalized.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # A run has to know after every step whether it has arrived at its size.
        ranks = torch.stack([layer.update_scores() for layer in self.layers]).tolist()
        self.size_ratio = stored_ratio(ranks, self.shapes)
        return loss.item()


class Ours:
    """(d): this package's training step."""

    def __init__(self, setting: Setting):
        self.model = setting.factorized_model()
        self.layers = list(svd_layers(self.model).values())
        self.config = CompressionConfig(adapter_dropout=setting.dropout, dtype=name_of(setting.dtype))
        self.engine = None
        self.resize(1.0)

    @torch.no_grad()
    def resize(self, ratio: float) -> bool:
        # Imported here so that the other variants can be measured beside any version of the package.
        from acip_kernels.compress.step import TrainingStep

        if self.engine is not None:
            self.engine.finish()
        self.ranks = 0
        for layer in self.layers:
            live = live_at(ratio, layer.out_features, layer.in_features).to(layer.mask.device)
            layer.set_live(live)
            layer.uncompact()  # what is left out, and in what layout, is for the step to choose
            self.ranks += int(live.sum())
        # A new one for each size: it knows the masks from its start, and has no momentum that would bring what is
        # pruned back to life.
        self.engine = TrainingStep(self.model, self.config)
        self.engine.compact(everything=True)
        return True

    def step(self, ids: Tensor) -> float:
        self.result = self.engine([{"input_ids": ids}], penalty=PENALTY)
        return self.result.loss

    def check_size(self) -> None:
        """After a step: the ranks are still those that `resize` left. Raises `RuntimeError` if not."""
        ranks = int(torch.as_tensor(self.result.ranks).sum())
        if ranks != self.ranks:
            raise RuntimeError(f"ours: {ranks} live singular values after a step at a size of {self.ranks}")


class Nested:
    """The default run's step: the best ranks of a size, the dense model as a teacher, updates of both factors."""

    def __init__(self, setting: Setting, *, learning_rate: float = LEARNING_RATE):
        from acip_kernels import NestedConfig
        from acip_kernels.compress.nested import NestedTraining
        from acip_kernels.compress.sizing import Sizing

        model = setting.factorized_model(adapters=False)
        for layer in svd_layers(model).values():
            # Whatever the size, every layer has that part of its numbers.
            out, in_ = layer.out_features, layer.in_features
            ranks = torch.arange(1, min(out, in_) + 1)
            layer.scores.copy_(1 - ranks * (out + in_ - ranks) / (2 * out * in_))
        config = NestedConfig(dtype=name_of(setting.dtype), update_rank=RANK)
        sizing = Sizing.of(model, adapters=False, forms=config.forms)
        self.training, self.rate = NestedTraining(model, sizing, config), learning_rate
        self.ratio = 1.0

    def resize(self, ratio: float) -> bool:
        self.ratio = ratio
        return True

    def step(self, ids: Tensor, ratio: float | None = None) -> float:
        return self.training([{"input_ids": ids}], [self.ratio if ratio is None else ratio], self.rate)[0]


def build(name: str, setting: Setting):
    """The variant of that name."""
    if name == "ours":
        return Ours(setting)
    if name == "nested":
        return Nested(setting)
    if name == "two products":
        return TwoProducts(setting)
    return Peft(setting, compiled=name == "peft compiled")


def rank_at(ratio: float, out: int, in_: int) -> int:
    """The rank at which two factors hold `ratio` of a layer's weights; all ranks at 1."""
    return min(out, in_) if ratio >= 1 else max(1, math.floor(ratio * out * in_ / (out + in_)))


def live_at(ratio: float, out: int, in_: int) -> Tensor:
    """Which singular values are live at `ratio`: the first ones, bool [k]."""
    return torch.arange(min(out, in_)) < rank_at(ratio, out, in_)


def pivoted_rank_at(ratio: float, out: int, in_: int) -> int:
    """The largest rank that the pivoted form of `ratio` of a layer's weights has: `rank (out + in - rank)` numbers."""
    sides = out + in_
    return max(1, math.floor((sides - math.sqrt(max(0.0, sides * sides - 4 * ratio * out * in_))) / 2))


def stored_ratio(ranks, shapes) -> float:
    """The size ratio of the factorized layers without adapters, as `Sizing` counts it."""
    stored = sum(min(rank * (out + in_), out * in_) for rank, (out, in_) in zip(ranks, shapes))
    return stored / sum(out * in_ for out, in_ in shapes)


# ---- counted operations; a product of [m, k] and [k, n] is 2·m·k·n


def dense_flops(tokens: int, out: int, in_: int) -> int:
    """A frozen weight: y = x Wᵀ and dx = g W. The first block's three that need no dx are counted all the same."""
    return 4 * tokens * out * in_


def factors_flops(tokens: int, rank: int, out: int, in_: int) -> int:
    """Two frozen factors: z = x Vhᵀ and y = z Uᵀ, h = g U and dx = h Vh; the mask's gradient comes from z and h."""
    return 4 * tokens * rank * (out + in_)


def effective_flops(tokens: int, rank: int, out: int, in_: int) -> int:
    """The same through its dense matrix W = U diag(S β) Vh: y = x Wᵀ, dx = g W and M = gᵀ x; then the mask's gradient
    from Uᵀ M and Vh, which the number of tokens does not enter.
    """
    return 6 * tokens * out * in_ + 2 * rank * out * in_


def adapter_flops(tokens: int, out: int, in_: int) -> int:
    """A trained adapter: two products forward, two for dx, and one each for dA and dB."""
    return 6 * tokens * RANK * (out + in_)


def nested_flops(tokens: int, rank: int, out: int, in_: int) -> int:
    """The teacher's product; both factors' y and dx, or a dense weight made of them and its; and the updates of rank r
    of both, whose gradients pass through r dimensions on either side.
    """
    teacher, updates = 2 * tokens * out * in_, 8 * tokens * RANK * (out + in_)
    made = 2 * out * in_ * (2 * tokens + rank)
    return teacher + min(factors_flops(tokens, rank, out, in_), made) + updates


def head_flops(tokens: int, vocabulary: int, hidden: int) -> int:
    """The frozen output head: logits, and dx."""
    return 4 * tokens * vocabulary * hidden


def attention_flops(batch: int, length: int, width: int) -> int:
    """One layer's causal attention, `width` over all heads: two products forward, five backward (the scores are made
    again rather than kept), each over half of the square.
    """
    return 7 * batch * length * length * width


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A model's sizes. linear: [out, in] of every linear layer but the head; attention: width of every attention."""

    linear: tuple[tuple[int, int], ...]
    vocabulary: int
    hidden: int
    attention: tuple[int, ...]

    @classmethod
    def of(cls, setting: Setting) -> Shapes:
        from transformers import AutoConfig, AutoModelForCausalLM

        from acip_kernels.models.targets import linear_layers, weight_of

        config = AutoConfig.from_pretrained(setting.source)
        with torch.device("meta"):
            layers, _ = linear_layers(AutoModelForCausalLM.from_config(config))
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(
            tuple(tuple(weight_of(layer).shape) for layer in layers.values()),
            config.vocab_size,
            config.hidden_size,
            (width,) * config.num_hidden_layers,
        )

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """The different [out, in] that the model multiplies by, the head's included."""
        return tuple(dict.fromkeys((*self.linear, (self.vocabulary, self.hidden))))

    @property
    def terms(self) -> int:
        """How many terms the sums have that lie one behind the other on the way to a logit, two factors a layer."""
        return sum(in_ + min(out, in_) for out, in_ in self.linear) + self.hidden

    def step_flops(self, variant: str, ratio: float, batch: int, length: int) -> int:
        tokens = batch * length
        total = head_flops(tokens, self.vocabulary, self.hidden)
        total += sum(attention_flops(batch, length, width) for width in self.attention)
        if variant == "nested":  # the teacher's forward pass
            total += head_flops(tokens, self.vocabulary, self.hidden) // 2
            total += sum(attention_flops(batch, length, width) * 2 // 7 for width in self.attention)
        return total + sum(layer_flops(variant, ratio, tokens, out, in_) for out, in_ in self.linear)


def layer_flops(variant: str, ratio: float, tokens: int, out: int, in_: int) -> int:
    """One linear layer with its adapter, forward and backward."""
    if variant == "nested":
        return nested_flops(tokens, pivoted_rank_at(ratio, out, in_), out, in_)
    if variant.startswith("peft"):
        product = dense_flops(tokens, out, in_)
    elif variant == "two products":
        product = factors_flops(tokens, min(out, in_), out, in_)  # it multiplies by the pruned ranks too
    else:
        # Both ways give the same, so the cheaper one is the floor, whichever way is taken.
        rank = rank_at(ratio, out, in_)
        product = min(factors_flops(tokens, rank, out, in_), effective_flops(tokens, rank, out, in_))
    return product + adapter_flops(tokens, out, in_)


# ---- measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action, device: torch.device) -> float:
    """How long `action()` takes, the device's queue included."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class MatmulRate:
    """The machine's rate of matrix products of `tokens` rows at the [out, in] of `shapes`, in floating point operations
    a second.

    It is measured in the same rounds as what is compared with it, as other users of a machine come and go.
    """

    def __init__(self, shapes, tokens: int, dtype: torch.dtype, device: torch.device):
        self.device, self.tokens = device, tokens
        self.factors = {
            (out, in_): (
                torch.randn(tokens, in_, device=device).to(dtype),
                torch.randn(out, in_, device=device).to(dtype),
            )
            for out, in_ in shapes
        }
        self.seconds = {shape: [] for shape in self.factors}
        self.measure(record=False)

    def measure(self, *, repeats: int = 3, record: bool = True) -> None:
        for shape, (x, weight) in self.factors.items():
            for _ in range(repeats):
                taken = seconds(lambda x=x, weight=weight: torch.mm(x, weight.t()), self.device)
                if record:
                    self.seconds[shape].append(taken)

    @property
    def by_shape(self) -> dict[tuple[int, int], float]:
        return {
            (out, in_): 2 * self.tokens * out * in_ / statistics.median(taken)
            for (out, in_), taken in self.seconds.items()
        }

    @property
    def median(self) -> float:
        return statistics.median(self.by_shape.values())

    def to_json(self) -> dict:
        return {f"{out}x{in_}": rate for (out, in_), rate in self.by_shape.items()}


def measured(times: list[float], base: list[float] | None, flops: int, rate: float) -> dict:
    """A row's numbers. base: the times of "peft" in the same rounds, which every round is compared with."""
    floor = flops / rate
    return {
        "flops": flops,
        "floor_seconds": floor,
        "seconds": spread(times),
        "to_peft": None if base is None else spread([own / other for own, other in zip(times, base)]),
        "share_of_floor": floor / statistics.median(times),
    }


# ---- one step


def bench_steps(setting: Setting, variants, ratios, two_products_ratios, rounds: int, say) -> dict:
    """Every variant at every size, in turns: `{"rows", "matmul_flops_per_s", …}`, `rows` without memory."""
    shapes, ids = Shapes.of(setting), setting.first_ids()
    built, losses, skipped = {}, {}, {}
    for name in variants:
        say(f"building {name}")
        try:
            built[name] = build(name, setting)
            built[name].resize(1.0)
            loss = built[name].step(ids)
            if name != "nested":  # whose loss is half the teacher's
                losses[name] = loss
            built[name].step(ids)  # the second one finds every buffer and every state of the optimizer in place
        except Exception as error:
            # Whether torch.compile works here is a finding; in anything else an error is one.
            if name != "peft compiled":
                raise
            skipped[name] = first_line(error)
            say(f"{name} is left out: {skipped[name]}")
            built.pop(name, None)
    bound = check_losses(losses, shapes, setting.dtype)

    cases = cases_of(built, ratios, two_products_ratios)
    times = {case: [] for case in cases}
    rate = MatmulRate(shapes.products, setting.tokens, setting.dtype, setting.device)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        rate.measure()
        for name, ratio in cases:
            variant = built[name]
            if variant.resize(ratio):
                variant.step(ids)  # untimed: the first step at a size makes its buffers
                if setting.device.type == "cuda":
                    variant.step(ids)  # and the second one captures a CUDA graph
            times[name, ratio].append(seconds(lambda v=variant: v.step(ids), setting.device))
            if name == "ours":
                variant.check_size()
    torch.compiler.reset()  # it holds on to the model that it compiled
    rows = []
    for name, ratio in cases:
        flops = shapes.step_flops(name, ratio, setting.batch, setting.length)
        numbers = measured(times[name, ratio], times.get(("peft", 1.0)), flops, rate.median)
        rows.append({"variant": name, "ratio": ratio, **numbers})
    return {
        "rows": rows,
        "matmul_flops_per_s": rate.median,
        "matmul_flops_per_s_by_shape": rate.to_json(),
        "first_losses": losses,
        "loss_bound": bound,
        "skipped": skipped,
    }


def cases_of(names, ratios, two_products_ratios) -> list[tuple[str, float]]:
    """The pairs of variant and size to measure."""
    sizes = {"ours": ratios, "nested": ratios, "two products": two_products_ratios}
    return [(name, ratio) for name in names for ratio in sizes.get(name, (1.0,))]


def check_losses(losses: dict[str, float], shapes: Shapes, dtype: torch.dtype) -> float:
    """The first step's losses, at full size, must be those of one and the same function; returns the bound.

    Dropout does not matter to them: it is on the adapters' input alone, and their second factor starts at zero.
    The bound is relative: sums in float32 (whatever the dtype, products are summed in that) whose errors add up like a
    random walk, and a rounding to `dtype` of three results a layer. Raises `RuntimeError` if it is exceeded.
    """
    summed = torch.finfo(torch.float32).eps * math.sqrt(shapes.terms)
    rounded = torch.finfo(dtype).eps / 2 * math.sqrt(3 * len(shapes.linear))
    bound = (summed + rounded) * max(map(abs, losses.values()), default=0.0)
    values = list(losses.values())
    if not all(map(math.isfinite, values)) or (values and max(values) - min(values) > bound):
        raise RuntimeError(f"the variants compute different losses (allowed: {bound:.2e} apart): {losses}")
    return bound


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# ---- memory


def measure_memory(setting: Setting, name: str, ratio: float) -> dict:
    """In a process of its own: the peak after three steps, of everything in the process, its libraries (and for
    "peft compiled" the compiler) included.
    """
    variant, ids = build(name, setting), setting.first_ids()
    variant.resize(ratio)
    built = peak_bytes(setting.device)
    for _ in range(MEMORY_STEPS):
        variant.step(ids)
    # `built` tells whether the peak is of the steps or of what came before them.
    return {"peak_bytes": peak_bytes(setting.device), "built_bytes": built}


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the device's allocations, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # VmHWM is this program's own; ru_maxrss begins with the peak of the process that started it.
    status = pathlib.Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bench_memory(setting: Setting, cases, say) -> dict:
    """`{(variant, ratio): what measure_memory says, or {"failed": reason}}`, one process after the other."""
    found = {}
    for name, ratio in cases:
        say(f"memory of {name} at {ratio}")
        command = [sys.executable, "-m", "bench.training_step", "--memory-of", f"{name}@{ratio}"]
        command += ["--device", str(setting.device), "--dtype", name_of(setting.dtype)]
        command += ["--dropout", str(setting.dropout), "--batch", str(setting.batch), "--length", str(setting.length)]
        command += ["--model", setting.model] if setting.model else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            if name != "peft compiled":
                raise RuntimeError(f"memory of {name} at {ratio}: {reason}\n{done.stderr}")
            found[name, ratio] = {"failed": reason}
        else:
            found[name, ratio] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# ---- a whole run


def bench_run(setting: Setting, steps: int, say) -> dict:
    """`steps` optimizer steps of "peft", "two products" and "ours", the latter two from full size to 0.4, and of
    "nested", at sizes drawn from 0.3 to 1 as the default run draws them.

    Ours is `compress` itself, its seconds those of its history; after each of its steps the others make theirs on
    the same tokens, so that all see the same machine. Factorizing and ranking are not timed. The masks that the
    schedule has not driven to zero by the last step are cut there by ours alone: they cost "two products" nothing
    either way.
    """
    config = CompressionConfig.short(
        steps,
        0.4,
        adapter_rank=RANK,
        adapter_alpha=ALPHA,
        adapter_dropout=setting.dropout,
        tune_steps=0,
        dtype=name_of(setting.dtype),
    )
    say("building the run's models")
    peft = Peft(setting, learning_rate=config.adapter_learning_rate)
    plain = TwoProducts(
        setting,
        mask_learning_rate=config.mask_learning_rate,
        adapter_learning_rate=config.adapter_learning_rate,
    )
    nested, random = Nested(setting), torch.Generator().manual_seed(0)
    batches = setting.batches()
    feed = iter(batches)
    rows = []

    def others(row: dict) -> None:
        ids, penalty = next(feed)["input_ids"].to(setting.device), config.lambda_at(row["step"])
        size = nested.training.nearest(0.3 + 0.7 * float(torch.rand((), generator=random)))
        taken = {
            "peft": seconds(lambda: peft.step(ids), setting.device),
            "two products": seconds(lambda: plain.step(ids, penalty), setting.device),
            "nested": seconds(lambda: nested.step(ids, size), setting.device),
        }
        ratios = {"ours": row["size_ratio"], "two products": plain.size_ratio}
        rows.append({"step": row["step"], "seconds": taken, "size_ratio": ratios})
        say(f"run: step {row['step'] + 1} of {steps}")

    history = acip_kernels.compress(setting.factorized_model(), batches, config, progress=False, on_step=others).history
    for row, before, after in zip(rows, [0.0, *(own["seconds"] for own in history)], history):
        row["seconds"]["ours"] = after["seconds"] - before
    total = {name: sum(row["seconds"][name] for row in rows) for name in ("peft", "two products", "ours", "nested")}
    return {"steps": len(rows), "total_seconds": total, "rows": rows}


# ---- one layer


class PeftLinear(nn.Module):
    """A frozen linear layer with a LoRA adapter."""

    def __init__(self, weight: Tensor, dropout: float):
        super().__init__()
        self.register_buffer("weight", weight)
        out, in_ = weight.shape
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(in_, RANK, bias=False, device=weight.device)
        self.lora_B = nn.Linear(RANK, out, bias=False, device=weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.lora_B(self.lora_A(self.dropout(x))) * (ALPHA / RANK)


def bench_layers(
    device, dropout: float, tokens: int, rounds: int, ratios, two_products_ratios, dtypes, say, layers=LLAMA_8B_LAYERS
) -> list[dict]:
    """Forward and backward of one layer of each [out, in] of `layers`: a row for every variant, size and dtype.

    Ours is `SVDLinear` by itself, compacted and with its adapter beside the factors as a run has it; the dense matrix
    is a choice of the training step. On a GPU each is also captured as a CUDA graph, whose replays take what the GPU
    takes ("graph"): for a single layer, called from Python, the GPU may have to wait.
    """
    rows = []
    for dtype, (out, in_) in itertools.product(dtypes, layers):
        say(f"layer {out} × {in_}, {name_of(dtype)}")
        rows += _bench_layer(device, dropout, tokens, rounds, ratios, two_products_ratios, dtype, out, in_)
        gc.collect()
    return rows


def _bench_layer(device, dropout, tokens, rounds, ratios, two_products_ratios, dtype, out, in_) -> list[dict]:
    # Imported here, as in `Ours`.
    from acip_kernels.compress.step import filled_up, rank_multiple
    from acip_kernels.ops.dropout import StaticSeeds

    k = min(out, in_)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, device=device) * scale).to(dtype)

    # Random factors of the right shapes: what they are does not change what they cost.
    U, Vh = normal(out, k, out**-0.5), normal(k, in_, in_**-0.5)
    S = torch.linspace(1.0, 0.01, k, device=device)
    x, gradient = normal(tokens, in_, 1.0).requires_grad_(), normal(tokens, out, 1.0)
    cases = {("peft", 1.0): PeftLinear(normal(out, in_, in_**-0.5), dropout)}
    plain = TwoProductsLinear(U, S, Vh, None, dropout=dropout)
    cases |= {("two products", ratio): plain for ratio in two_products_ratios}
    # One for every size, so that no size pays for changing to it; they share the full factors.
    for ratio in ratios:
        layer = SVDLinear(U, S, Vh, adapter_rank=RANK, adapter_alpha=ALPHA, adapter_dropout=dropout)
        layer.set_live(live_at(ratio, out, in_).to(device))
        multiple = rank_multiple(dtype)
        layer.compact(filled_up(layer.live, min(-(-rank_at(ratio, out, in_) // multiple) * multiple, k)), join=True)
        cases["ours", ratio] = layer.train()

    def forward_and_backward(layer: nn.Module, autocast: bool) -> None:
        with torch.autocast(device.type, dtype, enabled=autocast and dtype != torch.float32):
            y = layer(x)
        y.backward(gradient)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    def timed(name: str, ratio: float) -> float:
        layer = cases[name, ratio]
        if name == "two products":
            layer.set_live(live_at(ratio, out, in_).to(device))
        return seconds(lambda: forward_and_backward(layer, autocast=name != "ours"), device)

    def captured(name: str, ratio: float) -> Callable[[], object]:
        layer = cases[name, ratio]
        if name == "two products":
            layer.set_live(live_at(ratio, out, in_).to(device))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward_and_backward(layer, autocast=name != "ours")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with StaticSeeds(device, 1), torch.cuda.graph(graph):
            forward_and_backward(layer, autocast=name != "ours")
        return graph.replay

    rate = MatmulRate([(out, in_)], tokens, dtype, device)
    times, in_graphs = {case: [] for case in cases}, {case: [] for case in cases}
    for case in cases:
        timed(*case)
    for _ in range(rounds):
        rate.measure()
        for case in cases:
            times[case].append(timed(*case))
    if device.type == "cuda":
        replays = {case: captured(*case) for case in cases}
        for number in range(rounds + 1):
            for case, replay in replays.items():
                taken = seconds(replay, device)
                if number:  # the first one is longer
                    in_graphs[case].append(taken)
        del replays
    rows = []
    for (name, ratio), taken in times.items():
        flops = layer_flops(name, ratio, tokens, out, in_)
        numbers = measured(taken, times["peft", 1.0], flops, rate.median)
        place = {"out": out, "in": in_, "dtype": name_of(dtype), "tokens": tokens}
        row = {**place, "variant": name, "ratio": ratio, **numbers, "matmul_flops_per_s": rate.median}
        if in_graphs[name, ratio]:
            row["graph"] = measured(in_graphs[name, ratio], in_graphs["peft", 1.0], flops, rate.median)
        rows.append(row)
    return rows


# ---- what people read


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table, padded; its first `left` columns are text."""
    widths = [max(len(line[column]) for line in [head, *rows]) for column in range(len(head))]
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]

    def line(cells):
        return [c.ljust(w) if column < left else c.rjust(w) for column, (c, w) in enumerate(zip(cells, widths))]

    return "".join(f"| {' | '.join(cells)} |\n" for cells in (line(head), rule, *map(line, rows)))


def _numbers(row: dict) -> list[str]:
    """The cells that a step and a layer have in common."""
    taken, to_peft = row["seconds"], row["to_peft"]
    return [
        f"{row['flops'] / 1e9:,.0f}",
        _milliseconds(row["floor_seconds"]),
        _milliseconds(taken["median"]),
        "–" if to_peft is None else f"{to_peft['median']:.2f}",
        f"{100 * row['share_of_floor']:.0f} %",
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds >= 0.01 else f"{1e3 * seconds:.2f}"


_HEAD = ["GFLOP", "floor ms", "ms", "to peft", "floor share"]


def steps_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        memory = row.get("memory", {}).get("peak_bytes")
        size = f"{100 * row['ratio']:.0f} %"
        lines.append([row["variant"], size, *_numbers(row), "–" if memory is None else f"{memory / 1e9:.2f}"])
    return markdown(["step", "live size", *_HEAD, "peak GB"], lines)


def layers_table(rows: list[dict]) -> str:
    graphs = any("graph" in row for row in rows)
    lines = []
    for row in rows:
        line = [
            f"{row['out']} × {row['in']}",
            row["dtype"],
            row["variant"],
            f"{100 * row['ratio']:.0f} %",
            *_numbers(row),
        ]
        if graphs:
            _, _, taken, to_peft, share = _numbers(row | row["graph"])
            line += [f"{taken} ({to_peft})", share]
        lines.append(line)
    head = ["layer", "dtype", "variant", "live size", *_HEAD]
    return markdown(head + ["graph ms (to peft)", "floor share"] * graphs, lines, left=3)


def run_table(run: dict) -> str:
    total = run["total_seconds"]
    lines = []
    for name, taken in total.items():
        last = run["rows"][-1]["size_ratio"].get(name)
        size = "–" if last is None else f"{100 * last:.1f} %"
        lines.append([name, f"{taken:.1f}", f"{taken / total['peft']:.2f}", size])
    return markdown([f"{run['steps']} steps", "s", "to peft", "last size"], lines)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def result_path(device_name: str, dtype: torch.dtype) -> pathlib.Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return ROOT / "bench" / "results" / f"training_step-{slug}-{name_of(dtype)}.json"


# ---- the command line


def listed(values) -> str:
    return ", ".join(map(str, values))


def main(
    variant: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this one's steps and memory (repeatable): {listed(VARIANTS)}. All if not given."),
    ] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help=f"Live size of ours (repeatable). Default: {listed(RATIOS)}.")
    ] = None,
    two_products_ratio: Annotated[
        list[float] | None,
        typer.Option(help=f"Live size of “two products” (repeatable). Default: {listed(TWO_PRODUCTS_RATIOS)}."),
    ] = None,
    steps: Annotated[bool, typer.Option(help="Time single steps.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the single steps; medians are shown.")] = 5,
    compile_peft: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure “peft compiled” too.")] = True,
    memory: Annotated[
        bool, typer.Option(help="Peak memory of every variant and size, each in a process of its own.")
    ] = True,
    run_steps: Annotated[int, typer.Option(min=0, help="Steps of a whole run from 1.0 to 0.4; 0 for none.")] = 16,
    layers: Annotated[bool, typer.Option(help="Time single layers of Llama-3.1-8B's shapes.")] = True,
    layer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the single layers' input.")] = 512,
    layer_rounds: Annotated[int, typer.Option(min=1, help="Rounds of the single layers.")] = 3,
    layer_dtype: Annotated[
        list[str] | None,
        typer.Option(help="Of the single layers (repeatable). Default: float32, bfloat16."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 512,
    dropout: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Dropout on the adapters' input, in every variant.")
    ] = 0.05,
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 where the device is fast at it), bfloat16, float32.")] = (
        "auto"
    ),
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 …")] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="Directory of another model than SmolLM2-135M, which then gets random tokens."),
    ] = None,
    output: Annotated[
        pathlib.Path | None,
        typer.Option(help="JSON file of the result. Default: bench/results/training_step-<device>-<dtype>.json."),
    ] = None,
    memory_of: Annotated[str | None, typer.Option(hidden=True, help="variant@ratio, for the processes.")] = None,
):
    """What a training step costs: LoRA on the dense model, ACIP written plainly, and this package at several sizes.

    Example: python -m bench.training_step --no-layers --run-steps 0 --rounds 3
    """
    from transformers.utils import logging as transformers_logging

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    names = tuple(variant or VARIANTS)
    if unknown := set(names) - set(VARIANTS):
        raise typer.BadParameter(f"variant must be one of {', '.join(VARIANTS)}, got {', '.join(sorted(unknown))}")
    for name in (dtype, *(layer_dtype or ())):
        if name not in ("auto", "bfloat16", "float32"):
            # float16 would need a scaler of the loss, which is another step.
            raise typer.BadParameter(f"dtype must be auto, bfloat16 or float32, got {name}")
    names = tuple(name for name in VARIANTS if name in names and (compile_peft or name != "peft compiled"))
    ratios = tuple(ratio or RATIOS)
    plain_ratios = tuple(two_products_ratio or TWO_PRODUCTS_RATIOS)
    setting = Setting(model, where, compute_dtype(dtype, where), dropout, batch, length)
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    if memory_of is not None:
        name, _, size = memory_of.rpartition("@")
        print(json.dumps(measure_memory(setting, name, float(size))))
        return

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    about = report.device_description(where)
    summary = {
        "device": about | {"dtype": name_of(setting.dtype), "peft": importlib.metadata.version("peft")},
        "setting": {
            "model": pathlib.Path(setting.source).name,
            "batch": batch,
            "length": length,
            "dropout": dropout,
            "adapter_rank": RANK,
            "adapter_alpha": ALPHA,
            "rounds": rounds,
        },
    }
    target = output or result_path(about["device"], setting.dtype)

    def keep() -> None:
        # After every part: a run that is stopped leaves what it has measured.
        files.write_text(target, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    peaks = bench_memory(setting, cases_of(names, ratios, plain_ratios), say) if memory else {}
    if steps:
        summary |= bench_steps(setting, names, ratios, plain_ratios, rounds, say)
        for row in summary["rows"]:
            row["memory"] = peaks.get((row["variant"], row["ratio"]), {})
        keep()
        print(steps_table(summary["rows"]), flush=True)
        print(f"matrix products: {summary['matmul_flops_per_s'] / 1e9:,.1f} GFLOP/s in {name_of(setting.dtype)}\n")
        # The models refer to themselves; they shall not be in the way of the next ones.
        gc.collect()
    elif memory:
        summary["memory"] = [{"variant": name, "ratio": size, **peak} for (name, size), peak in peaks.items()]
        keep()
        for row in summary["memory"]:
            print(f"{row['variant']} at {row['ratio']}: {row.get('peak_bytes', 0) / 1e9:.2f} GB")
    if run_steps:
        summary["run"] = bench_run(setting, run_steps, say)
        keep()
        print(run_table(summary["run"]), flush=True)
        gc.collect()
    if layers:
        dtypes = [compute_dtype(name, where) for name in layer_dtype or ("float32", "bfloat16")]
        summary["layers"] = bench_layers(where, dropout, layer_tokens, layer_rounds, ratios, plain_ratios, dtypes, say)
        keep()
        print(layers_table(summary["layers"]), flush=True)
    say(f"written: {target}")


if __name__ == "__main__":
    typer.run(main)
