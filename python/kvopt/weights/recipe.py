# SPDX-License-Identifier: Apache-2.0
"""Recipes: how a model's weights are stored, as a short string (``docs/api.md`` §1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvopt.grammar import Part, reject_leftovers, split_choice, take_number, take_word, unknown
from kvopt.reference import Scheme
from kvopt.weights.formats import (
    BITS,
    BOOK_BLOCKS,
    GROUP_STEP,
    INT8,
    MAX_GROUP,
    MAX_THRESHOLD,
    MIN_GROUP,
    OUTLIER_THRESHOLD,
    WeightFormat,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = ("int8", "llm_int8", "int4", "int3", "int2", "nf4", "fp4")
DEFAULT_GROUPS = {"int4": 128, "int3": 64, "int2": 32}
RTN = "rtn"
METHODS = ("gptq", "awq", "hqq", "clip")  # beside rounding to nearest, which is said by the format alone
METHOD_GROUPS = {8: 128, 4: 128, 3: 64, 2: 32}
# Parts of the grammar that a later version builds; named so that they are not mistaken for typing errors.
PLANNED = ("smoothquant", "lorc", "eora")
A8 = "a8"
HEAD = "head"
FOLD = "fold"


@dataclass(frozen=True)
class Recipe:
    """How weights are stored: a plain type, or a format for the linears and optionally one for the head.

    Exactly one of ``dtype`` and ``format`` is set. ``parse`` and ``str`` are inverse and canonical.

    Attributes:
        dtype: the plain type; nothing is quantised.
        format: the format of every linear but the head.
        head: the format of ``lm_head``; ``None`` leaves it as it is. A tied embedding shares it and is stored once.
            ``+a8`` counts for both.
        method: how the codes of the linears but the head are chosen: ``"rtn"`` rounds to nearest; ``"gptq"``,
            ``"awq"``, ``"hqq"``, ``"clip"`` take an integer format (HQQ an asymmetric one). The head is rounded.
        fold_only: AWQ: factors only where the module before takes them up, so that no weight keeps an input scale.
    """

    dtype: torch.dtype | None = None
    format: WeightFormat | None = None
    head: WeightFormat | None = None
    method: str = RTN
    fold_only: bool = False

    def __post_init__(self) -> None:
        if (self.dtype is None) == (self.format is None):
            raise ValueError("a recipe has either a dtype or a format")
        if self.method != RTN or self.fold_only:
            self._check_method()
        if self.head is not None and self.format is None:
            raise ValueError("a recipe without quantised linears has no quantised head")
        if self.head is not None and self.format is not None:
            kinds = {f.has_a8_part for f in (self.format, self.head) if f.scheme != Scheme.INT8_DYNAMIC}
            if len(kinds) > 1:
                raise ValueError("a recipe has +a8 for both the linears and the head, or for neither")

    def _check_method(self) -> None:
        if self.fold_only and self.method != "awq":
            raise ValueError(f"fold_only is AWQ's, got it for {self.method}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {RTN}, {', '.join(METHODS)}; got {self.method!r}")
        schemes = (Scheme.ASYMMETRIC,) if self.method == "hqq" else (Scheme.ASYMMETRIC, Scheme.SYMMETRIC)
        if self.format is None or self.format.scheme not in schemes:
            words = " or ".join(scheme.name.lower() for scheme in schemes)
            raise ValueError(f"{self.method}: the format must be {words}, got {self.format}")

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """Reads ``"bf16"``, ``"llm_int8_t50"``, ``"int4_g128"``, ``"nf4_dq+a8+head_int8"``, ``"awq_4bit_g64_sym"`` …

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
        method = first.name if first.name in METHODS else RTN
        format = _format(first, text) if method == RTN else _chosen(first, text)
        head = None
        seen: set[str] = set()
        for part in rest:
            if part.name not in (A8, HEAD):
                raise _unknown_part(part, text, [A8, HEAD])
            if part.name in seen:
                raise ValueError(f"recipe {text!r}: the part {part.name!r} is given twice")
            seen.add(part.name)
            if part.name == A8:
                reject_leftovers(part.settings, A8, [], what="recipe", text=text)
                continue
            inner = str(part).removeprefix(HEAD).removeprefix("_")
            if not inner:
                raise ValueError(f"recipe {text!r}: {HEAD!r} needs a format, for instance {HEAD}_int8")
            head = _format(split_choice(inner, "recipe")[0], text)
        if A8 in seen:
            format = replace(format, activation_bits=8)
            head = None if head is None else replace(head, activation_bits=8)
        fold_only = first.name == "awq" and first.settings.get(FOLD) is True
        return cls(format=format, head=head, method=method, fold_only=fold_only)

    def __str__(self) -> str:
        if self.dtype is not None:
            return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        formats = [f for f in (self.format, self.head) if f is not None]
        first = formats[0]
        parts = [
            first.storage_name if self.method == RTN else f"{self.method}_{first.bits}bit_{_group(first)}"
        ]
        if self.fold_only:
            parts[0] += f"_{FOLD}"
        if any(f.has_a8_part for f in formats):
            parts.append(A8)
        if self.head is not None:
            parts.append(f"{HEAD}_{self.head.storage_name}")
        return "+".join(parts)


