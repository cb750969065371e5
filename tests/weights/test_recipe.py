# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

import kvopt
from kvopt.reference import Scheme
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
        ("int8_dyn", "int8_dyn"),
        ("int3", "int3_g64"),
        ("int2", "int2_g32"),
        ("int3_g128", "int3_g128"),
        ("int2_sym_gc", "int2_gc_sym"),
        ("int3_g1024", "int3_g1024"),
        ("nf4", "nf4"),
        ("nf4_b64", "nf4"),
        ("nf4_dq_b128", "nf4_b128_dq"),
        ("fp4_dq", "fp4_dq"),
        ("fp4_b4096", "fp4_b4096"),
        ("int4+a8", "int4_g128+a8"),
        ("nf4_dq+a8", "nf4_dq+a8"),
        ("int4_g64+head_int8+a8", "int4_g64+a8+head_int8"),
        ("int8+a8", "int8+a8"),
        ("int8_dyn+a8", "int8_dyn"),
        ("llm_int8", "llm_int8"),
        ("llm_int8_t60", "llm_int8"),
        ("llm_int8_t5", "llm_int8_t5"),
        ("llm_int8_t1000+head_int8", "llm_int8_t1000+head_int8"),
        ("int4+head_llm_int8_t30", "int4_g128+head_llm_int8_t30"),
        ("int8_dyn+head_int4", "int8_dyn+head_int4_g128"),
        ("int8_dyn+a8+head_int4", "int8_dyn+a8+head_int4_g128"),
        ("int4+a8+head_int8_dyn", "int4_g128+a8+head_int8_dyn"),
        ("int4_g128+head_nf4_dq", "int4_g128+head_nf4_dq"),
        ("gptq_4bit", "gptq_4bit_g128"),
        ("gptq_g128_4bit", "gptq_4bit_g128"),
        ("gptq_3bit_sym_g64", "gptq_3bit_g64_sym"),
        ("gptq_3bit", "gptq_3bit_g64"),
        ("gptq_8bit_gc_sym", "gptq_8bit_gc_sym"),
        ("awq_4bit_gc", "awq_4bit_gc"),
        ("awq_4bit_fold_sym_g64", "awq_4bit_g64_sym_fold"),
        ("awq_4bit_fold+head_int8", "awq_4bit_g128_fold+head_int8"),
        ("clip_2bit", "clip_2bit_g32"),
        ("hqq_4bit_g64", "hqq_4bit_g64"),
        ("gptq_4bit_g128+a8", "gptq_4bit_g128+a8"),
        ("awq_3bit_g64+head_int8", "awq_3bit_g64+head_int8"),
        ("gptq_4bit_g128+head_nf4_dq+a8", "gptq_4bit_g128+a8+head_nf4_dq"),
    ],
)
def test_parse_and_str_are_inverse_and_canonical(text, canonical):
    recipe = kvopt.Recipe.parse(text)
    assert str(recipe) == canonical
    assert kvopt.Recipe.parse(canonical) == recipe


def test_meaning():
    assert kvopt.Recipe.parse("fp16").dtype == torch.float16
    for text, format in [
        ("int8", INT8),
        ("int8_dyn", WeightFormat(8, None, Scheme.INT8_DYNAMIC)),
        ("llm_int8", WeightFormat(8, None, Scheme.INT8_DYNAMIC, outlier_threshold=6.0)),
        ("llm_int8_t7", WeightFormat(8, None, Scheme.INT8_DYNAMIC, outlier_threshold=0.7)),
        ("int4_g48_sym", WeightFormat(4, 48, Scheme.SYMMETRIC)),
        ("int4_gc", WeightFormat(4, None, Scheme.ASYMMETRIC)),
        ("int3", WeightFormat(3, 64, Scheme.ASYMMETRIC)),
        ("int2_sym", WeightFormat(2, 32, Scheme.SYMMETRIC)),
        ("nf4", WeightFormat(4, 64, Scheme.NF4)),
        ("fp4_b256_dq", WeightFormat(4, 256, Scheme.FP4, double_quantized=True)),
        ("nf4_dq+a8", WeightFormat(4, 64, Scheme.NF4, double_quantized=True, activation_bits=8)),
    ]:
        assert kvopt.Recipe.parse(text).format == format
    for text, method, format in [
        ("int4", "rtn", WeightFormat(4, 128, Scheme.ASYMMETRIC)),
        ("gptq_4bit_g64_sym", "gptq", WeightFormat(4, 64, Scheme.SYMMETRIC)),
        ("awq_4bit_gc", "awq", WeightFormat(4, None, Scheme.ASYMMETRIC)),
        ("hqq_3bit", "hqq", WeightFormat(3, 64, Scheme.ASYMMETRIC)),
        ("clip_8bit", "clip", WeightFormat(8, 128, Scheme.ASYMMETRIC)),
        ("gptq_2bit+a8", "gptq", WeightFormat(2, 32, Scheme.ASYMMETRIC, activation_bits=8)),
    ]:
        recipe = kvopt.Recipe.parse(text)
        assert (recipe.method, recipe.format) == (method, format)
    assert kvopt.Recipe.parse("gptq_4bit+head_int8").head == INT8
    both = kvopt.Recipe.parse("int4+a8+head_int8")
    assert both.format.activation_bits == both.head.activation_bits == 8
    assert kvopt.Recipe.parse("int8_dyn").format.activation_bits == 8
    assert kvopt.Recipe.parse("int4").format.activation_bits == 16


