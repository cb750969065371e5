# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

import kvopt
from kvopt.weights.formats import INT8, WeightFormat


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("fp32", "fp32"),
        ("bf16", "bf16"),
        ("int8", "int8"),
        ("int4", "int4_g128"),
        ("int4_g64", "int4_g64"),
        ("int4_sym_g32", "int4_g32_sym"),
        ("int4_gc", "int4_gc"),
        ("int4_g128+head_int8", "int4_g128+head_int8"),
        ("int8+head_int4_g64_sym", "int8+head_int4_g64_sym"),
    ],
)
def test_parse_and_str_are_inverse_and_canonical(text, canonical):
    recipe = kvopt.Recipe.parse(text)
    assert str(recipe) == canonical
    assert kvopt.Recipe.parse(canonical) == recipe


def test_meaning():
    assert kvopt.Recipe.parse("fp16").dtype == torch.float16
    assert kvopt.Recipe.parse("int8").format == INT8
    assert kvopt.Recipe.parse("int4_g48_sym").format == WeightFormat(4, 48, True)
    assert kvopt.Recipe.parse("int4_gc").format == WeightFormat(4, None, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int5", ["int5", "int4", "did you mean"]),
        ("bf61", ["bf61", "bf16", "did you mean"]),
        ("int4_g100", ["multiple of 16", "g100"]),
        ("int4_g8", ["g8", "16", "1024"]),
        ("int4_g2048", ["g2048", "1024"]),
        ("int4_h128", ["'h'", "g128"]),
        ("int4_g64_g32", ["'g'", "twice"]),
        ("int4_g64_gc", ["either"]),
        ("int8_g64", ["'g'"]),
        ("bf16+head_int8", ["bf16", "no further part"]),
        ("int4+head", ["head", "format"]),
        ("gptq_4bit_g128", ["not available in this version"]),
        ("int4_g128+lorc_r32", ["not available in this version"]),
        ("int8_dyn", ["not available in this version"]),
        ("int3_g64", ["not available in this version"]),
        ("nf4", ["not available in this version"]),
        ("", ["non-empty"]),
        ("int4++int8", ["empty"]),
    ],
)
def test_errors_name_what_came_and_what_is_possible(text, words):
    with pytest.raises(ValueError) as info:
        kvopt.Recipe.parse(text)
    for word in words:
        assert word in str(info.value)
