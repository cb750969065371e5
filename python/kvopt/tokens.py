# SPDX-License-Identifier: Apache-2.0
"""Text to token ids, the same for calibration and evaluation."""

from __future__ import annotations

from typing import Any


def token_ids(tokenizer: Any, text: str, *, begins: bool) -> list[int]:
    """Token ids of ``text``; where it ``begins`` a document, with the beginning-of-sequence token if there is one.

    Some tokenizers add that token by default and some never do, so it is looked at, not assumed.
    """
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    bos = tokenizer.bos_token_id
    if begins and bos is not None and (not ids or ids[0] != bos):
        ids.insert(0, int(bos))
    return ids
