# SPDX-License-Identifier: Apache-2.0
"""CacheSpec: the choice of a KV cache as four independent objects and one short string."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvopt.cache.budgets import Budget, MebibyteBudget, PercentBudget, TokenBudget
from kvopt.cache.codecs import Codec, ModelType
from kvopt.cache.policies import POLICIES, Full, Policy
from kvopt.grammar import Part, reject_leftovers, split_choice, take_number, unknown

_WHAT = "cache spec"
_PLANNED_POLICIES = ("h2o", "snapkv", "tova", "pyramidkv", "kvzip", "random")
_PLANNED_PARTS = {
    "pyramid": "allocator",
    "ada": "allocator",
    "fp8": "codec",
    "int8": "codec",
    "int4": "codec",
    "int2": "codec",
    "minicache": "merge",
}
_AVAILABLE_PARTS = ("uniform",)
RESERVED = {"full", "window", "sink", *_PLANNED_POLICIES, *_PLANNED_PARTS, *_AVAILABLE_PARTS}
_MAXIMUM = {"b": 2**24, "p": 100, "mb": 2**20}


@dataclass(frozen=True)
class CacheSpec:
    """Which tokens stay, how many, and in how many bits.

    ``CacheSpec.parse("sink_b256_s4_orig")`` and ``CacheSpec(Sink(4, original=True), TokenBudget(256))`` are equal, and
    ``str`` gives the canonical string back. Grammar: ``<policy>_b<tokens>[+ allocator][+ codec][+ merge]``; the budget
    is ``_b512`` (tokens per KV head), ``_p20`` (per cent of the prompt) or ``_mb64`` (MiB for the whole cache). This
    version has the policies ``full``, ``window``, ``sink`` and registered ones, the allocator ``uniform`` and the
    model's own type as codec.

    Raises:
        ValueError: a policy without the budget it needs, a budget for ``full``, or one below the policy's minimum.
    """

    policy: Policy = field(default_factory=Full)
    budget: Budget | None = None
    codec: Codec = field(default_factory=ModelType)

    def __post_init__(self) -> None:
        name = self.policy.name
        if isinstance(self.policy, Full):
            if self.budget is not None:
                raise ValueError(f"{_WHAT} 'full{self.budget}': 'full' keeps everything and takes no budget")
        elif self.budget is None:
            raise ValueError(
                f"{_WHAT} {name!r}: it needs a budget, _b<tokens>, _p<per cent> or _mb<MiB>, as in '{name}_b256'"
            )
        elif isinstance(self.budget, TokenBudget) and self.budget.tokens < self.policy.minimum:
            raise ValueError(
                f"{_WHAT} {str(self)!r}: b{self.budget.tokens} is too small, {name!r} with these settings needs "
                f"b{self.policy.minimum} or more"
            )

    def __str__(self) -> str:
        return f"{self.policy.name}{self.budget or ''}{self.policy.settings()}"

    @classmethod
    def parse(cls, choice: str | CacheSpec) -> CacheSpec:
        """Reads a choice such as ``"sink_b256_s4"``; a CacheSpec is passed through.

        Raises:
            ValueError: an unknown part (the nearest match is named), a part that this version does not have yet, a
                value out of range, or an impossible pair.
        """
        if isinstance(choice, CacheSpec):
            return choice
        first, *others = split_choice(choice, _WHAT)
        if first.name in _PLANNED_POLICIES or (first.name in _PLANNED_PARTS and not others):
            raise _not_available(choice, first, "policies", POLICIES)
        if first.name not in POLICIES:
            raise unknown(_WHAT, choice, "policy", first.name, POLICIES)
        settings = dict(first.settings)
        budget = _take_budget(settings, choice)
        policy = POLICIES[first.name].from_settings(settings, choice)
        possible = [*_MAXIMUM, *(["s", "orig"] if first.name == "sink" else [])]
        reject_leftovers(settings, first.name, possible, what=_WHAT, text=choice)
        for part in others:
            if part.name in _PLANNED_PARTS:
                raise _not_available(choice, part, "parts after the policy", _AVAILABLE_PARTS)
            if part.name not in _AVAILABLE_PARTS:
                raise unknown(_WHAT, choice, "part", part.name, [*_AVAILABLE_PARTS, *_PLANNED_PARTS])
            reject_leftovers(part.settings, part.name, [], what=_WHAT, text=choice)
        return cls(policy, budget)


def _take_budget(settings: dict[str, int | bool], text: str) -> Budget | None:
    given = [key for key in _MAXIMUM if key in settings]
    if len(given) > 1:
        raise ValueError(f"{_WHAT} {text!r}: one budget only, got {' and '.join(given)}")
    if not given:
        return None
    number = take_number(settings, given[0], None, 1, _MAXIMUM[given[0]], what=_WHAT, text=text)
    assert number is not None
    kinds: dict[str, Callable[[int], Budget]] = {"b": TokenBudget, "p": PercentBudget, "mb": MebibyteBudget}
    return kinds[given[0]](number)


def _not_available(text: str, part: Part, kind: str, have: Iterable[str]) -> ValueError:
    names = ", ".join(sorted(have))
    return ValueError(
        f"{_WHAT} {text!r}: {part.name!r} is not available in this version; {kind} there are: {names}"
    )