def _group(format: WeightFormat) -> str:
    """``g128`` or ``gc``, with ``_sym`` where it is."""
    group = "gc" if format.group_size is None else f"g{format.group_size}"
    return group + ("_sym" if format.scheme == Scheme.SYMMETRIC else "")


def _unknown_part(part: Part, text: str, possible: list[str]) -> ValueError:
    base = str(part)
    if part.name in PLANNED:
        return ValueError(
            f"recipe {text!r}: {base!r} is not available in this version; possible: {', '.join(possible)}"
        )
    return unknown("recipe", text, "part", part.name, possible)


def _format(part: Part, text: str) -> WeightFormat:
    """The format that a part names."""
    if part.name in METHODS:  # the first part does not come here
        raise ValueError(
            f"recipe {text!r}: {part.name!r} is for the linears; the head is rounded: {HEAD}_int8"
        )
    if part.name == "llm" and part.settings.get("int") == 8:
        return _llm_int8(part, text)
    if part.name not in FORMATS:
        raise _unknown_part(part, text, [*DTYPES, *FORMATS, *METHODS])
    settings = dict(part.settings)
    if part.name == "int8":
        dynamic = take_word(settings, "dyn", what="recipe", text=text)
        reject_leftovers(settings, "int8", ["dyn"], what="recipe", text=text)
        return WeightFormat(8, None, Scheme.INT8_DYNAMIC) if dynamic else INT8
    return _book(part, settings, text) if part.name in ("nf4", "fp4") else _integer(part, settings, text)


def _llm_int8(part: Part, text: str) -> WeightFormat:
    """``llm_int8``, which the grammar splits into ``llm`` and ``int8``, with ``t60``."""
    settings = {key: value for key, value in part.settings.items() if key != "int"}
    tenths = take_number(
        settings, "t", round(10 * OUTLIER_THRESHOLD), 1, MAX_THRESHOLD, what="recipe", text=text
    )
    assert tenths is not None
    reject_leftovers(settings, "llm_int8", ["t60"], what="recipe", text=text)
    return WeightFormat(8, None, Scheme.INT8_DYNAMIC, outlier_threshold=tenths / 10)


def _book(part: Part, settings: dict[str, int | bool], text: str) -> WeightFormat:
    """``nf4`` or ``fp4`` with ``b64`` and ``dq``."""
    block = take_number(settings, "b", 64, BOOK_BLOCKS[0], BOOK_BLOCKS[-1], what="recipe", text=text)
    double = take_word(settings, "dq", what="recipe", text=text)
    reject_leftovers(settings, part.name, ["b64", "dq"], what="recipe", text=text)
    if block not in BOOK_BLOCKS:
        possible = ", ".join(f"b{size}" for size in BOOK_BLOCKS)
        raise ValueError(f"recipe {text!r}: the block size must be one of {possible}, got b{block}")
    return WeightFormat(4, block, Scheme[part.name.upper()], double)


def _integer(part: Part, settings: dict[str, int | bool], text: str) -> WeightFormat:
    """``int4``, ``int3`` or ``int2`` with ``g16…g1024`` or ``gc``, and ``sym``."""
    return _grouped(part.name, int(part.name[-1]), DEFAULT_GROUPS[part.name], settings, text)


def _chosen(part: Part, text: str) -> WeightFormat:
    """The format behind ``gptq_4bit_g128`` and its like; HQQ has no ``sym``."""
    settings = dict(part.settings)
    widths = {f"{bits}bit": bits for bits in sorted(BITS)}
    given = [bits for word, bits in widths.items() if take_word(settings, word, what="recipe", text=text)]
    if len(given) != 1:
        raise ValueError(
            f"recipe {text!r}: {part.name!r} needs one of {', '.join(widths)}, for instance {part.name}_4bit_g128"
        )
    if part.name == "awq":
        take_word(settings, FOLD, what="recipe", text=text)
    if part.name == "hqq" and "sym" in settings:
        raise ValueError(f"recipe {text!r}: 'hqq' refines zero points and has no 'sym'")
    return _grouped(part.name, given[0], METHOD_GROUPS[given[0]], settings, text)


def _grouped(name: str, bits: int, default: int, settings: dict[str, int | bool], text: str) -> WeightFormat:
    """An integer format from its group and ``sym``."""
    per_row = take_word(settings, "gc", what="recipe", text=text)
    group = take_number(settings, "g", None, MIN_GROUP, MAX_GROUP, what="recipe", text=text)
    symmetric = take_word(settings, "sym", what="recipe", text=text)
    possible = [f"g{default}", "gc", "sym", *([FOLD] if name == "awq" else [])]
    reject_leftovers(settings, name, possible, what="recipe", text=text)
    if per_row and group is not None:
        raise ValueError(f"recipe {text!r}: give either g{group} or gc, not both")
    if group is not None and group % GROUP_STEP:
        raise ValueError(f"recipe {text!r}: the group size must be a multiple of {GROUP_STEP}, got g{group}")
    if group is None and not per_row:
        group = default
    scheme = Scheme.SYMMETRIC if symmetric else Scheme.ASYMMETRIC
    return WeightFormat(bits, group, scheme)
