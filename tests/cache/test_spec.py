# SPDX-License-Identifier: Apache-2.0
"""The grammar of cache specs: canonical, inverse, and clear about what it can't do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kvopt.cache import (
    Allocator,
    CacheSpec,
    Codec,
    MebibyteBudget,
    Merge,
    PercentBudget,
    Policy,
    Sink,
    SnapKV,
    TokenBudget,
    Tokens,
    register_policy,
)
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
        ("h2o_b512+int4", "h2o_b512+int4"),
        ("snapkv_b1024+pyramid+int2_g32_r128", "pyramidkv_b1024+int2_r128"),
        ("pyramidkv_b1024", "pyramidkv_b1024"),
        ("pyramidkv_b1024+pyramid", "pyramidkv_b1024"),
        ("snapkv_w16_b64_grow_k7+fp8_r32", "snapkv_b64_w16_k7_grow+fp8_r32"),
        ("h2o_b64+int4+ada+pyramid", "h2o_b64+pyramid+ada+int4"),
        ("full+int8_r96_g48", "full+int8_g48_r96"),
        ("full+int8_g48", "full+int8_g48"),
        ("full+int8_g128", "full+int8_g128"),
        ("full+fp8", "full+fp8"),
        ("tova_p20+int2_g16", "tova_p20+int2_g16"),
        ("full+minicache", "full+minicache"),
        ("full+int4+minicache_k5_t60", "full+minicache+int4"),
        ("h2o_b64+minicache_t0_k0+ada", "h2o_b64+ada+minicache_k0_t0"),
        ("window_b64+fp8_r8+minicache_k100", "window_b64+minicache_k100+fp8_r8"),
        ("full+minicache_r64_t50", "full+minicache_t50_r64"),
    ],
)
def test_parse_and_str_are_inverse(text: str, canonical: str) -> None:
    spec = CacheSpec.parse(text)
    assert str(spec) == canonical
    assert CacheSpec.parse(str(spec)) == spec


def test_objects_and_string_agree() -> None:
    assert CacheSpec(Sink(4, original=True), TokenBudget(256)) == CacheSpec.parse("sink_b256_s4_orig")
    whole = CacheSpec(SnapKV(), TokenBudget(64), Allocator(pyramid=True, ada=True), Codec("int4", 32, 128))
    assert whole == CacheSpec.parse("snapkv_b64+int4_r128+ada+pyramid")
    assert str(whole) == "pyramidkv_b64+ada+int4_r128"
    merged = CacheSpec(SnapKV(), TokenBudget(64), codec=Codec("fp8"), merge=Merge(10, 50))
    assert merged == CacheSpec.parse("snapkv_b64+minicache_k10_t50+fp8")
    for wrong in ((-1, 60), (101, 60), (5, -1), (5, 101), (5, 60, -1)):
        with pytest.raises(ValueError, match=r"minicache: k and t are per cent, 0…100, .* got k"):
            Merge(*wrong)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("full+minicache+minicache_k3", "'minicache' is given twice"),
        ("full+minicache_k101", "'k101' must be k0…k100"),
        ("full+minicache_t101", "'t101' must be t0…t100"),
        ("full+minicache_t", "'t' must be t0…t100"),
        ("full+minicache_g32", "unknown setting of 'minicache' 'g'; possible: k, r, t"),
        ("h2o_b64+pyramid+minicache", "'pyramid' gives the two layers of a pair different budgets"),
        ("pyramidkv_b64+minicache", "'pyramid' gives the two layers of a pair different budgets"),
        ("minicache_k5", "'minicache_k5': 'minicache' is no policy and comes behind one"),
        ("full+minicahce", "did you mean 'minicache'"),
        ("full+ada+minicache", "there is nothing for 'ada'"),
        ("int4", "'int4' is no policy and comes behind one, as in 'h2o_b512\\+int4'"),
        ("ada_b64", "'ada' is no policy"),
        ("sink_b64+ada", "'ada' compares heads, but 'sink' keeps the same"),
        ("tova_b64+ada", "'ada' compares heads, but 'tova'"),
        ("full+pyramid", "'full' keeps everything, there is nothing for 'pyramid'"),
        ("h2o_b64+uniform+ada", "can't be joined"),
        ("h2o_b64+ada+ada", "'ada' is given twice"),
        ("h2o_b64+int4+int2", "one codec only, got 'int4' and 'int2'"),
        ("h2o_b64+int4+int4", "one codec only"),
        ("h2o_b64+int3", "unknown part 'int3'; possible: ada, .*did you mean 'int\\d'"),
        ("h2o_b64+int4_g2", "'g2' must be g4…g256"),
        ("h2o_b64+int4_g32_r40", "multiple of the group .* got g32 and r40"),
        ("h2o_b64+int4_r0", "at least one"),
        ("h2o_b64+fp8_g32", "unknown setting of 'fp8' 'g'"),
        ("h2o_b64+int4_x", "unknown setting of 'int4' 'x'; possible: g, r"),
        ("h2o_b1", "needs b2 or more"),
        ("pyramidkv_b31", "'pyramidkv_b31': b31 is too small"),
        ("snapkv_b64_k4", "must be odd"),
        ("snapkv_b40_grow+int4_g64", "needs b64 or more"),
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


@pytest.mark.parametrize(
    "name", ["sink", "h2o", "pyramidkv", "int4", "ada", "minicache", "two_words", "Capital", ""]
)
def test_register_refuses_taken_and_unparsable_names(name: str) -> None:
    with pytest.raises(ValueError, match="register_policy"):
        register_policy(name)


def test_register_refuses_other_classes() -> None:
    with pytest.raises(TypeError, match="subclass"):
        register_policy("thing")(int)  # type: ignore[type-var]


def test_budgets() -> None:
    def cost(tokens: Sequence[int]) -> int:
        return 100 * len(tokens) + 1024 * sum(tokens)

    assert TokenBudget(7).per_row([1, 99], 5, cost) == [7, 7]
    assert PercentBudget(20).per_row([100, 57, 3], 5, cost) == [20, 11, 5]
    assert MebibyteBudget(1).per_row([10, 10], 5, cost) == [511, 511]
    with pytest.raises(ValueError, match="mb2 or more"):
        MebibyteBudget(1).per_row([10] * 300, 5, cost)
