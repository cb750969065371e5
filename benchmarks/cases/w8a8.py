# SPDX-License-Identifier: Apache-2.0
"""int8 x int8 products with per-token activations, quantisation included, beside torch's and bitsandbytes'."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from cases import qlinear
from compare import COLUMNS
from journal import Journal

__all__ = ["COLUMNS", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    qlinear.add_arguments(parser, recipes=["int8_dyn"])
    parser.set_defaults(
        m=[16, 64, 256, 1024],
        peers=["torch_dynamic", "torch_int_mm", "torch_int8_tokens", "bnb_int8"],
        shapes=["8b_gate_up", "8b_o"],
    )


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    return qlinear.run(args, journal, case="w8a8")
