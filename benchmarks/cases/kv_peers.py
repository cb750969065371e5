# SPDX-License-Identifier: Apache-2.0
"""Other libraries' KV caches beside ours: time a token and bytes behind a long prompt, recall at equal budgets.

``latency``: every contender reads the prompt once, then all of them decode the same tokens in turn, round by round.
``recall``: stories compressed before the question is known, each to the same share of its tokens where a contender
drops tokens; question and right answer then come in one forward over what is left, so that nobody drops any more, and
an answer counts when every token of it is the first choice. Bytes are what torch's allocator gave for the prompt.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

import kvopt
from journal import Journal
from kvopt import assets
from kvopt.eval import read_recall
from kvopt.eval.statistics import ratio_with_stderr
from kvopt.experiments.allocations import allocations
from kvopt.tokens import token_ids
from peers import Unavailable, kv_press, kv_readers
from peers.kv_readers import KvPeer, Reader

OURS = [
    *("full", "full+int4", "full+int2", "window_b{}", "sink_b{}_orig", "snapkv_b{}", "tova_b{}", "h2o_b{}"),
    *("keydiff_b{}", "kvzip_b{}", "random_b{}_prompt"),
]
COLUMNS = (
    *("part", "contender", "tokens_kept", "mib", "ms_per_token", "ms_min", "ms_max", "time_over_dynamic"),
    *("logit_error", "recall", "recall_stderr", "kb_per_story"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-6m")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--parts", nargs="+", choices=["latency", "recall"], default=["latency", "recall"])
    parser.add_argument("--ours", nargs="+", default=OURS, help="cache specs, {} for the budget in tokens")
    parser.add_argument("--peers", nargs="+", default=["all"], help="beginnings of names, all or none")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--keep", type=int, default=256, help="tokens that stay of it")
    parser.add_argument("--tokens", type=int, default=12, help="tokens a round")
    parser.add_argument("--documents", type=int, default=12, help="stories")
    parser.add_argument("--per-cent", type=int, default=25, help="of a story's tokens that stay")


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    base, tokenizer = kvopt.load(args.model, device=args.device, dtype=args.dtype)
    contenders = {peer.name: peer for peer in _contenders(args)}
    for part in args.parts:
        if part == "latency":
            rows = _latency(args, base, contenders, journal)
        else:
            rows = _recall(args, base, tokenizer, contenders, journal)
        for row in rows:
            empty: dict[str, Any] = dict.fromkeys(COLUMNS)
            yield {**empty, "case": "kv_peers", "part": part, "model": args.model, **row}


def _contenders(args: argparse.Namespace) -> Iterator[KvPeer]:
    foreign = (*kv_readers.PEERS, *kv_press.PEERS)
    for peer in foreign:
        if any(name == "all" or peer.name.startswith(name) for name in args.peers):
            yield peer
    yield from map(kv_readers.ours, args.ours)


def _open(peer: KvPeer, base: Any, stay: int, prompt: int, journal: Journal) -> Reader | None:
    try:
        reader = peer.open(copy.deepcopy(base), stay, prompt)
    except Unavailable as reason:
        journal.leave_out(peer.name, reason)
        return None
    journal.versions[peer.name] = peer.version()
    if peer.note:
        journal.notes[peer.name] = peer.note
    return reader


def _latency(
    args: argparse.Namespace, base: Any, contenders: dict[str, KvPeer], journal: Journal
) -> Iterator[dict[str, Any]]:
    ids = torch.randint(2, base.config.vocab_size, (1, args.prompt + 1), device=args.device)
    prompt, first = ids[:, :-1], ids[:, -1:]
    later = torch.randint(2, base.config.vocab_size, (args.rounds + 1, args.tokens), device=args.device)
    readers: dict[str, Reader] = {}
    held: dict[str, int] = {}
    logits: dict[str, torch.Tensor] = {}
    for name, peer in contenders.items():
        reader = _open(peer, base, args.keep, args.prompt, journal)
        if reader is None:
            continue
        try:
            with allocations(args.device) as seen:
                reader.prompt(prompt)
                seen.mark("prompt")
            logits[name] = reader.more(first)[:, -1].float()
        except Exception as error:
            journal.fail(name, error, "latency")
            continue
        readers[name], held[name] = reader, seen["prompt"].held
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(args.rounds + 1):  # the first round warms up
        names = list(readers) if number % 2 else list(reversed(readers))
        for name in names:
            each = []
            for token in later[number]:
                _wait(args.device)
                start = time.perf_counter()
                readers[name].more(token.view(1, 1))
                _wait(args.device)
                each.append(time.perf_counter() - start)
            if number:
                times[name].append(1e3 * statistics.median(each))
    exact, base_time = logits["hf_dynamic"], statistics.median(times["hf_dynamic"])
    for name, values in times.items():
        yield {
            "contender": name,
            "prompt": args.prompt,
            "tokens_kept": args.keep if contenders[name].keeps else args.prompt,
            "mib": held[name] / 2**20,
            "ms_per_token": statistics.median(values),
            "ms_min": min(values),
            "ms_max": max(values),
            "time_over_dynamic": statistics.median(values) / base_time,
            "logit_error": float((logits[name] - exact).norm() / exact.norm()),
        }


def _recall(
    args: argparse.Namespace, base: Any, tokenizer: Any, contenders: dict[str, KvPeer], journal: Journal
) -> Iterator[dict[str, Any]]:
    stories = read_recall(assets.path("recall.jsonl"), args.documents)
    for name, peer in contenders.items():
        right, asked, held, kept = [], [], [], []
        try:
            for story in stories:
                ids = torch.tensor([token_ids(tokenizer, story.story, begins=True)], device=args.device)
                stay = ids.shape[1] * args.per_cent // 100
                reader = _open(peer, base, stay, ids.shape[1], journal)
                if reader is None:
                    break
                with allocations(args.device) as seen:
                    last = reader.prompt(ids)
                    del last
                    seen.mark("story")
                held.append(seen["story"].held)
                kept.append(stay if peer.keeps else ids.shape[1])
                right.append(sum(_answers(reader.fork(), tokenizer, *pair) for pair in _pairs(story)))
                asked.append(len(story.questions))
        except Exception as error:
            if name.startswith("kvopt"):
                journal.fail(name, error, "recall")
            else:  # a foreign cache that can't be copied, or can't hold stories of these lengths
                reason = str(error).splitlines()[0][:160]
                journal.leave_out(name, f"{type(error).__name__}: {reason}", "recall")
            continue
        if not right:
            continue
        value, error = ratio_with_stderr(right, asked)
        yield {
            "contender": name,
            "tokens_kept": statistics.mean(kept),
            "recall": value,
            "recall_stderr": error,
            "questions": sum(asked),
            "kb_per_story": statistics.mean(held) / 1e3,
        }


def _pairs(story: Any) -> list[tuple[str, str]]:
    return list(zip(story.questions, story.answers, strict=True))


def _answers(reader: Reader, tokenizer: Any, question: str, answer: str) -> bool:
    """Question and right answer in one forward; whether every token of the answer was the first choice."""
    asked = token_ids(tokenizer, f"\n\nQ: {question}\n\nA:", begins=False)
    expected = token_ids(tokenizer, f" {answer}", begins=False)
    ids = torch.tensor([asked + expected[:-1]], device=reader.model.device)
    chosen = reader.more(ids)[0, len(asked) - 1 :].argmax(-1)
    return bool(chosen.tolist() == expected)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
