"""What a run leaves for people to read: tables, plots, and the readings of its history.

A *row* is a dict about one model: `{"method": "dense" | "acip" | "svd" | …, "size_ratio": target,
"factorized": ratio over the factorized layers, "stored": ratio over everything stored, "parameters": int,
"file_bytes": int, "perplexity": float, "decode_tokens_per_s": float, "prefill_tokens_per_s": float}`. Ratios
are what is left of the dense model. Only the method must be there; what is missing or None is shown as "–" or
not drawn.
"""

import datetime
import functools
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import statistics

# Okabe and Ito's colours, told apart with any colour vision; ACIP is always the first, plain SVD the second.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_GREY = "#555555"
_STYLE = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    # Text stays text in an SVG (searchable, and small), and two equal plots are equal files.
    "svg.fonttype": "none",
    "svg.hashsalt": "acip_kernels",
}


# ---- tables


def rich_table(rows):
    """`rows` as a rich.table.Table. Raises ValueError for no rows or one without a method."""
    from rich.table import Table

    _check_rows(rows)
    # Narrow enough for a terminal of 80 columns.
    table = Table(padding=0)
    heads = {"factorized": "factor-\nized", "parameters": "para-\nmeters", "perplexity": "perplex-\nity"}
    for name, _, _ in _COLUMNS:
        head = heads.get(name, name.replace(" ", "\n"))
        table.add_column(head, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def markdown_table(rows):
    """`rows` as a Markdown table (a str ending in a newline), its columns padded so that the source reads
    well too.

    Raises ValueError for no rows or one without a method.
    """
    _check_rows(rows)
    lines = [[name for name, _, _ in _COLUMNS], *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    padded = [
        [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs)]
        for pairs in (zip(line, widths, strict=True) for line in lines)
    ]
    rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (padded[0], rule, *padded[1:]))


def _percent(value):
    return f"{100 * value:.1f} %"


def _perplexity(value):
    if not math.isfinite(value):
        return str(value)
    if value <= 1e5:
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


_COLUMNS = (
    ("method", "method", str),
    ("target", "size_ratio", _percent),
    ("factorized", "factorized", _percent),
    ("stored", "stored", _percent),
    ("parameters", "parameters", lambda value: f"{value / 1e6:,.2f} M"),
    ("file", "file_bytes", lambda value: f"{value / 1e6:,.1f} MB"),
    ("perplexity", "perplexity", _perplexity),
    ("decode tok/s", "decode_tokens_per_s", lambda value: f"{value:,.1f}"),
    ("prefill tok/s", "prefill_tokens_per_s", lambda value: f"{value:,.0f}"),
)


def _cells(row):
    return ["–" if row.get(key) is None else show(row[key]) for _, key, show in _COLUMNS]


def _check_rows(rows):
    if not rows:
        raise ValueError("rows is empty")
    for row in rows:
        if not row.get("method"):
            raise ValueError(f"rows: a row has no method: {row}")


# ---- plots


def _styled(plot):
    """Draws in our style and leaves the process's matplotlib settings as they were."""

    @functools.wraps(plot)
    def styled(*args, **kwargs):
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return plot(*args, **kwargs)

    return styled


def _save(figure, stem):
    """Write `figure` as stem.png (150 dpi) and stem.svg, each in one step; returns both paths."""
    paths = []
    for kind, metadata in (("png", {}), ("svg", {"Date": None})):
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=150, metadata=metadata)
        # Not with_suffix: a stem such as "ranks-0.4" has its own dot.
        path = pathlib.Path(f"{os.fspath(stem)}.{kind}")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(content.getvalue())
        os.replace(unfinished, path)
        paths.append(path)
    return tuple(paths)


_SIZES = {
    "stored": ("Size of everything stored, % of the dense model", 100, "{:.0f} % of the size"),
    "factorized": ("Size of the factorized layers, % of the dense ones", 100, "{:.0f} % of the layers"),
    "file_bytes": ("File size, MB", 1e-6, "{:,.0f} MB"),
}


