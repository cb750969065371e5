# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown: ``python benchmarks/tables.py results/qlinear_cuda.json --cell median_us speedup``.

A line for each shape and M (or recipe, or model), a column for each contender. ``--into docs/performance.md``
makes a page's tables anew: each stands between ``<!-- table: arguments of this program -->`` (files of
``benchmarks/results``) and ``<!-- end -->``; ``<!-- targets: beginning files -->`` is ``summary.py``'s table of the
cases that begin so.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import summary

RESULTS = Path(__file__).parent / "results"
PLACE = re.compile(r"(<!-- (table|targets): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument(
        "--cell",
        nargs="+",
        default=["median_us", "speedup"],
        help="fields; the first, the others in brackets",
    )
    parser.add_argument("--digits", type=int, default=3, help="significant ones")
    parser.add_argument("--contenders", nargs="*", help="columns (default: all, as they come)")
    parser.add_argument("--shapes", nargs="*")
    parser.add_argument("--m", nargs="*", type=int)
    parser.add_argument("--into", type=Path, help="the page whose tables are made anew")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    if args.into is None:
        print(table(args))
        return 0
    page = args.into.read_text()
    args.into.write_text(PLACE.sub(_place, page))
    return 0


def _place(match: re.Match[str]) -> str:
    words = shlex.split(match[3])
    if match[2] == "targets":
        beginning, *names = words
        made = summary.markdown(summary.Results(RESULTS / name for name in names), beginning)
    else:
        args = parse(words)
        args.files = [RESULTS / file for file in args.files]
        made = table(args)
    return f"{match[1]}\n{made}\n\n{match[4]}"


def table(args: argparse.Namespace) -> str:
    """The table that these arguments describe."""
    rows = [row for file in args.files for row in json.loads(file.read_text())["rows"]]
    rows = [
        row
        for row in rows
        if (not args.shapes or row.get("shape") in args.shapes) and (not args.m or row.get("m") in args.m)
    ]
    return markdown(rows, args.cell, args.contenders, args.digits)


def markdown(
    rows: list[dict[str, Any]], cell: list[str], contenders: list[str] | None = None, digits: int = 3
) -> str:
    """The table; of rows that fall into the same place the last counts."""
    names = contenders or list(dict.fromkeys(row["contender"] for row in rows))
    places: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        place = (_where(row), str(row.get("m", "")))
        first, *others = (_number(row.get(field), digits) for field in cell)
        brackets = f" ({', '.join(others)})" if others else ""
        places.setdefault(place, {})[row["contender"]] = first + brackets
    head = (
        ["shape (K → N)", "M"]
        if any(m for _, m in places)
        else ["recipe" if "recipe" in rows[0] else "model"]
    )
    lines = [f"| {' | '.join([*head, *(f'`{name}`' for name in names)])} |"]
    lines.append("|---" * (len(names) + len(head)) + "|")
    for place, cells in places.items():
        columns = [*place[: len(head)], *(cells.get(name, "–") for name in names)]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _where(row: dict[str, Any]) -> str:
    if "shape" not in row:
        return str(row.get("recipe") or row.get("model", ""))
    return f"{row['shape'].replace('_', ' ', 1).replace('_', '-')} ({row['k']} → {row['n']})"


def _number(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.{digits}g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
