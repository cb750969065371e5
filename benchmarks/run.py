# SPDX-License-Identifier: Apache-2.0
"""The one benchmark driver: ``python benchmarks/run.py CASE [options]``.

Checks every contender's result before timing it, times them interleaved, prints a table and writes machine-stamped JSON
to ``benchmarks/results/`` (or ``--out``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

from journal import Journal
from kvopt import _library
from kvopt.experiments import machine

CASES = (
    "qlinear",
    "w8a8",
    "outliers",
    "epilogue",
    "decode",
    "kv_cache",
    "kv_attention",
    "kv_memory",
    "kv_peers",
    "quality",
    "quantize",
    "kv_quality",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="case", required=True)
    modules = {name: importlib.import_module(f"cases.{name}") for name in CASES}
    for name, module in modules.items():
        sub = subparsers.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        sub.add_argument(
            "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
        )
        sub.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
        sub.add_argument("--rounds", type=int, default=15, help="samples of each contender")
        sub.add_argument("--calls", type=int, default=20, help="calls of a sample on CUDA, at least")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--out", type=Path, default=None, help="JSON file")
        module.add_arguments(sub)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    module, journal = modules[args.case], Journal()
    before = read_rate(args.device)
    rows: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with torch.inference_mode():
            for row in module.run(args, journal):
                rows.append(row)
    except KeyboardInterrupt:  # also what `timeout` sends: what was measured is kept
        journal.failed = True
        print("interrupted", file=sys.stderr)
    if not rows:
        print("nothing could be measured", file=sys.stderr)
        return 1
    rates = [before, read_rate(args.device)]
    print_table(rows, getattr(module, "COLUMNS", tuple(rows[0])))
    for name, note in journal.notes.items():
        print(f"{name}: {note}")
    print(f"streaming read rate before and after: {rates[0]:.1f}, {rates[1]:.1f} GB/s")
    out = args.out or Path(__file__).parent / "results" / f"{args.case}_{args.device}.json"
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    record = {
        "machine": machine.stamp().to_dict(),
        "settings": settings,
        "threads": torch.get_num_threads(),
        "read_gb_per_s": rates,
        "contenders": journal.versions,
        "notes": journal.notes,
        "left_out": journal.left_out,
        "complete": not journal.failed,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
    return 1 if journal.failed else 0


def read_rate(device: str, passes: int = 7) -> float:
    """Streaming-read rate in GB/s: the roof beside the results. Median of a few passes over 1 GiB."""
    if device == "cpu":
        probe = _library._host_module.ReadProbe(2**30)
        values = sorted(probe.run(torch.get_num_threads()) for _ in range(passes))
        return values[len(values) // 2] / 1e9
    data = torch.ones(2**30, dtype=torch.float32, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    values = []
    for _ in range(passes):
        begin.record()
        data.sum()
        end.record()
        end.synchronize()
        values.append(data.nbytes / begin.elapsed_time(end) / 1e6)
    return sorted(values)[len(values) // 2]


def print_table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    columns = tuple(column for column in columns if any(row[column] is not None for row in rows))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console(width=200).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