@_styled
def plot_perplexity(rows, stem, *, x="stored"):
    """Perplexity against size: one line a method, the dense model as a horizontal line.

    x: "stored", "factorized" or "file_bytes". The perplexity axis is logarithmic where what is drawn spreads
      over more than 10x. Values above 50 times the worst value of the best method, infinite ones too, are
      drawn at the upper edge with their numbers, and a note says so.

    Writes stem.png and stem.svg and returns their paths. Raises ValueError for an unknown `x`, and for rows
    of which none but dense ones have both values, or none a finite perplexity.
    """
    from matplotlib.figure import Figure

    if x not in _SIZES:
        raise ValueError(f"x must be one of {', '.join(_SIZES)}, got {x!r}")
    dense, lines = _lines(rows, x)
    values = [value for points in lines.values() for _, value in points]
    limit = 50 * min(max(value for _, value in points) for points in lines.values())
    shown = [value for value in [*values, *dense] if value <= limit and math.isfinite(value)]
    if not shown:
        raise ValueError("rows: no perplexity is finite")
    worst = max(shown)
    clipped = [method for method, points in lines.items() if any(value > worst for _, value in points)]
    clipped.sort(key=lambda method: -lines[method][0][1])

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot()
    _scale_axes(axes, lines, min(shown), worst, len(clipped))
    for value in (value for value in dense if value <= worst):
        axes.axhline(value, color=_GREY, linestyle=(0, (5, 3)), linewidth=1.4, zorder=1)
        beside = axes.get_yaxis_transform()
        axes.text(1.01, value, f"dense\n{_short(value)}", transform=beside, va="center", color=_GREY)
    drawn = {}
    for method, points in lines.items():
        # Each clipped method has a height of its own below the upper edge, so that none hides another.
        edge = _height(axes, 0.97 - 0.06 * clipped.index(method)) if method in clipped else None
        drawn[method] = [(size, value if value <= worst else edge, value) for size, value in points]
        _draw_line(axes, drawn[method], edge, *_look(method, lines))
    _label_lines(axes, drawn)
    axes.set_xlabel(_SIZES[x][0])
    axes.set_title(_perplexity_title(lines, dense, x), pad=14)
    if clipped:
        least = _short(min(value for value in values if value > worst))
        note = f"▲ off the scale: perplexities from {least} up ({', '.join(clipped)}) stand at the upper edge"
        figure.supxlabel(note, fontsize=9.5, color=_GREY)
    return _save(figure, stem)


def _lines(rows, x):
    """The perplexities of dense rows, and {method: [(size, perplexity), …] by size} of the others."""
    _check_rows(rows)
    complete = [row for row in rows if not math.isnan(row.get("perplexity") or math.nan)]
    dense = sorted({row["perplexity"] for row in complete if row["method"] == "dense"})
    lines: dict[str, list] = {}
    for row in complete:
        if row["method"] != "dense" and row.get(x) is not None:
            lines.setdefault(row["method"], []).append((_SIZES[x][1] * row[x], row["perplexity"]))
    if not lines:
        raise ValueError(f"rows: none but dense ones have both perplexity and {x}")
    return dense, {method: sorted(points) for method, points in lines.items()}


def _scale_axes(axes, lines, best, worst, clipped):
    """Both axes' scales, with room for the names at the left and for `clipped` methods above."""
    sizes = [size for points in lines.values() for size, _ in points]
    span = (max(sizes) - min(sizes)) or max(sizes)
    # The axes are about 560 points wide, a bold letter about 8.
    names = (8 * max(len(f"{method} {_short(points[0][1])}") for method, points in lines.items()) + 20) / 560
    axes.set_xlim(min(sizes) - 1.08 * span * names / (1 - names), max(sizes) + 0.08 * span)
    logarithmic = worst > 10 * best
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.set_ylim(best / 1.5, worst * (1.6 if not clipped else 2.5 * 1.5**clipped))
    else:
        room = (worst - best) or 0.1 * worst
        axes.set_ylim(max(0, best - 0.2 * room), worst + room * (0.15 + 0.25 * clipped))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("Perplexity, lower is better" + (" (log scale)" if logarithmic else ""))


