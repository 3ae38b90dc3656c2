"""Write the measured numbers into README.md and docs/training.md: `python -m bench.readme [runs/demo/summary.json]`.

The README's are those of `make demo`; with a path, that summary is first stored under `bench/results/`, and its plots
under `docs/`. The training page's are those of `bench.training_step` and its neighbours, the quality page's those of
`bench.quality`, the decoding page's those of `bench.decode_cpu`, `bench.generate` and `bench.prompt`. So no number
there is typed by hand; a test compares them with what this file makes of the stored results.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import sys

from acip_kernels import files, report

from . import (
    cuda_builds,
    cuda_profile,
    decode_configs,
    decode_cpu,
    generate,
    kernel_builds,
    kernels_gpu,
    many_devices,
    prompt,
    quality,
    quality_bits,
    quality_rounding,
    quality_search,
    quality_tasks,
    training_parts,
    training_profile,
    training_routes,
    training_step,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
README, TRAINING, QUALITY = ROOT / "README.md", ROOT / "docs" / "training.md", ROOT / "docs" / "quality.md"
DECODING, GPU = ROOT / "docs" / "decoding.md", ROOT / "docs" / "gpu.md"
MANY_DEVICES = ROOT / "docs" / "many-devices.md"
RESULT = ROOT / "bench" / "results" / "demo.json"
BEGIN, END = "<!-- made by bench/readme.py -->", "<!-- end -->"


def block(summary: dict) -> str:
    """The README's section of measured numbers."""
    device, run, on = summary["device"], summary["run"], summary["perplexity_on"]
    lines = [
        report.markdown_table(summary["rows"]),
        f"{summary['model']} on {summary['data']}: ranked on {run['calibration_tokens'] / 1000:.0f} k tokens and "
        f"trained for {run['steps']} steps ({run['tokens'] / 1000:.0f} k tokens); perplexity over {on['windows']} "
        f"windows of {on['context']} tokens spread over {on['tokens'] / 1000:.0f} k held-out ones; speeds through "
        f"stock `generate`, the compressed models as `load(…, fuse=True)` gives them. {device['device']}, "
        f"{device['cores']} cores, {device['dtype']}, torch {device['torch']}, "
        f"transformers {device['transformers']}, {device['date'][:10]}; {summary['seconds'] / 60:.1f} minutes, "
        f"{summary['peak_memory_bytes'] / 1e9:.1f} GB at the peak.",
        *longer_run(),
        "",
        decoding_speed(),
        "",
        "![Perplexity against size](docs/demo-perplexity.svg)",
        "",
        f"What it costs, in words: greedy continuations of “{summary['prompts'][0]}”",
        "",
        "| model | continuation |",
        "| --- | --- |",
    ]
    for name, samples in summary["samples"].items():
        text = " ".join(samples[0].replace("|", "\\|").split())
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines) + "\n"


def longer_run(results: pathlib.Path = quality.RESULTS) -> list[str]:
    """What `bench.quality`'s run of the same recipe comes to, against the dense model."""
    stored = {(one["method"], one["seed"]): one for one in quality.read_results(results)}
    dense = stored["dense", 0]["rows"][0]["wikipedia"]
    nested = stored["nested", 0]
    rows = [row for row in nested["rows"] if "wikipedia" in row]
    times = ", ".join(f"{row['wikipedia'] / dense:.2f} at {100 * row['size_ratio']:.0f} %" for row in rows)
    text = (
        f"A run of {nested['setting']['config']['steps']} steps, {nested['seconds'] / 60:.0f} minutes on "
        f"{nested['device']['threads']} of the same cores with other work beside it, brings the perplexity, in terms "
        f"of the dense model's, to {times}."
    )
    if ("dense_tuned", 0) in stored:
        tuned = stored["dense_tuned", 0]["rows"][0]["wikipedia"] / dense
        weights = [stored[name, 0]["setting"]["config"]["distillation"] for name in ("dense_tuned", "nested")]
        other = "" if len(set(weights)) == 1 else f" (with a teacher of weight {weights[0]:g}, not {weights[1]:g})"
        text += (
            " Part of that is learning the kind of text: the same training at full size alone "
            f"comes to {tuned:.2f}{other}."
        )
    return ["", text]


