# SPDX-License-Identifier: Apache-2.0
"""The test-kit for policies: what is right passes, and each kind of wrong is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvopt.cache import Policy, Tokens
from kvopt.cache.policies import POLICIES, Observation
from kvopt.cache.testing import PolicyError, check_policy

BUILT_IN = [*(set(POLICIES) - {"full"}), "sink_orig", "h2o_age", "h2o_r6", "snapkv_w8_k3", "snapkv_w8_grow"]


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_policies_pass(name: str) -> None:
    check_policy(name)


class Quiet(Policy):
    def priority(self, tokens: Tokens) -> Tensor:
        assert tokens.keys is not None
        return -tokens.keys.norm(dim=-1)


class Noticed(Policy):
    """Observed, and asked again before each token."""

    @property
    def observation(self) -> Observation:
        return Observation(queries=4, maximum=True)

    def priority(self, tokens: Tokens) -> Tensor:
        assert tokens.scores is not None and tokens.values is not None
        return tokens.scores * tokens.values.norm(dim=-1)


@pytest.mark.parametrize("policy", [Quiet, Quiet(), Noticed])
def test_policies_that_were_not_registered_pass(policy: Policy) -> None:
    names = set(POLICIES)
    check_policy(policy)
    assert set(POLICIES) == names


class NotANumber(Policy):
    def priority(self, tokens: Tokens) -> Tensor:
        return tokens.positions.float().log() * 0 + torch.where(tokens.positions == 7, torch.nan, 1.0)


class Shapeless(Policy):
    def priority(self, tokens: Tokens) -> Tensor:
        return tokens.positions[0]


class Fickle(Policy):
    def priority(self, tokens: Tokens) -> Tensor:
        return torch.rand(tokens.positions.shape)


class Careless(Policy):
    def priority(self, tokens: Tokens) -> Tensor:
        assert tokens.keys is not None
        tokens.keys[:] = 0
        return tokens.positions


class Sociable(Policy):
    """Looks at the other rows of the batch."""

    def priority(self, tokens: Tokens) -> Tensor:
        assert tokens.keys is not None
        return (tokens.keys - tokens.keys.mean(dim=0, keepdim=True)).norm(dim=-1)


class Forgetful(Policy):
    """Its settings can't be read back."""

    def settings(self) -> str:
        return "_x3"


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (NotANumber, "NaN"),
        (Shapeless, "shape"),
        (Fickle, "two answers"),
        (Careless, "changed what it was shown"),
        (Sociable, "row . alone keeps other tokens"),
    ],
)
def test_wrong_policies_are_named(policy: type[Policy], says: str) -> None:
    names = set(POLICIES)
    with pytest.raises(PolicyError, match=says):
        check_policy(policy)
    assert set(POLICIES) == names


def test_unreadable_settings_and_full_are_refused() -> None:
    with pytest.raises(ValueError, match="x3"):
        check_policy(Forgetful)
    with pytest.raises(ValueError, match="full"):
        check_policy("full")
    with pytest.raises(ValueError, match="nosuch"):
        check_policy("nosuch")
