# SPDX-License-Identifier: Apache-2.0
"""Reading the texts that are evaluated on: plain documents, recall stories, windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from kvopt.tokens import token_ids

SEPARATOR = "\n\0\n"


@dataclass(frozen=True)
class RecallDocument:
    """One story with facts hidden in it, and questions whose answers are spans to repeat exactly."""

    id: str
    length: str
    story: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def read_documents(file: str | PathLike[str]) -> list[str]:
    """Documents of a UTF-8 text file, separated by a line that holds one NUL character; without one, a single document.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8 text, or holds no text.
    """
    path = Path(file)
    documents = [document for document in _read_text(path).split(SEPARATOR) if document.strip()]
    if not documents:
        raise ValueError(f"{path}: no text in it")
    return documents


def read_recall(file: str | PathLike[str], limit: int | None = None) -> list[RecallDocument]:
    """Recall stories of a JSON-lines file with ``id``, ``length``, ``story``, ``questions`` and ``answers`` per line.

    Args:
        file: the path.
        limit: read only the first so many documents.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not such a document; the message names the file and the line.
    """
    path = Path(file)
    documents: list[RecallDocument] = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if limit is not None and len(documents) >= limit:
            break
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            document = RecallDocument(
                id=str(row["id"]),
                length=str(row.get("length", "all")),
                story=str(row["story"]),
                questions=tuple(map(str, row["questions"])),
                answers=tuple(map(str, row["answers"])),
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a recall document ({error!r})") from error
        if not document.questions or len(document.questions) != len(document.answers):
            raise ValueError(
                f"{path}, line {number}: {len(document.questions)} questions, {len(document.answers)} answers"
            )
        documents.append(document)
    if not documents:
        raise ValueError(f"{path}: no recall documents in it")
    return documents


def windows_of(
    documents: Iterable[str], tokenizer: Any, window: int = 1024, limit: int | None = None
) -> torch.Tensor:
    """Disjoint windows of the concatenated documents, each of which begins with the document separator token.

    The last tokens, fewer than a window, are left out.

    Args:
        documents: texts in order.
        tokenizer: a Hugging Face tokenizer.
        window: tokens per window, at least 2.
        limit: at most so many windows.

    Returns:
        ``(windows, window)`` int64 token ids on the CPU.

    Raises:
        ValueError: the documents hold fewer tokens than one window, or ``window`` is below 2.
    """
    if window < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {window}")
    stream: list[int] = []
    for document in documents:
        if limit is not None and len(stream) >= limit * window:
            break
        stream += token_ids(tokenizer, document, begins=True)
    count = len(stream) // window if limit is None else min(limit, len(stream) // window)
    if count < 1:
        raise ValueError(f"the text has {len(stream)} tokens, fewer than one window of {window}")
    return torch.tensor(stream[: count * window], dtype=torch.int64).view(count, window)


def pad_right(rows: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    """``(rows, longest)`` int64 token ids, shorter rows filled with ``padding`` at their end."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.int64)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
