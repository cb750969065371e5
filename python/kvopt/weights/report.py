# SPDX-License-Identifier: Apache-2.0
"""What quantising did to each linear."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class LayerReport:
    """One linear.

    Attributes:
        name: the module's name in the model.
        format: its format, for instance ``"int4_g128"``.
        bits: bits per weight, scales and padding included.
        nbytes: bytes of the packed weight.
        weight_error: ‖ŵ − w‖ / ‖w‖.
        output_error: the same for outputs on calibration data; ``None`` where the method needs none.
        note: anything unusual.
        seconds: time taken.
    """

    name: str
    format: str
    bits: float
    nbytes: int
    weight_error: float
    output_error: float | None
    note: str
    seconds: float


@dataclass
class QuantizationReport:
    """All linears, in the model's order, and the model's size before and after in bytes."""

    recipe: str
    layers: list[LayerReport] = field(default_factory=list)
    nbytes_before: int = 0
    nbytes_after: int = 0

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

    def __str__(self) -> str:
        if not self.layers:
            return f"{self.recipe}: nothing quantised"
        worst = max(self.layers, key=lambda layer: layer.weight_error)
        return (
            f"{self.recipe}: {len(self.layers)} linears, {self.nbytes_before / 1e6:.2f} MB → "
            f"{self.nbytes_after / 1e6:.2f} MB, largest weight error {worst.weight_error:.4f} ({worst.name})"
        )