def decoding_speed(result: pathlib.Path = ROOT / "bench" / "results" / "generate-amd-epyc.json") -> str:
    """How much faster whole models decode at the smallest size, of `bench.generate`'s rows."""
    found = files.read_json(result)
    size = min(generate.RATIOS)

    def times(model: str, variant: str, loop: str) -> str:
        rows = next(one["rows"] for one in found["models"] if one["model"] == model)
        row = next(r for r in rows if (r["variant"], r["ratio"], r["loop"]) == (variant, size, loop))
        return f"{row['times_dense']:.1f}"

    ways = (generate.FUSED, generate.INT4, generate.INT4_ALL)
    plain, compiled = (
        [times(generate.LLAMA, way, loop) for way in ways] for loop in (generate.GENERATE, generate.COMPILED)
    )
    smol, *two = (
        times(model, way, generate.GENERATE)
        for model, way in (
            (generate.SMOL, generate.FUSED),
            (generate.SMOL, generate.TWO),
            (generate.LLAMA, generate.TWO),
        )
    )
    device = found["device"]
    return (
        f"Decoding at {100 * size:.0f} %, fused, as times the dense model's tokens in a second, {device['cores']} "
        f"cores of an {device['device']}, bfloat16, both through stock `generate`: SmolLM2-135M {smol}; a model of "
        f"Llama-3.2-1B's shape {plain[0]}, with int4 factors {plain[1]}, with int8 embeddings besides {plain[2]} (both "
        f"sides compiled: {', '.join(compiled)}). Two `F.linear` a layer come to {two[0]} and {two[1]}."
    )


def training_block(results: pathlib.Path = ROOT / "bench" / "results") -> str:
    """The training page's section of measured numbers: everything that was measured, by device."""
    parts = []
    for path in sorted(results.glob("training_step-*.json")):
        summary = files.read_json(path)
        device, setting = summary["device"], summary["setting"]
        parts.append(f"### {device['device']}, {device['cores']} cores, {device['dtype']}\n")
        versions = (
            f"torch {device['torch']}, transformers {device['transformers']}, peft {device['peft']}, "
            f"{device['date'][:10]}."
        )
        adapters = f"r = {setting['adapter_rank']}, dropout {setting['dropout']}; medians"
        parts.append(
            f"{versions} {setting['model']}, {setting['batch']} × {setting['length']} tokens, "
            f"{adapters} of {setting['rounds']} rounds, "
            f"variants in turns; matrix products at {summary['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s.\n"
        )
        parts.append(training_step.steps_table(summary["rows"]))
        if "earlier" in summary:
            earlier = summary["earlier"]
            parts.append(f"Measured earlier, on {earlier['date'][:16].replace('T', ' at ')}: {earlier['about']}.\n")
        if "run" in summary:
            parts.append("A whole run, the same number of steps on the same tokens:\n")
            parts.append(training_step.run_table(summary["run"]))
        if summary.get("layers"):
            tokens = ", ".join(sorted({f"{row['tokens']:,}" for row in summary["layers"]}))
            parts.append(f"One layer of Llama-3.1-8B's shapes (out × in), {tokens} tokens, forward and backward:\n")
            if "graph" in summary["layers"][0]:
                parts[-1] = parts[-1].replace(":\n", "; “graph”: replays of a CUDA graph:\n")
            parts.append(training_step.layers_table(summary["layers"]))
        profile = path.with_name(path.name.replace("training_step", "training_profile"))
        if profile.exists():
            profiled = files.read_json(profile)
            parts.append("Where the time of one step goes, by torch's profiler:\n")
            parts.append(training_profile.table(profiled["seconds"]))
            parts.append(memory_lines(profiled["formula_bytes"], summary["rows"]))
        parts.append(reading(summary))
        choices = path.with_name(path.name.replace("training_step", "training_parts"))
        if choices.exists():
            parts.append("Single choices, the one that was taken first:\n")
            parts.append(training_parts.table(files.read_json(choices)["rows"]))
        routes = path.with_name(path.name.replace("training_step", "training_routes"))
        if routes.exists():
            rows = files.read_json(routes)["rows"]
            parts.append("Both routes, measured and counted:\n")
            parts.append(training_routes.table(rows))
    if not any("cuda" in path.name or "nvidia" in path.name for path in results.glob("training_step-*.json")):
        parts.append("### GPU\n")
        parts.append("Not measured: `make gpu` writes what belongs here.\n")
    return "\n".join(parts)


