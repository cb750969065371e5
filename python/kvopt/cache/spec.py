# SPDX-License-Identifier: Apache-2.0
"""CacheSpec: the choice of a KV cache as independent objects, one per axis, and one short string."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvopt.cache.allocators import ADA, PYRAMID, UNIFORM, Allocator
from kvopt.cache.budgets import Budget, MebibyteBudget, PercentBudget, TokenBudget
from kvopt.cache.codecs import CODECS, Codec
from kvopt.cache.merge import MINICACHE, Merge
from kvopt.cache.policies import POLICIES, Full, Policy, SnapKV
from kvopt.grammar import Part, reject_leftovers, split_choice, take_number, unknown

_WHAT = "cache spec"
_PYRAMIDKV = "pyramidkv"  # snapkv + pyramid, the name of the paper
_ALLOCATORS = (UNIFORM, PYRAMID, ADA)
_PARTS = (*_ALLOCATORS, *CODECS, MINICACHE)  # behind the policy
RESERVED = {*POLICIES, _PYRAMIDKV, *_PARTS}
_MAXIMUM = {"b": 2**24, "p": 100, "mb": 2**20}


@dataclass(frozen=True)
class CacheSpec:
    """Which tokens stay, how many of them where, in how many bits, and which layers share them.

    ``CacheSpec.parse("sink_b256_s4_orig+int4")`` and ``CacheSpec(Sink(4, original=True), TokenBudget(256),
    codec=Codec.named("int4"))`` are equal, and ``str`` gives the canonical string back. Grammar: ``<policy>_b<tokens>
    [+ allocator] [+ merge] [+ codec]``, the parts after the policy in any order; the budget is ``_b512`` (tokens per KV
    head, mean over layers and heads), ``_p20`` (per cent of the prompt) or ``_mb64`` (MiB for the whole cache).

    Raises:
        ValueError: a policy without the budget it needs, a budget for ``full``, one below the policy's minimum, an
            allocator that the policy gives nothing to go by, or merged layers with different budgets.
    """

    policy: Policy = field(default_factory=Full)
    budget: Budget | None = None
    allocator: Allocator = field(default_factory=Allocator)
    codec: Codec = field(default_factory=Codec)
    merge: Merge | None = None

    def __post_init__(self) -> None:
        name = self.policy.name
        if isinstance(self.policy, Full):
            if self.budget is not None:
                raise ValueError(f"{_WHAT} 'full{self.budget}': 'full' keeps everything and takes no budget")
            if not self.allocator.uniform:
                raise ValueError(
                    f"{_WHAT} {str(self)!r}: 'full' keeps everything, there is nothing for {str(self.allocator)!r} to "
                    "share out"
                )
        elif self.budget is None:
            raise ValueError(
                f"{_WHAT} {name!r}: it needs a budget, _b<tokens>, _p<per cent> or _mb<MiB>, as in '{name}_b256'"
            )
        elif isinstance(self.budget, TokenBudget) and self.budget.tokens < self.minimum:
            raise ValueError(
                f"{_WHAT} {str(self)!r}: b{self.budget.tokens} is too small, {name!r} with these settings needs "
                f"b{self.minimum} or more"
            )
        if self.allocator.ada and (self.policy.positions_only or self.policy.shared_heads):
            raise ValueError(
                f"{_WHAT} {str(self)!r}: 'ada' compares heads, but {name!r} keeps the same tokens in all of them; "
                "possible: uniform, pyramid"
            )
        if self.allocator.pyramid and self.merge is not None:
            raise ValueError(
                f"{_WHAT} {str(self)!r}: 'pyramid' gives the two layers of a pair different budgets, but {MINICACHE!r} "
                "merges layers that keep the same tokens; possible: uniform, ada"
            )

    @property
    def minimum(self) -> int:
        """The smallest budget in tokens: what the policy needs, and a group to pack where the cache goes on growing."""
        return max(self.policy.minimum, self.codec.group if self.policy.grows else 1)

    @property
    def scored(self) -> bool:
        """Whether a score is kept per token."""
        return self.policy.observation is not None or self.policy.computes

    @property
    def packs(self) -> bool:
        """Whether anything is packed at all, by the codec or because layers are merged."""
        return self.codec.packs or self.merge is not None

    @property
    def never_packed(self) -> int:
        """Newest tokens that are plain in every layer at any moment."""
        residual = self.codec.residual if self.merge is None else self.merge.residual(self.codec)
        return residual - self.codec.group + 1

    def __str__(self) -> str:
        name, parts = self.policy.name, []
        pyramidkv = self.allocator.pyramid and isinstance(self.policy, SnapKV)
        if pyramidkv:
            name = _PYRAMIDKV
        if self.allocator.pyramid and not pyramidkv:
            parts.append(PYRAMID)
        if self.allocator.ada:
            parts.append(ADA)
        if self.merge is not None:
            parts.append(str(self.merge))
        if self.codec.packs:
            parts.append(str(self.codec))
        return "+".join([f"{name}{self.budget or ''}{self.policy.settings()}", *parts])

    @classmethod
    def parse(cls, choice: str | CacheSpec) -> CacheSpec:
        """Reads a choice such as ``"h2o_b512+int4"``; a CacheSpec is passed through.

        Raises:
            ValueError: an unknown part (the nearest match is named), a value out of range, two parts of one kind, or
                an impossible pair.
        """
        if isinstance(choice, CacheSpec):
            return choice
        first, *others = split_choice(choice, _WHAT)
        name = SnapKV.name if first.name == _PYRAMIDKV else first.name
        if name not in POLICIES:
            raise _no_policy(choice, first.name)
        settings = dict(first.settings)
        budget = _take_budget(settings, choice)
        kind = POLICIES[name]
        policy = kind.from_settings(settings, choice)
        reject_leftovers(settings, first.name, [*_MAXIMUM, *kind.options], what=_WHAT, text=choice)
        return cls(policy, budget, *_read_parts(choice, others, first.name == _PYRAMIDKV))


def _read_parts(text: str, parts: list[Part], pyramid: bool) -> tuple[Allocator, Codec, Merge | None]:
    allocators, codec, merge = [PYRAMID] if pyramid else [], Codec(), None
    for part in parts:
        settings = dict(part.settings)
        if part.name == MINICACHE:
            if merge is not None:
                raise ValueError(f"{_WHAT} {text!r}: {MINICACHE!r} is given twice")
            merge = Merge.from_settings(settings, text)
        elif part.name in CODECS:
            if codec.packs:
                raise ValueError(f"{_WHAT} {text!r}: one codec only, got {codec.name!r} and {part.name!r}")
            codec = Codec.from_settings(part.name, settings, text)
            reject_leftovers(settings, part.name, ["g", "r"], what=_WHAT, text=text)
        elif part.name in _ALLOCATORS:
            reject_leftovers(settings, part.name, [], what=_WHAT, text=text)
            if part.name in allocators and not (pyramid and part.name == PYRAMID):
                raise ValueError(f"{_WHAT} {text!r}: {part.name!r} is given twice")
            allocators.append(part.name)
        else:
            raise unknown(_WHAT, text, "part", part.name, _PARTS)
    if UNIFORM in allocators and len(allocators) > 1:
        raise ValueError(
            f"{_WHAT} {text!r}: 'uniform' shares out evenly, it can't be joined with another allocator"
        )
    return Allocator(PYRAMID in allocators, ADA in allocators), codec, merge


def _no_policy(text: str, name: str) -> ValueError:
    if name in _PARTS:
        return ValueError(
            f"{_WHAT} {text!r}: {name!r} is no policy and comes behind one, as in 'h2o_b512+{name}'; policies: "
            f"{', '.join(sorted({*POLICIES, _PYRAMIDKV}))}"
        )
    return unknown(_WHAT, text, "policy", name, [*POLICIES, _PYRAMIDKV])


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
