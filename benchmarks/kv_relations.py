# SPDX-License-Identifier: Apache-2.0
"""Whether one choice of a KV cache is better than another on the same questions: ``python benchmarks/kv_relations.py``.

Reads the journal of ``kv_plan.py`` and writes ``results/kv_relations.json``. Both choices answer the same questions, so
the error is that of the difference, story by story; it is far smaller than those of the two recalls apart.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from kv_pages import choice
from kv_plan import RESULTS, Line, Table, read_journal, tables
from kvopt.eval.statistics import ratio_with_stderr

CONTROL = "random_prompt"
PAIRS = [
    *((policy, CONTROL) for policy in ("snapkv", "tova", "h2o", "window", "sink_s4_orig")),
    *((policy, CONTROL) for policy in ("keydiff", "keydiff+ada", "kvzip", "kvzip+ada")),
    *(("pyramidkv", "snapkv"), ("keydiff+pyramid", "keydiff")),
    *(("snapkv+ada", "snapkv"), ("keydiff+ada", "keydiff"), ("kvzip+ada", "kvzip")),
]
MASKS = [("1 first + 63", "window 64"), ("4 first + 60", "window 64"), ("1 first + 255", "window 256")]
Found = dict[str, dict[str, tuple[float, int]]]


def by_spec(lines: list[Line]) -> Found:
    """For each spec the sum and the count of every story or window."""
    found: Found = {}
    for line in lines:
        for i, total, count in zip(line.ids, line.sums, line.counts, strict=True):
            found.setdefault(line.spec, {})[i] = total, count
    return found


def difference(found: Found, left: str, right: str) -> tuple[float, float, int] | None:
    """Left's mean less right's over the stories that both have seen, its standard error, and how many stories."""
    both = [i for i in found.get(left, {}) if i in found.get(right, {})]
    if len(both) < 2:
        return None
    sums = [found[left][i][0] - found[right][i][0] for i in both]
    mean, error = ratio_with_stderr(sums, [found[left][i][1] for i in both])
    assert error is not None
    return mean, error, len(both)


def relations(table: Table, lines: list[Line]) -> list[dict[str, Any]]:
    """What can be said of one table: each pair at each budget, and each policy with more budget and with less."""
    found, rows = by_spec(lines), []
    asked: list[
        tuple[str, str, str, str, str, str]
    ] = []  # relation, its two names, budget, and the two specs
    if table.kind == "sinks":
        asked += [("pair", a, b, "", a, b) for a, b in MASKS]
    for budget in table.budgets if table.kind in ("aware", "agnostic") else ():
        asked += [("pair", a, b, budget, choice(a, budget), choice(b, budget)) for a, b in PAIRS]
    if table.kind in ("aware", "agnostic"):
        steps = [b for b in table.budgets if b[0] == "b"], [b for b in table.budgets if b[0] == "p"]
        asked += [
            ("more", policy, policy, f"{low} to {high}", choice(policy, high), choice(policy, low))
            for part in steps
            for low, high in pairwise(part)
            for policy in table.policies
        ]
    for relation, left, right, budget, *specs in asked:
        result = difference(found, *specs)
        if result is None:
            continue
        mean, error, count = result
        if table.kind == "sinks":  # the ratio of perplexities, less one
            mean, error = math.exp(mean) - 1, math.exp(mean) * error
        rows.append(
            {
                "relation": relation,
                "model": table.model,
                "table": table.kind,
                "length": table.length,
                "left": left,
                "right": right,
                "budget": budget,
                "difference": mean,
                "stderr": error,
                "documents": count,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--journal", type=Path, default=RESULTS / "kv_journal")
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_relations.json")
    args = parser.parse_args()
    lines = read_journal(args.journal)
    rows = [
        row
        for table in tables()
        for row in relations(table, [line for line in lines if line.table == table.name])
    ]
    args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    worse = [r for r in rows if r["relation"] == "more" and r["difference"] < -2 * r["stderr"]]
    print(f"wrote {args.out}: {len(rows)} relations; worse with more by over two errors: {len(worse)}")
    for row in worse:
        print(f"  {row['model']} {row['table']} {row['left']} {row['budget']}: {row['difference']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
