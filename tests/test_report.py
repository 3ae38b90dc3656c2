"""report.py: tables read back, plots opened as pictures and as XML, histories with torn ends."""

import datetime
import io
import json
import math
import os
import platform
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from acip_kernels import report

DENSE = {"method": "dense", "size_ratio": 1.0, "stored": 1.0, "factorized": 1.0, "perplexity": 16.7}
ACIP = {1.0: 19.3, 0.8: 65, 0.6: 147, 0.4: 203}
SVD = {1.0: 16.7, 0.8: 1.2e6, 0.6: 2.3e6, 0.4: 4e6}


def make_row(method, ratio, perplexity, **changes):
    row = {
        "method": method,
        "size_ratio": ratio,
        "factorized": ratio,
        "stored": 0.2 + 0.8 * ratio,
        "parameters": int(134_500_000 * ratio),
        "file_bytes": int(269_000_000 * ratio),
        "perplexity": perplexity,
        "decode_tokens_per_s": 12.4 / ratio,
        "prefill_tokens_per_s": 1234.5 / ratio,
    }
    return row | changes


def make_rows(**methods):
    return [DENSE] + [make_row(name, *point) for name, points in methods.items() for point in points.items()]


def check_plot(paths, stem):
    """Both files are there, the picture holds something; returns its (width, height) and the SVG's texts."""
    assert [str(path) for path in paths] == [f"{stem}.png", f"{stem}.svg"]
    assert sorted(os.listdir(stem.parent)) == sorted(path.name for path in paths)  # nothing unfinished
    with Image.open(paths[0]) as picture:
        picture.load()
        assert round(picture.info["dpi"][0]) == 150
        pixels = np.asarray(picture.convert("RGB"))
    dark = (pixels.min(axis=2) < 128).mean()
    assert 0.002 < dark < 0.9
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    root = xml.etree.ElementTree.parse(paths[1]).getroot()
    assert root.tag.endswith("svg")
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    return pixels.shape[1::-1], texts


# ---- tables


