# SPDX-License-Identifier: Apache-2.0
"""Recipes: how a model's weights are stored, as a short string (``docs/api.md`` §1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvopt.grammar import Part, reject_leftovers, split_choice, take_number, take_word, unknown
from kvopt.weights.formats import GROUP_STEP, INT8, MAX_GROUP, MIN_GROUP, WeightFormat

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = ("int8", "int4")
# Parts of the grammar that a later version builds; named so that they are not mistaken for typing errors.
PLANNED = (
    *("int8_dyn", "llm_int8", "int3", "int2", "nf4", "fp4", "gptq", "awq", "hqq", "clip", "smoothquant"),
    *("a8", "lorc", "eora"),
)
HEAD = "head"


@dataclass(frozen=True)
class Recipe:
    """How weights are stored: a plain type, or a format for the linears and optionally one for the head.

    Exactly one of ``dtype`` and ``format`` is set. ``parse`` and ``str`` are inverse and canonical.

    Attributes:
        dtype: the plain type; nothing is quantised.
        format: the format of every linear but the head.
        head: the format of ``lm_head``; ``None`` leaves it as it is. A tied embedding shares it and is stored once.
    """

    dtype: torch.dtype | None = None
    format: WeightFormat | None = None
    head: WeightFormat | None = None

    def __post_init__(self) -> None:
        if (self.dtype is None) == (self.format is None):
            raise ValueError("a recipe has either a dtype or a format")
        if self.head is not None and self.format is None:
            raise ValueError("a recipe without quantised linears has no quantised head")

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """Reads ``"bf16"``, ``"int8"``, ``"int4_g128"``, ``"int4_g64_sym+head_int8"`` …

        Raises:
            ValueError: names the part, what came, what is possible and the nearest match.
        """
        if isinstance(text, Recipe):
            return text
        first, *rest = split_choice(text, "recipe")
        if first.name in DTYPES:
            reject_leftovers(first.settings, first.name, [], what="recipe", text=text)
            if rest:
                raise ValueError(f"recipe {text!r}: {first.name} quantises nothing and takes no further part")
            return cls(dtype=DTYPES[first.name])
        format = _format(first, text)
        head = None
        for part in rest:
            if part.name != HEAD:
                raise _unknown_part(part, text, [HEAD])
            if head is not None:
                raise ValueError(f"recipe {text!r}: the part {HEAD!r} is given twice")
            inner = str(part).removeprefix(HEAD).removeprefix("_")
            if not inner:
                raise ValueError(f"recipe {text!r}: {HEAD!r} needs a format, for instance {HEAD}_int8")
            head = _format(split_choice(inner, "recipe")[0], text)
        return cls(format=format, head=head)

    def __str__(self) -> str:
        if self.dtype is not None:
            return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return str(self.format) + (f"+{HEAD}_{self.head}" if self.head else "")


def _unknown_part(part: Part, text: str, possible: list[str]) -> ValueError:
    base = str(part)
    if part.name in PLANNED or base in PLANNED or part.name.rstrip("0123456789") in PLANNED:
        return ValueError(
            f"recipe {text!r}: {base!r} is not available in this version; possible: {', '.join(possible)}"
        )
    return unknown("recipe", text, "part", part.name, possible)


def _format(part: Part, text: str) -> WeightFormat:
    """The format a part names: ``int8``, or ``int4`` with ``g16…g1024`` or ``gc``, and ``sym``."""
    if part.name not in FORMATS:
        raise _unknown_part(part, text, [*DTYPES, *FORMATS])
    settings = dict(part.settings)
    if part.name == "int8":
        if "dyn" in settings:
            raise _unknown_part(part, text, [*DTYPES, *FORMATS])
        reject_leftovers(settings, "int8", [], what="recipe", text=text)
        return INT8
    per_row = take_word(settings, "gc", what="recipe", text=text)
    group = take_number(settings, "g", None, MIN_GROUP, MAX_GROUP, what="recipe", text=text)
    symmetric = take_word(settings, "sym", what="recipe", text=text)
    reject_leftovers(settings, part.name, ["g128", "gc", "sym"], what="recipe", text=text)
    if per_row and group is not None:
        raise ValueError(f"recipe {text!r}: give either g{group} or gc, not both")
    if group is not None and group % GROUP_STEP:
        raise ValueError(f"recipe {text!r}: the group size must be a multiple of {GROUP_STEP}, got g{group}")
    if group is None and not per_row:
        group = 128
    return WeightFormat(bits=4, group_size=group, symmetric=symmetric)
