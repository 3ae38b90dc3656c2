"""How fast a whole model decodes: `python -m bench.generate`, on a GPU with `--device cuda`; see `--help`.

Greedy decoding of a SmolLM2-135M and of a model of a 1B-class llama's shape, by transformers' own `generate` and by
this package's compiled loop (`acip_kernels.generation`), dense and at several sizes:

- "dense"; "dense, fused": its layers on this package's kernels; "two F.linear": factors as one writes them in PyTorch;
- "ours": `LowRankLinear`; "ours, fused": after `acip_kernels.fuse`; the same with int8 and int4 factors, and
  with an embedding and output head in int8.

What the weights are does not change what they cost, so this is about speed alone: factors are random numbers, of the
rank that the size gives every layer alike, and all variants of a model share its embedding, head and norms. What
compression does to a model's quality is measured by `bench.quality`.

On a GPU it is a model of Llama-3.1-8B's shape, of random weights unless `--checkpoint` names one, and three loops:
stock `generate`; the same with a static cache, which transformers compiles (`torch.compile(mode="reduce-overhead")`);
and one step of a static cache captured as a CUDA graph. Layers take our Triton kernels where `acip tune` has found them
to be faster on this GPU; where it has not been run, everywhere, and the result says so. A case that fails is written
down.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import acip_kernels
from acip_kernels import LowRankLinear, data, files, report
from acip_kernels.generation import Decoder, cache_name
from acip_kernels.models.fuse import is_fused
from acip_kernels.models.quantizer import put_embeddings
from acip_kernels.models.targets import linear_layers
from acip_kernels.ops import extension
from acip_kernels.ops.fused_linear import measured
from acip_kernels.ops.quantize import Scheme

from . import decode_cpu
from .decode_cpu import quantized, rank_at
from .training_step import ROOT, markdown, peak_bytes

SMOL, LLAMA = "SmolLM2-135M", "Llama-3.2-1B's shape, random weights"
LLAMA_8B = "Llama-3.1-8B's shape, random weights"
MODELS = {"smol": SMOL, "llama": LLAMA, "llama8b": LLAMA_8B}
RATIOS = (0.8, 0.6, 0.4)
GENERATE, COMPILED = "generate", "compiled loop"
DENSE, DENSE_FUSED, TWO = "dense", "dense, fused", "two F.linear"
OURS, FUSED, INT8, INT4 = "ours", "ours, fused", "ours, fused, int8", "ours, fused, int4"
INT4_ALL = "ours, fused, int4, embeddings int8"
STATIC, GRAPH = "generate, static cache", "CUDA graph"
PROMPT, NEW_TOKENS = 16, 64
# Compiling takes most of the time here: these are compiled at every size, the others at the smallest alone.
COMPILED_EVERYWHERE = (FUSED, INT4)


# ---- models


def smol() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(data.demo_model(), dtype=torch.bfloat16)


def llama(device="cpu", **changes) -> nn.Module:
    """The shape of Llama-3.2-1B, or of another llama by what is changed of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "dtype": torch.bfloat16,
    }
    config = LlamaConfig(**sizes | changes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(config.dtype).to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    model.tie_weights()
    # to_empty has left the rotations' frequencies, which are in no file, as they were.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


EIGHT_B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
BUILDERS = {SMOL: smol, LLAMA: llama, LLAMA_8B: lambda device="cpu": llama(device, **EIGHT_B)}


class TwoLinear(nn.Module):
    """A layer of two factors as one writes it in PyTorch."""

    def __init__(self, layer: LowRankLinear):
        super().__init__()
        self.Vh, self.U = layer.Vh, layer.U

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.Vh.weight), self.U.weight)