def test_markdown_table_is_aligned_and_reads_back():
    rows = [DENSE, make_row("acip", 0.4, 203.456), make_row("svd", 0.4, 1.26e6, decode_tokens_per_s=None)]
    lines = report.markdown_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    header, rule, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header[:4] == ["method", "target", "factorized", "stored"]
    assert rule[0].strip("-") == ""
    assert all(cell.endswith(":") and not cell.startswith(":") for cell in rule[1:])
    assert body[0] == ["dense", "100.0 %", "100.0 %", "100.0 %", "–", "–", "16.70", "–", "–"]
    assert body[1] == ["acip", "40.0 %", "40.0 %", "52.0 %", "53.80 M", "107.6 MB", "203.46", "31.0", "3,086"]
    assert body[2][6:8] == ["1.3e6", "–"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.678, "5.68"),
        (999.99, "999.99"),
        (12345.6, "12,346"),
        (1e5, "100,000"),
        (100001, "1.0e5"),
        (9.96e9, "1.0e10"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_perplexities_in_tables(value, text):
    assert f" {text} " in report.markdown_table([{"method": "svd", "perplexity": value}])


def test_rich_table_has_the_same_cells():
    rows = make_rows(acip=ACIP, svd=SVD)
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(report.rich_table(rows))
    shown = [line.strip("│ ") for line in console.export_text().splitlines() if line.startswith("│")]
    shown = [[cell.strip() for cell in line.split("│")] for line in shown]
    markdown = report.markdown_table(rows).splitlines()[2:]
    assert shown == [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown]
    assert len(shown) == 9


@pytest.mark.parametrize("make", [report.rich_table, report.markdown_table])
def test_tables_want_rows_with_methods(make):
    with pytest.raises(ValueError, match="rows is empty"):
        make([])
    with pytest.raises(ValueError, match="no method"):
        make([DENSE, {"perplexity": 3.0}])


# ---- plots


def test_plot_perplexity_clips_the_hopeless_method_and_says_so(tmp_path):
    stem = tmp_path / "plots-0.4" / "perplexity-0.4"  # the dots are no suffixes
    size, texts = check_plot(report.plot_perplexity(make_rows(acip=ACIP, svd=SVD), stem), stem)
    assert size == (1350, 810)
    assert "52 % of the size: perplexity 203 with acip, 4.0e6 with svd, 16.7 dense" in texts
    assert {"acip 203", "svd 4.0e6", "2.3e6", "1.2e6", "147", "65.0", "19.3"} <= set(texts)
    assert any("off the scale: perplexities from 1.2e6 up (svd)" in text for text in texts)
    assert any("log scale" in text for text in texts)
    assert "Size of everything stored, % of the dense model" in texts
    ticks = [float(text.replace(",", "")) for text in texts if text.replace(",", "").isdecimal()]
    assert max(ticks) <= 1000  # the axis belongs to the curve that can be read


@pytest.mark.parametrize(
    ("x", "label", "title"),
    [
        ("factorized", "Size of the factorized layers, % of the dense ones", "40 % of the layers: "),
        ("file_bytes", "File size, MB", "108 MB: "),
    ],
)
def test_plot_perplexity_against_other_sizes(tmp_path, x, label, title):
    stem = tmp_path / x
    points = {1.0: 5.7, 0.6: 7.3, 0.4: 9.1}
    _, texts = check_plot(report.plot_perplexity(make_rows(acip=points), stem, x=x), stem)
    assert label in texts
    assert any(text.startswith(title) for text in texts)
    assert not any("log scale" in text or "off the scale" in text for text in texts)


def test_plot_perplexity_of_awkward_values(tmp_path):
    awkward = {1.0: math.nan, 0.8: math.inf, 0.4: 1e7}
    stem = tmp_path / "awkward"
    _, texts = check_plot(report.plot_perplexity(make_rows(acip={0.4: 30.0}, asvd=awkward), stem), stem)
    assert {"acip 30.0", "asvd 1.0e7", "inf"} <= set(texts)
    with pytest.raises(ValueError, match="x must be one of"):
        report.plot_perplexity([DENSE], stem, x="width")
    with pytest.raises(ValueError, match="both perplexity and file_bytes"):
        report.plot_perplexity([DENSE, {"method": "acip", "perplexity": 3.0}], stem, x="file_bytes")
    with pytest.raises(ValueError, match="finite"):
        report.plot_perplexity([make_row("acip", 0.5, math.inf)], stem)


PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def test_plot_ranks_writes_layers_projections_and_numbers(tmp_path):
    ranks = {
        f"model.layers.{layer}.{name}": (100 * row + layer, 576)
        for layer in range(30)
        for row, name in enumerate(PROJECTIONS, 1)
    }
    stem = tmp_path / "ranks"
    size, texts = check_plot(report.plot_ranks(ranks, stem), stem)
    assert size[0] > 2 * size[1]
    numbers = [int(text) for text in texts if text.isdecimal()]
    assert sorted(numbers) == sorted([*range(30), *(live for live, _ in ranks.values())])
    rows = [text for text in texts if text.endswith("_proj") and " " not in text]
    assert rows == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    left = sum(live for live, _ in ranks.values()) / (576 * len(ranks))
    assert f"{100 * left:.0f} % of all ranks are left: 72 % in down_proj, 20 % in q_proj" in texts


def test_plot_ranks_colours_are_fractions_of_the_full_rank(tmp_path):
    ranks = {"layers.0.up": (0, 10), "layers.0.down": (20, 20), "layers.1.up": (4, 10)}
    png, _ = report.plot_ranks(ranks, tmp_path / "ranks")
    pixels = np.asarray(Image.open(png).convert("RGB")).reshape(-1, 3)
    viridis = matplotlib.colormaps["viridis"]
    for fraction in (0.0, 0.4, 1.0):
        colour = np.array(viridis(fraction)[:3]) * 255
        close = (np.abs(pixels - colour).max(axis=1) <= 2).mean()
        assert close > 0.05  # a cell's worth, more than the colour bar holds of it


def test_plot_ranks_names_and_many_layers(tmp_path):
    gpt2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ranks = {f"transformer.h.{layer}.{name}": (layer, 4096) for layer in range(120) for name in gpt2}
    stem = tmp_path / "many"
    _, texts = check_plot(report.plot_ranks(ranks | {"lm_head": (7, 4096)}, stem), stem)
    names = [text for text in texts if "_" in text and " " not in text]
    assert names == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head"]
    # No numbers in cells this narrow, and not every layer's number on the axis.
    assert [int(text) for text in texts if text.isdecimal()] == list(range(0, 120, 4))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [({}, "empty"), ({"a.0.q": (5, 4)}, r"'a\.0\.q'"), ({"a.0.q": (-1, 4)}, "live"), ({"a": (0, 0)}, "full")],
)
def test_plot_ranks_names_the_bad_rank(tmp_path, ranks, message):
    with pytest.raises(ValueError, match=message):
        report.plot_ranks(ranks, tmp_path / "ranks")
    assert not any(tmp_path.iterdir())


