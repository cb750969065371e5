# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvopt import assets
from kvopt.eval import read_documents, read_recall


def test_documents_are_split_at_a_nul_line(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"one\ntwo\n\0\nthree\n\0\n\n")
    assert read_documents(file) == ["one\ntwo", "three"]


def test_bad_text_files(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_documents(file)
    file.write_text(" \n")
    with pytest.raises(ValueError, match="no text in it"):
        read_documents(file)
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"id": 1}', '{"id": "x", "story": "s", "questions": ["a", "b"], "answers": ["c"]}'],
)
def test_bad_recall_lines_are_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "recall.jsonl"
    good = json.dumps({"id": "x", "story": "s", "questions": ["a"], "answers": ["c"]})
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_recall(file)
    assert len(read_recall(file, limit=1)) == 1


def test_embedded_files_are_there_and_balanced() -> None:
    assert assets.missing() == []
    stories = read_recall(assets.path("recall.jsonl"))
    assert [story.length for story in stories[:4]] == ["short", "1k", "2k", "3k"]
    assert {sum(s.length == length for s in stories) for length in ("short", "1k", "2k", "3k")} == {10}
    documents = read_documents(assets.path("wiki-heldout.txt"))
    assert len(documents) == 17 and documents[0].startswith("Carl Woese\n")
    assert (assets.path("llama-6m") / "model.safetensors").is_file()
    notice = (assets.root() / "NOTICE").read_text()
    assert all(document.split("\n")[0] in " ".join(notice.split()) for document in documents)
    with pytest.raises(KeyError, match="no embedded asset 'llama-9b'"):
        assets.path("llama-9b")


def test_every_dialogue_has_its_answers() -> None:
    lines = assets.path("fairytaleqa.coqa.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        assert row["story"] and len(row["questions"]["input_text"]) == len(row["answers"]["input_text"]) > 0
