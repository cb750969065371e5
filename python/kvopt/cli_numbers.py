# SPDX-License-Identifier: Apache-2.0
"""Numbers on the command line: what argparse takes as a type."""

from __future__ import annotations

import argparse


def capability(text: str) -> tuple[int, int]:
    """A compute capability, ``75`` or ``9.0``, as (major, minor)."""
    major, _, minor = text.partition(".") if "." in text else (text[:-1], "", text[-1:])
    if not (major.isdigit() and minor.isdigit()) or int(minor) > 9:
        raise argparse.ArgumentTypeError(f"expected a compute capability, 75 or 9.0 for instance; got {text}")
    return int(major), int(minor)


def count(text: str) -> int:
    """0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


def positive(text: str) -> int:
    """1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value