def shared_copy(model: nn.Module) -> nn.Module:
    """Another model of the same parameters."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def with_layers(model: nn.Module, make: Callable[[str], nn.Module]) -> nn.Module:
    """A copy of `model` with other linear layers, by name, that shares the rest with it."""
    other = shared_copy(model)
    for name in linear_layers(model)[0]:
        other.set_submodule(name, make(name))
    return other


def variants_at(model: nn.Module, ratio: float) -> dict[str, nn.Module]:
    """The factorized variants of one size; all but the quantized ones share their factors."""

    def factors(out: int, in_: int) -> LowRankLinear:
        rank = rank_at(ratio, out, in_)
        layer = LowRankLinear(in_, out, rank, bias=False, device=model.device, dtype=model.dtype)
        return layer.requires_grad_(False)

    layers = {name: factors(*layer.weight.shape) for name, layer in linear_layers(model)[0].items()}
    found = {
        TWO: with_layers(model, lambda name: TwoLinear(layers[name])),
        OURS: with_layers(model, lambda name: layers[name]),
    }
    if extension.available() or model.device.type == "cuda":
        found[FUSED] = acip_kernels.fuse(with_layers(model, lambda name: shared_copy(layers[name])))
        for variant, kind in ((INT8, "int8"), (INT4, "int4")):
            found[variant] = acip_kernels.fuse(
                with_layers(model, lambda name, kind=kind: quantized(shared_copy(layers[name]), kind))
            )
        everything = with_layers(model, lambda name: quantized(shared_copy(layers[name]), "int4"))
        put_embeddings(everything, Scheme("int8"))
        found[INT4_ALL] = acip_kernels.fuse(everything)
    return found


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def stored_bytes(model: nn.Module) -> int:
    """Bytes that a token reads: all weights, but of an embedding that is not the head's too."""
    tensors = {id(tensor): tensor for tensor in tensors_of(model) if tensor.numel()}
    of_head = {id(tensor) for tensor in tensors_of(model.get_output_embeddings())}
    for tensor in tensors_of(model.get_input_embeddings()):
        if id(tensor) not in of_head:
            tensors.pop(id(tensor), None)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# ---- loops


@dataclasses.dataclass
class Case:
    """One variant in one loop. decode: `decode(prompt, new_tokens)`, which returns all tokens."""

    variant: str
    ratio: float | None
    loop: str
    bytes: int
    decode: Callable[[Tensor, int], Tensor]
    fused: bool
    compile_seconds: float | None = None
    rates: list[float] = dataclasses.field(default_factory=list)

    def run(self, prompt: Tensor, tokens: int) -> float:
        """Tokens a second, the prompt read included, as a user sees it."""
        started = time.perf_counter()
        found = self.decode(prompt, tokens)
        taken = time.perf_counter() - started
        if found.shape[1] != prompt.shape[1] + tokens:
            raise RuntimeError(f"{self.variant}, {self.loop}: {found.shape[1] - prompt.shape[1]} tokens, not {tokens}")
        return tokens / taken


def loops_of(variant: str, ratio: float, ratios, loops, every: bool) -> list[str]:
    """Which loops a variant of one size runs in. Compiled and not fused, ours differs from fused by a call or two."""
    everywhere = every or variant in COMPILED_EVERYWHERE
    compiled = everywhere or (ratio == min(ratios) and variant != OURS)
    return [loop for loop in loops if loop != COMPILED or compiled]


def cases_of(model: nn.Module, variant: str, ratio: float | None, loops, length: int) -> list[Case]:
    model.eval()
    model.generation_config.eos_token_id = None  # every run decodes as many tokens

    def stock(prompt: Tensor, tokens: int) -> Tensor:
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)

    ways = {GENERATE: stock, COMPILED: Decoder(model, length)}
    size = stored_bytes(model)
    return [Case(variant, ratio, loop, size, ways[loop], is_fused(model)) for loop in loops]


def measure(cases: list[Case], prompt: Tensor, tokens: int, rounds: int, say) -> None:
    """All cases in turns; each has decoded a few tokens before, and so is compiled."""
    for case in cases:
        started = time.perf_counter()
        case.run(prompt, 3)
        if case.loop == COMPILED and case.compile_seconds is None:
            case.compile_seconds = time.perf_counter() - started
            say(f"compiled {label(case.variant, case.ratio)} in {case.compile_seconds:.0f} s")
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
            case.rates.append(case.run(prompt, tokens))


def label(variant: str, ratio: float | None) -> str:
    return variant if ratio is None else f"{variant}, {100 * ratio:.0f} %"


