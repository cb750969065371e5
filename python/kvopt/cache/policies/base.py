# SPDX-License-Identifier: Apache-2.0
"""What a policy is: a priority for every token, and what must be observed to know it.

The tokens with the highest priorities stay, as many as the budget allows. A policy is asked when a prompt, a chunk of
it or a turn of a conversation is compressed. Afterwards, before each new token is appended to a full cache, one token
makes room: by the policy's :class:`DecodeRule`, which runs inside the compiled step, or, without one, because
:meth:`Policy.priority` is asked again. The new token itself always enters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch.nn.functional import avg_pool1d

HALF = -1
"""As a number of recent tokens: the larger half of what the KV head may keep."""


@dataclass(frozen=True)
class Tokens:
    """What a policy sees of the tokens it ranks: B rows, H KV heads, n tokens.

    Attributes:
        positions: (B, G, n) int32, the logical position of each token in its own unpadded sequence, -1 where there is
            none. G is H, or 1 where all heads have the same tokens.
        keys: (B, H, n, D) in the model's type, as the attention sees them; None for a policy with ``positions_only``.
        values: (B, H, n, D), likewise.
        layer: index of the layer; 0 for a policy with ``positions_only``.
        scores: (B, H, n) float32, what was observed (:class:`Observation`) or computed (:meth:`Policy.scores_of`); None
            for a policy that asks for neither.
        newest: (B,) int32, position of the newest token of each row.
        capacity: (B, 1 or H) int32, how many tokens each KV head may keep.
    """

    positions: torch.Tensor
    keys: torch.Tensor | None
    values: torch.Tensor | None
    layer: int
    scores: torch.Tensor | None = None
    newest: torch.Tensor | None = None
    capacity: torch.Tensor | None = None

    def among_newest(self, count: int) -> torch.Tensor:
        """(B, G, n) bool: the newest ``count`` tokens of each row, or, for ``HALF``, of what each head may keep."""
        assert self.newest is not None and self.capacity is not None
        if count == HALF:
            return self.positions > (self.newest[:, None] - (self.capacity - self.capacity // 2))[..., None]
        return self.positions > self.newest[:, None, None] - count


@dataclass(frozen=True)
class Observation:
    """How tokens are scored when they are compressed: the attention that queries pay to them.

    The softmax of each query runs over everything it may see, in fp32. Its weights are summed over the query heads of
    a KV head's group.

    Attributes:
        queries: the newest so many queries of what is being read; None for all of them. With None, what a token was
            given before stays in its score (added, or the larger of the two); with a number it is scored afresh.
        maximum: the largest weight over queries and group instead of the sum.
        pool: odd width of an average over neighbouring tokens, 0 for none. Missing neighbours count as 0.
        protect: the newest so many tokens get the score infinity, and count as 0 in their neighbours' average.
    """

    queries: int | None = None
    maximum: bool = False
    pool: int = 0
    protect: int = 0

    def finish(self, scores: torch.Tensor, positions: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
        """Pools and protects.

        Args:
            scores: (B, H, n) float32 sums or maxima, tokens in increasing order of position, 0 where there is none.
            positions: (B, 1 or H, n) int32, -1 where there is none.
            newest: (B,) int32, position of each row's newest token.

        Returns:
            (B, H, n) float32.
        """
        if not self.pool and not self.protect:
            return scores
        recent = positions > newest[:, None, None] - self.protect
        if self.pool:
            scores = avg_pool1d(
                scores.masked_fill(recent | (positions < 0), 0.0), self.pool, 1, self.pool // 2
            )
        return scores.masked_fill(recent, float("inf"))


@dataclass(frozen=True)
class DecodeRule:
    """Who makes room while decoding, in the terms of ``kv_evict_append`` and ``kv_attention_decode``.

    Attributes:
        order: 0: the oldest token leaves; 1: the one with the lowest score, of equal ones the oldest.
        first: tokens at positions below this never leave.
        recent: neither do the newest so many, the arriving one among them; ``HALF`` of the head's capacity.
        shared: scores are summed over a row's KV heads, and all of them give up the same token.
        age: a score is divided by the number of tokens that came since, the arriving one included.
        update: what a step's attention weights do to the scores: 0 nothing, 1 add their sum over the group, 2 become
            that sum, 3 take the largest.
        new_score: the score of an arriving token; None: :meth:`Policy.scores_of` knows it.
    """

    order: int = 0
    first: int = 0
    recent: int = 0
    shared: bool = False
    age: bool = False
    update: int = 0
    new_score: float | None = 0.0


class Policy:
    """Base of all policies; override :meth:`priority`.

    Attributes:
        name: the part of the grammar it answers to; set by :func:`register_policy`.
        options: the letters and words of its own settings, for error messages.
        positions_only: the priority depends on positions alone. All layers and heads then keep the same tokens, which
            is worked out once per step instead of once per layer.
        shared_heads: all KV heads of a layer keep the same tokens: priorities are summed over heads.
        second_reading: the observed queries are those of a second reading of the prompt, against all of its keys.
        sinks: how many first tokens are never evicted and appear at positions inside the cache (see
            ``docs/methods/sink.md``); 0 keeps every key at its original position.
        grows: nothing is evicted after the prompt.
    """

    name: ClassVar[str] = ""
    options: ClassVar[tuple[str, ...]] = ()
    positions_only: ClassVar[bool] = False
    shared_heads: ClassVar[bool] = False
    second_reading: ClassVar[bool] = False

    @property
    def sinks(self) -> int:
        """The first tokens that appear at positions inside the cache, see above."""
        return 0

    @property
    def grows(self) -> bool:
        """Whether tokens after the prompt enter without another leaving."""
        return False

    @property
    def minimum(self) -> int:
        """The smallest budget in tokens that this policy can work with."""
        return 1

    @property
    def observation(self) -> Observation | None:
        """What is scored when a prompt, chunk or turn is compressed; None for nothing."""
        return None

    @property
    def decode(self) -> DecodeRule | None:
        """Who makes room while decoding; None asks :meth:`priority` before each token."""
        return None

    @property
    def computes(self) -> bool:
        """Whether :meth:`scores_of` is the policy's own."""
        return type(self).scores_of is not Policy.scores_of

    def scores_of(self, tokens: Tokens) -> torch.Tensor | None:
        """Scores that follow from positions, keys and values alone, without any attention.

        Asked for all tokens when they are compressed, and with ``DecodeRule(new_score=None)`` for each arriving one.

        Args:
            tokens: all but ``scores``.

        Returns:
            (B, H, n) float32, or None: scores, if any, come from the observation.
        """
        return None

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """Returns (B, G, n) priorities, any real dtype; larger stays, of equal ones the newer.

        What it returns where there is no token (position -1) is ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no priority(tokens)")

    @classmethod
    def from_settings(cls, settings: dict[str, int | bool], text: str) -> Policy:
        """Builds the policy, removing the settings that it understands from ``settings``; the default takes none."""
        return cls()

    def settings(self) -> str:
        """The settings as in the grammar, each with its leading underscore; the inverse of :meth:`from_settings`."""
        return ""


WHAT = "cache spec"
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
        return built_in(name)(policy)

    return decorate


def built_in(name: str) -> Callable[[PolicyType], PolicyType]:
    """:func:`register_policy` for the names that belong to the grammar."""

    def decorate(policy: PolicyType) -> PolicyType:
        policy.name = name
        POLICIES[name] = policy
        return policy

    return decorate
