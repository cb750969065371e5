# SPDX-License-Identifier: Apache-2.0
"""The table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

from kvopt.experiments.results import Record, best

_MISSING = "–"
_LEGEND = (
    "* baseline, which × compares with: the faster of the unquantised types. MB: 10⁶ bytes. bits/w: linear layers with "
    "scales.\n± standard error over windows and stories; for tok/s the standard deviation of the rounds."
)


def print_table(records: Sequence[Record], stream: IO[str] | None = None, title: str | None = None) -> None:
    """Prints one table per model, speeds with their ratio to the baseline's.

    Args:
        records: of a run.
        stream: where to; default stdout. Colours only on a terminal and without ``NO_COLOR``.
        title: above the first table.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError("the table needs rich: pip install rich") from error
    console = Console(file=stream, soft_wrap=False)
    if not console.is_terminal:  # a file or a pipe has no width: do not cut columns to 80 characters
        console = Console(file=stream, width=140)
    if title:
        console.print(title, style="bold", highlight=False)
    for model in dict.fromkeys(record.model for record in records):
        console.print(_table(model, [record for record in records if record.model == model]))
    console.print(_LEGEND, style="dim", highlight=False)


def _table(model: str, records: Sequence[Record]) -> Any:
    from rich.table import Table
    from rich.text import Text

    scored = any(r.perplexity is not None or r.recall is not None for r in records)
    random = all("speed only" in r.note for r in records)
    compressed = any(r.cache != "full" for r in records)
    columns = ["experiment", *(["cache"] if compressed else []), "bits/w", "model MB", "cache MB"]
    columns += ["perplexity", "recall %"] if scored else []
    columns += ["prefill ms", "×", "decode tok/s", "×"]
    table = Table(title=f"{model} (speed only)" if random else model, title_justify="left")
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("experiment", "cache") else "right", no_wrap=True
        )
    baseline = best(records)
    prefill_ms = baseline.prefill_ms if baseline else None
    decode_tok_s = baseline.decode_tok_s if baseline else None
    for record in records:
        is_baseline = record is baseline
        row = [f"{record.experiment}{' *' if is_baseline else ''}", *([record.cache] if compressed else [])]
        row += [
            number(record.bits_per_weight, 2),
            megabytes(record.model_bytes),
            megabytes(record.cache_bytes),
        ]
        if scored:
            row += [
                with_error(record.perplexity, record.perplexity_stderr, 2),
                with_error(_percent(record.recall), _percent(record.recall_stderr), 1),
            ]
        row += [
            number(record.prefill_ms, 1),
            _ratio(prefill_ms, record.prefill_ms),
            with_error(record.decode_tok_s, record.decode_tok_s_std, 1),
            _ratio(record.decode_tok_s, decode_tok_s),
        ]
        failed = "failed" in record.note
        style = "red" if failed else "bold" if is_baseline else ""
        table.add_row(*(Text(cell) for cell in row), style=style)
    return table


def number(value: float | None, digits: int) -> str:
    """A number, or a dash where it was not measured."""
    return _MISSING if value is None else f"{value:.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """``12.34 ± 0.56``."""
    return number(value, digits) if error is None else f"{number(value, digits)} ± {error:.{digits}f}"


def megabytes(nbytes: int | None) -> str:
    """Millions of bytes with three significant digits or more."""
    if nbytes is None:
        return _MISSING
    value = nbytes / 1e6
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _ratio(above: float | None, below: float | None) -> str:
    return f"{above / below:.2f}" if above and below else _MISSING
