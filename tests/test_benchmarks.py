# SPDX-License-Identifier: Apache-2.0
"""The benchmark driver: who computes something else is not timed, and tables say what was and was not measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BENCHMARKS


def test_driver_writes_what_it_prints(tmp_path: Path) -> None:
    out = tmp_path / "new" / "q.json"
    options = "qlinear --device cpu --shapes 1b_o --m 2 --rounds 2 --copies-mb 1 --recipes int4_g128 --peers torch_int4"
    command = [sys.executable, str(BENCHMARKS / "run.py"), *options.split(), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    rows = {row["contender"]: row for row in record["rows"]}
    assert set(rows) == {"torch_bf16", "torch_int4_g128", "kvopt_int4_g128"} == set(record["contenders"])
    for name, row in rows.items():
        assert name in done.stdout and row["median_us"] > 0 and row["of_read_rate"] > 0
        assert row["p10_us"] <= row["median_us"] <= row["p90_us"] and row["copies"] >= 3
        assert row["gops"] == pytest.approx(2 * 2 * 2048 * 2048 / row["median_us"] / 1e3)
        base = rows["torch_bf16"]["median_us"]
        assert row["speedup"] == pytest.approx(base / row["median_us"])
    assert rows["kvopt_int4_g128"]["weight_bytes"] == 2048 * 2048 * 17 // 32
    assert 0.05 < rows["kvopt_int4_g128"]["relative_error"] < 0.15
    assert record["machine"]["cpu"] and record["settings"]["m"] == [2] and len(record["read_gb_per_s"]) == 2


@pytest.mark.parametrize("wrong", ["nan", "shape", "far"])
def test_a_wrong_product_is_not_timed(module: Any, wrong: str) -> None:
    compare, peers = module("compare"), module("peers")
    x, weight = torch.randn(3, 32), torch.randn(16, 32)
    exact = x @ weight.T
    result = {"nan": exact.clone().fill_(float("nan")), "shape": exact[:, :8], "far": exact * 1.5}[wrong]
    peer = peers.Peer("wrong", ("cpu",), lambda w: None, 0.1)
    product = peers.Product(lambda given: result, 1)
    with pytest.raises(RuntimeError, match="wrong at anywhere"):
        compare._enter(peer, [product], x, exact, "anywhere")
    right = peers.Product(lambda given: given @ weight.T, 1)
    assert compare._enter(peer, [right], x, exact, "anywhere")[1] < 1e-5


def test_torch_peers_compute_the_product(module: Any) -> None:
    peers = module("peers")
    weight = torch.randn(64, 256) / 16
    x = torch.randn(5, 256)
    exact = x @ weight.T
    for peer in peers.select(["torch"], "cpu"):
        try:
            product = peer.prepare(weight.bfloat16())()
        except peers.Unavailable:
            continue
        y = product.leave(product.run(product.enter(x.to(peer.takes)))).float()
        assert ((y - exact).norm() / exact.norm()).item() < peer.error, peer.name
    with pytest.raises(ValueError, match="nobody"):
        peers.select(["nobody"], "cpu")


def test_a_sample_reads_no_copy_twice(module: Any) -> None:
    timing = module("timing")
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(5)]
    times, failures = timing.interleaved({"one": calls}, "cpu", rounds=3, calls=1)
    assert failures == {} and times["one"].calls == 4 and len(times["one"].reads) == 3
    for sample in range(4):  # the warm-up and three rounds, each an untimed call and four timed ones
        assert sorted(seen[5 * sample : 5 * sample + 5]) == [0, 1, 2, 3, 4]


def test_summary_reached_missed_and_missing(module: Any) -> None:
    summary = module("summary")
    results = summary.Results([])
    row = {"device": "cuda", "case": "qlinear", "contender": "kvopt_int4_g128", "shape": "8b_gate_up", "m": 1}
    results.rows = [{**row, "speedup": 3.6, "gb_per_s": 3000.0, "median_us": 17.0}]
    lines = {target.case: target.line(results) for target in summary.TARGETS}
    assert lines["H200 W4 M=1 8B gate-up, x fp16"][2:4] == ("3.6", "yes")
    assert lines["H200 W4 M=1 gate-up, read GB/s"][3] == "no"
    assert lines["CPU 1B decode, tok/s"][2:4] == ("", "not measured")
    assert all(line[3] in ("yes", "no", "so far", "not measured") for line in lines.values())


def test_tables_are_made_anew_in_a_page(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = module("tables")
    row = {"shape": "8b_o", "k": 4, "n": 8, "m": 1, "contender": "a", "median_us": 1234.6, "speedup": 1.0}
    other = {**row, "contender": "b", "median_us": 12.345, "speedup": 100.0}
    (tmp_path / "q.json").write_text(json.dumps({"rows": [row, other, {**row, "m": 2}]}))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: q.json --contenders b a -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--into", str(page)])
    for _ in range(2):  # a second time changes nothing
        assert tables.main() == 0
        text = page.read_text()
        assert (
            text.startswith("before\n<!-- table")
            and text.endswith("<!-- end -->\nafter\n")
            and "old" not in text
        )
        assert "| 8b o (4 → 8) | 1 | 12.3 (100) | 1235 (1) |" in text
        assert "| 8b o (4 → 8) | 2 | – | 1235 (1) |" in text


def test_quantising_a_random_model_is_measured(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize, parser = module("cases.quantize"), argparse.ArgumentParser()
    small = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 9}
    monkeypatch.setitem(quantize.SHAPES, "8b", quantize.SHAPES["8b"] | small | {"num_attention_heads": 8})
    quantize.add_arguments(parser)
    args = parser.parse_args(
        ["--layers=2", "--windows=5", "--window=16", "--recipes", "gptq_4bit_g32", "int8"]
    )
    args.seed, args.device = 3, "cpu"
    first, second = quantize.run(args, module("journal").Journal())
    assert first["layers"] == 2 and first["calibration_tokens"] == 5 * 16 and first["seconds"] > 0
    weights = 2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 160
    assert first["layer_gb"] == pytest.approx(2 * weights / 1e9)
    assert 0.5 < first["packed_gb"] / (2 * weights * 4.25 / 8 / 1e9) < 2
    assert first["held_out_error"] <= first["rtn_held_out_error"] and second["rtn_held_out_error"] < 0.05
    assert first["peak_gb"] is None  # of CUDA only


def test_random_weights_are_the_seeds_and_look_like_a_models(module: Any) -> None:
    shape = module("cases.quantize").SHAPES["1b"] | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 96,
    }
    models = [module("cases.quantize").random_model(shape, 1, seed, "cpu") for seed in (1, 1, 2)]
    states = [model.state_dict() for model in models]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])
    assert 0.015 < states[0][name].float().std() < 0.025 and states[0][name].dtype == torch.bfloat16
    logits = models[0](torch.tensor([[3, 5, 7]])).logits
    assert torch.isfinite(logits).all() and models[0].lm_head.weight is models[0].model.embed_tokens.weight
