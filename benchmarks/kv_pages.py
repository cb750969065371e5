# SPDX-License-Identifier: Apache-2.0
"""The figures and tables of the KV cache's pages: ``python benchmarks/kv_pages.py kept``, ``quality`` or ``tables``.

``kept`` reads one embedded recall story with the embedded model and draws which tokens each policy keeps, a line for
every layer and KV head. ``quality`` draws recall against the bytes of the cache from ``results/kv_quality_*.json``.
``tables`` makes the tables of ``docs/methods`` anew, each between ``<!-- kv: policies or table -->`` and
``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = Path(__file__).parent / "results"
IMAGES = DOCS / "images"
PLACE = re.compile(r"(<!-- kv: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
TITLES = {
    "agnostic": "Recall, the story compressed before the question is known",
    "aware": "Recall, story and question compressed together",
    "perplexity": "Perplexity over that of the whole cache",
    "equal": "Recall at equal bytes, the story compressed before the question is known",
    "sinks": "Perplexity under a mask, original positions, from the start of the text",
    "orientation": "Perplexity",
    "merge": "Perplexity",
}
PANELS = {
    "agnostic": "question unknown",
    "aware": "question known",
    "equal": "codecs, question unknown",
}
POLICY_TABLES = ("agnostic", "aware", "perplexity")
STORIES = {
    "short": "stories of about 300 tokens",
    "1k": "stories of about 1,100 tokens",
    "2k": "stories of about 2,300 tokens",
}
SHOWN = ["window", "sink", "h2o", "snapkv", "pyramidkv", "tova", "random", "kvzip", "keydiff", "keydiff+ada"]
COLORS = {
    "random": "#777777",
    "window": "#9c6b30",
    "sink": "#c9a227",
    "h2o": "#c0392b",
    "snapkv": "#2471a3",
    "pyramidkv": "#5dade2",
    "tova": "#8e44ad",
    "kvzip": "#1e8449",
    "keydiff": "#d35400",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kept = commands.add_parser("kept")
    kept.add_argument("--model", default="llama-6m")
    kept.add_argument("--stories", default=None)
    kept.add_argument("--length", default="1k")
    kept.add_argument("--budget", default="p25")
    kept.add_argument("--out", type=Path, default=IMAGES / "kept_tokens.png")
    quality = commands.add_parser("quality")
    quality.add_argument(
        "files", nargs="*", type=Path, default=sorted(RESULTS.glob("kv_quality_*_llama-6m_1k.json"))
    )
    quality.add_argument("--out", type=Path, default=IMAGES / "kv_quality.png")
    tables = commands.add_parser("tables")
    tables.add_argument("pages", nargs="*", type=Path, default=sorted(DOCS.glob("methods/*.md")))
    args = parser.parse_args()
    if args.command == "tables":
        rows = read_rows([*sorted(RESULTS.glob("kv_quality_*.json")), RESULTS / "kv_relations.json"])
        for page in args.pages:
            text = page.read_text()
            page.write_text(
                PLACE.sub(lambda m: m[1] + "\n".join(markdown(rows, m[2].split())) + "\n" + m[3], text)
            )
        return 0
    draw_kept(args) if args.command == "kept" else draw_quality(args)
    print(f"wrote {args.out}")
    return 0


def read_rows(files: list[Path]) -> list[dict[str, Any]]:
    """All rows of the files."""
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def markdown(rows: list[dict[str, Any]], words: list[str]) -> list[str]:
    """One table for each measure, model and length that has some of the policies, or for the table that is named."""
    lines: list[str] = []
    if words[0] == "relations":
        return _relations([row for row in rows if "relation" in row])
    rows = [row for row in rows if "relation" not in row]
    named = words[0] if words[0] in TITLES else None
    for table in TITLES:
        places = sorted({(row["model"], row.get("length", "")) for row in rows if row["table"] == table})
        for place in places:
            part = [r for r in rows if r["table"] == table and (r["model"], r.get("length", "")) == place]
            if named is not None:
                lines += _plain_table(part, place[0]) if table == named else []
            elif table in POLICY_TABLES:
                lines += _policy_table(
                    [row for row in part if family(row["spec"])[0] in words], place[0], words
                )
    return lines


def _relations(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each measure, a line for each pair, the budgets of every model in a cell."""
    lines: list[str] = []
    for table in ("aware", "agnostic", "sinks"):
        part = [row for row in rows if row["table"] == table and row["relation"] == "pair"]
        places = list(dict.fromkeys((row["model"], row["length"]) for row in part))
        if not part:
            continue
        measure = "ratio of perplexities less one" if table == "sinks" else "difference of recall"
        lines += [f"{TITLES[table]}: {measure} ± its standard error, over the same texts:", ""]
        counts = [
            _range([row for row in part if (row["model"], row["length"]) == p], "documents") for p in places
        ]
        heads = [
            f"`{model}`, {count} {_what(length)}"
            for (model, length), count in zip(places, counts, strict=True)
        ]
        lines += [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for left, right in dict.fromkeys((row["left"], row["right"]) for row in part):
            cells = []
            for place in places:
                mine = [row for row in part if (row["left"], row["right"]) == (left, right)]
                mine = [row for row in mine if (row["model"], row["length"]) == place]
                cells.append("<br>".join(_signed(row) for row in mine))
            lines.append(f"| `{left}` against `{right}` | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _what(length: str) -> str:
    return STORIES.get(length, f"windows of {length}")


def _signed(row: dict[str, Any]) -> str:
    """Bold beyond two errors."""
    text = f"{row['difference']:+.3f} ± {row['stderr']:.3f}"
    sure = abs(row["difference"]) > 2 * row["stderr"]
    budget = f"`_{row['budget']}` " if row["budget"] else ""
    return budget + (f"**{text}**" if sure else text)


def family(spec: str) -> tuple[str, str]:
    """``snapkv_p25_w8+ada`` to ``snapkv_w8+ada`` and ``p25``."""
    policy, plus, rest = spec.partition("+")
    name, *settings = policy.split("_")
    budget = next((s for s in settings if re.fullmatch(r"(b|p|mb)\d+", s)), "")
    return "_".join([name, *(s for s in settings if s != budget)]) + plus + rest, budget


def _policy_table(rows: list[dict[str, Any]], model: str, words: list[str]) -> list[str]:
    budgets = sorted(
        {family(row["spec"])[1] for row in rows} - {""}, key=lambda b: (b[0] != "p", int(b.lstrip("pmb")))
    )
    if not budgets:
        return []
    cells = {family(row["spec"]): row for row in rows}
    sizes = [max(row["cache_kb"] for row in rows if family(row["spec"])[1] == b) for b in budgets]
    head = [f"`_{b}` ({size / 1e3:.2g} MB)" for b, size in zip(budgets, sizes, strict=True)]
    lines = [_title(rows, model), "", f"| policy | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for word in words:
        if word == "full":
            if ("full", "") in cells:
                lines.append(f"| `full` | {' | '.join([_cell(cells['full', ''])] * len(budgets))} |")
        elif any((word, b) in cells for b in budgets):
            line = [_cell(cells[word, b]) if (word, b) in cells else "" for b in budgets]
            lines.append(f"| `{word}` | {' | '.join(line)} |")
    return [*lines, ""]


def _plain_table(rows: list[dict[str, Any]], model: str) -> list[str]:
    recalled = rows[0].get("recall") is not None
    lines = [_title(rows, model), ""]
    lines.append(
        "| cache | MB a row | recall |" if recalled else "| cache | perplexity | over the first line |"
    )
    lines.append("|---|---|---|")
    for row in rows:
        if recalled:
            lines.append(f"| `{row['spec']}` | {row['cache_kb'] / 1e3:.2g} | {_cell(row)} |")
        else:
            lines.append(f"| {row['spec']} | {row['perplexity']:.2f} | {_cell(row)} |")
    return [*lines, ""]


def _title(rows: list[dict[str, Any]], model: str) -> str:
    row = rows[0]
    if row.get("recall") is None:
        scored = row.get("scored", row["window"] // 2)
        detail = f"{_range(rows, 'windows')} windows, {scored} tokens scored"
        detail += f" behind a prompt of {row['window'] - scored}" if scored < row["window"] - 1 else ""
    else:
        stories = STORIES.get(row.get("length", ""), "stories")
        detail = f"{_range(rows, 'documents')} {stories}, {_range(rows, 'questions')} questions"
    return f"{TITLES[row['table']]}, `{model}`, {detail}; ± standard error:"


def _range(rows: list[dict[str, Any]], name: str) -> str:
    """A number, or where the rows differ the smallest and the largest."""
    low, high = min(row[name] for row in rows), max(row[name] for row in rows)
    return str(low) if low == high else f"{low} to {high}"


def _cell(row: dict[str, Any]) -> str:
    if row.get("recall") is not None:
        return f"{row['recall']:.2f} ± {row['recall_stderr']:.2f}"
    return f"{row['ratio']:.3f} ± {row['ratio_stderr']:.3f}"


def choice(spec: str, budget: str) -> str:
    """``snapkv_w8+ada`` with the budget behind the policy's name."""
    policy, plus, rest = spec.partition("+")
    name, *settings = policy.split("_")
    return "_".join([name, budget, *settings]) + plus + rest


@torch.inference_mode()
def draw_kept(args: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    import kvopt
    from kvopt import assets
    from kvopt.eval import read_recall

    model, tokenizer = kvopt.load(args.model, device="cpu", dtype="fp32")
    stories = read_recall(args.stories or assets.path("recall.jsonl"))
    story = next((s for s in stories if s.length == args.length), stories[-1])
    ids = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer(story.story, add_special_tokens=False)["input_ids"]]]
    )
    layers, total = model.config.num_hidden_layers, ids.shape[1]
    figure = Figure(figsize=(10, 0.95 * len(SHOWN) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(SHOWN), 1, sharex=True)
    for axis, spec in zip(axes, SHOWN, strict=True):
        cache = kvopt.Cache(model, choice(spec, args.budget))
        model(ids, past_key_values=cache)
        lines = []
        for layer in range(layers):
            for positions in cache.positions(layer)[0]:
                line = torch.zeros(total)
                line[positions[positions >= 0].long()] = 1
                lines.append(line)
        axis.imshow(
            torch.stack(lines), aspect="auto", cmap="Greys", interpolation="antialiased", vmin=0, vmax=1
        )
        axis.set_ylabel(spec, rotation=0, ha="right", va="center")
        axis.set_yticks([])
    axes[-1].set_xlabel(
        f"position in a story of {total} tokens; a line for each layer (top: first) and KV head"
    )
    figure.suptitle(f"{args.model}: what stays of a prompt at {args.budget[1:]} per cent", fontsize=11)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


def draw_quality(args: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(file.read_text()) for file in args.files]
    rows = [row for record in records for row in record["rows"] if row.get("recall") is not None]
    panels = sorted({(row["model"], row["table"]) for row in rows})
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (model, table) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        of_panel = [row for row in rows if (row["model"], row["table"]) == (model, table)]
        for name, points in _lines(of_panel).items():
            policy, plus, _ = name.partition("+")
            color = COLORS.get(policy.partition("_")[0], "#333333")
            x, y = [p["cache_kb"] / 1e3 for p in points], [100 * p["recall"] for p in points]
            error = [100 * (p["recall_stderr"] or 0) for p in points]
            style = "--" if plus else ":" if "_" in policy else "-"
            if table == "equal":  # few points a line: written beside them instead of in a legend
                for point, at in zip(points, zip(x, y, strict=True), strict=True):
                    axis.annotate(point["spec"], at, xytext=(4, 3), textcoords="offset points", fontsize=6)
            axis.errorbar(x, y, error, label=name, color=color, ls=style, marker="o", ms=4, capsize=2, lw=1.3)
        axis.set_xscale("log")
        axis.set_xticks([0.4, 0.8, 1.5, 3, 6], ["0.4", "0.8", "1.5", "3", "6"])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("cache of a row (MB)")
        axis.set_ylabel("recall (%)")
        axis.set_title(f"{model}, {PANELS[table]}", fontsize=10)
        axis.grid(alpha=0.3)
        if table != "equal":
            axis.legend(fontsize=7)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


def _lines(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of one policy, allocator and codec, by bytes."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r["cache_kb"]):
        lines.setdefault(family(row["spec"])[0], []).append(row)
    return dict(sorted(lines.items()))


if __name__ == "__main__":
    sys.exit(main())