def bench(name: str, ratios, loops, only, every: bool, tokens: int, rounds: int, profiled: bool, say) -> dict:
    """`{"rows", "profile"}` of one model."""
    torch.manual_seed(0)
    say(f"building {name}")
    model = BUILDERS[name]()
    prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT))
    length = PROMPT + tokens
    bases = {DENSE: shared_copy(model)}
    if extension.available():
        bases[DENSE_FUSED] = acip_kernels.fuse(shared_copy(model))
    dense = [
        case for key, base in bases.items() if wanted(key, only) for case in cases_of(base, key, None, loops, length)
    ]
    rows, profiles = [], {}
    for ratio in ratios:
        variants = {key: found for key, found in variants_at(model, ratio).items() if wanted(key, only)}
        cases = [
            case
            for key, found in variants.items()
            for case in cases_of(found, key, ratio, loops_of(key, ratio, ratios, loops, every), length)
        ]
        # Dense runs in the rounds of every size, as the machine may be another by then.
        for case in dense:
            case.rates = []
        measure(dense + cases, prompt, tokens, rounds, say)
        rows += rows_of(dense + cases, ratio)
        if profiled and ratio == min(ratios):
            for case in dense + cases:
                if case.variant in (DENSE, FUSED, INT4):
                    say(f"profile of {label(case.variant, case.ratio)}, {case.loop}")
                    profiles[f"{label(case.variant, case.ratio)}, {case.loop}"] = profile_of(
                        case, model, prompt, tokens
                    )
        del variants, cases
        gc.collect()
    torch.compiler.reset()  # it holds on to the models that it compiled
    return {"model": name, "rows": rows, "profile": profiles}


def wanted(variant: str, only) -> bool:
    return not only or variant in only


def rows_of(cases: list[Case], group: float) -> list[dict]:
    """A row for each case; group: the size in whose rounds it was measured."""
    rates = {(case.variant, case.loop): case.rates for case in cases}
    rows = []
    for case in cases:
        rows.append(
            {
                "group": group,
                "variant": case.variant,
                "ratio": case.ratio,
                "loop": case.loop,
                "bytes": case.bytes,
                "tokens_per_s": {
                    "median": statistics.median(case.rates), "min": min(case.rates), "max": max(case.rates),
                },
                "bytes_per_s": case.bytes * statistics.median(case.rates),
                "times_dense": times(case.rates, rates.get((DENSE, case.loop))),
                "times_dense_generate": times(case.rates, rates.get((DENSE, GENERATE))),
                "compile_seconds": case.compile_seconds,
            }
        )  # fmt: skip
    return rows


def times(rates: list[float], base: list[float] | None) -> float | None:
    """How many times `base`: the median over rounds, each of which saw the same machine."""
    return None if base is None else statistics.median(own / other for own, other in zip(rates, base))


# ---- on a GPU


class GraphLoop:
    """`loop(prompt, new_tokens)`, greedy: a static cache, and a step that the first call captures as a CUDA graph.

    Without a GPU the step is called. Cache and buffers are for `length` tokens.
    """

    def __init__(self, model: nn.Module, length: int):
        from transformers import StaticCache

        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.graph = None

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        cache = {cache_name(self.model): self.cache}
        output = self.model(input_ids=ids, position_ids=positions, **cache, use_cache=True)
        return output.logits[:, -1:].argmax(-1)

    def _step(self) -> None:
        self.token.copy_(self._read(self.token, self.position))
        self.position.add_(1)

    def _begin(self, prompt: Tensor) -> None:
        self.cache.reset()
        length = prompt.shape[1]
        self.token.copy_(self._read(prompt, torch.arange(length, device=prompt.device)[None]))
        self.position.fill_(length)

    @torch.no_grad()
    def __call__(self, prompt: Tensor, tokens: int) -> Tensor:
        if self.graph is None and prompt.device.type == "cuda":
            self._begin(prompt)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # loads what is captured
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        step = self._step if self.graph is None else self.graph.replay
        self._begin(prompt)
        made = [self.token.clone()]
        for _ in range(tokens - 1):
            step()
            made.append(self.token.clone())
        return torch.cat([prompt, *made], 1)