def _height(axes, fraction):
    """The perplexity at a fraction of the axis's height."""
    return axes.transData.inverted().transform(axes.transAxes.transform((0, fraction)))[1]


def _short(value):
    """A perplexity as a plot shows it: three digits."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else _perplexity(value)


def _look(method, methods):
    """(colour, marker) of a method; ours, ACIP and plain SVD look the same in every plot."""
    order = ["nested", "acip", "svd", *(name for name in methods if name not in ("nested", "acip", "svd"))]
    number = order.index(method)
    # Where colours begin anew, markers are others.
    return _COLOURS[number % len(_COLOURS)], _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)]


def _draw_line(axes, points, edge, colour, marker):
    """One method's line through `points` (size, height, value); dotted to and along the edge."""
    for (size, height, _), (next_size, next_height, _) in itertools.pairwise(points):
        style = ":" if edge in (height, next_height) else "-"
        axes.plot([size, next_size], [height, next_height], style, color=colour, linewidth=1.8, zorder=2)
    for size, height, _ in points:
        axes.plot(size, height, "^" if height == edge else marker, color=colour, markersize=8, zorder=4)


def _label_lines(axes, drawn):
    """Each method's name and number at its smallest size; elsewhere those of the worst and the best one.

    drawn: {method: [(size, height, value), …] by size}.
    """
    lowest = -math.inf
    for method, points in sorted(drawn.items(), key=lambda item: item[1][0][1]):
        size, height, value = points[0]
        # Names of lines that end close together are pushed apart.
        at = axes.transData.transform((size, height))[1] * 72 / axes.figure.dpi
        shift = max(0, lowest + 15 - at)
        lowest = at + shift
        style = {"ha": "right", "va": "center", "weight": "bold", "color": _look(method, drawn)[0]}
        _annotate(axes, f"{method} {_short(value)}", (size, height), (-10, shift), **style)
    groups: list = []
    near = 0.04 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    for size, height, value, colour in sorted(
        (*point, _look(method, drawn)[0]) for method, points in drawn.items() for point in points[1:]
    ):
        if height != value:  # only its number tells what a clipped point is
            _annotate(axes, _short(value), (size, height), (6, 5), fontsize=10, color=colour)
        elif groups and size - groups[-1][0][1] < near:
            groups[-1].append((value, size, colour))
        else:
            groups.append([(value, size, colour)])
    for group in groups:
        # Lines fall to the right, so that above right and below left of a point are free.
        (value, size, colour), *others = sorted(group, reverse=True)
        _annotate(axes, _short(value), (size, value), (6, 6), fontsize=10, color=colour)
        if others:
            value, size, colour = others[-1]
            _annotate(axes, _short(value), (size, value), (-6, -16), ha="right", fontsize=10, color=colour)


def _annotate(axes, text, point, offset, **style):
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
    axes.annotate(text, point, xytext=offset, textcoords="offset points", bbox=box, zorder=3, **style)


def _perplexity_title(lines, dense, x):
    """The best two methods at the smallest size, e.g. "40 % of the size: perplexity 203 with acip, …"."""
    smallest = min(points[0][0] for points in lines.values())
    ends = sorted((points[0][1], method) for method, points in lines.items() if points[0][0] <= 1.05 * smallest)
    parts = [f"{_short(value)} with {method}" for value, method in ends[:2]]
    parts += [f"{_short(value)} dense" for value in dense[:1]]
    return f"{_SIZES[x][2].format(smallest)}: perplexity {', '.join(parts)}"


