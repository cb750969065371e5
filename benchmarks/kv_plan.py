# SPDX-License-Identifier: Apache-2.0
"""Every measurement behind the KV cache's tables, in a fixed order: ``kv_plan.py list``, ``run``, ``collect``.

``run`` measures what the journal does not have yet: one line per (model, table, spec) and batch of stories or windows,
with the result of every story. Shards (``--shard 2/12``) divide the specs and may share one journal folder, each writes
a file of its own; what anybody has measured is not measured again. ``collect`` makes ``results/kv_quality_*.json`` of
the journal. A run that was stopped goes on where it was; more stories later add to those there are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

import kv_references
import kv_sweep
import kvopt
from kv_pages import choice, family
from kvopt.eval import read_documents, read_recall, windows_of
from kvopt.eval.statistics import ratio_with_stderr
from kvopt.experiments import machine

RESULTS = Path(__file__).parent / "results"
POLICIES = [
    *("random_prompt", "random", "window", "sink_s4_orig", "h2o", "h2o_age", "tova"),
    *("snapkv", "snapkv+ada", "pyramidkv", "pyramidkv+ada"),
    *("keydiff", "keydiff+ada", "keydiff+pyramid", "kvzip", "kvzip+ada"),
]
TEXT_POLICIES = [
    *("random", "window", "sink_s1_orig", "sink_s4_orig", "sink_s4", "h2o", "h2o_age"),
    *("tova", "snapkv", "pyramidkv", "keydiff", "kvzip"),
]
CODECS = ("", "fp8", "int8", "int4", "int2", "minicache", "minicache+int4")
TOKENS = {"short": 300, "1k": 1150, "2k": 2300}  # of a prompt, about
GROUP = 8  # tokens: budgets at equal bytes are multiples of it


@dataclass(frozen=True)
class Table:
    """One table: a model, a measure, texts and specs.

    Attributes:
        kind: ``agnostic``, ``aware``, ``perplexity``, ``equal`` (agnostic, at equal bytes) or ``sinks``.
        length: of the stories, as in the file; or tokens of a window.
        count: stories or windows.
        budgets: of each policy; for ``equal`` those of the model's own type whose bytes the others get.
        context: tokens of a window that are read at once and not scored.
    """

    model: str
    kind: str
    length: str
    count: int
    policies: tuple[str, ...]
    budgets: tuple[str, ...]
    context: int = 0

    @property
    def name(self) -> str:
        """As in the names of results."""
        return f"{self.kind}_{self.model}_{self.length}"


def tables() -> list[Table]:
    """The final tables, the most telling first."""
    found = []
    llamas, gpt2 = ("llama-6m", "llama-27m"), "gpt2-18m"
    equal = ("keydiff", "window", "snapkv")
    for model, length in [(m, "1k") for m in llamas] + [(gpt2, "short")] + [(m, "2k") for m in llamas]:
        top = {"short": ("b64", "b128", "b256"), "1k": ("b64", "b128", "b256", "b512")}
        budgets = top.get(length, ("b64", "b128", "b256", "b512", "b1024"))
        found.append(Table(model, "aware", length, 40, tuple(POLICIES), budgets))
        found.append(Table(model, "agnostic", length, 40, tuple(POLICIES), ("p25", "p50", *budgets)))
        if length != "2k":
            found.append(
                Table(model, "equal", length, 40, equal, ("b64", "b128", "b256")[: 2 + (length == "1k")])
            )
    for model in (gpt2, *llamas):
        found.append(Table(model, "sinks", "1024", 32, tuple(kv_references.SINKS), (), 1))
        budgets = ("b64", "b128", "b256")
        found.append(Table(model, "perplexity", "1024", 16, tuple(TEXT_POLICIES), budgets, 512))
    for model in llamas:
        budgets = ("b64", "b128", "b256", "b512", "b1024")
        found.append(Table(model, "perplexity", "1536", 16, tuple(TEXT_POLICIES), budgets, 1024))
    return found


def specs_of(table: Table, model: Any = None) -> list[str]:
    """``full``, then each policy with each budget; ``model`` is needed for equal bytes."""
    if table.kind == "sinks":
        return list(table.policies)
    found = ["full"]
    if table.kind == "equal":
        found += [f"full+{codec}" for codec in CODECS if codec and possible(f"full+{codec}")]
    for policy in table.policies:
        for budget in table.budgets:
            if table.kind != "equal":
                found.append(choice(policy, budget))
            else:
                found += equal_bytes(model, policy, int(budget[1:]))
    return found


def possible(spec: str) -> bool:
    """Whether this version has it."""
    try:
        kvopt.CacheSpec.parse(spec)
    except ValueError:
        return False
    return True


def equal_bytes(model: Any, policy: str, budget: int) -> list[str]:
    """``policy`` at ``budget`` in the model's type, and each codec with as many tokens as fit into the same bytes."""
    room = nbytes(model, choice(policy, f"b{budget}"))
    found = []
    for codec in CODECS:
        suffix = f"+{codec}" if codec else ""
        if not possible(f"full{suffix}"):
            continue
        least = -(-kvopt.CacheSpec.parse(f"{policy}_p50").policy.minimum // GROUP)
        fits, misses = 0, max(least, budget // GROUP)
        while nbytes(model, choice(policy, f"b{misses * GROUP}") + suffix) <= room:
            fits, misses = misses, 2 * misses
        while misses - max(fits, least) > 1:
            middle = (max(fits, least) + misses) // 2
            fit = nbytes(model, choice(policy, f"b{middle * GROUP}") + suffix) <= room
            fits, misses = (middle, misses) if fit else (fits, middle)
        if fits:
            found.append(choice(policy, f"b{fits * GROUP}") + suffix)
    return found


def nbytes(model: Any, spec: str, tokens: int = 0) -> int:
    """Bytes of one row's cache, alone, behind a prompt of ``tokens``, or of one more than its budget."""
    arch = kvopt.Cache(model, spec).architecture
    tokens = tokens or int(family(spec)[1][1:]) + 1
    ids = torch.zeros((1, tokens), dtype=torch.int64)
    shape = (1, arch.kv_heads, tokens, arch.head_dim)
    keys = torch.randn(shape, dtype=arch.dtype, generator=torch.Generator().manual_seed(0)).to(model.device)
    query = keys.repeat_interleave(model.config.num_attention_heads // arch.kv_heads, 1)
    layers = [(query, keys, keys)] * arch.layers
    prompts = kv_sweep.Prompts([], ids.tolist(), torch.zeros(1, 1), [arch.head_dim**-0.5] * arch.layers)
    return kv_sweep.compressed(model, spec, prompts, layers).nbytes()


# --- the journal ------------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """One spec on one batch: for each story or window its sum (right answers, negative log-likelihood) and count."""

    table: str
    spec: str
    ids: list[str]
    sums: list[float]
    counts: list[int]
    machine: str
    seconds: float


def read_journal(folder: Path) -> list[Line]:
    """All lines of all files; a last line that was cut off is left out."""
    lines = []
    for file in sorted(folder.glob("*.jsonl")):
        for text in file.read_text().splitlines():
            try:
                lines.append(Line(**json.loads(text)))
            except json.JSONDecodeError:
                continue
    return lines


def torn(file: str) -> str:
    """A line feed where a run was ended while it wrote a line."""
    text = Path(file).read_bytes()
    return "\n" if text and not text.endswith(b"\n") else ""


def run(args: argparse.Namespace) -> int:
    """Measures what is missing; one journal file for each shard."""
    if args.threads:
        torch.set_num_threads(args.threads)
    shard, shards = map(int, args.shard.split("/"))
    end = time.monotonic() + args.seconds if args.seconds else math.inf
    args.journal.mkdir(parents=True, exist_ok=True)
    done = {(line.table, line.spec, i) for line in read_journal(args.journal) for i in line.ids}
    stamp = machine.stamp()
    gpu = f", {stamp.gpus[0]}" if stamp.gpus and args.device == "cuda" else ""
    name = f"{stamp.cpu}{gpu}, torch {stamp.torch}, transformers {stamp.transformers}"
    models: dict[str, Any] = {}
    with (args.journal / f"{args.name}_{shard}.jsonl").open("a+") as file, torch.inference_mode():
        file.write(torn(file.name))
        for table in chosen(args):
            if table.model not in models:
                models[table.model] = kvopt.load(folder_of(table.model), device=args.device, dtype="fp32")
            model, tokenizer = models[table.model]
            wanted = [s for s in specs_of(table, model) if args.specs is None or family(s)[0] in args.specs]
            wanted = wanted[shard::shards]
            for ids, batch in batches(table, tokenizer, args):
                begun = None
                for spec in wanted:
                    if all((table.name, spec, i) in done for i in ids):
                        continue
                    if time.monotonic() > end:
                        print("time is up", flush=True)
                        return 0
                    if begun is None:
                        begun = begin(table, model, tokenizer, batch)
                    start = time.perf_counter()
                    try:
                        sums, counts = measure(table, model, spec, begun)
                    except ValueError as error:
                        print(f"left out: {table.name} {spec}: {error}", file=sys.stderr, flush=True)
                        continue
                    line = Line(table.name, spec, ids, sums, counts, name, time.perf_counter() - start)
                    file.write(json.dumps(asdict(line)) + "\n")
                    file.flush()
                    print(f"{table.name} {spec}: {sum(sums):.4g} / {sum(counts)}", flush=True)
    return 0


def chosen(args: argparse.Namespace) -> list[Table]:
    """The tables asked for, with the budgets asked for."""
    found = []
    for table in tables():
        asked = [(args.tables, table.kind), (args.models, table.model), (args.lengths, table.length)]
        if any(names and name not in names for names, name in asked):
            continue
        if args.budgets and table.budgets:
            table = Table(
                **{**asdict(table), "budgets": tuple(b for b in table.budgets if b in args.budgets)}
            )
        found.append(table)
    return found


def folder_of(model: str) -> str:
    """The model's folder in ``KVOPT_MODELS``, or its name where that is embedded."""
    places = [Path(p) / model for p in os.environ.get("KVOPT_MODELS", "").split(os.pathsep) if p]
    return next((str(place) for place in places if place.exists()), model)


def batches(table: Table, tokenizer: Any, args: argparse.Namespace) -> Iterator[tuple[list[str], Any]]:
    """Names and contents of each batch of the table's stories or windows."""
    count = min(table.count, args.count or table.count)
    if table.kind in ("perplexity", "sinks"):
        name, text = Path(args.text).name, read_documents(args.text)
        windows = windows_of(text, tokenizer, int(table.length), count)
        items: list[tuple[str, Any]] = [(f"{name} {i}", window) for i, window in enumerate(windows)]
    else:
        stories = [s for s in read_recall(args.stories) if s.length == table.length][:count]
        items = [(s.id, s) for s in stories]
    size = max(1, args.batch // 4) if table.kind == "aware" else args.batch  # a prompt for each question
    for at in range(0, len(items), size):
        part = items[at : at + size]
        yield [name for name, _ in part], [item for _, item in part]


def begin(table: Table, model: Any, tokenizer: Any, batch: list[Any]) -> Any:
    """What all specs begin from."""
    if table.kind == "sinks":
        return torch.stack(batch)
    if table.kind == "perplexity":
        return kv_sweep.read_windows(model, torch.stack(batch), table.context)
    return kv_sweep.read_stories(model, tokenizer, batch, table.kind == "aware")


def measure(table: Table, model: Any, spec: str, begun: Any) -> tuple[list[float], list[int]]:
    """Sums and counts of each story or window."""
    if table.kind == "sinks":
        sums = kv_references.masked_nll(model, begun, spec)
        return sums, [begun.shape[1] - 1] * len(sums)
    if table.kind == "perplexity":
        sums = kv_sweep.nll_of(model, spec, begun)
        return sums, [begun.ids.shape[1] - table.context] * len(sums)
    right = kv_sweep.recall_of(model, spec, begun)
    return list(map(float, right)), [len(d.questions) for d in begun.documents]


# --- results ----------------------------------------------------------------------------------------------------------


def collect(args: argparse.Namespace) -> int:
    """One file of results for each table of which something was measured."""
    lines = read_journal(args.journal)
    for table in tables():
        mine = [line for line in lines if line.table == table.name]
        if not mine:
            continue
        model, _ = kvopt.load(folder_of(table.model), device="cpu", dtype="fp32")
        with torch.inference_mode():
            rows = list(rows_of(table, mine, model))
        record = {
            "machines": sorted({line.machine for line in mine}),
            "settings": asdict(table),
            "complete": complete(table, mine),
            "rows": rows,
        }
        out = args.out / f"kv_quality_{table.name}.json"
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {out}: {len(rows)} rows")
    return 0


def complete(table: Table, lines: Iterable[Line]) -> bool:
    """Whether every spec has seen every story or window; equal bytes count the specs that were found."""
    seen: dict[str, set[str]] = {}
    for line in lines:
        seen.setdefault(line.spec, set()).update(line.ids)
    wanted = set(seen) if table.kind == "equal" else set(specs_of(table))
    return wanted <= set(seen) and all(len(seen[spec]) >= table.count for spec in wanted)


def rows_of(table: Table, lines: list[Line], model: Any) -> Iterator[dict[str, Any]]:
    """Rows in the plan's order. Specs that have seen fewer stories than the others have fewer in their row.

    The bytes are those of a row alone behind a prompt of the usual length: in a batch every row takes as much as
    the longest.
    """
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for line in lines:
        for i, total, count in zip(line.ids, line.sums, line.counts, strict=True):
            found.setdefault(line.spec, {})[i] = total, count
    order = list(found) if table.kind == "equal" else [s for s in specs_of(table) if s in found]
    first, prompt = found.get(order[0], {}), table.context or TOKENS.get(table.length, 0)
    for spec in order:
        mine = found[spec]
        sums, counts = zip(*mine.values(), strict=True)
        value, error = ratio_with_stderr(sums, counts)
        row: dict[str, Any] = {
            "case": "kv_quality",
            "model": table.model,
            "table": table.kind,
            "length": table.length,
            "spec": spec,
            "cache_kb": None if table.kind == "sinks" else nbytes(model, spec, prompt) / 1e3,
        }
        if table.kind in ("perplexity", "sinks"):
            both = [i for i in mine if i in first]
            differences = [mine[i][0] - first[i][0] for i in both]
            ratio, spread = ratio_with_stderr(differences, [mine[i][1] for i in both])
            row |= {
                "perplexity": math.exp(value),
                "stderr": error and math.exp(value) * error,
                "ratio": math.exp(ratio),
                "ratio_stderr": spread and math.exp(ratio) * spread,
                "windows": len(mine),
                "window": int(table.length),
                "scored": counts[0],
            }
        else:
            row |= {
                "recall": value,
                "recall_stderr": error,
                "documents": len(mine),
                "questions": int(sum(counts)),
            }
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {name: commands.add_parser(name) for name in ("list", "run", "collect")}
    for sub in (parts["list"], parts["run"]):
        sub.add_argument("--tables", nargs="+", help="kinds")
        sub.add_argument("--models", nargs="+")
        sub.add_argument("--lengths", nargs="+")
        sub.add_argument("--budgets", nargs="+")
    for sub in (parts["run"], parts["collect"]):
        sub.add_argument("--journal", type=Path, default=RESULTS / "kv_journal")
    one = parts["run"]
    one.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    one.add_argument("--threads", type=int, default=None)
    one.add_argument("--shard", default="0/1")
    one.add_argument("--name", default="cpu", help="of the journal's files")
    one.add_argument("--seconds", type=float, default=None, help="begin nothing new after so long")
    one.add_argument(
        "--batch", type=int, default=4, help="stories or windows read together (aware: a quarter)"
    )
    one.add_argument("--count", type=int, default=None, help="at most so many stories or windows")
    one.add_argument("--specs", nargs="+", default=None, help="policies with settings, without budget")
    one.add_argument("--stories", required=True)
    one.add_argument("--text", required=True)
    parts["collect"].add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.command == "list":
        for table in chosen(args):
            specs = len(table.policies) * max(1, len(table.budgets))
            print(f"{table.name}: {specs} specs, {table.count} stories or windows")
        return 0
    return run(args) if args.command == "run" else collect(args)


if __name__ == "__main__":
    sys.exit(main())
