# SPDX-License-Identifier: Apache-2.0
"""The one grammar of every choice: parts joined by ``+``, settings behind ``_``.

``"h2o_b512+int4"`` is two parts, ``h2o`` with the setting ``b512`` and ``int4``. A setting is a letter and a number
(``g128``), or a word (``sym``). This module only splits, matches and complains; what the parts mean is known to
:class:`kvopt.Recipe` and :class:`kvopt.CacheSpec`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_SETTING = re.compile(r"^(?P<letters>[a-z]+)(?P<number>\d+)$")


@dataclass(frozen=True)
class Part:
    """One part of a choice: its name and its settings in the order they came.

    ``settings`` maps a letter to its number (``{"g": 128}``) and a word to ``True`` (``{"sym": True}``).
    """

    name: str
    settings: Mapping[str, int | bool]

    def __str__(self) -> str:
        return "_".join([self.name, *(k if v is True else f"{k}{v}" for k, v in self.settings.items())])


def split_choice(text: str, what: str) -> list[Part]:
    """Splits ``text`` into parts.

    Args:
        text: the choice, for instance ``"sink_b256_s4+int4"``.
        what: what is being chosen, for the error: ``"recipe"`` or ``"cache spec"``.

    Raises:
        ValueError: empty text, an empty part or setting, or a setting given twice.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what}: expected a non-empty string, got {text!r}")
    parts = []
    for raw in text.strip().split("+"):
        name, *raw_settings = raw.split("_")
        if not name or not all(raw_settings):
            raise ValueError(f"{what} {text!r}: empty part or setting in {raw!r}")
        settings: dict[str, int | bool] = {}
        for setting in raw_settings:
            match = _SETTING.match(setting)
            key: str = match["letters"] if match else setting
            if key in settings:
                raise ValueError(f"{what} {text!r}: setting {key!r} is given twice in {raw!r}")
            settings[key] = int(match["number"]) if match else True
        parts.append(Part(name, settings))
    return parts


def unknown(what: str, text: str, kind: str, got: str, possible: Iterable[str]) -> ValueError:
    """The error for a name that is not known: it lists what is possible and names the nearest match.

    ``unknown("recipe", "int5", "part", "int5", ["int4", "int8"])`` reads
    ``recipe 'int5': unknown part 'int5'; possible: int4, int8; did you mean 'int4'?``
    """
    names = sorted(possible)
    message = f"{what} {text!r}: unknown {kind} {got!r}; possible: {', '.join(names)}"
    nearest = difflib.get_close_matches(got, names, n=1, cutoff=0.4)
    return ValueError(f"{message}; did you mean {nearest[0]!r}?" if nearest else message)


def take_number(
    settings: dict[str, int | bool],
    key: str,
    default: int | None,
    low: int,
    high: int,
    *,
    what: str,
    text: str,
) -> int | None:
    """Removes the numeric setting ``key`` from ``settings`` and returns it, or ``default`` where it is absent.

    Raises:
        ValueError: it is not a number, or outside ``low..high``.
    """
    value = settings.pop(key, None)
    if value is None:
        return default
    if value is True or not low <= value <= high:
        came = key if value is True else f"{key}{value}"
        raise ValueError(f"{what} {text!r}: setting {came!r} must be {key}{low}…{key}{high}")
    return int(value)


def take_word(settings: dict[str, int | bool], key: str, *, what: str, text: str) -> bool:
    """Removes the word ``key`` from ``settings`` and says whether it was there.

    Raises:
        ValueError: it came with a number.
    """
    value = settings.pop(key, False)
    if value is not True and value is not False:
        raise ValueError(f"{what} {text!r}: setting {key!r} takes no number, got {key}{value}")
    return bool(value)


def reject_leftovers(
    settings: Mapping[str, int | bool], part: str, possible: Iterable[str], *, what: str, text: str
) -> None:
    """Raises :class:`ValueError` if a setting of ``part`` was not consumed."""
    for key in settings:
        raise unknown(what, text, f"setting of {part!r}", key, possible)
