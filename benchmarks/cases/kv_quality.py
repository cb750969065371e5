# SPDX-License-Identifier: Apache-2.0
"""What each choice of a KV cache costs: recall and perplexity through the compressed cache, with the bytes it held.

Tables (``--tables``):

- ``agnostic``: recall, the story compressed before the question is known.
- ``aware``: recall, story and question compressed together; a few questions of each story.
- ``perplexity``: of the second half of each window, token by token behind a compressed first half.
- ``orientation``: K and V at 2 bits per channel or per token, all four pairs, and residuals; by plain quantised
  tensors put into transformers' own cache, since the package has one orientation.
- ``merge``: MiniCache's interpolation against averaging, and where it begins; likewise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import kv_references
import kvopt
from journal import Journal
from kvopt import assets
from kvopt.eval import perplexity, read_documents, read_recall, recall, windows_of
from kvopt.eval.perplexity import paired_ratio

COLUMNS = (
    "model",
    "table",
    "spec",
    "cache_kb",
    "recall",
    "recall_stderr",
    "perplexity",
    "ratio",
    "ratio_stderr",
)
TABLES = ("agnostic", "aware", "perplexity", "orientation", "merge")
POLICIES = ["random", "window", "sink", "h2o", "snapkv", "pyramidkv", "tova", "kvzip", "keydiff"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["llama-6m"], help="embedded names or folders")
    parser.add_argument("--tables", nargs="+", default=["agnostic"], choices=TABLES)
    parser.add_argument(
        "--specs",
        nargs="+",
        default=POLICIES,
        help="policies with settings and further parts, without budget",
    )
    parser.add_argument(
        "--budgets", nargs="+", default=["p25", "p50"], help="b256, p25 …; '' for specs with one"
    )
    parser.add_argument("--stories", default=None, help="recall stories (default: the embedded ones)")
    parser.add_argument("--lengths", nargs="+", default=None, help="only stories of these length classes")
    parser.add_argument("--documents", type=int, default=12, help="stories, or windows of text")
    parser.add_argument("--questions", type=int, default=None, help="at most so many of each story")
    parser.add_argument("--file", default=None, help="text for perplexity (default: the embedded one)")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", default="fp32")


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    stories = _stories(args)
    text = read_documents(args.file or assets.path("wiki-heldout.txt"))
    folders = args.models
    args.models = [Path(folder).name for folder in folders]  # what is recorded names no place on this machine
    for name in ("stories", "file"):
        setattr(args, name, getattr(args, name) and Path(getattr(args, name)).name)
    for folder in folders:
        model, tokenizer = kvopt.load(folder, device=args.device, dtype=args.dtype)
        window = min(args.window, model.config.max_position_embeddings)
        windows = windows_of(text, tokenizer, window, args.documents)
        for table in args.tables:
            common = {"case": "kv_quality", "model": Path(folder).name, "table": table}
            if table == "perplexity":
                rows = _perplexity(model, windows, _specs(args), journal)
            elif table in ("agnostic", "aware"):
                rows = _recall(model, tokenizer, stories, _specs(args), table == "aware", journal)
            else:
                rows = kv_references.rows(model, windows, table)
            empty = dict.fromkeys(COLUMNS)
            yield from ({**empty, **common, **row} for row in rows)


def _stories(args: argparse.Namespace) -> list[Any]:
    stories = read_recall(args.stories or assets.path("recall.jsonl"))
    stories = [s for s in stories if args.lengths is None or s.length in args.lengths]
    if args.documents < len(stories):  # spread over the file, which is sorted by length
        stories = [stories[i * len(stories) // args.documents] for i in range(args.documents)]
    if args.questions is not None:
        keep = args.questions
        stories = [type(s)(s.id, s.length, s.story, s.questions[:keep], s.answers[:keep]) for s in stories]
    return stories


def _specs(args: argparse.Namespace) -> list[str]:
    """``full``, then each spec with each budget put behind the policy's name."""
    found = ["full"]
    for spec in args.specs:
        policy, plus, rest = spec.partition("+")
        name, *settings = policy.split("_")
        for budget in args.budgets if name != "full" else [""]:
            choice = "_".join([name, *([budget] if budget else []), *settings]) + plus + rest
            if choice not in found:
                found.append(choice)
    return found


def _recall(
    model: Any, tokenizer: Any, stories: list[Any], specs: list[str], aware: bool, journal: Journal
) -> Iterator[dict[str, Any]]:
    for spec in specs:
        start = time.perf_counter()
        sizes = _Sizes()
        try:
            with sizes:
                result = recall(model, tokenizer, stories, cache=spec, query_aware=aware)
        except ValueError as error:
            journal.leave_out(spec, error)
            continue
        yield {
            "spec": spec,
            "cache_kb": sizes.mean() / 1e3,
            "recall": result.recall,
            "recall_stderr": result.stderr,
            "documents": result.n_documents,
            "questions": result.n_questions,
            "by_length": result.by_length,
            "seconds": time.perf_counter() - start,
        }


def _perplexity(
    model: Any, windows: torch.Tensor, specs: list[str], journal: Journal
) -> Iterator[dict[str, Any]]:
    full = None
    for spec in specs:
        start = time.perf_counter()
        sizes = _Sizes()
        try:
            with sizes:
                result = perplexity(model, windows, cache=spec, prefill=windows.shape[1] // 2, batch_size=4)
        except ValueError as error:
            journal.leave_out(spec, error)
            continue
        full = full or result
        ratio, error = paired_ratio(result, full)
        yield {
            "spec": spec,
            "cache_kb": sizes.mean() / 1e3,
            "perplexity": result.perplexity,
            "stderr": result.stderr,
            "ratio": ratio,
            "ratio_stderr": error,
            "windows": len(result.window_nll),
            "window": windows.shape[1],
            "seconds": time.perf_counter() - start,
        }


class _Sizes:
    """Bytes per row of every cache made inside, when its prompt had been read: seen at the second forward."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def __enter__(self) -> _Sizes:
        self.begin = kvopt.Cache.begin
        sizes = self.found

        def begin(cache: Any, batch: int, new: int, *rest: Any, **more: Any) -> Any:
            if new == 1 and id(cache) not in sizes and cache.get_seq_length():
                sizes[id(cache)] = cache.nbytes() / batch
                self.alive.append(cache)
            return self.begin(cache, batch, new, *rest, **more)

        self.alive: list[Any] = []
        kvopt.Cache.begin = begin  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        kvopt.Cache.begin = self.begin  # type: ignore[method-assign]
        self.alive = []

    def mean(self) -> float:
        return sum(self.found.values()) / max(1, len(self.found))