@_styled
def plot_ranks(ranks, stem):
    """What is left of every layer's rank, as a heat map: projections down, layers across.

    ranks: {module name: (live rank, full rank)}. The first number in a name is its layer, the rest its
      projection, shortened to the last parts that tell it from the others ("q_proj"; "attn.c_proj" beside
      "mlp.c_proj"); a name without a number gets the column "–". Rank numbers are written into the cells
      where they fit.

    Writes stem.png and stem.svg and returns their paths. Raises ValueError for no ranks, or some out of
    range.
    """
    import numpy as np
    from matplotlib.figure import Figure

    if not ranks:
        raise ValueError("ranks is empty")
    for name, (live, full) in ranks.items():
        if not 0 <= live <= full or full < 1:
            raise ValueError(f"ranks[{name!r}] must be (live, full) with 0 <= live <= full, got {(live, full)}")
    places = {name: _place(name) for name in ranks}
    layers = sorted({layer for layer, _ in places.values()})
    projections = list(dict.fromkeys(projection for _, projection in places.values()))
    fraction = np.full((len(projections), len(layers)), np.nan)
    cells = {}
    for name, (layer, projection) in places.items():
        cell = projections.index(projection), layers.index(layer)
        fraction[cell] = ranks[name][0] / ranks[name][1]
        cells[cell] = ranks[name][0]

    figure = Figure(figsize=(min(max(0.4 * len(layers) + 2.6, 7), 20), 0.42 * len(projections) + 1.7))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(fraction, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # At most about forty layer numbers along the axis.
    every = 1 + (len(layers) - 1) // 40
    axes.set_xticks(
        [column + 0.5 for column in range(0, len(layers), every)],
        ["–" if layer == math.inf else str(layer) for layer in layers[::every]],
    )
    axes.set_yticks([row + 0.5 for row in range(len(projections))], _short_names(projections))
    axes.set_xlabel("Layer")
    axes.set_title(_ranks_title(ranks, places, projections), pad=14)
    bar = figure.colorbar(mesh, ax=axes, format=lambda value, _: f"{100 * value:.0f} %", pad=0.01, aspect=12)
    bar.set_label("live rank / full rank")
    bar.outline.set_visible(False)
    _number_cells(axes, fraction, cells)
    return _save(figure, stem)


def _place(name):
    """(layer number, the name without it), from a module name; the layer is inf if there is none."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return math.inf, name
    return int(parts[number]), ".".join(parts[:number] + parts[number + 1 :])


def _short_names(names):
    """The fewest last parts of each dotted name that no other name ends in."""
    short = []
    for name in names:
        parts = name.split(".")
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        alone = (tail for tail in tails if sum(f".{other}".endswith(f".{tail}") for other in names) == 1)
        short.append(next(alone, name))
    return short


def _ranks_title(ranks, places, projections):
    """How much is left, and the projections that keep the largest and the smallest part."""
    left = {}
    for projection, short in zip(projections, _short_names(projections), strict=True):
        pairs = [ranks[name] for name in ranks if places[name][1] == projection]
        left[short] = sum(live for live, _ in pairs) / sum(full for _, full in pairs)
    total = sum(live for live, _ in ranks.values()) / sum(full for _, full in ranks.values())
    title = f"{100 * total:.0f} % of all ranks are left"
    most, least = max(left, key=left.get), min(left, key=left.get)
    if left[most] > left[least]:
        title += f": {100 * left[most]:.0f} % in {most}, {100 * left[least]:.0f} % in {least}"
    return title


def _number_cells(axes, fraction, cells):
    """Write the ranks into their cells, if a legible size fits the narrowest way."""
    figure = axes.figure
    figure.draw_without_rendering()  # only now is the size of a cell known
    width = axes.get_window_extent().width * 72 / figure.dpi / fraction.shape[1]
    # A digit is about 0.64 of the font size wide.
    size = min(9, 0.92 * width / (0.64 * max(len(str(rank)) for rank in cells.values())))
    if size < 6:
        return
    for (row, column), rank in cells.items():
        # Viridis is dark below about a half.
        colour = "white" if fraction[row, column] < 0.55 else "black"
        axes.text(column + 0.5, row + 0.5, str(rank), ha="center", va="center", fontsize=size, color=colour)


@_styled
def plot_history(history, stem):
    """A compression run over its steps: loss, λ and size ratio, with the border between its phases.

    Of a nested run, whose steps have sizes of all kinds: the loss, coloured by size, the learning rate, the sizes.

    history: dicts with `step`, `phase` ("prune" and "tune", or "train"), `loss`, `lambda` or `learning_rate`,
      `size_ratio`; the last three may be missing or None. A step written again after a restart counts once, as
      written last. Tune steps that count from their own start follow on the prune steps.

    Writes stem.png and stem.svg and returns their paths. Raises ValueError for no rows, or one without a step
    or with another phase.
    """
    from matplotlib.figure import Figure

    rows = _timeline(history)
    if rows[0]["phase"] == "train":
        return _plot_nested(rows, stem)
    phases = [[row for row in rows if row["phase"] == phase] for phase in ("prune", "tune")]
    figure = Figure(figsize=(9, 7.4), layout="constrained")
    loss_axes, lambda_axes, size_axes = figure.subplots(3, sharex=True, height_ratios=(2, 1, 1))
    loss_axes.set_xlim(rows[0]["position"] - 1, rows[-1]["position"] + 1)

    medians = []
    for phase in phases:
        steps, losses = _series(phase, "loss")
        medians.append(_running_median(losses))
        loss_axes.plot(steps, losses, "o", color=_COLOURS[5], markersize=3, alpha=0.7)
        loss_axes.plot(steps, medians[-1], "-" if len(steps) > 1 else "o", color=_COLOURS[0], linewidth=2)
    loss_axes.plot([], [], "o", color=_COLOURS[5], markersize=4, label="each step")
    loss_axes.plot([], [], color=_COLOURS[0], linewidth=2, label="running median")
    loss_axes.legend(frameon=False, ncols=2, loc="best")
    loss_axes.set_ylabel("Loss, nats/token")

    steps, values = _series(rows, "lambda")
    positive = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
    if positive:
        lambda_axes.set_yscale("log")
        lambda_axes.plot(*zip(*positive, strict=True), color=_COLOURS[2], linewidth=2, marker=_dot(positive))
    lambda_axes.set_ylabel("λ (log scale)")

    steps, values = _series(rows, "size_ratio")
    size_axes.plot(steps, [100 * value for value in values], color=_COLOURS[1], linewidth=2, marker=_dot(steps))
    if values:
        size_axes.annotate(
            f"{100 * values[-1]:.1f} %",
            (steps[-1], 100 * values[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right" if len(steps) > 1 else "left",
            color=_COLOURS[1],
            weight="bold",
        )
    size_axes.set_ylim(0, 118 * max(values, default=1))
    size_axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    size_axes.set_ylabel("Size left")
    size_axes.set_xlabel("Step")
    size_axes.xaxis.get_major_locator().set_params(integer=True)

    figure.align_ylabels()

    _mark_phases((loss_axes, lambda_axes, size_axes), phases)
    loss_axes.set_title(_history_title(phases, medians), pad=24)
    return _save(figure, stem)


def _plot_nested(rows, stem):
    """A nested run: losses can only be compared at like sizes, so that colour says the size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.4), layout="constrained")
    loss_axes, rate_axes, size_axes = figure.subplots(3, sharex=True, height_ratios=(2, 1, 1))
    loss_axes.set_xlim(rows[0]["position"] - 1, rows[-1]["position"] + 1)
    drawn = [row for row in rows if row.get("size_ratio") is not None and math.isfinite(row.get("loss") or math.nan)]
    sizes = [100 * row["size_ratio"] for row in drawn]
    steps, losses = [row["position"] for row in drawn], [row["loss"] for row in drawn]
    dots = loss_axes.scatter(steps, losses, c=sizes, cmap="viridis", s=14)
    figure.colorbar(dots, ax=loss_axes, label="Size, %")
    loss_axes.set_ylabel("Loss, nats/token")
    steps, rates = _series(rows, "learning_rate")
    rate_axes.plot(steps, rates, color=_COLOURS[2], linewidth=2, marker=_dot(steps))
    rate_axes.set_ylabel("Learning rate")
    size_axes.plot([row["position"] for row in drawn], sizes, ".", color=_COLOURS[1])
    size_axes.set_ylim(0, 105)
    size_axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    size_axes.set_ylabel("Size drawn")
    size_axes.set_xlabel("Step")
    size_axes.xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels()
    span = f", at sizes from {min(sizes):.0f} to {max(sizes):.0f} %" if sizes else ""
    loss_axes.set_title(f"One set of factors trained in {_steps(rows)}{span}")
    return _save(figure, stem)


