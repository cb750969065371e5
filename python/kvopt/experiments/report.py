# SPDX-License-Identifier: Apache-2.0
"""Writes what a run found: ``results.json``, ``results.csv`` and the figure ``results.png``."""

from __future__ import annotations

import os
from pathlib import Path

from kvopt.experiments.plots import draw
from kvopt.experiments.results import Results, write_results


def write_report(results: Results, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes all files of a run into ``folder``, numbers first, and returns their paths.

    Raises:
        OSError: a file can't be written; none is ever left half-written.
    """
    return [*write_results(results, folder), draw(results, Path(folder) / "results.png")]
