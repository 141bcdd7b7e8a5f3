"""The figures of the report page, as SVG text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from .results import ModelRun, Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS_COLOUR, LINE_COLOUR = "#1f5fbf", "#888888"
DTYPE_COLOURS = {
    "float64": "#7a4fb5",
    "float32": "#1f5fbf",
    "bfloat16": "#d1602b",
    "float16": "#2f8f5b",
    "int8": "#b03060",
}
PEER_MARKERS = "os^Dvp*X"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text: smaller files, and the page can be searched and read aloud.
    mpl.rcParams["svg.fonttype"] = "none"
    # Fixed ids: the same results give the same page.
    mpl.rcParams["svg.hashsalt"] = "ptkernels"
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _label(row: Row) -> str:
    return f"{row.case}  {row.dtype}  {row.direction}"


def speedups(rows: list[Row]) -> str:
    """Bars: ratio to the best peer; markers: ratio to every peer."""
    rows = [row for row in rows if row.ratio is not None]
    figure, axes = _figure(10, 1.6 + 0.28 * len(rows))
    ratios = [row.ratio or 1.0 for row in rows]
    colours = [DTYPE_COLOURS.get(row.dtype, OURS_COLOUR) for row in rows]
    axes.barh(range(len(rows)), [ratio - 1 for ratio in ratios], left=1, color=colours, alpha=0.55)
    for index, peer in enumerate(dict.fromkeys(name for row in rows for name in row.peers)):
        timed = [(row.peers[peer] / (row.seconds or 1), at) for at, row in enumerate(rows) if peer in row.peers]
        marker = PEER_MARKERS[index % len(PEER_MARKERS)]
        axes.plot(*zip(*timed, strict=True), marker, label=peer, color="#333333", markersize=4, fillstyle="none")
    axes.axvline(1.0, color=LINE_COLOUR, linewidth=1)
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("peer's time / ours: above 1, ours is faster (bar: best peer)")
    figure.legend(fontsize=8, loc="outside lower center", ncols=6)
    return _svg(figure)


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def roofline(rows: list[Row], limits: dict[str, Any]) -> str:
    """Achieved rate over arithmetic intensity, under what the machine allows."""
    rows = [row for row in rows if row.seconds and row.work_bytes and row.work_flops]
    figure, axes = _figure(10, 5.5)
    bandwidth = limits["read_bandwidth"]
    intensities = [row.work_flops / row.work_bytes for row in rows] or [1.0]
    low, high = min(intensities) / 4, max(intensities) * 4
    for dtype in dict.fromkeys(row.dtype for row in rows):
        colour = DTYPE_COLOURS.get(dtype, OURS_COLOUR)
        peak = limits["peak_flops"].get(dtype)
        if peak and bandwidth:
            knee = peak / bandwidth
            xs = [low, knee, high] if low < knee < high else [low, high]
            axes.plot(xs, [min(peak, x * bandwidth) for x in xs], color=colour, linewidth=1)
        ours = [
            (row.work_flops / row.work_bytes, row.work_flops / row.seconds)
            for row in rows
            if row.dtype == dtype and row.seconds
        ]
        axes.plot(*zip(*ours, strict=True), "o", color=colour, label=f"{dtype}, ours", markersize=5)
        best = [
            (row.work_flops / row.work_bytes, row.work_flops / row.peers[row.best_peer])
            for row in rows
            if row.dtype == dtype and row.best_peer
        ]
        if best:
            axes.plot(*zip(*best, strict=True), "x", color=colour, label=f"{dtype}, best peer", markersize=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity, FLOP per byte of compulsory traffic")
    axes.set_ylabel("FLOP/s")
    figure.legend(fontsize=8, loc="outside lower center", ncols=6)
    return _svg(figure)


def scaling(rows: list[Row]) -> str:
    """Time over length, a line for every number of threads: solid for ours, dashed for the best peer."""
    kinds = list(dict.fromkeys((row.dtype, row.direction) for row in rows))
    figure, axes = _figure(10, 5.5)
    for dtype, direction in kinds:
        for threads in sorted({row.shape["threads"] for row in rows}):
            line = [
                row for row in rows if (row.dtype, row.direction, row.shape["threads"]) == (dtype, direction, threads)
            ]
            lengths = [row.shape["Lq"] for row in line]
            label = f"{dtype} {direction}, {threads} thread{'s' if threads > 1 else ''}"
            style: dict[str, Any] = {
                "color": DTYPE_COLOURS.get(dtype, OURS_COLOUR),
                "marker": PEER_MARKERS[threads % len(PEER_MARKERS)],
            }
            style["fillstyle"] = "full" if direction == "forward" else "none"
            axes.plot(lengths, [(row.seconds or 0) * 1e3 for row in line], label=label, **style)
            timed = [(row.shape["Lq"], row.peers[row.best_peer] * 1e3) for row in line if row.best_peer]
            if timed:
                axes.plot(*zip(*timed, strict=True), linestyle="--", linewidth=1, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("length of query and key (dashed: best peer)")
    axes.set_ylabel("ms")
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    return _svg(figure)


def model_times(model: ModelRun) -> str:
    """Time of the pretrained model per attention implementation."""
    figure, axes = _figure(7, 0.8 + 0.4 * len(model.seconds))
    names = list(model.seconds)
    bars = axes.barh(names, [model.seconds[name] * 1e3 for name in names], color=OURS_COLOUR, alpha=0.55)
    axes.bar_label(bars, fmt="%.0f ms", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"ms for {model.sentences} sentences")
    return _svg(figure)


def comparison(pairs: list[tuple[Row, Row]], names: tuple[str, str]) -> str:
    """Bars: how many times faster the second run is than the first, per case."""
    figure, axes = _figure(10, 1.2 + 0.28 * len(pairs))
    changes = [(before.seconds or 0.0) / (after.seconds or 1.0) for before, after in pairs]
    colours = ["#2f8f5b" if change >= 1 else "#b03060" for change in changes]
    axes.barh(range(len(pairs)), changes, color=colours, alpha=0.6)
    axes.axvline(1.0, color=LINE_COLOUR, linewidth=1)
    axes.set_yticks(range(len(pairs)), [_label(after) for _, after in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time in {names[0]} / time in {names[1]}: above 1, the second is faster")
    return _svg(figure)


def figures(results: Results) -> list[tuple[str, str]]:
    """Titles and SVG of everything there is to draw in these results."""
    drawn = []
    if any(row.ratio is not None for row in results.rows):
        drawn.append(("Speed against the peers", speedups(results.rows)))
    if any(row.seconds for row in results.rows):
        drawn.append(("Roofline", roofline(results.rows, results.machine["limits"])))
    doubling = [row for row in results.rows if "threads" in row.shape and row.seconds]
    if doubling:
        drawn.append(("Time over length", scaling(doubling)))
    if results.model is not None and results.model.seconds:
        drawn.append((f"{results.model.name} with the attention exchanged", model_times(results.model)))
    return drawn