def decoding_block(results: pathlib.Path = ROOT / "bench" / "results") -> str:
    """The decoding page's section of measured numbers: single layers, then whole models, by device."""
    parts = []
    for path in sorted(results.glob("decode_cpu-*.json")):
        summary = files.read_json(path)
        parts.append(f"### Single layers: {measured_on(summary['device'])}\n")
        parts.append(f"Medians of {summary['setting']['rounds']} rounds. {decode_cpu.stream_line(summary['stream'])}")
        parts.append(decode_cpu.instructions_line(summary.get("instructions", {})) + "\n")
        parts.append(decode_cpu.targets_table(summary["targets"]))
        for dtype in dict.fromkeys(row["dtype"] for row in summary["rows"]):
            rows = [row for row in summary["rows"] if row["dtype"] == dtype]
            parts.append(f"{dtype}, µs a call, of weights that come from memory:\n")
            parts.append(decode_cpu.short_table(rows))
            if any(row["ratio"] is None and row["variant"] != "dense" for row in rows):
                parts.append("Beside them, weight-only quantization of the dense layer by others:\n")
                parts.append(decode_cpu.peers_table(rows))
    if not parts:
        parts.append("### Single layers\n")
        parts.append("Not measured: `python -m bench.decode_cpu` writes what belongs here.\n")
    models = sorted(results.glob("generate-*.json"))
    for path in models:
        summary = files.read_json(path)
        setting = summary["setting"]
        parts.append(f"### Whole models: {measured_on(summary['device'])}\n")
        parts.append(
            f"Greedy, {setting['prompt']} tokens of prompt and {setting['new_tokens']} new ones, the prompt's time "
            f"counted; medians of {setting['rounds']} rounds; factors of random numbers, of the same size ratio in "
            f"every layer; {summary['peak_memory_bytes'] / 1e9:.1f} GB at the peak.\n"
        )
        if "about" in summary:
            parts.append(f"{summary['about']}.\n")
        if summary["targets"]:
            parts.append(generate.targets_table(summary["targets"]))
        for result in summary["models"]:
            parts.append(f"{result['model']}:\n")
            parts.append(generate.table(result["rows"]))
            if result["profile"]:
                parts.append("Where the time goes, by torch's profiler:\n")
                parts.append(generate.profile_table(result["profile"]))
    if not models:
        parts.append("### Whole models\n")
        parts.append("Not measured: `python -m bench.generate` writes what belongs here.\n")
    for path in sorted(results.glob("prompt-*.json")):
        summary = files.read_json(path)
        parts.append(f"### Prompts: {measured_on(summary['device'])}\n")
        parts.append(
            f"One forward pass, ms (× two `F.linear`); medians of {summary['setting']['rounds']} rounds; models and "
            "variants as above.\n"
        )
        for name in dict.fromkeys(row["model"] for row in summary["rows"]):
            parts.append(f"{name}:\n")
            parts.append(prompt.table([row for row in summary["rows"] if row["model"] == name]))
    return "\n".join(parts)


