# SPDX-License-Identifier: Apache-2.0
"""Targets beside what was measured: ``python benchmarks/summary.py results/*.json``.

One line a target: the worst of the figures it covers, all of them, and whether every one reaches it. A target of which
something was not measured says so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Figures = dict[str, float | None]  # by label; None: not measured


class Results:
    """All rows of some files, with what their files say about the run."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.rows: list[Row] = []
        for file in files:
            record = json.loads(file.read_text())
            common = {"device": record["settings"]["device"], "threads": record["threads"]}
            self.rows += [{**common, **row} for row in record["rows"]]

    def one(self, field: str, **what: Any) -> float | None:
        """``field`` of the last row that fits, or None."""
        found = [row[field] for row in self.rows if all(row.get(key) == value for key, value in what.items())]
        return found[-1] if found else None

    def ratio(self, field: str, over: str, contender: str, **what: Any) -> float | None:
        """``field`` of ``over`` divided by that of ``contender``: of two times how often faster ``contender`` is."""
        return _divide(self.one(field, contender=over, **what), self.one(field, contender=contender, **what))

    def best(self, names: str, **what: Any) -> float | None:
        """The shortest median of the contenders whose names begin so."""
        times = [
            row["median_us"]
            for row in self.rows
            if str(row.get("contender")).startswith(names)
            and all(row.get(key) == value for key, value in what.items())
        ]
        return min(times, default=None)


@dataclass(frozen=True)
class Target:
    """``least``: figures must be at least this, else at most."""

    case: str
    goal: float
    figures: Callable[[Results], Figures]
    least: bool = True

    def line(self, results: Results) -> tuple[str, ...]:
        """Cells of its row."""
        figures = self.figures(results)
        known = {label: value for label, value in figures.items() if value is not None}
        worst = (min if self.least else max)(known.values(), default=None)
        reached = "not measured"
        if worst is not None:
            fits = worst >= self.goal if self.least else worst <= self.goal
            reached = "no" if not fits else "yes" if len(known) == len(figures) else "so far"
        details = ", ".join(f"{label} {value:.3g}" for label, value in known.items())
        return (
            *(self.case, f"{'≥' if self.least else '≤'} {self.goal:g}"),
            *("" if worst is None else f"{worst:.3g}", reached, details),
        )


