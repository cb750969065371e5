# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvopt.experiments.results import (
    FIELDS,
    Record,
    Results,
    best,
    read_results,
    require_writable,
    write_results,
)
from kvopt.files import write_whole

# The contract of docs/api.md, section "Results": names and order.
CONTRACT = [
    "experiment",
    "model",
    "recipe",
    "cache",
    "seed",
    "bits_per_weight",
    "model_bytes",
    "cache_bytes",
    "peak_memory_bytes",
    "perplexity",
    "perplexity_stderr",
    "recall",
    "recall_stderr",
    "em",
    "em_stderr",
    "f1",
    "f1_stderr",
    "n_documents",
    "prompt_tokens",
    "prefill_ms",
    "decode_tok_s",
    "decode_tok_s_std",
    "n_runs",
    "n_warmup",
    "seconds",
    "note",
]


@pytest.fixture
def results() -> Results:
    records = [
        Record(
            "fp32",
            "m",
            "fp32",
            "full",
            7,
            model_bytes=100,
            perplexity=3.5,
            decode_tok_s=10.0,
            note='a "b", c',
        ),
        Record("int8", "m", "int8", "sink_b256_s4", 7, recall=0.0, decode_tok_s=20.0),
    ]
    return Results({"cpu": "x", "gpus": []}, records, "0.1.0")


def test_fields_are_the_contract() -> None:
    assert list(FIELDS) == CONTRACT


def test_round_trip_and_schema(results: Results, tmp_path: Path) -> None:
    paths = write_results(results, tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.csv"]
    data = json.loads(paths[0].read_text())
    assert list(data) == ["schema", "kvopt", "machine", "records"] and data["schema"] == 1
    assert read_results(paths[0]) == results


def test_unmeasured_is_null_and_empty_but_a_measured_zero_is_zero(results: Results, tmp_path: Path) -> None:
    json_path, csv_path = write_results(results, tmp_path)
    rows = list(csv.DictReader(csv_path.open(newline="")))
    assert list(rows[0]) == CONTRACT
    assert rows[0]["note"] == 'a "b", c' and rows[0]["recall"] == "" and rows[1]["recall"] == "0.0"
    record = json.loads(json_path.read_text())["records"][0]
    assert record["recall"] is None and record["cache_bytes"] is None


def test_nan_is_never_written(results: Results, tmp_path: Path) -> None:
    results.records[0].perplexity = float("nan")
    with pytest.raises(ValueError):
        write_results(results, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_schemas_are_refused(results: Results) -> None:
    with pytest.raises(ValueError, match="expected schema 1, got 2"):
        Results.from_dict({**results.to_dict(), "schema": 2})
    with pytest.raises(ValueError, match="not as schema 1"):
        Results.from_dict({**results.to_dict(), "records": [{"colour": "red"}]})


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "results.json"
    target.write_text("old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left.*results\.json"):
        write_whole(target, b"new" * 100)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    """mkstemp's are for the owner only."""
    plain = tmp_path / "plain"
    plain.write_text("")
    written = write_whole(tmp_path / "a", b"x")
    assert written.stat().st_mode == plain.stat().st_mode


def test_unwritable_folder_is_known_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        require_writable(tmp_path / "file" / "out")
    assert list(require_writable(tmp_path / "new" / "deep").iterdir()) == []


def test_best_is_the_faster_baseline(results: Results) -> None:
    assert best(results.records) is results.records[0]
    faster = Record("bf16", "m", "bf16", "full", 7, decode_tok_s=11.0)
    assert best([*results.records, faster]) is faster
    assert best(results.records[1:]) is None