def make_history(prune=120, tune=30, tune_start=120):
    rows = [
        {"step": step, "phase": "prune", "loss": 3 + step / 60, "lambda": 1e-3 * 1.05**step}
        | {"size_ratio": 1 - 0.6 * step / max(prune - 1, 1), "seconds": 2.0 * step}
        for step in range(prune)
    ]
    return rows + [
        {"step": tune_start + step, "phase": "tune", "loss": 5 - step / 29, "lambda": None, "size_ratio": 0.4}
        for step in range(tune)
    ]


@pytest.mark.parametrize("tune_start", [120, 0, 1])
def test_plot_history_continues_the_steps(tmp_path, tune_start):
    stem = tmp_path / "history"
    size, texts = check_plot(report.plot_history(make_history(tune_start=tune_start), stem), stem)
    assert size == (1350, 1110)
    assert "Pruned to 40 % of the size in 120 steps; loss 4.93 → 4.07 in 30 steps of tuning" in texts
    assert {"prune", "tune", "λ (log scale)", "Size left", "Step", "40.0 %", "running median"} <= set(texts)
    assert "140" in texts


def test_plot_history_of_one_line(tmp_path):
    stem = tmp_path / "history"
    _, texts = check_plot(report.plot_history(make_history(1, 0), stem), stem)
    assert "Pruned to 100 % of the size in 1 step" in texts
    assert "tune" not in texts
    bare = tmp_path / "bare" / "history"
    _, texts = check_plot(report.plot_history([{"step": 3, "phase": "tune", "loss": math.nan}], bare), bare)
    assert "Compression run, 1 step" in texts


def test_a_step_written_again_after_a_restart_counts_once():
    history = make_history(10, 0)
    again = [row | {"loss": 9.0} for row in history[6:8]]
    rows = report._timeline(history[:9] + again)
    assert [row["position"] for row in rows] == list(range(9))
    assert [row["loss"] == 9.0 for row in rows] == [step in (6, 7) for step in range(9)]


def test_plot_history_names_the_bad_row(tmp_path):
    with pytest.raises(ValueError, match="history is empty"):
        report.plot_history([], tmp_path / "history")
    with pytest.raises(ValueError, match=r"history\[1\]"):
        report.plot_history([*make_history(1, 0), {"step": 1, "phase": "rest"}], tmp_path / "history")


def test_running_median_ignores_outliers_and_keeps_the_ends():
    values = [float(value) for value in range(100)]
    values[40] = 1e9
    medians = report._running_median(values)
    assert len(medians) == 100
    # A window of six, shifted at the ends.
    assert medians[:4] == [2.5] * 4
    assert medians[-3:] == [96.5] * 3
    assert max(medians) < 100
    assert report._running_median([7.0]) == [7.0]


def test_plots_leave_matplotlib_as_it_was_and_repeat_exactly(tmp_path):
    before = dict(matplotlib.rcParams)
    rows = make_rows(acip=ACIP, svd=SVD)
    first = [path.read_bytes() for path in report.plot_perplexity(rows, tmp_path / "a")]
    second = [path.read_bytes() for path in report.plot_perplexity(rows, tmp_path / "b")]
    assert first == second
    assert dict(matplotlib.rcParams) == before


# ---- history files and the device


def test_read_history_leaves_out_a_torn_last_line(tmp_path):
    path = tmp_path / "history.jsonl"
    rows = make_history(3, 1)
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(whole)
    assert report.read_history(path) == rows
    path.write_text(whole + '{"step": 4, "phase": "tu')
    assert report.read_history(str(path)) == rows
    path.write_bytes(whole.encode() + '{"step": 4, "phase": "λ'.encode()[:-1])  # torn inside a letter
    assert report.read_history(path) == rows
    path.write_text(whole[:-1])  # only the newline is missing
    assert report.read_history(path) == rows
    path.write_text("")
    assert report.read_history(path) == []


@pytest.mark.parametrize("line", ["", "{", "[1, 2]", "12", '{"step": 1}{"step": 2}'])
def test_read_history_names_file_and_line_of_any_other_bad_one(tmp_path, line):
    path = tmp_path / "history.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl, line 2"):
        report.read_history(path)
    path.write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl, line 2"):
        report.read_history(path)


def test_device_description_fits_a_results_file():
    description = json.loads(json.dumps(report.device_description("cpu")))
    assert description["device"]
    assert 1 <= description["cores"] <= os.cpu_count()
    assert description["threads"] == torch.get_num_threads()
    assert description["torch"] == torch.__version__
    assert description["python"] == platform.python_version()
    assert description["transformers"][0].isdecimal()
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(description["date"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    assert platform.node() not in description.values()
