"""The `acip` command."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import os
import pathlib
import sys
import tempfile
import types
import typing
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

app = typer.Typer(
    name="acip",
    help="Compress a language model to any size in one gradient run, and run it faster than the dense one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
# What people read goes to stderr, so that stdout is the result alone.
console = Console(stderr=True)

# Errors whose message is for the user; anything else is a bug, and shows where.
_MISTAKES = (ValueError, TypeError, RuntimeError, OSError, FloatingPointError)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="Text: a file (.txt, .json, .jsonl, .csv, .parquet), a directory, wikipedia-demo, wikitext2, c4, "
        "or the name of a hub dataset.",
    ),
]
Column = Annotated[str, typer.Option(help="The column of a table that holds the text.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 where the device is fast at it), bfloat16, float32, float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 …")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there already.")]
Count = Annotated[
    str,
    typer.Option(
        help="What size ratios count: factorized (the factorized layers), stored (the whole file), or paper (the "
        "reference's count and cut: its ranks; without adapters, and just above the target)."
    ),
]
Adapters = Annotated[
    str, typer.Option(help="What becomes of the adapters: auto, merge (exactly, as more ranks), truncate or drop.")
]


def main():
    """The console script: every mistake of the user becomes one line, and exit status 1."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar for every model that is loaded says nothing
    # As torchrun and the like say it.
    processes, rank = int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("RANK") or 0)
    try:
        if processes > 1 and sys.argv[1:2] not in (["compress"], ["run"]):
            raise ValueError(f"only `acip compress` and `run` are for several processes, and WORLD_SIZE is {processes}")
        app()
    except (KeyboardInterrupt, SystemExit) as end:
        # typer makes an exit of Ctrl-C, and says nothing.
        stop: BaseException | None = end
        while stop is not None and not isinstance(stop, KeyboardInterrupt):
            stop = stop.__cause__ or stop.__context__
        if stop is None:
            raise
        console.print(f"[yellow]{stop or 'stopped'}[/]", highlight=False)
        raise SystemExit(130) from None
    except _MISTAKES as error:
        if rank and getattr(error, "in_all_processes", False):
            raise SystemExit(1) from None
        console.quiet = False
        console.print(f"error in process {rank}:" if processes > 1 else "error:", style="bold red", end=" ")
        console.print(str(error) or type(error).__name__, markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


_PANELS = {"NestedConfig": "nested, importance, svd_llm, asvd, svd", "CompressionConfig": "acip (--recipe paper)"}
_CONFIG_HELP = {
    "allocation": "How sizes are divided among layers: worth; global; sensitivity or uniform (asvd); loss or uniform "
    "(svd_llm). Default: the method's first.",
    "sensitivity_batches": "Batches that the sensitivity of each layer is measured on (asvd).",
    "forms": "Forms that layers may be stored in: dense, factors, pivoted (repeatable).",
    "magnitude_power": "ASVD's α.",
    "gradient_share": "How much of an input's weight in its covariance is its gradient's, 0 to 1 (nested, importance).",
    "distillation": "Weight of the dense model's probabilities in the loss; 0 for the next token alone (nested).",
    "learning_rate": "AdamW's highest learning rate (nested).",
    "update_rank": "Rank of what is trained of each factor (nested).",
    "warmup_steps": "Steps in which it rises to that (nested).",
    "smallest_ratio": "The smallest size that is trained (nested) …",
    "largest_ratio": "… and the largest.",
    "targets": "What to factorize: all-linear, or a regular expression over the layers' names.",
    "exclude": "Names, or last parts of names, of layers to leave as they are (repeatable).",
    "basis": "Decompose by the weights alone, or by what the activations make of them.",
    "calibration_batches": "Batches that the activations are taken from.",
    "mask_scale": "Start value of every mask parameter.",
    "adapter_rank": "Rank of the LoRA adapters beside the factors; 0 for none.",
    "adapter_alpha": "Their α: the adapter counts α/rank.",
    "adapter_dropout": "Dropout on the adapters' input.",
    "mask_learning_rate": "AdamW's learning rate for the masks.",
    "adapter_learning_rate": "AdamW's learning rate for the adapters.",
    "betas": "AdamW's betas.",
    "eps": "AdamW's epsilon.",
    "lambda_start": "The l1 penalty λ on the masks, at the start.",
    "lambda_growth": "Factor by which λ grows …",
    "lambda_every": "… every so many steps.",
    "penalty": "λ is the same for all entries (entries), or in proportion to what each one stores (numbers).",
    "stop_ratio": "Prune until this much of the factorized layers is left.",
    "max_prune_steps": "At this step, cut what is still above the stop ratio at once.",
    "tune_steps": "Steps that tune the adapters after pruning.",
    "tune_learning_rate": "Their learning rate, if not the adapters'.",
    "dtype": "Of the model and its factors: auto, bfloat16, float32.",
    "gradient_accumulation": "Batches a step.",
    "gradient_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
    "shard": "Of several processes, each holds a part of the factors (FSDP) instead of all.",
    "compact_every": "Steps between two checks whether pruned ranks can be left out; 0 for never.",
    "route": "How layers are computed: auto (what is cheaper), factored, or effective (through a dense weight).",
    "save_z": "Keep the products with Vh for the backward pass: more memory, less time.",
    "lean_loss": "Never store all logits, where the model's loss allows it.",
    "cuda_graph": "On a GPU, launch a batch's forward and backward pass as one CUDA graph.",
    "checkpoint_seconds": "Seconds between two checkpoints of the run.",
    "seed": "Of adapters, dropout and the order of the data.",
}


# The methods of `compress`, and the class of their configuration; the first is the default.
METHODS = {
    "nested": "NestedConfig",
    "acip": "CompressionConfig",
    "importance": "RankingConfig",
    "svd_llm": "RankingConfig",
    "asvd": "RankingConfig",
    "svd": "RankingConfig",
}


def _with_config_options(command):
    """Give `command` an option for every field of the methods' configurations; they arrive in its `config` dict."""
    import acip_kernels

    parameters = dict(inspect.signature(command).parameters)
    hints = typing.get_type_hints(command, include_extras=True)
    del parameters["config"]
    shown = {}
    for name, parameter in parameters.items():
        shown[name] = parameter.replace(annotation=hints[name])
    names = set()
    owners: dict[str, list] = {}
    for configuration in (acip_kernels.NestedConfig, acip_kernels.CompressionConfig):
        for field in dataclasses.fields(configuration):
            owners.setdefault(field.name, []).append((configuration, field))
    for name, owned in owners.items():
        if name in ("steps", "method"):  # options of the command itself
            continue
        kind = typing.get_type_hints(owned[0][0])[name]
        # Of `str | tuple[str, …]` a command line has the string, of `T | None` the T.
        union = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        kind = next(
            one for one in union if (one is not type(None) and typing.get_origin(one) is not tuple) or len(union) == 1
        )
        if typing.get_args(kind) == (str, ...):
            kind = list[str]
        defaults = list(dict.fromkeys(str(field.default) for _, field in owned if field.default not in (None, ())))
        default = f" [default: {' or '.join(defaults)}]" if defaults else ""
        panel = "Every method" if len(owned) == 2 else _PANELS[owned[0][0].__name__]
        option = typer.Option(help=_CONFIG_HELP[name] + default, rich_help_panel=panel, show_default=False)
        shown[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )
        names.add(name)

    def wrapped(**options):
        config = {name: options.pop(name) for name in names}
        # A list that was not given arrives empty.
        return command(**options, config={name: value for name, value in config.items() if value not in (None, [])})

    wrapped.__signature__ = inspect.Signature(list(shown.values()))
    wrapped.__annotations__ = {name: parameter.annotation for name, parameter in shown.items()}
    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    return wrapped


def _configuration(method: str | None, recipe: str, steps: int | None, fields: dict):
    """The configuration that `compress`'s options mean."""
    import acip_kernels

    if recipe not in ("best", "paper"):
        raise ValueError(f"--recipe must be best or paper, got {recipe!r}")
    if recipe == "paper" and method not in (None, "acip"):
        raise ValueError(f"--recipe paper is --method acip, got --method {method}")
    method = method or ("acip" if recipe == "paper" else "nested")
    if method not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    kind = getattr(acip_kernels, METHODS[method])
    known = {field.name for field in dataclasses.fields(kind)}
    foreign = [f"--{name.replace('_', '-')}" for name in fields if name not in known]
    if foreign:
        raise ValueError(f"--method {method} has no {', '.join(foreign)}")
    if METHODS[method] == "RankingConfig":
        if steps is not None:
            raise ValueError(f"--method {method} trains nothing, and has no --steps")
        return kind(method=method, **fields)
    if method == "acip":
        return kind(**fields) if steps is None else kind.short(steps, **fields)
    return kind(**fields) if steps is None else kind(steps=steps, **fields)


@app.command()
@_with_config_options
def compress(
    model: Annotated[str, typer.Argument(help="Name on the hub, or directory, of a transformers model.")],
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Directory for the run and its result.")],
    data: Data = "c4",
    column: Column = "text",
    method: Annotated[
        str | None,
        typer.Option(
            help="nested (rank by importance, then train at all sizes), acip (the paper's run), or a ranking without "
            "training: importance, svd_llm, asvd, svd. [default: nested]",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="best, or paper: the method of the ACIP paper as it is.")] = "best",
    steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps. For acip: a short run that reaches the stop ratio in so many steps; without it, the "
            "reference's schedule."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences a batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 1024,
    compact: Annotated[bool, typer.Option("--compact", help="Save scores and adapters only.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    device: Device = "auto",
    as_json: Json = False,
    *,
    config,
):
    """Compress MODEL in one run. The result, an elastic checkpoint, holds every size.

    Example: `acip compress HuggingFaceTB/SmolLM2-135M --data wikitext2 --steps 400 --stop-ratio 0.4 -o runs/smol`

    Then: `acip materialize runs/smol/elastic --size-ratio 0.6 -o smol-60`

    On eight GPUs: `torchrun --nproc-per-node 8 -m acip_kernels compress …`, with `--shard` where a model is too large
    for one. A step then takes eight times the batches; see docs/many-devices.md.
    """
    from .compress.processes import joined

    settings = _configuration(method, recipe, steps, config)
    if compact and not settings.rebuilds:
        raise ValueError(
            "--compact keeps scores and adapters alone, and the base model does not give this method's factors again: "
            "leave it out, or take --recipe paper or --method svd"
        )
    with joined(_device(device)) as own_device:
        _compress(model, output, settings, data, column, batch_size, length, compact, resume, own_device, as_json)


def _compress(model, output, settings, data, column, batch_size, length, compact, resume, device, as_json) -> None:
    """`compress`, once it is clear with what, in this process."""
    import torch

    from . import data as texts
    from . import report
    from .compress import compress as run
    from .compress.config import cast
    from .compress.processes import Processes
    from .models.quantizer import quantized_layers
    from .models.saving import checkpoint_dtype

    # Several processes speak with one voice.
    main_process = Processes.current(torch.device(device)).main
    if not main_process:
        console.quiet = True
    loaded, tokenizer = _load(model, device, settings.dtype)
    if quantized := quantized_layers(loaded):
        raise ValueError(
            f"{model} has quantized layers, as {quantized[0]}, which no elastic checkpoint holds: compress the model "
            "that it was made from"
        )
    stored_dtype = checkpoint_dtype(model)
    tokens = texts.tokenize(tokenizer, texts.read_texts(data, column=column))
    batches = texts.Batches(tokens, batch_size=batch_size, length=length, seed=settings.seed)
    result = run(
        loaded, batches, settings, output=output, resume=resume, svd_cache=texts.svd_cache(model), progress=not as_json
    )
    if not main_process:
        return
    # What is fast to compute with here is no reason to store twice the bytes.
    cast(result.model, stored_dtype or result.model.dtype)
    target = output / "elastic"
    result.save(target, compact=compact, tokenizer=tokenizer, base_model=model, overwrite=True)
    plots = list(report.plot_history(result.history, output / "plots" / "history")) if result.history else []
    plots += report.plot_ranks(
        _ranks(result.cut(settings.stop_ratio, adapters="drop", forms=settings.forms)), output / "plots" / "ranks"
    )
    _print(
        {
            "elastic": str(target),
            "history": str(output / "history.jsonl") if result.history else None,
            "plots": [str(plot) for plot in plots],
            "steps": len(result.history),
            "size_ratio": result.size_ratio,
            "smallest_with_adapters": result.cut(1.0, adapters="merge").sizing.smallest(),
        },
        as_json,
    )


@app.command()
def materialize(
    elastic: Annotated[
        pathlib.Path,
        typer.Argument(help="An elastic checkpoint, as `acip compress` writes it, or a published ACIP checkpoint."),
    ],
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Directory for the new model.")],
    size_ratio: Annotated[float, typer.Option("--size-ratio", "-s", help="What is left, in (0, 1].")],
    count: Count = "factorized",
    adapters: Adapters = "auto",
    rank_multiple: Annotated[int, typer.Option(help="Round stored ranks up to a multiple of this.")] = 1,
    forms: Annotated[
        list[str] | None,
        typer.Option(
            help="Forms that layers may be stored in: dense, factors, pivoted (repeatable). Default: all; "
            "of int4 without pivoted, if rounding knows nothing of the layers' inputs: see docs/quality.md."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the new weights; auto for the checkpoint's own.")] = "auto",
    base_model: Annotated[
        str | None, typer.Option(help="Of a compact or published checkpoint: where its base model is now.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Keep the factorized layers' weights as int8, int4 or fp8.", show_default=False)
    ] = None,
    quantize_group: Annotated[
        int, typer.Option(help="Numbers of a row that share a scale: 32, 64 or 128 (int4).")
    ] = 64,
    quantize_symmetric: Annotated[
        bool, typer.Option("--quantize-symmetric", help="No zero points: fewer bytes, larger errors (int4).")
    ] = False,
    quantize_rounding: Annotated[
        str, typer.Option(help="feedback (least error of the outputs) or nearest (quick, for a trial).")
    ] = "feedback",
    quantize_embeddings: Annotated[
        str | None,
        typer.Option(
            help="The embedding and the output head as int8 or int4: in a small model half of the file.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="With --quantize: round by what this text makes of the errors, instead of what the factors remember "
            "of the text that they were made with; see docs/quality.md. "
            "With --recalibrate: fit on it. See `compress --help`.",
        ),
    ] = None,
    column: Column = "text",
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate",
            help="Fit what stays, layer after layer, to what the whole model makes of --data: for a ranking that was "
            "not trained. Minutes, no bytes; it need not help, so evaluate both.",
        ),
    ] = False,
    calibration_batches: Annotated[int, typer.Option(help="Sequences of the text that are taken.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 1024,
    overwrite: Overwrite = False,
    as_json: Json = False,
):
    """Cut an ordinary model of any size from an elastic checkpoint, in seconds.

    Example: `acip materialize runs/smol/elastic --size-ratio 0.6 -o smol-60`

    Example: `acip materialize runs/smol/elastic -s 0.6 --quantize int4 --data wikitext2 -o smol-60-int4`
    """
    import itertools

    import acip_kernels

    from . import data as texts
    from . import files, load, save
    from .compress.progress import RunProgress
    from .compress.sizing import forms_for
    from .models.saving import load_result
    from .ops.quantize import Scheme

    if data is not None and quantize is None and not recalibrate:
        raise ValueError("--data is for --quantize and --recalibrate: without them, nothing depends on a text")
    if data is None and recalibrate:
        raise ValueError("--recalibrate fits on a text: give --data")
    source = {"dtype": dtype, "base_model": base_model, "svd_cache": texts.svd_cache(base_model or elastic)}
    options = {"count": count, "adapters": adapters, "rank_multiple": rank_multiple}
    scheme = {"quantize": quantize, "quantize_group": quantize_group, "quantize_symmetric": quantize_symmetric}
    stored_as = None if quantize is None else Scheme(quantize, quantize_group, quantize_symmetric)
    options["forms"] = tuple(forms) if forms else None
    scheme |= {"quantize_rounding": quantize_rounding, "quantize_embeddings": quantize_embeddings}
    if data is None:
        model = load(elastic, size_ratio, **source, **options, **scheme)
    else:
        tokens = texts.tokenize(_tokenizer(elastic, base_model), texts.read_texts(data, column=column))
        batches = texts.Batches(tokens, batch_size=1, length=length, seed=0)
        calibration = list(itertools.islice(batches, calibration_batches))
        result = load_result(elastic, **source)
        # A text tells of the inputs, so what is refitted is what is cut afterwards.
        options["forms"] = forms_for(options["forms"], stored_as, quantize_rounding == "feedback")
        if recalibrate:
            cut_by = {name: options[name] for name in ("count", "rank_multiple", "forms")}
            with RunProgress(enabled=not as_json) as bar, bar.counting("refit", "blocks") as advance:
                acip_kernels.recalibrate(result, size_ratio, calibration, progress=advance, **cut_by)
        if quantize is None:
            model = acip_kernels.materialize(result, size_ratio, **options, quantize_embeddings=quantize_embeddings)
        else:
            model = _quantized_by(calibration, result.model, size_ratio, options, scheme)
    about = files.read_json(elastic / "config.json").get("quantization_config", {})
    base = about.get("base_model") or about.get("base_name") or base_model
    save(model, output, tokenizer=_tokenizer_if_any(elastic, base_model), base_model=base, overwrite=overwrite)
    _print({"model": str(output), **_about(model, output)}, as_json)


@app.command()
def finetune(
    model: Annotated[
        pathlib.Path,
        typer.Argument(help="A materialized model's directory, or with --size-ratio an elastic checkpoint."),
    ],
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Directory for the new model.")],
    data: Data = "c4",
    column: Column = "text",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    size_ratio: Annotated[
        float | None, typer.Option("--size-ratio", "-s", help="The size to cut from an elastic checkpoint first.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="AdamW's: 2e-4 for adapters, 3e-4 for factors, 1e-3 (relative) for scales if not given."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Of a quantized model: what it learns from, a model's directory or name; an elastic checkpoint "
            "teaches at its full size.",
        ),
    ] = None,
    distillation: Annotated[
        float | None,
        typer.Option(
            help="Weight of the teacher: of --teacher, or where factors are trained of the checkpoint at its full "
            "size. [default: 0.5]",
            show_default=False,
        ),
    ] = None,
    adapter_rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the LoRA adapter beside each low-rank layer, or of the factors' updates. [default: 32]",
            show_default=False,
        ),
    ] = None,
    adapter_alpha: Annotated[
        float | None,
        typer.Option(
            help="Where adapters are trained: their α, an adapter counts α/rank. [default: 16]", show_default=False
        ),
    ] = None,
    adapter_dropout: Annotated[
        float | None,
        typer.Option(help="Where adapters are trained: dropout on their input. [default: 0.05]", show_default=False),
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            help="Where adapters are trained: what becomes of them, merge (exactly, as further ranks) or truncate (to "
            "the ranks there were). [default: merge]",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences a batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 1024,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    seed: Annotated[int, typer.Option(help="Of adapters, dropout and the order of the data.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
):
    """Tune a compressed model at one size.

    Cut from an elastic checkpoint without adapters (the default recipe's), the factors of that size are trained
    themselves, with the checkpoint at its full size as teacher. Of a quantized model the scales are trained, which
    wins back a part of what rounding has lost, at the same bytes. Of any other model, adapters are trained, and merged
    into its factors.

    Example: `acip finetune smol-elastic -s 0.6 --data wikitext2 --steps 200 -o smol-60-tuned`

    Example: `acip finetune smol-60-int4 --teacher smol-elastic --data wikitext2 -o smol-60-int4-tuned`
    """
    import acip_kernels

    from . import CompressionResult, files, load, save
    from . import data as texts
    from .compress import materialize as cut
    from .models.foreign import is_published
    from .models.saving import checkpoint_dtype, stored_config

    if adapters not in (None, "merge", "truncate"):
        raise ValueError(f"--adapters must be merge or truncate, got {adapters!r}")
    fields = files.read_json(model / "config.json")
    if is_published(fields):
        raise ValueError(f"{model} is a published ACIP checkpoint: `acip import` it, and tune what comes of that")
    acip = _acip_fields(model)
    elastic = acip.get("kind") == "elastic"
    if elastic and size_ratio is None:
        raise ValueError(f"{model} is an elastic checkpoint, of every size: say which with --size-ratio")
    factors = elastic and not any(layer.get("adapter_rank") for layer in acip["layers"].values())
    scales = bool(acip.get("quantized"))
    for_adapters = {"adapter_alpha": adapter_alpha, "adapter_dropout": adapter_dropout, "adapters": adapters}
    if scales:
        what, idle = "the scales of this quantized model are trained", {**for_adapters, "adapter_rank": adapter_rank}
        if teacher is None:
            what, idle = f"{what}, and without --teacher by the text alone", {**idle, "distillation": distillation}
    elif factors:
        what, idle = "the factors of this checkpoint are trained, and no adapters", {**for_adapters, "teacher": teacher}
    else:
        what, idle = "adapters are trained", {"distillation": distillation, "teacher": teacher}
    given = ", ".join(f"--{name.replace('_', '-')}" for name, value in idle.items() if value is not None)
    if given:
        raise ValueError(f"{given} would do nothing: {what}")
    options: dict = {"learning_rate": learning_rate, "seed": seed, "gradient_accumulation": gradient_accumulation}
    options["distillation"] = 0.5 if distillation is None else distillation
    options["adapter_rank"] = 32 if adapter_rank is None else adapter_rank
    loaded, tokenizer = _load(str(model), device, "auto", None if factors else size_ratio)
    tokens = texts.tokenize(tokenizer, texts.read_texts(data, column=column))
    batches = texts.Batches(tokens, batch_size=batch_size, length=length, seed=seed)
    if factors:
        loaded = CompressionResult(loaded, stored_config(model))
        options |= {"size_ratio": size_ratio}
    elif not scales:
        options["adapter_alpha"] = 16.0 if adapter_alpha is None else adapter_alpha
        options["adapter_dropout"] = 0.05 if adapter_dropout is None else adapter_dropout
    elif teacher is not None:
        of_all_sizes = pathlib.Path(teacher).is_dir() and _acip_fields(pathlib.Path(teacher)).get("kind") == "elastic"
        options["teacher"], _ = _load(teacher, device, "auto", 1.0 if of_all_sizes else None)
    result = acip_kernels.finetune(loaded, batches, steps, **options, progress=not as_json)
    if scales:
        # Into the file's own dtype, whatever was computed with.
        tuned, learnt = load(model), result.model.state_dict()
        tuned.load_state_dict({name: t for name, t in learnt.items() if name.endswith("scales")}, strict=False)
    else:
        merged = "auto" if factors else adapters or "merge"
        tuned = cut(result, size_ratio if factors else 1.0, adapters=merged, dtype=checkpoint_dtype(str(model)))
    base = fields.get("quantization_config", {}).get("base_model")
    save(tuned, output, tokenizer=tokenizer, base_model=base, overwrite=overwrite)
    losses = [row["loss"] for row in result.history]
    summary = {"model": str(output), "steps": steps, "first_loss": losses[0], "last_loss": losses[-1]}
    _print(summary | _about(tuned, output), as_json)


@app.command("import")
def import_model(
    source: Annotated[
        pathlib.Path,
        typer.Argument(help="A published ACIP checkpoint's directory; or a directory or .safetensors file of factors."),
    ],
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Directory for what it becomes.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The model that was compressed: name on the hub, or directory. A published one may name it.",
        ),
    ] = None,
    names: Annotated[
        str,
        typer.Option(
            help="What pairs of factors are called: auto, svd-llm, asvd, sequential, children, or patterns with a *, "
            "as 'U=*_u_proj,Vh=*_v_proj,layer=*_proj' (S=… for singular values between them)."
        ),
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the new weights; auto for the source's own.")] = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
):
    """Take over what others have compressed: ACIP checkpoints as the paper's authors publish them, and models whose
    layers are pairs of factors (SVD-LLM, ASVD, or any names).

    A published checkpoint becomes an elastic one, with its scores and adapters: any size is cut from it, and
    `--count paper` cuts the ranks that the authors' code does. Pairs of factors become a materialized model of the size
    that they have. Only the base model's config is needed, unless weights are missing in the source.

    Example: `acip import ACIP-llama2-7b --base meta-llama/Llama-2-7b-hf -o llama-elastic`

    Then: `acip materialize llama-elastic -s 0.5 --count paper -o llama-50`

    Example: `acip import svd-llm/model.safetensors --base meta-llama/Llama-2-7b-hf --names svd-llm -o llama-svd`
    """
    import acip_kernels

    from . import data as texts
    from . import files, save
    from .models.foreign import base_name, is_published

    if not source.exists():
        raise ValueError(
            f"{source} does not exist: fetch what is on the hub first (hf download {source} --local-dir …)"
        )
    config = source / "config.json"
    fields = files.read_json(config) if config.exists() else {}
    result: typing.Any
    if is_published(fields):
        if names != "auto":
            raise ValueError(f"{source} is a published ACIP checkpoint, whose names are known: leave --names out")
        cache = texts.svd_cache(base or source)
        result = acip_kernels.import_checkpoint(source, base, dtype=dtype, svd_cache=cache)
        model, base = result.model, base or base_name(fields)
    else:
        if base is None:
            raise ValueError("--base: say which model these are factors of, by its name on the hub or its directory")
        patterns = dict(part.split("=", 1) for part in names.split(",")) if "=" in names else names
        model = result = acip_kernels.import_factors(source, base, patterns, dtype=dtype)
    place = source if source.is_dir() else source.parent
    save(result, output, tokenizer=_tokenizer_if_any(place, base), base_model=base, overwrite=overwrite)
    about: dict = {"model": str(output), "kind": "elastic" if _is_elastic(output) else "materialized"}
    if about["kind"] == "elastic":
        about |= {"layers": len(result.scores), "run_ended_at": result.size_ratio}
        _print(about, as_json)
    else:
        _print(about | _about(model, output), as_json)


@app.command()
def export(
    model: Annotated[
        pathlib.Path,
        typer.Argument(help="A materialized model, or with --size-ratio an elastic or published checkpoint."),
    ],
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Directory for the export.")],
    form: Annotated[
        str,
        typer.Option(
            help="dense (a transformers model as before the compression), factors (two nn.Linear a layer, for stock "
            "PyTorch), or onnx."
        ),
    ],
    size_ratio: Annotated[
        float | None, typer.Option("--size-ratio", "-s", help="The size to cut from an elastic checkpoint first.")
    ] = None,
    count: Count = "factorized",
    adapters: Adapters = "auto",
    base_model: Annotated[
        str | None, typer.Option(help="Of a compact or published checkpoint: where its base model is now.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto for the model's own; float32 for an ONNX runtime without bfloat16.")
    ] = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
):
    """Write a compressed model for where this package is not.

    **dense** is an ordinary transformers model, of as many numbers as before the compression. **factors** keeps the
    small size: two `nn.Linear` a layer, in a safetensors file that a dozen lines of stock PyTorch load (they are in the
    README.md beside it); a layer in pivoted form gets rank² more numbers. **onnx** is a graph from `input_ids` and
    `attention_mask` to `logits`, without a cache, in which pivoted layers stay as they are. Quantized weights become
    floating-point ones in all three.

    Example: `acip export smol-60 --form factors -o smol-60-factors`

    Example: `acip export runs/smol/elastic -s 0.6 --form onnx --dtype float32 -o smol-60-onnx`
    """
    from . import load, save
    from .models import export as exporting

    if form not in exporting.FORMS:
        raise ValueError(f"--form must be one of {', '.join(exporting.FORMS)}, got {form!r}")
    options = {"count": count, "adapters": adapters, "base_model": base_model}
    loaded = load(model, size_ratio, dtype=dtype, **options)
    tokenizer = _tokenizer_if_any(model, base_model)
    write = {"dense": save, "factors": exporting.save_factors, "onnx": exporting.export_onnx}[form]
    exported = exporting.to_plain(loaded, "dense") if form == "dense" else loaded
    write(exported, output, tokenizer=tokenizer, overwrite=overwrite)
    size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.onnx*") for file in output.glob(pattern))
    _print({"model": str(output), "form": form, "file_bytes": size}, as_json)


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Directories or hub names; the first is what speeds compare with.")
    ],
    size_ratio: Annotated[
        list[float] | None,
        typer.Option("--size-ratio", "-s", help="Sizes to cut from an elastic checkpoint (repeatable)."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Text for the perplexity; see `compress --help`.")
    ] = None,
    column: Column = "text",
    context: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    stride: Annotated[int | None, typer.Option(help="Tokens between two windows; the context if not given.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Take this many windows, spread over the text.")] = None,
    speed: Annotated[bool, typer.Option(help="Measure decode and prefill speed, side by side.")] = True,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode for the speed.")] = 32,
    prefill_tokens: Annotated[int, typer.Option(help="Tokens of the prefill for the speed.")] = 512,
    rounds: Annotated[int, typer.Option(help="Rounds of the speed measurement.")] = 3,
    prompt: Annotated[list[str] | None, typer.Option(help="Show a greedy continuation of this (repeatable).")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "--tasks",
            help="LM-Eval task (repeatable, or a list with commas); paper for the paper's seven; text for two made of "
            "--data, without a hub.",
        ),
    ] = None,
    include_path: Annotated[
        pathlib.Path | None, typer.Option(help="Directory of LM-Eval task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples a task at most.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    output: Annotated[
        pathlib.Path | None,
        typer.Option("--output", "-o", help="Write the result to this JSON file too, for `acip plot`."),
    ] = None,
    as_json: Json = False,
):
    """Perplexity, size, speed, FLOPs, memory, samples and task accuracies of models side by side.

    Example: `acip evaluate runs/smol/elastic -s 1.0 -s 0.6 --data wikitext2 --prompt "The capital of France is"`

    Example: `acip evaluate HuggingFaceTB/SmolLM2-135M smol-60 --task piqa --task arc_easy --json`
    """
    from . import data as texts
    from . import evaluate as measure
    from . import files, report

    task = [name for one in task or () for name in one.split(",") if name]
    loaded, tokenizer = {}, None
    for name in models:
        for ratio in size_ratio if size_ratio and _is_elastic(name) else [None]:
            label = (
                pathlib.Path(name.rstrip("/")).name if ratio is None else f"{pathlib.Path(name).parent.name} {ratio:g}"
            )
            while label in loaded:
                label += "'"
            loaded[label], tokenizer = _load(name, device, dtype, ratio)
    if size_ratio and not any(_is_elastic(name) for name in models):
        raise ValueError("--size-ratio cuts elastic checkpoints, and none of the models is one")
    articles = None if data is None else list(texts.read_texts(data, column=column))
    if "text" in task and articles is None:
        raise ValueError("--task text makes tasks of a text: name it with --data")
    tokens = None if articles is None else texts.tokenize(tokenizer, articles)
    rows = []
    for label, model in loaded.items():
        directory = pathlib.Path(model.config._name_or_path)
        own_files = directory if directory.is_dir() and list(directory.glob("model*.safetensors")) else None
        with console.status(f"{label} …"):
            windows = {"context": context, "stride": stride, "max_windows": max_windows}
            rows.append(measure.table_row(model, label, tokens=tokens, directory=own_files, **windows))
            rows[-1]["parameter_counts"] = measure.parameter_counts(model)
            if prompt:
                rows[-1]["samples"] = measure.generate_samples(model, tokenizer, prompt)
            if task:
                names = [each for one in task for each in (measure.PAPER_TASKS if one == "paper" else [one])]
                rows[-1]["tasks"] = {}
                if "text" in names:
                    names.remove("text")
                    with tempfile.TemporaryDirectory() as folder:
                        measure.write_text_tasks(folder, articles)
                        found = measure.tasks(model, tokenizer, measure.TEXT_TASKS, include_path=folder, limit=limit)
                    rows[-1]["tasks"] |= found
                if names:
                    rows[-1]["tasks"] |= measure.tasks(model, tokenizer, names, include_path=include_path, limit=limit)
    if speed:
        with console.status("speed …"):
            options = {"new_tokens": new_tokens, "prefill_tokens": prefill_tokens, "rounds": rounds}
            rows = measure.with_speed(rows, dict(enumerate(loaded.values())), **options)
    where = next(iter(loaded.values())).device
    result = {
        "device": report.device_description(where),
        "perplexity_on": None if data is None else {"data": data, "context": context, "stride": stride or context},
        "peak_memory_bytes": measure.peak_memory_bytes(where),
        "rows": rows,
    }
    if output is not None:
        files.write_json(output, result)
    if as_json:
        _print(result, True)
        return
    console.print(report.rich_table(rows))
    console.print(
        f"{result['device']['device']}, {next(iter(loaded.values())).dtype}, "
        f"peak memory of this process {result['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    for row in rows:
        for text, sample in zip(prompt or [], row.get("samples", []), strict=True):
            console.print(f"\n[bold]{row['method']}[/]: [dim]{text}[/]{sample}", highlight=False)
        for name, metrics in row.get("tasks", {}).items():
            console.print(f"[bold]{row['method']}[/] {name}: {metrics}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    program: Annotated[
        str, typer.Argument(help="A Python file, a command of an installed package (lm_eval), or a module.")
    ],
):
    """Another program that loads compressed models: all that follows its name is its own command line.

    Example: `acip run lm_eval --model hf --model_args pretrained=smol-60 --tasks piqa`

    Example: `acip run train.py --epochs 3`
    """
    from .launch import run_program

    run_program(program, context.args)


@app.command()
def tune(
    model: Annotated[
        pathlib.Path,
        typer.Argument(help="A materialized model's directory, or with --size-ratio an elastic checkpoint."),
    ],
    size_ratio: Annotated[
        float | None, typer.Option("--size-ratio", "-s", help="The size to cut from an elastic checkpoint.")
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=16, help="Tokens at a time (repeatable); 16 stands for 2 to 16.", show_default="1 and 16"
        ),
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=1, help="Configs to try for each launch: those that are predicted to be fastest.")
    ] = 12,
    again: Annotated[
        bool, typer.Option("--again", help="Measure what is known already as well, as after a change of clocks.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
):
    """Measure how the GPU's kernels run best for a model's layers, and whether they beat torch's products.

    What is found is kept for this GPU, its driver and the versions of torch, triton and this package, and every model
    follows it from then on: up to 16 tokens, layers are computed by the Triton kernels, or by the CUDA C++ ones where
    they are built, wherever the faster of them was measured to beat torch's products. Results change by rounding alone.
    A run that is interrupted goes on where it was.

    Example: `acip tune smol-60`

    Example: `acip tune runs/smol/elastic -s 0.6 --tokens 1 --tokens 4 --candidates 24`
    """
    import torch

    from .ops.fused_linear import measured, op

    where = torch.device(_device(device))
    if not torch.cuda.is_available():
        raise ValueError("acip tune measures a GPU, and there is none here: on a CPU nothing has to be tuned")
    if where.type != "cuda":
        raise ValueError(f"acip tune measures a GPU, and --device is {device}")
    if op.triton is None:
        raise ValueError("acip tune is for Triton's kernels, and Triton is not installed: pip install triton")
    from . import load
    from .compress.config import compute_dtype
    from .compress.progress import RunProgress
    from .models import tune as tuning

    if not model.is_dir():
        raise ValueError(f"{model} is not a directory")
    if _is_elastic(model) and size_ratio is None:
        raise ValueError(f"{model} is an elastic checkpoint, of every size: say which with --size-ratio")
    loaded = load(model, size_ratio, dtype=compute_dtype(dtype, where)).to(where)
    with RunProgress(enabled=not as_json) as shown, shown.counting("tuning", "problems") as progress:
        rows = tuning.tune(
            loaded, tuple(tokens or tuning.TOKENS), candidates=candidates, again=again, progress=progress
        )
    path = measured.path_of(measured.identity(loaded.device))
    if as_json:
        _print({"table": str(path), "device": torch.cuda.get_device_name(loaded.device), "problems": rows}, True)
        return
    console.print(tuning.rich_table(rows))
    console.print(f"{torch.cuda.get_device_name(loaded.device)}: {path}", highlight=False, soft_wrap=True)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Directory of any kind, or hub name, of a model with its tokenizer.")],
    size_ratio: Annotated[
        float | None, typer.Option("--size-ratio", "-s", help="The size to cut from an elastic checkpoint first.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; its directory's name if not given.")
    ] = None,
    fuse: Annotated[
        bool | None,
        typer.Option(
            "--fuse/--no-fuse",
            help="Compute sibling layers in one call, see `acip_kernels.fuse`. "
            "[default: on a CPU, with native kernels]",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    log_level: Annotated[str, typer.Option(help="info (a line for every request), warning, error.")] = "info",
    as_json: Json = False,
):
    """Serve a model over HTTP as OpenAI's interface has it, on the CPU or one GPU, by transformers' server.

    Example: `acip serve smol-60`

    Example: `acip serve runs/smol/elastic --size-ratio 0.6 --name smol --port 8080`

    Then: `curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "smol",
    "messages": [{"role": "user", "content": "Hello"}], "stream": true}'`
    """
    from . import fuse as fused
    from .ops import extension
    from .serving import server

    if log_level not in ("info", "warning", "error"):
        raise ValueError(f"--log-level must be info, warning or error, got {log_level!r}")
    if size_ratio is not None and not _is_elastic(model):
        raise ValueError(f"--size-ratio cuts elastic checkpoints, and {model} is none")
    server.check_installed()
    on_cpu = _device(device) == "cpu"
    if fuse and not on_cpu:
        raise ValueError(f"--fuse is for the CPU, got --device {device}")
    with contextlib.closing(server.listen(host, port)) as listener:
        loaded, tokenizer = _load(model, device, dtype, size_ratio)
        if any(hasattr(module, "set_live") for module in loaded.modules()):
            raise ValueError(f"{model} is an elastic checkpoint, of every size: say which with --size-ratio")
        if fuse or (fuse is None and on_cpu and extension.available()):
            fused(loaded)
            fuse = True
        if tokenizer.chat_template is None:
            console.print(
                f"[yellow]{model} has no chat template: /v1/chat/completions will fail, /v1/completions works[/]",
                highlight=False,
            )
        name = name or pathlib.Path(model).resolve().name
        host, port = listener.getsockname()[:2]
        about: dict = {"model": name, "url": f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"}
        about |= {"device": str(loaded.device), "dtype": str(loaded.dtype).removeprefix("torch."), "fused": bool(fuse)}
        if as_json:
            typer.echo(json.dumps(about))
        else:
            console.print(f"{name} at {about['url']}, {about['device']}, {about['dtype']}; Ctrl-C stops it")
        server.serve(loaded.eval(), tokenizer, name, listener, log_level=log_level)


@app.command()
def info(
    path: Annotated[
        pathlib.Path | None, typer.Argument(help="A checkpoint of any kind; without it, what runs here.")
    ] = None,
    as_json: Json = False,
):
    """What a checkpoint is: kind, sizes, ranks. Without one: versions, device, backends.

    Example: `acip info runs/smol/elastic`
    """
    from . import __version__, files, report
    from .models.foreign import base_name, is_published
    from .ops import extension, lowrank_linear, masked_svd_linear

    if path is None:
        operators = {"lowrank_linear": lowrank_linear, "masked_svd_linear": masked_svd_linear}
        backends = {name: sorted(inspect.getmodule(function).BACKENDS) for name, function in operators.items()}
        native = extension.instruction_set() or f"{extension.missing}; plain PyTorch runs instead"
        about = {"acip_kernels": __version__, **report.device_description(), "native_kernels": native}
        _print(about | {"backends": backends}, as_json)
        return
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    fields = files.read_json(path / "config.json")
    acip = _acip_fields(path)
    about = {"path": str(path), "model_type": fields.get("model_type"), "kind": acip.get("kind", "dense")}
    if is_published(fields):
        about |= {"kind": "published ACIP checkpoint", "model_type": fields.get("model_type")}
        about["base_model"] = base_name(fields)
        about["to_use_it"] = f"acip import {path} --base MODEL -o DIRECTORY"
    elif (path / "factors.safetensors").exists():
        about["kind"] = "plain nn.Linear pairs (acip export --form factors)"
    if about["kind"] == "elastic":
        from .compress.result import CompressionResult

        result = CompressionResult.load(path)
        about |= {"compact": acip.get("compact", False), "run_ended_at": result.size_ratio}
        about["layers"] = len(acip["layers"])
        sizes = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        cuts = {size: result.cut(size) for size in sizes}
        about["sizes"] = {
            f"{size:g}": {**cut.ratios, "parameters": cut.parameters, "adapters": cut.adapters}
            for size, cut in cuts.items()
        }
    elif about["kind"] == "materialized":
        about |= {key: acip[key] for key in ("size_ratio", "count", "factorized", "stored", "adapters") if key in acip}
        if acip.get("quantized"):
            dense = acip["quantized"]["dense"]
            about["quantized"] = {key: value for key, value in acip["quantized"].items() if key != "dense"}
            about["quantized"]["dense_layers"] = len(dense)
        if acip.get("embeddings"):
            about["embeddings"] = acip["embeddings"]
        about["low_rank_layers"] = len(acip.get("ranks", {}))
        about["ranks"] = acip.get("ranks", {})
    weights = list(path.glob("*.safetensors"))
    about["file_bytes"] = sum(file.stat().st_size for file in weights)
    _print(about, as_json)


@app.command()
def verify(
    path: Annotated[
        pathlib.Path, typer.Argument(help="An elastic or materialized checkpoint, or an export, of this package.")
    ],
    as_json: Json = False,
):
    """Whether every byte of a directory is as it was saved: after a copy, a download, or years on a disk.

    All of it is read and compared with checksums.json, which was written along; what is damaged or missing is named, by
    its tensor, and the exit status is 1. Loading does not do this: it reads what it needs.

    Example: `acip verify smol-60`
    """
    from . import checksums
    from .compress.progress import RunProgress

    with RunProgress(enabled=not as_json) as shown, shown.counting("verify", "bytes") as progress:
        found = checksums.verify(path, progress=progress)
    _print({"path": str(path), "as_saved": True, **found}, as_json)


@app.command()
def plot(
    source: Annotated[
        pathlib.Path,
        typer.Argument(
            help="A run's directory, an elastic or materialized checkpoint, or a JSON file of `evaluate -o`."
        ),
    ],
    output: Annotated[
        pathlib.Path | None,
        typer.Option("--output", "-o", help="Directory for the plots; `plots` in SOURCE if not given."),
    ] = None,
    size_ratio: Annotated[
        float | None, typer.Option("--size-ratio", "-s", help="Size of the heat map of ranks.")
    ] = None,
    x: Annotated[str, typer.Option(help="Perplexity against: stored, factorized or file_bytes.")] = "stored",
    as_json: Json = False,
):
    """Plots (PNG and SVG): loss, λ and size over the run; ranks left per layer; perplexity against size.

    Example: `acip plot runs/smol`
    """
    from . import report

    if source.is_file():
        target = output or source.parent / "plots"
        written = report.plot_perplexity(_rows(source), target / f"perplexity-{x}", x=x)
    elif source.is_dir():
        target, written = output or source / "plots", ()
        histories = [file for file in (source / "history.jsonl", source.parent / "history.jsonl") if file.exists()]
        if histories:
            written += report.plot_history(report.read_history(histories[0]), target / "history")
        checkpoint = source / "elastic" if (source / "elastic").is_dir() else source
        if _is_elastic(checkpoint):
            from .compress.result import CompressionResult

            result = CompressionResult.load(checkpoint)
            ratio = size_ratio or (result.config.stop_ratio if result.config else 0.5)
            # As in the run, where the adapters were not yet ranks.
            written += report.plot_ranks(
                _ranks(result.cut(ratio, adapters="drop", **({"forms": result.config.forms} if result.config else {}))),
                target / f"ranks-{ratio:g}",
            )
        elif (checkpoint / "config.json").exists():
            acip = _acip_fields(checkpoint)
            if acip.get("ranks"):
                written += report.plot_ranks(_stored_ranks(checkpoint, acip["ranks"]), target / "ranks")
    else:
        raise ValueError(f"{source} does not exist")
    if not written:
        raise ValueError(f"{source} holds nothing to plot: no history.jsonl, no checkpoint with low-rank layers")
    _print({"plots": [str(path) for path in written]}, as_json)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Hub name or directory; SmolLM2-135M if not given.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Text, see `compress --help`; Wikipedia articles if not given.")
    ] = None,
    output: Annotated[
        pathlib.Path, typer.Option("--output", "-o", help="Directory for models, log and plots.")
    ] = pathlib.Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(help="Pruning steps; as many as fit the time if not given.")] = None,
    minutes: Annotated[float, typer.Option(help="Time that the whole demo may take.")] = 10.5,
    cache: Annotated[pathlib.Path | None, typer.Option(help="Where what is fetched is kept.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
):
    """From nothing to a compressed model, its price at every size, and plots: one command, some minutes.

    Example: `acip demo`

    Example: `acip demo --model Qwen/Qwen2.5-0.5B --data wikitext2 --minutes 60 -o runs/qwen`
    """
    from .demo import run_demo

    summary = run_demo(
        model=model,
        data=data,
        output=output,
        steps=steps,
        minutes=minutes,
        cache=cache,
        device=_device(device),
        dtype=dtype,
        console=console,
    )
    if as_json:
        _print(summary, True)


# ---- shared


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _load(name: str, device: str, dtype: str, size_ratio: float | None = None):
    """`(model on the device, tokenizer)` of a hub name or a directory of any kind."""
    import torch
    from transformers import AutoModelForCausalLM

    from . import load
    from .compress.config import compute_dtype

    where = torch.device(_device(device))
    options = {"dtype": compute_dtype(dtype, where)}
    if pathlib.Path(name).is_dir():
        model = load(name, size_ratio, **options)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name} is neither a directory nor a model that can be fetched: {reason}") from None
    return model.to(where), _tokenizer(name)


def _tokenizer(*names):
    """The tokenizer of the first of these that has one; None among them is nothing."""
    from transformers import AutoTokenizer

    bases = {name: _published_base(name) for name in names if name is not None}
    # A published checkpoint need not hold one, and the model that it was made from does: the last to be asked, as it
    # may have to be fetched.
    places = [name for name, base in bases.items() if base is None or list(pathlib.Path(name).glob("tokenizer*"))]
    places += [base for base in bases.values() if base is not None]
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError):
            continue
    raise ValueError(f"{places[0]} holds no tokenizer: copy its files there, or name the model that has it")


def _published_base(name) -> str | None:
    """The model that a published ACIP checkpoint says it was made from; None for whatever else."""
    from . import files
    from .models.foreign import base_name, is_published

    config = pathlib.Path(name) / "config.json"
    fields = files.read_json(config) if config.is_file() else {}
    return base_name(fields) if is_published(fields) else None


def _tokenizer_if_any(*names):
    try:
        return _tokenizer(*names)
    except ValueError as error:
        logging.getLogger("acip_kernels").warning("%s; without it only token ids can be given", error)
        return None


def _quantized_by(batches: list, factorized, size_ratio: float, options: dict, scheme: dict):
    """`materialize`, rounding in the metric of the inputs that the model of this size has on `batches`."""
    from . import materialize as cut_at
    from .compress.basis import layer_covariances
    from .compress.factorize import svd_layers
    from .compress.step import with_labels

    names = list(svd_layers(factorized))
    plain = cut_at(factorized, size_ratio, **options)
    with console.status("inputs of every layer …"):
        covariances, _ = layer_covariances(plain, names, [with_labels(batch, plain.device) for batch in batches])
    return cut_at(factorized, size_ratio, covariances=covariances, **options, **scheme).eval()


def _is_elastic(path) -> bool:
    from . import files
    from .models.foreign import is_published

    path = pathlib.Path(path)
    if not (path / "config.json").exists():
        return False
    return is_published(files.read_json(path / "config.json")) or _acip_fields(path).get("kind") == "elastic"


def _acip_fields(path: pathlib.Path) -> dict:
    """What a directory's config.json says in this package's format, checked; nothing for any other."""
    from . import files
    from .models.quantizer import AcipConfig

    fields = files.read_json(path / "config.json").get("quantization_config")
    ours = isinstance(fields, dict) and fields.get("quant_method") == "acip"
    return AcipConfig(**fields).to_dict() if ours else {}


def _rows(path: pathlib.Path) -> list[dict]:
    """The rows of what `evaluate -o` wrote."""
    from . import files

    rows = files.read_json(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has no rows: it is not what `acip evaluate -o` writes")
    return rows


def _ranks(cut) -> dict[str, tuple[int, int]]:
    return {name: (int(live.sum()), live.numel()) for name, live in cut.live.items()}


def _stored_ranks(path, ranks: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Ranks of a materialized checkpoint beside what they could be, as the model in its config is wide."""
    from .models.quantizer import layers_to_replace
    from .models.saving import described_model
    from .models.targets import weight_of

    layers = layers_to_replace(described_model(path), ranks)
    return {name: (rank, min(weight_of(layers[name]).shape)) for name, rank in ranks.items()}


def _about(model, directory) -> dict:
    from . import evaluate as measure

    row = measure.table_row(model, "materialized", directory=directory)
    return {
        key: row[key] for key in ("size_ratio", "factorized", "stored", "parameters", "file_bytes", "flops_per_token")
    }


def _print(result: dict, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in result.items():
        if isinstance(value, dict):
            value = "\n".join(f"{name}: {_short(one)}" for name, one in list(value.items())[:16])
        elif isinstance(value, list):
            value = "\n".join(map(str, value))
        table.add_row(f"[bold]{key}[/]", _short(value))
    Console().print(table)


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    return str(value)


if __name__ == "__main__":
    main()
