# SPDX-License-Identifier: Apache-2.0
"""Draws a product's rate over M against its two roofs: ``python benchmarks/roofline.py FILE.json --shape 8b_gate_up``.

The slope is the weight's bytes at the read rate of the run, one line for 16 bits and one for the first of ours; the
ceiling is ``--peak`` or, without it, the fastest dense product of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="of one machine; rows are joined")
    parser.add_argument("--shape", default="8b_gate_up")
    parser.add_argument("--contenders", nargs="*", help="names (default: all)")
    parser.add_argument("--peak", type=float, help="ceiling in TFLOP/s or TOP/s")
    parser.add_argument("--out", type=Path, default=Path("roofline.png"))
    args = parser.parse_args()
    records = [json.loads(file.read_text()) for file in args.files]
    rows = [row for record in records for row in record["rows"] if row.get("shape") == args.shape]
    if not rows:
        print(f"no rows of the shape {args.shape}", file=sys.stderr)
        return 1
    draw(rows, records, args).savefig(args.out, dpi=150)
    print(f"wrote {args.out}")
    return 0


def draw(rows: list[dict[str, Any]], records: list[dict[str, Any]], args: argparse.Namespace) -> Any:
    """One panel: lines of contenders, dashed roofs."""
    names = args.contenders or list(dict.fromkeys(row["contender"] for row in rows))
    by_name = {name: sorted((r["m"], r) for r in rows if r["contender"] == name) for name in names}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, points in by_name.items():
        if not points:
            continue
        ours = name.startswith("kvopt")
        axes.plot(
            [m for m, _ in points],
            [row["gops"] / 1e3 for _, row in points],
            marker="o" if ours else ".",
            linewidth=2 if ours else 1,
            linestyle="-" if ours else ":",
            label=name.replace("_", " "),
        )
    dense = [row for row in rows if row["contender"].startswith("torch_") and _is_dense(row)]
    peak = args.peak or max((row["gops"] for row in dense), default=max(r["gops"] for r in rows)) / 1e3
    read = max(max(record["read_gb_per_s"]) for record in records)
    some = rows[0]
    ticks = sorted({row["m"] for row in rows})
    span = [ticks[0] * (ticks[-1] / ticks[0]) ** (i / 200) for i in range(201)]
    ours = next((row for row in rows if row["contender"].startswith("kvopt")), None)
    for label, nbytes in (("16 bits", 2 * some["n"] * some["k"]), *_named(ours)):
        slope = [min(peak, 2 * m * some["n"] * some["k"] / nbytes * read / 1e3) for m in span]
        axes.plot(span, slope, color="black", linewidth=1, linestyle="--")
        axes.annotate(f"roof, {label}", (span[0], slope[0]), fontsize=8, va="bottom")
    axes.set(
        xscale="log", yscale="log", xlabel="M (rows of activations)", ylabel="TFLOP/s, 2·M·N·K over time"
    )
    axes.set_xticks(ticks, [str(m) for m in ticks])
    axes.minorticks_off()
    machine = records[0]["machine"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {records[0]['threads']} threads"
    axes.set_title(f"{args.shape} ({some['k']} → {some['n']}) · {where} · reads {read:.0f} GB/s", fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    return figure


def _is_dense(row: dict[str, Any]) -> bool:
    return row["weight_bytes"] >= 2 * row["n"] * row["k"]


def _named(row: dict[str, Any] | None) -> list[tuple[str, int]]:
    if row is None:
        return []
    bits = 8 * row["weight_bytes"] / (row["n"] * row["k"])
    return [(f"{bits:.2f} bits", row["weight_bytes"])]


if __name__ == "__main__":
    sys.exit(main())
