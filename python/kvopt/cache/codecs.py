# SPDX-License-Identifier: Apache-2.0
"""How a key or value is stored: in the model's type, in fp8, or in integer codes of 8, 4 or 2 bits.

Integers follow KIVI (Liu et al. 2024, arXiv:2402.02750, section 3): keys are quantised per channel over groups of
``group`` tokens, values per token over groups of ``group`` channels, and the newest tokens, ``residual`` of them, stay
in the model's type until a whole group of them is the oldest. What is packed once is never quantised again.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvopt.grammar import take_number
from kvopt.reference_kv_codes import FP8, INT2, INT4, INT8, MODEL

BLOCK = 256  # slots by which a cache without a limit grows
_NUMBERS = {"fp8": FP8, "int8": INT8, "int4": INT4, "int2": INT2}
_GROUP, _RESIDUAL = 32, 64
WHAT = "cache spec"


@dataclass(frozen=True)
class Codec:
    """One way of storing vectors; ``Codec()`` is the model's own type.

    Args:
        name: ``model``, ``fp8``, ``int8``, ``int4`` or ``int2``.
        group: tokens that share a key's scale, channels that share a value's, G; 1 for the others.
        residual: newest tokens that are not packed, R; a multiple of ``group``, 0 only where that is 1.

    Raises:
        ValueError: an unknown name, or a residual that is no multiple of the group.
    """

    name: str = "model"
    group: int = 1
    residual: int = 0

    def __post_init__(self) -> None:
        if self.name not in ("model", *_NUMBERS):
            raise ValueError(f"codec {self.name!r}: possible are model, {', '.join(_NUMBERS)}")
        if self.name in ("model", "fp8") and self.group != 1:
            raise ValueError(f"codec {self.name!r} has no groups, got g{self.group}")
        if self.residual % self.group or (self.group > 1 and not self.residual):
            raise ValueError(
                f"codec {self.name!r}: the residual must be a multiple of the group and at least one, "
                f"got g{self.group} and r{self.residual}"
            )

    @classmethod
    def named(cls, name: str) -> Codec:
        """The codec with its default group and residual."""
        return cls(name, _GROUP, _RESIDUAL) if name.startswith("int") else cls(name)

    @classmethod
    def from_settings(cls, name: str, settings: dict[str, int | bool], text: str) -> Codec:
        """``_g32`` and ``_r64``, removed from ``settings``.

        Raises:
            ValueError: a number out of range, or a residual that is no multiple of the group.
        """
        integer = name.startswith("int")
        group = take_number(settings, "g", _GROUP, 4, 256, what=WHAT, text=text) if integer else 1
        assert group is not None
        default = max(_RESIDUAL // group, 1) * group if integer else 0
        residual = take_number(settings, "r", default, 0, 2**16, what=WHAT, text=text)
        assert residual is not None
        try:
            return cls(name, group, residual)
        except ValueError as error:
            raise ValueError(f"{WHAT} {text!r}: {error}") from None

    @property
    def number(self) -> int:
        """As the operators know it."""
        return _NUMBERS.get(self.name, MODEL)

    @property
    def packs(self) -> bool:
        """Whether anything is packed at all."""
        return self.name != "model"

    def check(self, dim: int, model: str) -> None:
        """Raises ValueError where vectors of ``dim`` numbers can't be packed."""
        if self.name.startswith("int") and dim % 4:
            raise ValueError(
                f"codec {self.name!r}: heads of {dim} numbers (model type {model!r}) are no multiple of 4; use fp8"
            )

    def split(self, capacity: int) -> tuple[int, int]:
        """Packed and plain slots of a segment that may hold ``capacity`` tokens."""
        packed = max(0, capacity - self.residual) // self.group * self.group if self.packs else 0
        return packed, capacity - packed

    @property
    def block(self) -> int:
        """Slots by which a segment grows: 256, in whole groups."""
        return -(-BLOCK // self.group) * self.group

    def round_up(self, tokens: int) -> int:
        """The capacity of a segment that grows, for ``tokens`` now: the residual and whole blocks."""
        base = self.residual if self.packs else 0
        return base + max(0, -(-(tokens - base) // self.block)) * self.block

    def __str__(self) -> str:
        default = Codec.named(self.name)
        group = f"_g{self.group}" if self.group != default.group else ""
        usual = max(_RESIDUAL // self.group, 1) * self.group if self.group > 1 else 0
        return f"{self.name}{group}" + (f"_r{self.residual}" if self.residual != usual else "")


CODECS = tuple(_NUMBERS)