class _Everywhere:
    """In the place of a table that `acip tune` has not measured: our kernels, as `plan` configures them."""

    tokens = (1, 16)

    def pays(self, graph: bool) -> bool:
        return True

    def is_faster(self, problem, graph: bool) -> bool:
        return True

    def config(self, launch) -> None:
        return None


@contextlib.contextmanager
def kernels_everywhere() -> Iterator[None]:
    held, measured.table = measured.table, lambda device: _Everywhere() if device.type == "cuda" else None
    try:
        yield
    finally:
        measured.table = held


def bench_gpu(model: nn.Module, name: str, ratios, loops, tokens: int, rounds: int, only, say) -> dict:
    """`{"model", "rows", "errors"}` on the device of `model`."""
    device, length = model.device, PROMPT + tokens + 4
    prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT), device=device)
    rows, errors = [], []
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # every run decodes as many tokens

    def cases_of_variant(variant: str, ratio: float | None, built: nn.Module) -> list[Case]:
        def stock(prompt: Tensor, tokens: int, **options) -> Tensor:
            options |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "pad_token_id": 0}
            return built.generate(prompt, do_sample=False, **options)

        def static(prompt: Tensor, tokens: int) -> Tensor:
            return stock(prompt, tokens, cache_implementation="static")

        def synchronized(decode: Callable) -> Callable:
            def run(prompt: Tensor, tokens: int) -> Tensor:
                found = decode(prompt, tokens)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return found

            return run

        ways = {GENERATE: stock, STATIC: static, GRAPH: GraphLoop(built, length)}
        size = stored_bytes(built)
        return [Case(variant, ratio, loop, size, synchronized(ways[loop]), is_fused(built)) for loop in loops]

    def works(case: Case) -> bool:
        started = time.perf_counter()
        try:
            case.run(prompt, tokens)
            case.compile_seconds = time.perf_counter() - started
            case.run(prompt, tokens)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            errors.append({"variant": case.variant, "ratio": case.ratio, "loop": case.loop, "error": text})
            say(f"{label(case.variant, case.ratio)}, {case.loop} failed: {text}")
            return False
        say(f"{label(case.variant, case.ratio)}, {case.loop}: begun in {case.compile_seconds:.1f} s")
        return True

    dense = [case for case in cases_of_variant(DENSE, None, model) if works(case)]
    for ratio in ratios:
        built = variants_at(model, ratio)
        found = [case for key, one in built.items() if wanted(key, only) for case in cases_of_variant(key, ratio, one)]
        cases = dense + [case for case in found if works(case)]
        for case in cases:
            case.rates = []
        for number in range(rounds):
            for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
                case.rates.append(case.run(prompt, tokens))
        rows += rows_of(cases, ratio)
        del built, found, cases
        gc.collect()
    return {"model": name, "rows": rows, "profile": {}, "errors": errors}


def main_gpu(name: str, checkpoint: str | None, ratios, loops, tokens: int, rounds: int, only, say) -> dict:
    device = torch.device("cuda")
    tuned = measured.table(torch.device("cuda", torch.cuda.current_device()))
    if checkpoint is not None:
        from transformers import AutoModelForCausalLM

        name, model = checkpoint, AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
    else:
        model = BUILDERS[name](device)
    say(
        f"{name}; "
        + ("our kernels where acip tune found them faster" if tuned else "our kernels everywhere: not tuned")
    )
    with contextlib.nullcontext() if tuned is not None else kernels_everywhere():
        found = bench_gpu(model, name, ratios, loops, tokens, rounds, only, say)
    return {
        "device": report.device_description(device) | {"dtype": "bfloat16"},
        "setting": {"prompt": PROMPT, "new_tokens": tokens, "rounds": rounds, "tuned": tuned is not None},
        "models": [found],
        "targets": [],
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }


# ---- where the time goes

# The first kind whose prefix fits has it. Self time only, so nothing counts twice.
HEAD, LAYERS, KERNELS = "output head", "linear layers, torch's", "linear layers, our kernels"
ATTENTION, REST = "attention", "norms, rotations, residuals and the like"
PYTHON = "Python, dispatch, compiled code without a name"
KINDS = (KERNELS, LAYERS, ATTENTION, HEAD, REST, PYTHON)
_PRODUCTS = ("aten::linear", "aten::mm", "aten::addmm", "aten::matmul", "mkldnn::", "aten::mkldnn", "onednn::")