def _divide(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    if not known or any(value is None for value in known):
        return None
    return math.exp(sum(math.log(value) for value in known if value is not None) / len(known))


W4, GATE = "kvopt_int4_g128", "8b_gate_up"
SMALL = (1, 2, 4, 8, 16, 32)
CPU_SHAPES = ("1b_o", "1b_gate_up", "1b_down", "8b_o", GATE)
GPU: dict[str, Any] = {"device": "cuda", "case": "qlinear"}
CPU: dict[str, Any] = {"device": "cpu", "case": "qlinear"}


def _speedup(shapes: Iterable[str], rows: Iterable[int], contender: str = W4) -> Callable[[Results], Figures]:
    return lambda r: {
        f"{shape} M={m}": r.one("speedup", contender=contender, shape=shape, m=m, **GPU)
        for shape in shapes
        for m in rows
    }


def _over_bnb(kind: str) -> Callable[[Results], Figures]:
    return lambda r: {
        f"M={m}": r.ratio("median_us", f"bnb_{kind}", f"kvopt_{kind}", shape=GATE, m=m, **GPU) for m in SMALL
    }


def _beside_w4(kind: str, over: bool, rows: Iterable[int]) -> Callable[[Results], Figures]:
    """Speed of ``kind`` beside W4's, or (``over``) its time over W4's."""
    pair = (kind, W4) if over else (W4, kind)
    return lambda r: {f"M={m}": r.ratio("median_us", *pair, shape=GATE, m=m, **GPU) for m in rows}


def _w8a8(r: Results) -> Figures:
    # beside bf16: the rows of a bf16 run, in whichever case it was
    return {
        f"M={m}": r.one(
            "speedup", contender="kvopt_int8_dyn", shape=GATE, m=m, device="cuda", dtype="bf16", case="w8a8"
        )
        for m in (1024, 2048, 4096, 8192)
    }


def _cpu_each(field: str, contender: str, threads: int, m: int = 1) -> Callable[[Results], Figures]:
    return lambda r: {
        shape: r.one(field, contender=contender, shape=shape, m=m, threads=threads, **CPU)
        for shape in CPU_SHAPES
    }


def _over_ggml(r: Results) -> Figures:
    fixed = {"m": 1, "threads": 2, **CPU}
    return {
        shape: _divide(
            r.best("ggml_q4", shape=shape, **fixed), r.one("median_us", contender=W4, shape=shape, **fixed)
        )
        for shape in CPU_SHAPES
    }


def _cpu_mean(field: str, contender: str, m: int) -> Callable[[Results], Figures]:
    """The geometric mean over the shapes."""
    fixed = {"contender": contender, "m": m, "threads": 2, **CPU}
    return lambda r: {f"mean, M={m}": _mean(r.one(field, shape=shape, **fixed) for shape in CPU_SHAPES)}


def _cpu_w8a8(r: Results) -> Figures:
    return {
        f"M={m}": _mean(
            _divide(
                r.best("torch_dynamic", shape=shape, m=m, threads=2, **CPU),
                r.one("median_us", contender="kvopt_int8_dyn", shape=shape, m=m, threads=2, **CPU),
            )
            for shape in CPU_SHAPES
        )
        for m in (16, 64, 256)
    }


def _end_to_end(field: str, *recipes: str) -> Callable[[Results], Figures]:
    return lambda r: {
        recipe: r.one(field, contender=f"kvopt_{recipe}", model="1b", device="cpu", threads=2, case="decode")
        for recipe in recipes
    }


TARGETS = (
    Target("H200 W4 M=1 8B gate-up, x fp16", 3.5, _speedup([GATE], [1])),
    Target("H200 W4 M=1 8B o, x fp16", 3.2, _speedup(["8b_o"], [1])),
    Target("H200 W4 M=1 1B o, x fp16", 2.7, _speedup(["1b_o"], [1])),
    Target("H200 W4 M=1 1B gate-up, x fp16", 3.3, _speedup(["1b_gate_up"], [1])),
    Target("H200 W4 M=16 8B gate-up, x fp16", 2.8, _speedup([GATE], [16])),
    Target("H200 W4 M=64 8B gate-up, x fp16", 1.8, _speedup([GATE], [64])),
    Target("H200 W4 M=256 8B gate-up, x fp16", 1.0, _speedup([GATE], [256])),
    Target("H200 W4 M>=2048, x fp16", 0.90, _speedup([GATE], [2048, 4096])),
    Target("H200 W4 M=8192, x fp16", 0.95, _speedup([GATE], [8192])),
    Target("H200 NF4 speed beside our W4", 0.85, _beside_w4("kvopt_nf4", False, SMALL)),
    Target("H200 FP4 speed beside our W4", 0.85, _beside_w4("kvopt_fp4", False, SMALL)),
    Target("H200 NF4, x bitsandbytes", 1.5, _over_bnb("nf4")),
    Target("H200 FP4, x bitsandbytes", 1.5, _over_bnb("fp4")),
    Target("H200 W3 M=1 time over W4", 0.85, _beside_w4("kvopt_int3_g128", True, [1]), False),
    Target("H200 W2 M=1 time over W4", 0.68, _beside_w4("kvopt_int2_g128", True, [1]), False),
    Target("H200 W8 M=1 8B gate-up, x fp16", 1.85, _speedup([GATE], [1], "kvopt_int8")),
    Target("H200 W8A8 M>=1024, x bf16", 1.4, _w8a8),
    Target(
        "H200 W4 M=1 gate-up, read GB/s",
        3700,
        lambda r: {GATE: r.one("gb_per_s", contender=W4, shape=GATE, m=1, **GPU)},
    ),
    Target("CPU W4 M=1 2 threads, x best ggml 4-bit", 1.0, _over_ggml),
    Target("CPU W4 M=1 2 threads, of the read rate", 0.9, _cpu_each("of_read_rate", W4, 2)),
    Target("CPU W4 M=1 1 thread, GB/s", 27, _cpu_each("gb_per_s", W4, 1)),
    Target("CPU W4 M=1 2 threads, x torch bf16", 6.5, _cpu_each("speedup", W4, 2)),
    Target("CPU NF4 M=1, of the read rate", 0.85, _cpu_each("of_read_rate", "kvopt_nf4", 2)),
    Target("CPU INT8 M=1, of the read rate", 0.85, _cpu_each("of_read_rate", "kvopt_int8", 2)),
    Target("CPU W3 M=1, of the read rate", 0.85, _cpu_each("of_read_rate", "kvopt_int3_g128", 2)),
    Target("CPU W4 M=16, x torch bf16", 1.2, _cpu_mean("speedup", W4, 16)),
    Target("CPU W4 M=64, x torch bf16", 1.0, _cpu_mean("speedup", W4, 64)),
    Target("CPU W4 M=256, x torch bf16", 1.0, _cpu_mean("speedup", W4, 256)),
    Target("CPU W4 +a8 M=16, GOPS", 600, _cpu_mean("gops", f"{W4}+a8", 16)),
    Target("CPU W4 +a8 M=64, GOPS", 680, _cpu_mean("gops", f"{W4}+a8", 64)),
    Target("CPU W4 +a8 M=256, GOPS", 700, _cpu_mean("gops", f"{W4}+a8", 256)),
    Target("CPU W8A8, x torch dynamic int8", 1.0, _cpu_w8a8),
    Target("CPU 1B decode, tok/s", 34, _end_to_end("decode_tok_s", "int4_g128")),
    Target(
        "CPU 1B prefill, tok/s",
        308,
        _end_to_end("prefill_tok_s", "int4_g128+a8", "int8_dyn"),
    ),
)


def markdown(results: Results, beginning: str) -> str:
    """The table of the targets whose case begins so."""
    lines = ["| case | target | measured | reached | each |", "|---|---|---|---|---|"]
    lines += [
        f"| {' | '.join(target.line(results))} |" for target in TARGETS if target.case.startswith(beginning)
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    results = Results(parser.parse_args().files)
    table = Table()
    for column in ("case", "target", "measured", "reached", "each"):
        table.add_column(column)
    for target in TARGETS:
        table.add_row(*target.line(results))
    Console(width=180).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
