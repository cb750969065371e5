# SPDX-License-Identifier: Apache-2.0
"""The embedded default model and texts. Sources and licences are in the file ``NOTICE`` beside this module."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

MODELS = ("llama-6m",)
"""Embedded models, each a folder in the Hugging Face format: ``path(name)`` can be given to ``from_pretrained``."""

TEXTS = ("wiki-heldout.txt", "recall.jsonl", "fairytaleqa.coqa.jsonl")
"""Embedded texts: held-out Wikipedia articles, recall stories, FairytaleQA dialogues."""


def root() -> Path:
    """The folder of the assets.

    Raises:
        FileNotFoundError: kvopt was imported out of an archive, where a folder can't be opened.
    """
    folder = files("kvopt.assets")
    if not isinstance(folder, Path):  # MultiplexedPath or a zip: transformers needs real files
        folder = Path(str(folder))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"kvopt's assets are not a folder on disk ({folder}); install kvopt unpacked, with pip"
        )
    return folder


def path(name: str) -> Path:
    """Path of an embedded model (``"llama-6m"``, a folder) or text (``"wiki-heldout.txt"``, a file).

    Raises:
        KeyError: no asset of that name.
        FileNotFoundError: it should be there but is not; the installation is incomplete.
    """
    if name in MODELS:
        found = root() / name
        complete = (found / "config.json").is_file()
    elif name in TEXTS:
        found = root() / "data" / name
        complete = found.is_file()
    else:
        raise KeyError(f"no embedded asset {name!r}; there are {', '.join(MODELS + TEXTS)}")
    if not complete:
        raise FileNotFoundError(f"the embedded asset {name!r} is missing at {found}; reinstall kvopt")
    return found


def missing() -> list[str]:
    """Names of embedded assets that this installation lacks; empty when it is complete."""
    absent = []
    for name in MODELS + TEXTS:
        try:
            path(name)
        except FileNotFoundError:
            absent.append(name)
    return absent


__all__ = ["MODELS", "TEXTS", "missing", "path", "root"]