def kind_of(name: str, shapes: list, vocabulary: int) -> str:
    if name == "acip::fused_linear" or name.startswith(_PRODUCTS):
        if vocabulary in _flat(shapes):
            return HEAD
        return KERNELS if name.startswith("acip::") else LAYERS
    if name.startswith(("aten::_scaled_dot_product", "aten::scaled_dot_product", "aten::bmm")):
        return ATTENTION
    return REST if name.startswith(("aten::", "cpp_fused", "graph_")) or "cpp_fused" in name else PYTHON


def _flat(shapes) -> list[int]:
    return [shapes] if isinstance(shapes, int) else [size for part in shapes for size in _flat(part)]


def profile_of(case: Case, model: nn.Module, prompt: Tensor, tokens: int) -> dict[str, float]:
    """Seconds a token by kind. What the profiler itself takes is in the last kind."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = time.perf_counter()
        case.decode(prompt, tokens)
        total = time.perf_counter() - started
    seconds, ours = dict.fromkeys(KINDS, 0.0), []
    for event in profiler.events():
        kind = kind_of(event.name, event.input_shapes or [], model.config.vocab_size)
        seconds[kind] += event.self_cpu_time_total / 1e6
        if kind == KERNELS:
            ours.append(event)
    if case.fused:
        # Shapes in lists are not recorded, but a token's last call of our operator is the head's.
        calls = len(ours) // tokens
        ours.sort(key=lambda event: event.time_range.start)
        head = sum(event.self_cpu_time_total for event in ours[calls - 1 :: calls]) / 1e6
        seconds[KERNELS] -= head
        seconds[HEAD] += head
    seconds[PYTHON] = total - sum(value for kind, value in seconds.items() if kind != PYTHON)
    return {kind: value / tokens for kind, value in seconds.items()}


# ---- the targets


def targets(results: list[dict]) -> list[dict]:
    """Each target of what this should show, with what was measured, as `decode_cpu.targets`."""
    found = {result["model"]: result["rows"] for result in results}

    def of(model: str, variant: str, loop: str, key: str, least: float, what: str) -> dict | None:
        for row in found.get(model, ()):
            if (row["variant"], row["ratio"], row["loop"]) == (variant, 0.4, loop) and row[key] is not None:
                return {"target": what, "least": least, "measured": row[key], "met": row[key] >= least}
        return None

    # Of two loops the better one for either side: dense is compared within the same loop.
    listed = [
        of(LLAMA, FUSED, GENERATE, "times_dense", 2, "1B shape, fused bfloat16 at 40 %, both by generate: × dense"),
        of(LLAMA, FUSED, COMPILED, "times_dense", 2, "1B shape, fused bfloat16 at 40 %, both compiled: × dense"),
        of(LLAMA, INT4, GENERATE, "times_dense", 4, "1B shape, fused int4 at 40 %, both by generate: × dense"),
        of(LLAMA, INT4, COMPILED, "times_dense", 4, "1B shape, fused int4 at 40 %, both compiled: × dense"),
        of(
            LLAMA,
            INT4_ALL,
            COMPILED,
            "times_dense",
            4,
            "1B shape, with int8 embeddings, both compiled: × dense",
        ),
        of(SMOL, FUSED, GENERATE, "times_dense", 1.5, "SmolLM2, fused at 40 %, both by generate: × dense"),
        of(SMOL, FUSED, COMPILED, "times_dense_generate", 3, "SmolLM2, fused at 40 %, compiled: × dense by generate"),
    ]
    return [target for target in listed if target]


# ---- what people read


def table(rows: list[dict]) -> str:
    """Dense once, of the smallest size's rounds; then the sizes."""
    last = min(row["group"] for row in rows)
    lines = []
    for row in rows:
        if row["ratio"] is None and row["group"] != last:
            continue
        lines.append(
            [
                row["variant"],
                "–" if row["ratio"] is None else f"{100 * row['ratio']:.0f} %",
                row["loop"],
                f"{row['bytes'] / 1e6:,.0f}",
                f"{row['tokens_per_s']['median']:.1f}",
                f"{row['bytes_per_s'] / 1e9:.1f}",
                ratio_cell(row["times_dense"]),
                ratio_cell(row["times_dense_generate"]),
            ]
        )
    lines.sort(key=lambda line: line[1] != "–")  # stable: the sizes stay in order
    head = ["variant", "size", "loop", "MB a token", "tokens/s", "GB/s", "× dense, same loop", "× dense, generate"]
    return markdown(head, lines, left=3)


