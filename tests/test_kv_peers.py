# SPDX-License-Identifier: Apache-2.0
"""Caches as contenders: each reader reads what it says, and the cases count what the allocator gave."""

from __future__ import annotations

import argparse
import copy
import importlib
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from conftest import relative_error
from kvopt import assets
from kvopt.eval import read_recall, recall
from tiny_models import tiny_llama


def peers_by_name(module: Any) -> dict[str, Any]:
    readers, press = module("peers.kv_readers"), module("peers.kv_press")
    return {peer.name: peer for peer in (*readers.PEERS, *press.PEERS)}


@torch.no_grad()
def read(peer: Any, model: Any, prompt: torch.Tensor, parts: list[torch.Tensor], stay: int) -> torch.Tensor:
    reader = peer.open(copy.deepcopy(model), stay, prompt.shape[1])
    return torch.cat([reader.prompt(prompt)[:, None], *(reader.more(part) for part in parts)], dim=1)


@torch.no_grad()
def test_transformers_window_is_ours_and_full_is_the_dynamic_cache(module: Any) -> None:
    model, ids = tiny_llama().double().eval(), torch.randint(64, (1, 60))
    peers, ours = peers_by_name(module), module("peers.kv_readers").ours
    prompt, later = ids[:, :40], [ids[:, t : t + 1] for t in range(40, 60)]
    dynamic = read(peers["hf_dynamic"], model, prompt, later, 16)
    plain = model(ids, use_cache=False).logits[:, 39:]
    assert relative_error(dynamic, plain) < 1e-10
    assert relative_error(read(ours("full"), model, prompt, later, 16), plain) < 1e-10
    window = read(ours("window_b{}"), model, prompt, later, 16)
    assert relative_error(read(peers["hf_sliding"], model, prompt, later, 16), window) < 1e-10
    assert relative_error(window, plain) > 1e-4


@torch.no_grad()
def test_a_fork_goes_its_own_way(module: Any) -> None:
    model, ids = tiny_llama().double().eval(), torch.randint(64, (1, 50))
    for peer in (peers_by_name(module)["hf_dynamic"], module("peers.kv_readers").ours("h2o_b{}")):
        reader = peer.open(model, 16, 30)
        reader.prompt(ids[:, :30])
        forks = [reader.fork(), reader.fork()]
        first = forks[0].more(ids[:, 30:40])
        forks[0].more(ids[:, 40:])
        assert relative_error(forks[1].more(ids[:, 30:40]), first) < 1e-10


def test_what_is_not_installed_is_left_out(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable = module("peers.base").Unavailable
    monkeypatch.setitem(importlib.import_module("sys").modules, "kvpress", None)
    with pytest.raises(unavailable, match="kvpress is not installed"):
        peers_by_name(module)["kvpress SnapKV"].open(tiny_llama(), 8, 32)


@torch.no_grad()
def test_recall_of_the_full_cache_is_the_evaluation_s_own(module: Any) -> None:
    import kvopt

    case, journal = module("cases.kv_peers"), module("journal").Journal()
    args = argparse.Namespace(
        **{
            "model": "llama-6m",
            "device": "cpu",
            "dtype": "fp32",
            "parts": ["recall"],
            "peers": ["hf_dynamic"],
        },
        **{"ours": ["full"], "documents": 1, "per_cent": 25},
    )
    rows = {row["contender"]: row for row in case.run(args, journal)}
    model, tokenizer = kvopt.load("llama-6m", device="cpu", dtype="fp32")
    expected = recall(model, tokenizer, read_recall(assets.path("recall.jsonl"), 1))
    assert rows["hf_dynamic"]["recall"] == rows["kvopt full"]["recall"] == expected.recall
    cache = DynamicCache(config=model.config)
    tokens = int(rows["hf_dynamic"]["tokens_kept"])
    model(torch.zeros((1, tokens), dtype=torch.int64), past_key_values=cache)
    exact = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert rows["hf_dynamic"]["kb_per_story"] == pytest.approx(exact / 1e3, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("prefill", ["full", "32"])
def test_memory_is_counted_and_predicted(module: Any, prefill: str) -> None:
    case, journal = module("cases.kv_memory"), module("journal").Journal()
    args = argparse.Namespace(
        **{"model": "llama-6m", "device": "cpu", "dtype": "fp32", "batch": 2, "prompts": [90], "tokens": 4},
        **{"caches": ["full", "h2o_b40+ada+int4_g8_r16", "tova_b40"], "prefills": ["full", prefill]},
    )
    rows = [row for row in case.run(args, journal) if row["prefill"] == prefill]
    assert {row["contender"] for row in rows} >= {"full", "tova_b40"}
    assert ("h2o_b40+ada+int4_g8_r16 (prefill 32)" in journal.left_out) == (prefill == "32")
    for row in rows:
        if row["contender"] == "DynamicCache":
            assert row["held"] == 2 * 6 * 2 * 2 * 94 * 64 * 4 and row["predicted"] is None
            continue
        assert row["held"] == pytest.approx(row["allocator"], rel=0.02) == pytest.approx(row["freed"])
        assert row["held"] * 0.9 < row["peak"] <= row["bound"]
        if "ada" not in row["contender"]:
            assert row["predicted"] == row["held"]
