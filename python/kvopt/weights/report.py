# SPDX-License-Identifier: Apache-2.0
"""What quantising did to each linear."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvopt.files import write_whole

if TYPE_CHECKING:
    import pandas

# Okabe and Ito's palette, told apart by colour-blind readers.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class LayerReport:
    """One linear.

    Attributes:
        name: the module's name in the model.
        format: its format, for instance ``"int4_g128"``.
        bits: bits per weight, scales and padding included.
        nbytes: bytes of the packed weight.
        weight_error: ‖ŵ − w‖ / ‖w‖.
        output_error: ‖ŵx − wx‖ / ‖wx‖ over the calibration tokens; ``None`` without them.
        note: anything unusual: a fallback, what is shared or folded.
        seconds: time taken.
        method: how the codes were chosen; what was used in the end, for instance ``"rtn"`` after a fallback.
        held_out_error: ``output_error`` over the held-out tokens, which the method did not see.
        rtn_held_out_error: the same had the weight been rounded to nearest.
        damping: GPTQ: added to the Hessian's diagonal, as a share of its mean.
    """

    name: str
    format: str
    bits: float
    nbytes: int
    weight_error: float
    output_error: float | None
    note: str
    seconds: float
    method: str = "rtn"
    held_out_error: float | None = None
    rtn_held_out_error: float | None = None
    damping: float | None = None


@dataclass
class QuantizationReport:
    """All linears, in the model's order, and what else there is to say.

    Attributes:
        recipe: as a string.
        layers: a row per linear.
        nbytes_before: the model's bytes.
        nbytes_after: the same afterwards.
        kept: bytes of each weight of two or more dimensions that stays as it was: embeddings, a head that the recipe
            leaves alone, fused expert weights, which are no linears.
        calibration_tokens: that methods saw; 0 without calibration.
        held_out_tokens: that judged them.
        seed: of the split and of methods that draw.
        budget_bits: what a search was allowed; ``None`` without one.
        estimated_loss: by how much the search expects the loss to rise, nats a token, were all rounded to nearest.
        chosen: its result: a recipe for each linear.
    """

    recipe: str
    layers: list[LayerReport] = field(default_factory=list)
    nbytes_before: int = 0
    nbytes_after: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    calibration_tokens: int = 0
    held_out_tokens: int = 0
    seed: int = 0
    budget_bits: float | None = None
    estimated_loss: float | None = None
    chosen: dict[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """The mean of bits per quantised weight, all included.

        Raises:
            ValueError: nothing was quantised.
        """
        if not self.layers:
            raise ValueError("bits: nothing was quantised")
        return (
            8 * sum(row.nbytes for row in self.layers) / sum(8 * row.nbytes / row.bits for row in self.layers)
        )

    def to_frame(self) -> pandas.DataFrame:
        """One row per linear.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("report.to_frame() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.to_dict()["layers"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def to_json(self, file: str | PathLike[str] | None = None) -> str:
        """The report as JSON, and into ``file`` if one is given, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if file is not None:
            write_whole(Path(file), text.encode("utf-8"))
        return text

    def plot(self, file: str | PathLike[str]) -> Path:
        """Draws the error of each linear over the layers: a line per kind of linear, dashed for rounding to nearest.

        Shows held-out output errors where there was calibration, else weight errors.

        Args:
            file: of the picture, ``.png``, ``.svg`` or ``.pdf``; written whole or not at all.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing was quantised, or matplotlib does not know the file's ending.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("report.plot() needs matplotlib: pip install matplotlib") from error
        if not self.layers:
            raise ValueError("plot: nothing was quantised")
        path = Path(file)
        figure = Figure(figsize=(9.0, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        self._draw(figure.subplots())
        picture = io.BytesIO()
        figure.savefig(picture, format=path.suffix.lstrip(".") or "png", dpi=150, facecolor="white")
        return write_whole(path, picture.getvalue())

    def _draw(self, axes: Any) -> None:
        measured = any(layer.held_out_error is not None for layer in self.layers)
        kinds: dict[str, list[tuple[int, LayerReport]]] = {}
        for layer in self.layers:
            number = _LAYER.search(layer.name)
            kind = layer.name[number.end() :] if number else layer.name
            kinds.setdefault(kind, []).append((int(number[1]) if number else -1, layer))
        for index, (kind, rows) in enumerate(kinds.items()):
            rows.sort(key=lambda row: row[0])
            style = {"color": _COLOURS[index % len(_COLOURS)], "marker": "o", "markersize": 4}
            x = [number for number, _ in rows]
            y = [layer.held_out_error if measured else layer.weight_error for _, layer in rows]
            axes.plot(x, _gaps(y), label=kind, **style)
            if measured:
                axes.plot(
                    x,
                    _gaps([r.rtn_held_out_error for _, r in rows]),
                    **style,
                    ls="--",
                    mfc="white",
                    alpha=0.6,
                )
        outside = any(number < 0 for rows in kinds.values() for number, _ in rows)
        axes.set_title(self.recipe, loc="left", fontweight="bold", wrap=True)
        axes.set_ylabel("relative output error, held-out tokens" if measured else "relative weight error")
        axes.set_xlabel("decoder layer (−1: in none)" if outside else "decoder layer")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        title = "dashed, hollow: rounded to nearest" if measured else None
        axes.legend(fontsize=8, title_fontsize=8, ncols=2, frameon=False, title=title)

    def __str__(self) -> str:
        if not self.layers:
            return f"{self.recipe}: nothing quantised"
        worst = max(self.layers, key=lambda layer: layer.weight_error)
        return (
            f"{self.recipe}: {len(self.layers)} linears{self._formats()}, {self.nbytes_before / 1e6:.2f} MB → "
            f"{self.nbytes_after / 1e6:.2f} MB, largest weight error {worst.weight_error:.4f} ({worst.name})"
            + self._judgement()
        )

    def _formats(self) -> str:
        """After a search: how many linears got which format."""
        if self.budget_bits is None:
            return ""
        counts = Counter(row.format for row in self.layers)
        words = ", ".join(f"{count} × {format}" for format, count in sorted(counts.items()))
        return f" ({words}; {self.bits:.3f} bits)"

    def _judgement(self) -> str:
        pairs = [
            (row.held_out_error, row.rtn_held_out_error)
            for row in self.layers
            if row.held_out_error is not None and row.rtn_held_out_error is not None
        ]
        if not pairs:
            return ""
        mean, nearest = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        return f", mean held-out output error {mean:.4f} (rounded to nearest {nearest:.4f})"


def _gaps(values: list[float | None]) -> list[float]:
    """What was not measured leaves a gap in a line."""
    return [float("nan") if value is None else value for value in values]