def ratio_cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def profile_table(profiles: dict[str, dict[str, float]]) -> str:
    totals = {name: sum(kinds.values()) for name, kinds in profiles.items()}
    lines = [
        [
            kind,
            *(
                f"{1e3 * kinds[kind]:.1f} ({100 * kinds[kind] / totals[name]:.0f} %)"
                for name, kinds in profiles.items()
            ),
        ]
        for kind in KINDS
    ]
    lines.append(["total", *(f"{1e3 * total:.1f}" for total in totals.values())])
    return markdown(["ms a token, under the profiler", *profiles], lines)


def targets_table(found: list[dict]) -> str:
    lines = [
        [target["target"], f"{target['least']:g}", f"{target['measured']:.2f}", "met" if target["met"] else "not met"]
        for target in found
    ]
    return markdown(["target", "at least", "measured", ""], lines)


def result_path(device_name: str) -> pathlib.Path:
    return decode_cpu.result_path(device_name, "generate")


def main(
    model: Annotated[list[str] | None, typer.Option(help="smol, llama or llama8b; the first two if not given.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Only this size (repeatable); on a GPU 0.5.")] = None,
    loop: Annotated[
        list[str] | None,
        typer.Option(
            help=f"“{GENERATE}” or “{COMPILED}”; on a GPU “{GENERATE}”, “{STATIC}” or “{GRAPH}”. Default: all."
        ),
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only this one (repeatable), by its name in the table; all if not given.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--every", help="Every variant in the compiled loop at every size, which takes long.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=4, help="New tokens of a run.")] = NEW_TOKENS,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 3,
    profiles: Annotated[bool, typer.Option("--profile/--no-profile", help="Where the time goes.")] = True,
    store: Annotated[bool, typer.Option(help="Write the result under bench/results.")] = True,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a dense model, instead of random weights (cuda).", show_default=False)
    ] = None,
):
    """Tokens a second of whole models, dense and compressed, in several decoding loops."""

    def say(text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device must be cpu or cuda, got {device}")
    loops_here = (GENERATE, STATIC, GRAPH) if device == "cuda" else (GENERATE, COMPILED)
    if unknown := set(loop or ()) - set(loops_here):
        raise typer.BadParameter(f"loop must be one of {', '.join(loops_here)} on {device}, got {', '.join(unknown)}")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise typer.BadParameter("there is no GPU")
        name = MODELS[(model or ["llama8b"])[0]]
        loops = tuple(loop or loops_here)
        summary = main_gpu(name, checkpoint, tuple(ratio or (0.5,)), loops, tokens, rounds, variant, say)
    else:
        if checkpoint is not None:
            raise typer.BadParameter("--checkpoint goes with --device cuda")
        if not extension.available():
            say(f"there are no native kernels here, so nothing is fused or quantized: {extension.missing}")
        settings = tuple(ratio or RATIOS), tuple(loop or loops_here), variant, every, tokens, rounds, profiles
        results = [bench(MODELS[name], *settings, say) for name in model or ("smol", "llama")]
        summary = {
            "device": report.device_description("cpu")
            | {"dtype": "bfloat16", "instruction_set": extension.instruction_set()},
            "setting": {"prompt": PROMPT, "new_tokens": tokens, "rounds": rounds},
            "models": results,
            "targets": targets(results),
            "peak_memory_bytes": peak_bytes(torch.device("cpu")),
        }
    for result in summary["models"]:
        print(f"\n{result['model']}\n")
        print(table(result["rows"]))
        if result["profile"]:
            print(profile_table(result["profile"]))
    print(targets_table(summary["targets"]))
    if store:
        path = result_path(summary["device"]["device"])
        files.write_json(path, summary)
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
