"""Write the README's table from the committed result of `make demo`: `python -m bench.readme [runs/demo/summary.json]`.

With a path, that summary is first stored under `bench/results/`, and its plots under `docs/`. So no number in the
README is typed by hand; a test compares it with what this file makes of the stored result.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import sys

from acip_kernels import files, report

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "demo.json"
BEGIN, END = "<!-- made by bench/readme.py -->", "<!-- end -->"


def block(summary: dict) -> str:
    """The README's section of measured numbers."""
    device, run, on = summary["device"], summary["run"], summary["perplexity_on"]
    lines = [
        report.markdown_table(summary["rows"]),
        f"{summary['model']} on {summary['data']}, {run['steps']} pruning and {run['tune_steps']} tuning steps "
        f"({run['tokens'] / 1000:.0f} k tokens in all) in the basis of the activations, adapters counted; "
        f"perplexity over {on['windows']} windows of {on['context']} tokens "
        f"spread over {on['tokens'] / 1000:.0f} k held-out ones. {device['device']}, {device['cores']} cores, "
        f"{device['dtype']}, torch {device['torch']}, transformers {device['transformers']}, {device['date'][:10]}; "
        f"{summary['seconds'] / 60:.1f} minutes, {summary['peak_memory_bytes'] / 1e9:.1f} GB at the peak. "
        "`svd` is truncation by the plain singular values alone, at the same size.",
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


def with_block(readme: str, summary: dict) -> str:
    """The README with its section made anew."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"README.md has no section between {BEGIN} and {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{block(summary)}{END}", readme)


def main(source: str | None = None) -> None:
    if source is not None:
        summary = files.read_json(source)
        # Paths of the machine that measured are nobody's business.
        summary.pop("plots", None)
        files.write_json(RESULT, summary)
        plots = pathlib.Path(source).parent / "plots"
        for name in ("perplexity", "history", "ranks-0.6"):
            shutil.copyfile(plots / f"{name}.svg", ROOT / "docs" / f"demo-{name}.svg")
    readme = ROOT / "README.md"
    files.write_text(readme, with_block(readme.read_text("utf-8"), files.read_json(RESULT)))


if __name__ == "__main__":
    main(*sys.argv[1:])
