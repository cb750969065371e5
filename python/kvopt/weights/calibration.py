# SPDX-License-Identifier: Apache-2.0
"""Calibration data: texts or tokens become windows of one length, a tenth of which is held out to judge the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kvopt.tokens import token_ids

MAX_WINDOW = 2048  # tokens in a window
MAX_WINDOWS = 128  # read from texts; 128 x 2048 tokens is what GPTQ's paper takes (section 4)
MIN_WINDOWS = 10  # windows get shorter where the text would fill fewer
HELD_OUT = 0.1


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens, int64 on the CPU.

    Attributes:
        windows: (W, S), what methods see.
        held_out: (H, S), what they don't: a tenth, at least one. Drawn by the seed.
    """

    windows: Tensor
    held_out: Tensor

    @property
    def fingerprint(self) -> str:
        """A digest of the tokens and of the split."""
        digest = hashlib.sha256(repr((tuple(self.windows.shape), tuple(self.held_out.shape))).encode())
        for part in (self.windows, self.held_out):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def prepare(calibration: Any, tokenizer: Any, model: nn.Module, seed: int) -> Calibration:
    """Makes windows of what a user gave.

    Args:
        calibration: a text or texts; token ids as a tensor (windows, tokens), which is taken as it is, or (tokens,);
            or an iterable of texts, of token id sequences, or of rows with ``input_ids`` or ``text``. Texts and
            sequences are joined and cut into windows of ``MAX_WINDOW`` tokens, or of what the model's positions allow;
            reading ends after ``MAX_WINDOWS``. Each text begins with the beginning-of-sequence token, where the
            tokenizer has one.
        tokenizer: of the model, for texts.
        model: for its vocabulary and its largest position.
        seed: draws the held-out windows.

    Raises:
        ValueError: no data, too little of it, texts without a tokenizer, or tokens that the model does not have.
        TypeError: neither texts nor token ids.
    """
    longest = _positions(model)
    if isinstance(calibration, Tensor) and calibration.dim() == 2:
        windows = _integer(calibration)
        if longest is not None and windows.shape[1] > longest:
            raise ValueError(
                f"calibration: windows of {windows.shape[1]} tokens, the model has {longest} positions"
            )
    else:
        windows = _cut(_documents(calibration, tokenizer), min(MAX_WINDOW, longest or MAX_WINDOW))
    if windows.numel() == 0:
        raise ValueError(f"calibration: no tokens in it, shape {tuple(windows.shape)}")
    low, high = (int(value) for value in torch.aminmax(windows))
    size = _vocabulary(model)
    if low < 0 or (size is not None and high >= size):
        raise ValueError(f"calibration: token ids are {low}…{high}, the model has 0…{(size or 0) - 1}")
    if len(windows) == 1:  # one half judges what the other chose
        half = windows.shape[1] // 2
        windows = windows[:, : 2 * half].view(2, half)
    if windows.shape[1] < 2:
        raise ValueError(f"calibration: {windows.numel()} tokens are too few to learn from and to judge by")
    return _split(windows, seed)


def _split(windows: Tensor, seed: int) -> Calibration:
    count = max(1, round(HELD_OUT * len(windows)))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(windows), dtype=torch.bool)
    held[order[:count]] = True
    return Calibration(windows[~held], windows[held])


def _documents(calibration: Any, tokenizer: Any) -> Iterable[Sequence[int]]:
    """Token ids, document by document."""
    if isinstance(calibration, str):
        calibration = [calibration]
    elif isinstance(calibration, Tensor):
        if calibration.dim() != 1:
            raise ValueError(
                f"calibration: expected (windows, tokens) or (tokens,), got shape {tuple(calibration.shape)}"
            )
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration: expected texts or token ids, got {type(calibration).__name__}")
    items = iter(calibration)
    first = next(items, None)
    if isinstance(first, int):  # a list of token ids
        items, first = iter(()), [first, *items]
    for item in chain([] if first is None else [first], items):
        yield from _tokens_of(item, tokenizer)


def _tokens_of(item: Any, tokenizer: Any) -> Iterable[Sequence[int]]:
    if isinstance(item, Mapping):  # a row of a data set, or what a tokenizer gives
        item = item.get("input_ids", item.get("text", item))
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError(
                "calibration: texts need the model's tokenizer: quantize(…, tokenizer=tokenizer)"
            )
        yield token_ids(tokenizer, item, begins=True)
        return
    if not isinstance(item, Tensor):
        try:
            item = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"calibration: expected texts or token ids, got {type(item).__name__}") from error
    if item.numel() == 0:  # an empty document; of an empty list torch makes floats
        return
    yield from (row.tolist() for row in _integer(item).reshape(-1, item.shape[-1] if item.dim() else 1))


def _cut(documents: Iterable[Sequence[int]], window: int) -> Tensor:
    stream: list[int] = []
    for document in documents:
        stream += document
        if len(stream) >= MAX_WINDOWS * window:
            break
    window = min(window, max(len(stream) // MIN_WINDOWS, 2))
    count = min(len(stream) // window, MAX_WINDOWS)
    return torch.tensor(stream[: count * window], dtype=torch.int64).view(count, window)


def _integer(tokens: Tensor) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"calibration: expected integer token ids, got {tokens.dtype}")
    return tokens.detach().to("cpu", torch.int64)


def _positions(model: Any) -> int | None:
    config = getattr(model, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


def _vocabulary(model: Any) -> int | None:
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(table, "num_embeddings", None)
    return size if isinstance(size, int) else None
