# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay: one small class per policy, with one method.

A policy gives every cached token a priority; the tokens with the highest priorities stay, as many as the budget
allows. It is asked when a prompt (or a chunk of it) is compressed, and, once the cache is full, before each new token
is appended: then the token with the lowest priority makes room. The new token itself always enters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from kvopt.grammar import take_number, take_word

_WHAT = "cache spec"


@dataclass(frozen=True)
class Tokens:
    """What a policy sees of the tokens it ranks.

    Attributes:
        positions: (B, G, n) int32, the logical position of each token in its own unpadded sequence, -1 where a slot is
            empty. G is the number of KV heads, or 1 for a policy with ``positions_only``.
        keys: (B, H, n, D) in the model's type, as the attention sees them; None for a policy with ``positions_only``.
        values: (B, H, n, D), likewise.
        layer: index of the layer; 0 for a policy with ``positions_only``.
        full: no slot is empty.
    """

    positions: torch.Tensor
    keys: torch.Tensor | None
    values: torch.Tensor | None
    layer: int
    full: bool


class Policy:
    """Base of all policies; override :meth:`priority`.

    Attributes:
        name: the part of the grammar it answers to; set by :func:`register_policy`.
        positions_only: the priority depends on positions alone. All layers and heads then keep the same tokens, which
            is worked out once per step instead of once per layer.
        sinks: how many first tokens are never evicted and appear at positions inside the cache (see
            ``docs/methods/kv_cache.md``); 0 keeps every key at its original position.
    """

    name: ClassVar[str] = ""
    positions_only: ClassVar[bool] = False

    @property
    def sinks(self) -> int:
        """The first tokens that appear at positions inside the cache, see above."""
        return 0

    @property
    def minimum(self) -> int:
        """The smallest budget in tokens that this policy can work with."""
        return 1

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """Returns (B, G, n) priorities, any real dtype; larger stays, ties are broken arbitrarily.

        What it returns for empty slots (position -1) is ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no priority(tokens)")

    @classmethod
    def from_settings(cls, settings: dict[str, int | bool], text: str) -> Policy:
        """Builds the policy, removing the settings that it understands from ``settings``; the default takes none."""
        return cls()

    def settings(self) -> str:
        """The settings as in the grammar, each with its leading underscore; the inverse of :meth:`from_settings`."""
        return ""


POLICIES: dict[str, type[Policy]] = {}
PolicyType = TypeVar("PolicyType", bound=type[Policy])


def register_policy(name: str) -> Callable[[PolicyType], PolicyType]:
    """Class decorator: makes a subclass of :class:`Policy` available as ``"<name>_b<tokens>"``.

    .. code-block:: python

        @kvopt.register_policy("quiet")
        class Quiet(kvopt.cache.Policy):
            def priority(self, tokens):
                return -tokens.keys.norm(dim=-1)        # (B, H, n): keys of small norm stay

    Registering a name again replaces it, so a notebook cell can be run twice; the built-in names are taken.

    Raises:
        ValueError: the name is not one lower-case word, or belongs to the grammar.
        TypeError: the class is no :class:`Policy`.
    """
    from kvopt.cache.spec import RESERVED

    if not name.isidentifier() or "_" in name or name != name.lower():
        raise ValueError(f"register_policy: {name!r} must be one lower-case word of letters and digits")
    if name in RESERVED:
        raise ValueError(f"register_policy: {name!r} is a name of the grammar; choose another")

    def decorate(policy: PolicyType) -> PolicyType:
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise TypeError(
                f"register_policy({name!r}): expected a subclass of kvopt.cache.Policy, got {policy!r}"
            )
        policy.name = name
        POLICIES[name] = policy
        return policy

    return decorate


def _built_in(name: str) -> Callable[[PolicyType], PolicyType]:
    def decorate(policy: PolicyType) -> PolicyType:
        policy.name = name
        POLICIES[name] = policy
        return policy

    return decorate


@_built_in("full")
@dataclass(frozen=True)
class Full(Policy):
    """Everything stays: the baseline, with memory in blocks instead of a copy of the whole buffer per token."""

    positions_only: ClassVar[bool] = True

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The newest first."""
        return tokens.positions


@_built_in("window")
@dataclass(frozen=True)
class Window(Policy):
    """The newest tokens stay (Beltagy et al. 2020, arXiv:2004.05150, applied at inference)."""

    positions_only: ClassVar[bool] = True

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The newest first."""
        return tokens.positions


@_built_in("sink")
@dataclass(frozen=True)
class Sink(Policy):
    """The first tokens and the newest stay: StreamingLLM (Xiao et al. 2023, arXiv:2309.17453, section 3.2).

    Args:
        first: how many first tokens stay, the attention sinks.
        original: keep original positions; otherwise positions are those inside the cache, as published.
    """

    first: int = 4
    original: bool = False
    positions_only: ClassVar[bool] = True

    @property
    def sinks(self) -> int:
        """None appear elsewhere with original positions."""
        return 0 if self.original else self.first

    @property
    def minimum(self) -> int:
        """The sinks and the newest token."""
        return self.first + 1

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The sinks, then the newest first."""
        return tokens.positions.masked_fill(tokens.positions < self.first, torch.iinfo(torch.int32).max)

    @classmethod
    def from_settings(cls, settings: dict[str, int | bool], text: str) -> Sink:
        """``_s4`` and ``_orig``."""
        first = take_number(settings, "s", 4, 1, 1024, what=_WHAT, text=text)
        assert first is not None
        return cls(first, take_word(settings, "orig", what=_WHAT, text=text))

    def settings(self) -> str:
        """``_s4`` or ``_s4_orig``."""
        return f"_s{self.first}" + ("_orig" if self.original else "")