def gpu_block(results: pathlib.Path = ROOT / "bench" / "results") -> str:
    """The GPU page's section: what the kernels cost, by device, and what they become."""
    parts = []
    measured = sorted(results.glob("kernels_gpu-*.json"))
    for path in measured:
        found = files.read_json(path)
        device = found["device"]
        parts.append(
            f"### {device['device']}\n\ntorch {device['torch']}, Triton {device['triton']}, {device['date'][:10]}; "
            f"reads {found['streaming_bytes_per_s'] / 1e12:.2f} TB/s. Medians of {found['rounds']} replays, variants "
            "in turns, microseconds and × dense.\n"
        )
        parts.append(kernels_gpu.targets_table(found["targets"]))
        kinds = dict.fromkeys(
            (row["kind"], row["what"], row["tokens"] <= max(kernels_gpu.FEW)) for row in found["rows"]
        )
        for kind in kinds:
            some = [r for r in found["rows"] if (r["kind"], r["what"], r["tokens"] <= max(kernels_gpu.FEW)) == kind]
            parts.append(kernels_gpu.table(some))
        timed = path.with_name(path.name.replace("kernels_gpu", "decode_configs"))
        if timed.exists():
            found = files.read_json(timed)
            parts.append(
                "Configs of single launches, and what `plan` makes of them (`python -m bench.decode_configs`):\n"
            )
            parts.append(decode_configs.table(found["rows"], decode_configs.known(found["device"]["device"])))
        profile = path.with_name(path.name.replace("kernels_gpu", "cuda_profile"))
        if profile.exists():
            found = files.read_json(profile)
            parts.append("The CUDA C++ kernels by themselves (`python -m bench.cuda_profile`):\n")
            parts.append(cuda_profile.times_table(found))
            barriers = ", ".join(f"{seconds * 1e6:.1f} µs {launch}" for launch, seconds in found["barriers"].items())
            counted = "Under `ncu`, what was read of memory:" if "counters" in found else ""
            parts.append(f"A second stage of next to no weights: {barriers}. {counted}\n")
            if counted:
                parts.append(cuda_profile.counters_table(found["counters"]))
    if not measured:
        parts.append("`python -m bench.kernels_gpu`, which `make gpu` runs, measures them against these targets:\n")
        parts.append(kernels_gpu.targets_table(kernels_gpu.targets([])))
    path = results / kernel_builds.RESULTS.name
    if path.exists():
        found = kernel_builds.read_result(path)
        parts.append(
            f"What the launches that `plan` chooses are compiled to, by Triton {found['triton']} ahead of time, "
            f"torch {found['torch']}, {found['date'][:10]}; from the "
            f"smallest to the largest of {len(found['rows'])} builds.\n"
        )
        parts.append(kernel_builds.table(found["rows"]))
    parts.append(cuda_block(results / cuda_builds.RESULTS.name))
    return "\n".join(parts)


def cuda_block(path: pathlib.Path) -> str:
    """What the CUDA C++ kernels become, and how they lay out layers."""
    found = files.read_json(path)
    return (
        f"What the CUDA C++ kernels are compiled to, by nvcc {found['nvcc']}, {found['date'][:10]}: machine "
        "instructions as they are written down, what a loop repeats once.\n\n"
        f"{cuda_builds.builds_table(found['builds'])}\n"
        "How they lay out Llama-3.1-8B's layers at half their size, by their own arithmetic: one or two blocks to a "
        "multiprocessor, whose rings of weights take the shared memory. Uneven: how many times its share of the "
        "weights a stage's busiest block reads, over all stages. The floor is weights over the datasheet's "
        "bandwidth; the model is the floor, one latency of memory, and what of each barrier (three latencies of "
        "0.7 µs, assumed) the weights that keep coming do not cover.\n\n"
        f"{cuda_builds.schedules_table(found['schedules'])}"
    )


def measured_on(device: dict) -> str:
    """What a measurement ran on, in a line."""
    parts = [f"{device['device']}, {device['cores']} cores", device.get("instruction_set"), f"torch {device['torch']}"]
    parts += [f"{name} {device[name]}" for name in ("transformers", "torchao") if device.get(name)]
    return ", ".join(part for part in (*parts, device["date"][:10]) if part)