def test_symmetric_may_be_said_with_a_truth_value():
    assert WeightFormat(4, 128, True) == WeightFormat(4, 128, Scheme.SYMMETRIC)
    assert WeightFormat(4, 128, False) == WeightFormat(4, 128, Scheme.ASYMMETRIC)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 128, Scheme.SYMMETRIC), "bits must be 2, 3, 4 or 8, got 5"),
        ((4, 24, Scheme.SYMMETRIC), "multiple of 16"),
        ((4, 2048, Scheme.SYMMETRIC), "1024"),
        ((3, 64, Scheme.NF4), "nf4 has 4 bits, got 3"),
        ((4, 48, Scheme.FP4), "block size must be one of 32, 64.*got 48"),
        ((4, None, Scheme.NF4), "block size"),
        ((4, 128, Scheme.SYMMETRIC, True), "only nf4 and fp4 have double-quantised scales"),
        ((8, 64, Scheme.INT8_DYNAMIC), "one scale per row"),
        ((4, 64, Scheme.SYMMETRIC, False, 4), "activation bits must be 8 or 16, got 4"),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightFormat(*arguments)


def test_a8_counts_for_linears_and_head():
    a8, plain = WeightFormat(4, 64, True, activation_bits=8), WeightFormat(4, 64, True)
    with pytest.raises(ValueError, match="both"):
        kvopt.Recipe(format=a8, head=plain)


def test_methods_take_integer_formats():
    with pytest.raises(ValueError, match="gptq: the format must be asymmetric or symmetric, got nf4"):
        kvopt.Recipe(format=WeightFormat(4, 64, Scheme.NF4), method="gptq")
    with pytest.raises(ValueError, match="hqq: the format must be asymmetric, got int4_g64_sym"):
        kvopt.Recipe(format=WeightFormat(4, 64, Scheme.SYMMETRIC), method="hqq")
    with pytest.raises(ValueError, match="method must be one of rtn, gptq"):
        kvopt.Recipe(format=WeightFormat(4, 64, Scheme.SYMMETRIC), method="gptk")


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
        ("gptq_5bit_g128", ["'gptq'", "2bit", "4bit", "8bit"]),
        ("gptq", ["'gptq'", "4bit"]),
        ("gptq_4bit_3bit", ["'gptq'", "one of 2bit"]),
        ("gptq_4bit_g100", ["multiple of 16", "g100"]),
        ("gptq_4bit_g2048", ["g2048", "1024"]),
        ("awq_4bit_g64_gc", ["either"]),
        ("awq_4bit_fold3", ["'fold'", "number"]),
        ("awq_4bit_fo", ["'fo'", "fold"]),
        ("gptq_4bit_fold", ["'fold'", "g128"]),
        ("clip_4bit_h64", ["'h'", "g128"]),
        ("hqq_4bit_g64_sym", ["'hqq'", "'sym'"]),
        ("gptk_4bit_g128", ["gptk", "gptq", "did you mean"]),
        ("int4+head_gptq_4bit", ["the head is rounded", "gptq"]),
        ("int4_g128+lorc_r32", ["not available in this version"]),
        ("llm_int8_t0", ["'t0'", "t1…t1000"]),
        ("llm_int8_t1001", ["'t1001'"]),
        ("llm_int8_t", ["'t'", "t1…t1000"]),
        ("llm_int8_x60", ["setting of 'llm_int8'", "'x'", "t60"]),
        ("llm_int4", ["unknown part 'llm'", "llm_int8", "did you mean"]),
        ("int8_t60", ["'t'"]),
        ("smoothquant_w8a8", ["not available in this version"]),
        ("int3_g2048", ["g2048", "1024"]),
        ("int8_dim", ["'dim'", "dyn"]),
        ("nf4_b48", ["b48", "b64", "b4096"]),
        ("nf4_b8192", ["b8192"]),
        ("nf4_g64", ["'g'", "b64"]),
        ("nf5", ["nf5", "nf4", "did you mean"]),
        ("int4_dq", ["'dq'"]),
        ("int4+a4", ["a4"]),
        ("int4+a8_g64", ["'g'"]),
        ("int4+a8+a8", ["'a8'", "twice"]),
        ("bf16+a8", ["bf16", "no further part"]),
        ("", ["non-empty"]),
        ("int4++int8", ["empty"]),
    ],
)
def test_errors_name_what_came_and_what_is_possible(text, words):
    with pytest.raises(ValueError) as info:
        kvopt.Recipe.parse(text)
    for word in words:
        assert word in str(info.value)
