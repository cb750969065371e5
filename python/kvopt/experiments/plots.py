# SPDX-License-Identifier: Apache-2.0
"""The figure of a run: accuracy against bytes, memory, prefill latency and decode throughput, on one page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvopt.experiments.results import Record, Results, best
from kvopt.files import write_whole

# Okabe and Ito's palette, told apart by colour-blind readers; greys are for what is not quantised.
_GREYS = ("#8c8c8c", "#4d4d4d", "#b8b8b8")
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_HATCHES = ("", "////", "....", "xxxx", "++", "\\\\\\\\")
_BASELINES = ("fp32", "fp16", "bf16")


def draw(results: Results, file: Path, title: str | None = None) -> Path:
    """Draws the four panels of ``results`` into the PNG ``file``, written whole or not at all.

    Args:
        results: of a run.
        file: the path of the picture.
        title: default: the models, the machine and the date.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no records.
        OSError: the file can't be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.legend_handler import HandlerTuple
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install matplotlib") from error
    if not results.records:
        raise ValueError("draw: no records")
    style = _Style(results.records)
    groups = _by_model(results.records)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(13.0, 9.6), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title or _title(results), fontsize=14, fontweight="bold", x=0.012, ha="left")
    panels: Any = figure.subfigures(2, 2)
    _accuracy(panels[0, 0], groups, style)
    _memory(panels[0, 1], groups, style)
    _bars(panels[1, 0], groups, style, "prefill_ms", "c   Prefill latency (ms, lower is better)")
    _bars(panels[1, 1], groups, style, "decode_tok_s", "d   Decode throughput (tokens/s, higher is better)")
    handles, labels = style.legend()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=10, handlelength=3.2,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.6)},
    )  # fmt: skip
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, facecolor="white")
    return write_whole(file, picture.getvalue())


class _Style:
    """Colour by experiment, marker and hatch by cache, the same in all panels."""

    def __init__(self, records: Sequence[Record]) -> None:
        greys, colours = iter(_GREYS * 9), iter(_COLOURS * 9)
        self.experiments = list(dict.fromkeys(record.experiment for record in records))
        recipe = {record.experiment: record.recipe for record in records}
        self.colour = {n: next(greys if recipe[n] in _BASELINES else colours) for n in self.experiments}
        self.caches = list(dict.fromkeys(record.cache for record in records))
        self.marker = {cache: _MARKERS[i % len(_MARKERS)] for i, cache in enumerate(self.caches)}
        self.hatch = {cache: _HATCHES[i % len(_HATCHES)] for i, cache in enumerate(self.caches)}

    def legend(self) -> tuple[list[Any], list[str]]:
        """Handles and labels: a colour per experiment, a hatch and a marker per cache."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        weights = [Patch(facecolor=self.colour[name]) for name in self.experiments]
        if len(self.caches) == 1:
            return weights, list(self.experiments)
        caches = [
            (
                Patch(facecolor="0.55", edgecolor="white", hatch=self.hatch[cache]),
                Line2D([], [], linestyle="", marker=self.marker[cache], markersize=8, markeredgewidth=1.8,
                       markeredgecolor="0.35", markerfacecolor="0.35" if cache == "full" else "white"),
            )
            for cache in self.caches
        ]  # fmt: skip
        return [*weights, *caches], [*self.experiments, *(f"cache {cache}" for cache in self.caches)]


def _accuracy(panel: Any, groups: dict[str, list[Record]], style: _Style) -> None:
    """Perplexity and recall over the bytes of weights and cache; one column per model that was scored."""
    panel.suptitle("a   Accuracy against bytes (weights + cache, bars: ± 1 standard error)", **_PANEL_TITLE)
    scored = {
        m: rs for m, rs in groups.items() if any(r.perplexity is not None or r.recall is not None for r in rs)
    }
    if not scored:
        axes = panel.subplots()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "accuracy was not measured", ha="center", va="center", color="0.4")
        return
    grid = panel.subplots(2, len(scored), sharex="col", squeeze=False)
    for column, (model, records) in enumerate(scored.items()):
        top, bottom = grid[0][column], grid[1][column]
        for record in records:
            if record.model_bytes is None:
                continue
            x = (record.model_bytes + (record.cache_bytes or 0)) / 1e6
            points = [
                (top, record.perplexity, record.perplexity_stderr, 1),
                (bottom, record.recall, record.recall_stderr, 100),
            ]
            for axes, value, error, scale in points:
                if value is not None:
                    axes.errorbar(
                        x, scale * value, yerr=None if error is None else scale * error, markersize=8.5,
                        marker=style.marker[record.cache], color=style.colour[record.experiment],
                        markerfacecolor=style.colour[record.experiment] if record.cache == "full" else "white",
                        markeredgewidth=1.8, capsize=3, elinewidth=1.2,
                    )  # fmt: skip
        top.set_ylabel("perplexity ↓")
        bottom.set_ylabel("recall (%) ↑")
        bottom.set_xlabel(f"MB, {model}")
        for axes in (top, bottom):
            axes.margins(0.08, 0.15)
            _tidy(axes, "both")


def _memory(panel: Any, groups: dict[str, list[Record]], style: _Style) -> None:
    """Stacked bars: weights, then the cache at the end of the timed text."""
    panel.suptitle("b   Memory (MB: weights, and the cache on top of them in black)", **_PANEL_TITLE)
    for axes, (model, records) in zip(_columns(panel, groups), groups.items(), strict=True):
        sized = [record for record in records if record.model_bytes is not None]
        heights = [(r.model_bytes or 0) / 1e6 for r in sized]
        extra = [(r.cache_bytes or 0) / 1e6 for r in sized]
        places = _places(sized)
        for x, record, height, more in zip(places, sized, heights, extra, strict=True):
            axes.bar(x, height, 0.84, color=style.colour[record.experiment], **_edge(style, record))
            axes.bar(x, more, 0.84, bottom=height, color="black")
        totals = [a + b for a, b in zip(heights, extra, strict=True)]
        _label(axes, places, totals, [None] * len(totals), [_short(t) for t in totals])
        _experiments_below(axes, sized, places, model)


def _bars(panel: Any, groups: dict[str, list[Record]], style: _Style, what: str, title: str) -> None:
    """Bars of one measure, each with its ratio to the baseline's."""
    panel.suptitle(title, **_PANEL_TITLE)
    for axes, (model, records) in zip(_columns(panel, groups), groups.items(), strict=True):
        timed = [record for record in records if getattr(record, what) is not None]
        if not timed:
            axes.set_axis_off()
            axes.text(0.5, 0.5, f"{model}: not timed", ha="center", va="center", color="0.4")
            continue
        baseline = best(records)
        values = [float(getattr(record, what)) for record in timed]
        errors = [getattr(record, f"{what}_std", None) for record in timed]
        places = _places(timed)
        for x, record, value, error in zip(places, timed, values, errors, strict=True):
            axes.bar(x, value, 0.84, color=style.colour[record.experiment], **_edge(style, record))
            if error is not None:
                axes.errorbar(x, value, yerr=error, color="black", capsize=3, elinewidth=1.2)
        reference = None if baseline is None else getattr(baseline, what)
        labels = []
        for record, value in zip(timed, values, strict=True):
            better = (
                None if not reference else value / reference if what == "decode_tok_s" else reference / value
            )
            ratio = "" if better is None or record is baseline else f"\n{better:.2f}×"
            labels.append(f"{_short(value)}{ratio}")
        if reference:
            axes.axhline(reference, color="0.35", linewidth=0.9, linestyle=(0, (5, 4)), zorder=0.5)
        _label(axes, places, values, errors, labels)
        _experiments_below(axes, timed, places, model)