def quality_block(results: pathlib.Path = quality.RESULTS) -> str:
    """The quality page's section of measured numbers."""
    stored = quality.read_results(results)
    parts = quality_tables(stored) if stored else ["The benchmark: not measured yet.\n"]
    if stored:
        parts.append(
            "What the default was before, and is now: the same steps on the same tokens, perplexity on Wikipedia; each "
            "recipe with the seeds' median and range:\n"
        )
        earlier = files.read_json(quality.RECIPES)["recipes"]
        parts.append(quality.recipes_table(earlier, stored))
        parts.append("And on newswire, where it was measured:\n")
        parts.append(quality.recipes_table(earlier, stored, "news"))
    beside = results.parent / quality_tasks.RESULTS.name
    if beside.exists():
        found = files.read_json(beside)
        parts.append(
            f"The same checkpoint on two tasks made of the held-out articles, {found['examples']} examples each (chance"
            " is 50 % for the order of two sentences; ± is the standard error):\n"
        )
        parts.append(quality_tasks.table(found))
        parts.append("And in words, greedily:\n")
        parts.append(quality_tasks.samples(found))
    bits = results.parent / quality_bits.RESULTS.name
    if bits.exists():
        found = files.read_json(bits)
        parts.append(
            "Rank or bits: perplexity and megabytes of the whole file, of which embeddings stay in "
            f"{found['device']['dtype']}; {found['windows']} windows of the Wikipedia text. In bold what no other file "
            "beats in both. `importance` at size 1 is the dense model:\n"
        )
        parts.append(quality_bits.table(found))
    rounding = results.parent / quality_rounding.RESULTS.name
    if rounding.exists():
        found = files.read_json(rounding)
        parts.append(
            "What int4 in groups of 64 costs by what rounding is told of the layers' inputs: by how much the loss of a "
            "token rises, in nats. The model itself, of full rank, on the validation articles, "
            f"{found['windows']} windows, where it has a perplexity of {found['perplexity']:.1f}. "
            f"{found['device']['device']}, torch {found['device']['torch']}, {found['device']['date'][:10]}:\n"
        )
        parts.append(quality_rounding.table(found))
    trials = files.read_json(results.parent / "quality_trials.json")
    device = trials["device"]
    parts.append(
        f"Trials before the recipe was chosen. {trials['about']}; dense {trials['dense']:.1f}. {device['device']}, "
        f"{device['cores']} cores, {device['dtype']}, torch {device['torch']}, transformers {device['transformers']}, "
        f"{device['date']}.\n"
    )
    sizes = ("0.9", "0.8", "0.6", "0.4")
    lines = [
        [row["ranking"], row["training"], *(f"{row[size]:.1f}" if size in row else "–" for size in sizes)]
        for row in trials["rows"]
    ]
    parts.append(training_step.markdown(["ranking", "training", *sizes], lines, left=2))
    parts.append(search_table(files.read_json(results.parent / "quality_search.json")))
    return "\n".join(parts)


def search_table(trials: dict) -> str:
    """The trials of `bench.quality_search`, in the order in which they were made."""
    devices = dict.fromkeys(
        f"{d['device']}, {d['cores']} cores, torch {d['torch']}, transformers {d['transformers']}, {d['date'][:10]}"
        for d in (row["device"] for row in trials.values())
    )
    sizes = [f"{size:g}" for size in quality_search.SIZES]
    lines = [
        [
            row["about"],
            f"{row['training_tokens'] / 1000:.0f} k",
            *(f"{row['perplexity'][size]:.1f}" if size in row["perplexity"] else "–" for size in sizes),
        ]
        for row in trials.values()
    ]
    return (
        "Trials of recipes, on the same validation articles, "
        f"{quality_search.WINDOWS} windows; one seed. {'; '.join(devices)}.\n\n"
        + training_step.markdown(["what was trained, and how", "tokens", *sizes], lines)
    )


# What the picture in bytes calls `bench.quality_bits`' ways to store weights, of those that it shows.
_NUMBERS = {
    "int8": "int8",
    "int4": "int4",
    "int8, embeddings too": "all int8",
    "int4, embeddings int8": "int4, int8",
}


def quality_plots(results: pathlib.Path = quality.RESULTS, into: pathlib.Path = ROOT / "docs") -> None:
    """The quality page's pictures: the first seed of every method; and in bytes, nested in other numbers."""
    rows = [
        row for one in quality.read_results(results) if one["seed"] == 0 for row in one["rows"] if "perplexity" in row
    ]
    bits = results.parent / quality_bits.RESULTS.name
    stored = files.read_json(bits)["rows"] if bits.exists() else []
    quantized = [
        row | {"method": _NUMBERS[row["weights"]]}
        for row in stored
        if row["method"] == "nested" and row["weights"] in _NUMBERS
    ]
    few = [row for row in rows if row["method"] in ("dense", "nested", "acip", "svd_llm")]
    for name, x, some in (("size", "factorized", rows), ("bytes", "file_bytes", quantized + few)):
        png, _ = report.plot_perplexity(some, into / f"quality-{name}", x=x)
        png.unlink()