def _timeline(history):
    """The rows in order, once each, with a `position` on one step axis."""
    for number, row in enumerate(history):
        if not isinstance(row.get("step"), int) or row.get("phase") not in ("prune", "tune", "train"):
            raise ValueError(f"history[{number}] must have an int step and a phase, prune, tune or train: {row}")
    latest = {(row["phase"], row["step"]): row for row in history}
    if not latest:
        raise ValueError("history is empty")
    last_prune = max((step for phase, step in latest if phase == "prune"), default=-math.inf)
    first_tune = min((step for phase, step in latest if phase == "tune"), default=math.inf)
    behind = last_prune + 1 - first_tune if first_tune <= last_prune else 0
    return [
        {**row, "position": step + (behind if phase == "tune" else 0)} for (phase, step), row in sorted(latest.items())
    ]


def _series(rows, key):
    """(positions, values) of the rows with a finite value."""
    rows = [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return [row["position"] for row in rows], [row[key] for row in rows]


def _running_median(values):
    """Medians over a fifteenth of the values, 5 to 101 of them, centred as far as the ends allow."""
    window = min(max(len(values) // 15, 5), 101)
    starts = (min(max(0, i - window // 2), max(0, len(values) - window)) for i in range(len(values)))
    return [statistics.median(values[start : start + window]) for start in starts]


def _dot(values):
    return "o" if len(values) == 1 else None  # a line of one point would not be seen


def _mark_phases(panels, phases):
    """Name the phases above the first panel, and shade the tune phase in all of them."""
    left, right = panels[0].get_xlim()
    prune, tune = phases
    border = (prune[-1]["position"] + tune[0]["position"]) / 2 if prune and tune else right if prune else left
    for axes in panels if tune else ():
        axes.axvspan(border, right, color="#000000", alpha=0.05, linewidth=0)
        if prune:
            axes.axvline(border, color=_GREY, linewidth=1)
    for name, start, stop, rows in (("prune", left, border, prune), ("tune", border, right, tune)):
        if rows:
            above = panels[0].get_xaxis_transform()
            panels[0].text((start + stop) / 2, 1.02, name, transform=above, ha="center", color=_GREY, style="italic")


def _history_title(phases, medians):
    """What each phase did: the size after pruning, the loss before and after tuning."""
    parts = []
    _, ratios = _series(phases[0], "size_ratio")
    if ratios:
        parts.append(f"Pruned to {100 * ratios[-1]:.0f} % of the size in {_steps(phases[0])}")
    if len(medians[1]) > 1:
        parts.append(f"loss {medians[1][0]:.2f} → {medians[1][-1]:.2f} in {_steps(phases[1])} of tuning")
    return "; ".join(parts) or f"Compression run, {_steps(phases[0] + phases[1])}"


def _steps(rows):
    return "1 step" if len(rows) == 1 else f"{len(rows)} steps"


# ---- what a results file starts from


def read_history(path):
    """The rows of a history.jsonl, a list of dicts.

    A last line without a newline that cannot be read was torn by a kill, and is left out. Raises ValueError,
    naming file and line, for any other line that is no JSON object.
    """
    rows = []
    try:
        lines = pathlib.Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    torn = lines.pop()  # what follows the last newline: nothing, or a line without its end
    for number, line in enumerate([*lines, torn] if torn else lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            if number > len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    return rows


def device_description(device=None):
    """What a measurement ran on, for results files.

    device: a torch device or its name; `None` for the GPU if there is one, else the CPU. Returns a dict:
      `device` (the name of the GPU or CPU), `cores` (usable by this process), `threads` (torch's), `python`,
      `torch`, `transformers` (versions; None if not installed), `date` (ISO 8601, UTC).
    """
    import importlib.metadata

    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    try:
        transformers = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        transformers = None
    usable = getattr(os, "sched_getaffinity", None)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": len(usable(0)) if usable else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name():
    try:
        name = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name[1].strip() if name else platform.processor() or platform.machine()