_PANEL_TITLE = {"fontsize": 11.5, "x": 0.02, "ha": "left"}


def _by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    models = dict.fromkeys(record.model for record in records)
    return {model: [record for record in records if record.model == model] for model in models}


def _columns(panel: Any, groups: dict[str, list[Record]]) -> list[Any]:
    """One set of axes per model, as wide as it has bars."""
    widths = [len(records) + 0.5 for records in groups.values()]
    return list(panel.subplots(1, len(groups), squeeze=False, gridspec_kw={"width_ratios": widths})[0])


def _places(records: Sequence[Record]) -> list[float]:
    """Where the bars stand: those of one experiment side by side, a gap between experiments."""
    places: list[float] = []
    x = 0.0
    for i, record in enumerate(records):
        if i:
            x += 0.9 if record.experiment == records[i - 1].experiment else 1.3
        places.append(x)
    return places


def _edge(style: _Style, record: Record) -> dict[str, Any]:
    """Hatching tells the caches apart."""
    return {"hatch": style.hatch[record.cache], "edgecolor": "white", "linewidth": 0}


def _label(
    axes: Any,
    places: Sequence[float],
    tops: Sequence[float],
    errors: Sequence[float | None],
    labels: Sequence[str],
) -> None:
    """Writes a label above each bar and its error bar, and makes room for it."""
    clear = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
    reach = [top + (error or 0.0) for top, error in zip(tops, errors, strict=True)]
    for x, y, text in zip(places, reach, labels, strict=True):
        axes.annotate(
            text,
            (x, y),
            (0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7.5,
            bbox=clear,
        )
    axes.set_ylim(0, max(reach) * 1.2)


def _experiments_below(axes: Any, records: Sequence[Record], places: Sequence[float], model: str) -> None:
    """Names each group of bars once, under its middle."""
    middle: dict[str, list[float]] = {}
    for record, x in zip(records, places, strict=True):
        middle.setdefault(record.experiment, []).append(x)
    names = [name.replace("_", "\n", 1).replace("+", "\n+") for name in middle]
    axes.set_xticks([sum(xs) / len(xs) for xs in middle.values()], names, fontsize=8.5)
    only_speed = all("speed only" in record.note for record in records)
    axes.set_xlabel(f"{model}\n(speed only)" if only_speed else model)
    axes.tick_params(axis="x", length=0)
    _tidy(axes, "y")


def _tidy(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _title(results: Results) -> str:
    machine = results.machine
    models = " and ".join(dict.fromkeys(record.model for record in results.records))
    where = ", ".join(machine.get("gpus") or []) or f"{machine.get('cpu')}, {machine.get('threads')} threads"
    return f"{models} on {where} · torch {machine.get('torch')} · {str(machine.get('date'))[:10]}"