def quality_tables(stored: list[dict]) -> list[str]:
    """What `bench.quality` has measured."""
    setting, device = stored[0]["setting"], stored[0]["device"]
    parts = [
        f"SmolLM2-135M-Instruct, {device['device']}, {device['dtype']}, torch {device['torch']}, "
        f"transformers {device['transformers']}, {device['date'][:10]}. "
        f"Windows of {setting['context']} tokens, {setting['windows']} spread over a text; all methods calibrated on "
        f"the same {setting['calibration_tokens'] / 1000:.0f} k tokens. Sizes are what is stored of the factorized "
        "layers, everything in them counted.\n"
    ]
    for text, name in (
        ("wikipedia", "Wikipedia, held-out articles"),
        ("quick", f"the first {quality.QUICK} windows of the same articles, where the dense model does better"),
        ("news", "newswire, which no method has seen"),
    ):
        if not any(text in row for result in stored for row in result["rows"]):
            continue
        parts.append(f"Perplexity on {name}:\n")
        parts.append(quality.table(stored, text))
        if text == "wikipedia":
            parts.append("![Perplexity against the size of the layers](quality-size.svg)\n")
            parts.append("![Perplexity against the bytes of the file](quality-bytes.svg)\n")
            parts.append(
                "In the second picture, nested and the others are in bfloat16; int8 and int4 are nested with its layers"
                " in these, “all int8” and “int4, int8” have the embeddings and the output head in int8 besides.\n"
            )
    return parts


def memory_lines(by_size: dict, rows: list[dict]) -> str:
    """The formula's bytes beside the measured peak, which holds the whole model, its activations and PyTorch too."""
    peaks = {row["ratio"]: row["memory"]["peak_bytes"] for row in rows if row["variant"] == "ours" and row["memory"]}
    lines = [
        [f"{100 * float(size):.0f} %", *(f"{value / 1e9:.2f}" for value in found.values()),
         f"{sum(found.values()) / 1e9:.2f}", f"{peaks[float(size)] / 1e9:.2f}" if float(size) in peaks else "–"]
        for size, found in by_size.items()
    ]  # fmt: skip
    head = ["GB at live size", "frozen", "trained", "kept", "the layers in all", "measured peak of the process"]
    return training_step.markdown(head, lines)


def reading(summary: dict) -> str:
    """What the table says, in words."""
    rows = {(row["variant"], row["ratio"]): row for row in summary["rows"]}
    peft, full, small = rows["peft", 1.0], rows["ours", 1.0], rows["ours", 0.4]

    def against(row: dict) -> str:
        operations, time = row["flops"] / peft["flops"], row["to_peft"]["median"]
        return f"{operations:.2f} times the operations of LoRA on the dense model, and {time:.2f} times its time"

    return f"At full size a step is {against(full)}; at 40 %, {against(small)}.\n"


def with_block(text: str, made: str) -> str:
    """`text` with its section made anew."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no section between {BEGIN} and {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{made}{END}", text)


def main(source: str | None = None) -> None:
    if source is not None:
        summary = files.read_json(source)
        # Paths of the machine that measured are nobody's business.
        summary.pop("plots", None)
        files.write_json(RESULT, summary)
        plots = pathlib.Path(source).parent / "plots"
        for name in ("perplexity", "history", "ranks-0.6"):
            shutil.copyfile(plots / f"{name}.svg", ROOT / "docs" / f"demo-{name}.svg")
    made = {README: block(files.read_json(RESULT)), TRAINING: training_block(), QUALITY: quality_block()}
    made |= {DECODING: decoding_block(), GPU: gpu_block(), MANY_DEVICES: many_devices.block()}
    quality_plots()
    for path, text in made.items():
        files.write_text(path, with_block(path.read_text("utf-8"), text))


if __name__ == "__main__":
    main(*sys.argv[1:])
