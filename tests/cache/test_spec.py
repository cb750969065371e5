# SPDX-License-Identifier: Apache-2.0
"""The grammar of cache specs: canonical, inverse, and clear about what it can't do."""

from __future__ import annotations

import pytest
import torch

from kvopt.cache import (
    CacheSpec,
    MebibyteBudget,
    PercentBudget,
    Policy,
    Sink,
    TokenBudget,
    Tokens,
    register_policy,
)
from kvopt.cache.budgets import TokenCost
from kvopt.cache.policies import POLICIES


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("full", "full"),
        ("window_b256", "window_b256"),
        ("sink_b256", "sink_b256_s4"),
        ("sink_orig_s1_b64", "sink_b64_s1_orig"),
        ("sink_p20_s4", "sink_p20_s4"),
        ("window_mb64", "window_mb64"),
        ("window_b8+uniform", "window_b8"),
    ],
)
def test_parse_and_str_are_inverse(text: str, canonical: str) -> None:
    spec = CacheSpec.parse(text)
    assert str(spec) == canonical
    assert CacheSpec.parse(str(spec)) == spec


def test_objects_and_string_agree() -> None:
    assert CacheSpec(Sink(4, original=True), TokenBudget(256)) == CacheSpec.parse("sink_b256_s4_orig")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h2o_b512", "'h2o' is not available in this version; policies there are: full, .*sink, window"),
        ("sink_b64+int4", "'int4' is not available in this version"),
        ("full+minicache", "'minicache' is not available"),
        ("window_b64+ada", "'ada' is not available"),
        ("int4", "not available"),
        ("windwo_b64", "did you mean 'window'"),
        ("sink_b64+unifrom", "did you mean 'uniform'"),
        ("window_b64_s4", "unknown setting of 'window' 's'"),
        ("sink_b64_orgi", "did you mean 'orig'"),
        ("window", "needs a budget"),
        ("sink_s4", "needs a budget"),
        ("full_b64", "takes no budget"),
        ("sink_b4_s4", "needs b5 or more"),
        ("window_b0", "b1…"),
        ("window_p101", "p1…p100"),
        ("window_b64_p20", "one budget only"),
        ("sink_b64_s0", "s1…"),
        ("", "non-empty"),
        ("window_b64+", "empty part"),
        ("window_b64+uniform_g4", "setting of 'uniform'"),
    ],
)
def test_errors_name_part_and_way_out(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CacheSpec.parse(text)


def test_registered_policy_joins_the_grammar() -> None:
    @register_policy("parity")
    class Parity(Policy):
        def priority(self, tokens: Tokens) -> torch.Tensor:
            return -(tokens.positions % 2)

    try:
        assert str(CacheSpec.parse("parity_b8")) == "parity_b8"
        with pytest.raises(ValueError, match="setting of 'parity'"):
            CacheSpec.parse("parity_b8_x3")
    finally:
        del POLICIES["parity"]
    with pytest.raises(ValueError, match="unknown policy"):
        CacheSpec.parse("parity_b8")


@pytest.mark.parametrize("name", ["sink", "h2o", "int4", "two_words", "Capital", ""])
def test_register_refuses_taken_and_unparsable_names(name: str) -> None:
    with pytest.raises(ValueError, match="register_policy"):
        register_policy(name)


def test_register_refuses_other_classes() -> None:
    with pytest.raises(TypeError, match="subclass"):
        register_policy("thing")(int)  # type: ignore[type-var]


def test_budgets() -> None:
    cost = TokenCost(token=1024, row=100)
    assert TokenBudget(7).per_row([1, 99], 5, cost) == [7, 7]
    assert PercentBudget(20).per_row([100, 57, 3], 5, cost) == [20, 11, 5]
    assert MebibyteBudget(1).per_row([10, 10], 5, cost) == [511, 511]
    with pytest.raises(ValueError, match="mb2 or more"):
        MebibyteBudget(1).per_row([10] * 300, 5, cost)
