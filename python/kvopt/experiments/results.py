# SPDX-License-Identifier: Apache-2.0
"""Records of measurements and their files: ``results.json`` and ``results.csv``.

Files appear whole or not at all: they are rendered in memory, written under a temporary name in the same folder,
flushed to the disk and renamed. When that fails, for instance because the disk is full, the temporary file is removed
and an older file of that name stays as it was.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvopt.files import write_whole

SCHEMA = 1


@dataclass
class Record:
    """One experiment's measurements. What was not measured is ``None``, never 0.

    Sizes are bytes, ``bits_per_weight`` is over the linear layers with scales and zeros included, ``recall`` is a share
    of 1, times are as their names say; ``decode_tok_s`` is the median over ``n_runs`` rounds and ``_std`` their spread.
    ``peak_memory_bytes`` is the model's bytes plus the growth of memory while a prompt was read and tokens decoded.
    """

    experiment: str
    model: str
    recipe: str
    cache: str
    seed: int
    bits_per_weight: float | None = None
    model_bytes: int | None = None
    cache_bytes: int | None = None
    peak_memory_bytes: int | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    recall: float | None = None
    recall_stderr: float | None = None
    em: float | None = None
    em_stderr: float | None = None
    f1: float | None = None
    f1_stderr: float | None = None
    n_documents: int | None = None
    prompt_tokens: int | None = None
    prefill_ms: float | None = None
    decode_tok_s: float | None = None
    decode_tok_s_std: float | None = None
    n_runs: int | None = None
    n_warmup: int | None = None
    seconds: float | None = None
    note: str = ""

    def add_note(self, text: str) -> None:
        """Appends a remark to ``note``."""
        self.note = f"{self.note}; {text}" if self.note else text


FIELDS = tuple(field.name for field in dataclasses.fields(Record))


@dataclass
class Results:
    """All records of one run with the machine they were made on."""

    machine: dict[str, Any]
    records: list[Record]
    kvopt: str

    def to_dict(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return {
            "schema": SCHEMA,
            "kvopt": self.kvopt,
            "machine": self.machine,
            "records": [dataclasses.asdict(record) for record in self.records],
        }

    def to_json(self) -> str:
        """``results.json`` as text.

        Raises:
            ValueError: a number is NaN or infinite, which a result never is.
        """
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """``results.csv`` as text: the same columns, empty where not measured."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(FIELDS)
        for record in self.records:
            values = (getattr(record, name) for name in FIELDS)
            writer.writerow(["" if value is None else value for value in values])
        return text.getvalue()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Results:
        """Reads the content of ``results.json`` back.

        Raises:
            ValueError: another schema, or fields that this version doesn't know.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"results: expected schema {SCHEMA}, got {data.get('schema')!r}")
        try:
            records = [Record(**row) for row in data["records"]]
            return cls(machine=data["machine"], records=records, kvopt=data["kvopt"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"results: not as schema {SCHEMA} has it: {error}") from error


def read_results(file: str | os.PathLike[str]) -> Results:
    """Reads a ``results.json``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not this schema.
    """
    return Results.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))


def write_results(results: Results, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes ``results.json`` and ``results.csv`` into ``folder`` and returns their paths.

    Raises:
        OSError: a file could not be written; it is then absent or as it was before.
    """
    out = Path(folder)
    contents = {"results.json": results.to_json(), "results.csv": results.to_csv()}
    return [write_whole(out / name, text.encode("utf-8")) for name, text in contents.items()]


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """Makes ``folder`` if needed and proves that a file can be written there, before any work is done.

    Raises:
        OSError: it can't.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    descriptor, probe = tempfile.mkstemp(prefix=".probe.", suffix=".tmp", dir=out)
    os.close(descriptor)
    _remove(probe)
    return out


def best(records: Sequence[Record]) -> Record | None:
    """The baseline among the records of one model: the fastest of ``fp32``, ``fp16``, ``bf16`` with ``full``."""
    baselines = [r for r in records if r.recipe in ("fp32", "fp16", "bf16") and r.cache == "full"]
    timed = [r for r in baselines if r.decode_tok_s is not None]
    if timed:
        return max(timed, key=lambda record: record.decode_tok_s or 0.0)
    return baselines[0] if baselines else None


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
