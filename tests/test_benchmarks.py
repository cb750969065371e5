# SPDX-License-Identifier: Apache-2.0
"""The benchmark driver: who computes something else is not timed, and tables say what was and was not measured."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the benchmarks are not part of this checkout")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_driver_writes_what_it_prints(tmp_path: Path) -> None:
    out = tmp_path / "new" / "q.json"
    options = "qlinear --device cpu --shapes 1b_o --m 2 --rounds 2 --copies-mb 1 --recipes int4_g128 --peers torch_int4"
    command = [sys.executable, str(FOLDER / "run.py"), *options.split(), "--out", str(out)]
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
