# SPDX-License-Identifier: Apache-2.0
"""Foreign layouts spelled out value by value, and what others' files have and ours have not.

That is: act-order, short groups, biases of zeros, fp32 scales, another storage type.
"""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvopt
from conftest import relative_error
from kvopt.weights.checkpoint.ordered import OrderedLinear
from kvopt.weights.checkpoint.plain import ScaleRoundingWarning, group_order, in_input_order
from kvopt.weights.checkpoint.words import from_words, to_words, words_of
from kvopt.weights.formats import QuantizedWeight, WeightFormat
from kvopt.weights.linear import QuantLinear
from tiny_models import VOCABULARY, logits, some_tokens, tiny_llama

Q = "model.layers.0.self_attn.q_proj"


def saved(tmp_path, recipe, format, **settings):
    model = tiny_llama(num_hidden_layers=1, **settings)
    kvopt.quantize(model, recipe, progress=False)
    kvopt.save_quantized(model, tmp_path / "m", format=format)
    return model, load_file(tmp_path / "m" / "model.safetensors")


def numbers(tmp_path, model):
    """Codes, scales and zero points of the q projection, and the configuration that was written."""
    codes, scale, zero = model.get_submodule(Q).quantized_weight.codes()
    return codes, scale, zero, json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]


def edit(tmp_path, tensors, **config):
    """Writes changed tensors and settings back."""
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "m" / "config.json"
    described = json.loads(path.read_text())
    described["quantization_config"].update(config)
    path.write_text(json.dumps(described))


def bits_of(word, first, count):
    return (int(word) & 0xFFFFFFFF) >> first & (1 << count) - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_one_stream_of_bits(bits):
    for count in (1, 31, 32, 33, random.randrange(2, 300)):
        values = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8)
        words = to_words(values, bits)
        assert words.dtype == torch.int32 and words.shape == (3, words_of(count, bits))
        for row, packed in zip(values.tolist(), words.tolist(), strict=True):
            stream = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(packed))
            assert stream == sum(value << bits * i for i, value in enumerate(row))
        assert torch.equal(from_words(words, count, bits), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_packs_down_the_inputs_and_stores_zero_less_one(bits, tmp_path):
    recipe = {2: "int2_g32", 4: "int4_g32", 8: "int8"}[bits]
    model, tensors = saved(tmp_path, recipe, "gptq")
    codes, scale, zero, config = numbers(tmp_path, model)
    qweight, qzeros = tensors[f"{Q}.qweight"], tensors[f"{Q}.qzeros"]
    per_word = 32 // bits
    for _ in range(50):
        n, k = random.randrange(64), random.randrange(64)
        assert bits_of(qweight[k // per_word, n], k % per_word * bits, bits) == codes[n, k]
    less = 1 if config["checkpoint_format"] == "gptq" else 0
    for group in range(scale.shape[1]):
        for n in range(64):
            assert bits_of(qzeros[group, n // per_word], n % per_word * bits, bits) == zero[n, group] - less
    assert torch.equal(tensors[f"{Q}.scales"], scale.T)
    assert torch.equal(tensors[f"{Q}.g_idx"], (torch.arange(64) // (64 if bits == 8 else 32)).int())


def test_gptq_of_three_bits_crosses_words(tmp_path):
    model, tensors = saved(tmp_path, "int3_g32", "gptq")
    codes, *_ = numbers(tmp_path, model)
    words = tensors[f"{Q}.qweight"][:3]
    for n in range(64):
        w0, w1, w2 = words[:, n].tolist()
        assert [bits_of(w0, 3 * i, 3) for i in range(10)] == codes[n, :10].tolist()
        assert bits_of(w0, 30, 2) | bits_of(w1, 0, 1) << 2 == codes[n, 10]
        assert [bits_of(w1, 3 * i + 1, 3) for i in range(10)] == codes[n, 11:21].tolist()
        assert bits_of(w1, 31, 1) | bits_of(w2, 0, 2) << 1 == codes[n, 21]
        assert [bits_of(w2, 3 * i + 2, 3) for i in range(10)] == codes[n, 22:32].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_writes_version_1_of_symmetric_weights_and_2_of_others(bits, tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    tokens = some_tokens()
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            layer.weight[0].abs_()  # a group above 0 has the zero point 0
    for symmetric in (True, False):
        changed, folder = copy.deepcopy(model), tmp_path / str(symmetric)
        kvopt.quantize(changed, f"int{bits}_g32" + "_sym" * symmetric, progress=False)
        kvopt.save_quantized(changed, folder, format="gptq")
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert (
            config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2") and config["sym"] == symmetric
        )
        loaded = kvopt.load_quantized(folder, device="cpu")
        assert torch.equal(logits(loaded, tokens), logits(changed, tokens))


def test_awq_interleaves_eight_outputs(tmp_path):
    model, tensors = saved(tmp_path, "int4_g32", "awq")
    codes, scale, zero, _ = numbers(tmp_path, model)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for _ in range(50):
        k, j = random.randrange(64), random.randrange(8)
        nibbles = [bits_of(tensors[f"{Q}.qweight"][k, j], 4 * i, 4) for i in range(8)]
        assert nibbles == [codes[8 * j + o, k] for o in order]
        group = random.randrange(2)
        nibbles = [bits_of(tensors[f"{Q}.qzeros"][group, j], 4 * i, 4) for i in range(8)]
        assert nibbles == [zero[8 * j + o, group] for o in order]
    assert torch.equal(tensors[f"{Q}.scales"], scale.T)


def test_compressed_tensors_packs_rows_and_zero_points_down_the_outputs(tmp_path):
    model, tensors = saved(tmp_path, "int4_g32", "compressed-tensors")
    codes, scale, zero, config = numbers(tmp_path, model)
    for _ in range(50):
        n, k = random.randrange(64), random.randrange(64)
        assert bits_of(tensors[f"{Q}.weight_packed"][n, k // 8], k % 8 * 4, 4) == codes[n, k]
        packed = tensors[f"{Q}.weight_zero_point"][n // 8, k // 32]
        assert bits_of(packed, n % 8 * 4, 4) == zero[n, k // 32]
    assert torch.equal(tensors[f"{Q}.weight_scale"], scale)
    assert tensors[f"{Q}.weight_shape"].tolist() == [64, 64] and config["ignore"] == ["lm_head"]


def test_int_quantized_is_signed(tmp_path):
    model, tensors = saved(tmp_path, "int8_dyn", "compressed-tensors")
    codes, scale, _, config = numbers(tmp_path, model)
    assert (
        torch.equal(tensors[f"{Q}.weight"].int() + 128, codes.int()) and config["format"] == "int-quantized"
    )
    assert torch.equal(tensors[f"{Q}.weight_scale"], scale)


def test_bitsandbytes_has_the_first_code_in_the_high_nibble(tmp_path):
    model, tensors = saved(tmp_path, "nf4", "bnb")
    codes, scale, *_ = numbers(tmp_path, model)
    flat = codes.flatten().tolist()
    stored = tensors[f"{Q}.weight"].flatten().tolist()
    assert stored == [high << 4 | low for high, low in zip(flat[::2], flat[1::2], strict=True)]
    assert torch.equal(tensors[f"{Q}.weight.absmax"], scale.float().flatten())


def test_act_order_gathers_inputs(tmp_path):
    model, tensors = saved(tmp_path, "int4_g32", "gptq")
    dense = model.get_submodule(Q).quantized_weight.dequantize()
    names = [name.removesuffix(".g_idx") for name in tensors if name.endswith(".g_idx")]
    permutations = {}
    for name in names:  # column j becomes input p[j]: codes and group numbers move together
        k = tensors[f"{name}.g_idx"].numel()
        permutation = permutations[name] = torch.randperm(k)
        codes = from_words(tensors[f"{name}.qweight"].T, k, 4)
        tensors[f"{name}.qweight"] = to_words(in_input_order(codes, permutation), 4).T.contiguous()
        tensors[f"{name}.g_idx"] = in_input_order(tensors[f"{name}.g_idx"], permutation)
    edit(tmp_path, tensors, desc_act=True)
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    module = loaded.get_submodule(Q)
    assert isinstance(module, OrderedLinear)
    assert torch.equal(module.quantized_weight.dequantize(), in_input_order(dense, permutations[Q]))
    x = torch.randn(3, 64, requires_grad=True)
    module(x).sum().backward()
    expected = module.quantized_weight.dequantize().sum(dim=0)
    assert relative_error(x.grad, expected.expand(3, -1)) < 1e-3

    tokens = some_tokens()
    for format in ("kvopt", "gptq"):
        kvopt.save_quantized(loaded, tmp_path / format, format=format)
        again = kvopt.load_quantized(tmp_path / format, device="cpu")
        assert torch.equal(logits(again, tokens), logits(loaded, tokens))
    back = load_file(tmp_path / "gptq" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="its groups are not consecutive inputs"):
        kvopt.save_quantized(loaded, tmp_path / "ct", format="compressed-tensors")
    kvopt.dequantize(loaded)
    assert torch.equal(loaded.get_submodule(Q).weight, in_input_order(dense, permutations[Q]))


def test_group_order():
    assert group_order(torch.arange(70) // 32, 32, "g") is None  # a short last group
    g_idx = torch.tensor([1, 0, 1, 0, 2])
    assert group_order(g_idx, 2, "g").tolist() == [1, 3, 0, 2, 4]
    for wrong in ([0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [-1, 0, 0, 1, 1], [0, 0, 1, 1, 3]):
        with pytest.raises(ValueError, match="g: expected 3 groups of 2 columns each in any order"):
            group_order(torch.tensor(wrong), 2, "g")


def test_a_short_last_group_is_read(tmp_path):
    """AutoGPTQ writes ⌈K / group⌉ groups; we read them, and do not write them."""
    model, tensors = saved(tmp_path, "int4_g32", "gptq")
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    scales = torch.rand(2, 64, generator=generator).half()
    tensors[f"{Q}.scales"] = scales
    tensors[f"{Q}.g_idx"] = (torch.arange(64) // 48).int()
    for name in list(tensors):
        if name.endswith(".g_idx"):
            k = tensors[name].numel()
            tensors[name] = (torch.arange(k) // 48).int()
            groups = -(-k // 48)
            for part in ("scales", "qzeros"):
                key = name.replace("g_idx", part)
                tensors[key] = tensors[key][:groups].contiguous()
    edit(tmp_path, tensors, group_size=48)
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu").get_submodule(Q)
    codes, _, _ = model.get_submodule(Q).quantized_weight.codes()
    got, scale, _ = loaded.quantized_weight.codes()
    assert torch.equal(got, codes) and torch.equal(scale, scales.T) and loaded.format.group_size == 48


def test_a_bias_of_zeros_where_the_model_has_none(tmp_path):
    model, tensors = saved(tmp_path, "int4_g32", "gptq", attention_bias=False)
    tokens = some_tokens()
    tensors[f"{Q}.bias"] = torch.zeros(64, dtype=torch.float16)
    tensors[f"{Q.replace('q_proj', 'k_proj')}.bias"] = torch.ones(32, dtype=torch.float16)
    edit(tmp_path, tensors)
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert loaded.get_submodule(Q).bias is None
    assert torch.equal(loaded.get_submodule(Q.replace("q_proj", "k_proj")).bias, torch.ones(32))
    loaded.get_submodule(Q.replace("q_proj", "k_proj")).bias = None
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_finer_scales_are_rounded_with_a_warning(tmp_path):
    _, tensors = saved(tmp_path, "int4_g32", "compressed-tensors")
    scale = tensors[f"{Q}.weight_scale"].float() * (1 + 2**-13)
    tensors[f"{Q}.weight_scale"] = scale
    edit(tmp_path, tensors)
    with pytest.warns(ScaleRoundingWarning, match="finer than fp16"):
        loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert torch.equal(loaded.get_submodule(Q).quantized_weight.codes()[1], scale.half())
    tensors[f"{Q}.weight_scale"] = scale * 1e7
    edit(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"{Q}.weight_scale: a value is not finite or beyond fp16's range"):
        kvopt.load_quantized(tmp_path / "m", device="cpu")


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bitsandbytes_bytes_under_another_type(storage, tmp_path):
    model, tensors = saved(tmp_path, "nf4", "bnb")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].flatten().view(storage)[:, None].contiguous()
    edit(tmp_path, tensors, bnb_4bit_quant_storage=str(storage).removeprefix("torch."))
    tokens = some_tokens()
    assert torch.equal(
        logits(kvopt.load_quantized(tmp_path / "m", device="cpu"), tokens), logits(model, tokens)
    )


def test_blocks_across_rows_cannot_be_read(tmp_path):
    _, tensors = saved(tmp_path, "nf4", "bnb")
    key = f"{Q}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | {"blocksize": 128}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    edit(tmp_path, tensors)
    with pytest.raises(
        ValueError, match=f"{Q}.weight: blocks of 128 that cross rows of 64 columns can't be read"
    ):
        kvopt.load_quantized(tmp_path / "m", device="cpu")


def test_zero_points_that_are_no_integers_are_refused(tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    kvopt.quantize(model, "int4_g32", progress=False)
    codes, scale, zero = model.get_submodule(Q).quantized_weight.codes()
    weight = QuantizedWeight.from_codes(codes, scale, zero + 0.5, WeightFormat(4, 32, False))
    model.model.layers[0].self_attn.q_proj = QuantLinear(weight)
    for format in ("gptq", "awq", "compressed-tensors"):
        with pytest.raises(ValueError, match="q_proj: a zero point is no integer in 0…15"):
            kvopt.save_quantized(model, tmp_path / "m", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["int4_g32", "nf4"])
def test_scaled_inputs_are_kept_in_our_format_only(recipe, tmp_path):
    model, tokens = tiny_llama(num_hidden_layers=1), some_tokens()
    kvopt.quantize(model, recipe, progress=False)
    module = model.get_submodule(Q)
    held = module.quantized_weight
    weight = QuantizedWeight(held.packed, held.scales, held.shape, held.format, torch.rand(64) + 0.5)
    model.model.layers[0].self_attn.q_proj = QuantLinear(weight, module.bias)
    kvopt.save_quantized(model, tmp_path / "m")
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert torch.equal(loaded.get_submodule(Q).quantized_weight.input_scale, weight.input_scale)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    for format in ("gptq", "awq", "compressed-tensors") if recipe == "int4_g32" else ("bnb",):
        with pytest.raises(ValueError, match="q_proj: its inputs have a scale of their own"):
            kvopt.save_quantized(model, tmp_path / format, format=format)


def test_gptqmodel_gives_a_module_its_own_bits(tmp_path):
    plain, tokens = tiny_llama(num_hidden_layers=1), some_tokens()
    model = copy.deepcopy(plain)
    kvopt.quantize(model, {"*mlp*": "int8", "*": "int4_g32_sym"}, progress=False)
    tensors = {}
    for recipe in ("int8", "int4_g32_sym"):
        half = copy.deepcopy(plain)
        kvopt.quantize(half, recipe, progress=False)
        kvopt.save_quantized(half, tmp_path / recipe, format="gptq")
        content = load_file(tmp_path / recipe / "model.safetensors")
        tensors |= {n: t for n, t in content.items() if recipe == "int8" or "mlp" not in n}
    (tmp_path / "int4_g32_sym").rename(tmp_path / "m")
    edit(tmp_path, tensors, dynamic={r"-:^lm_head$": {}, r"+:.*\.mlp\..*": {"bits": 8, "group_size": -1}})
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert str(loaded.get_submodule(Q).format) == "int4_g32_sym"
    assert str(loaded.model.layers[0].mlp.up_proj.format) == "int8"
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_awq_that_is_only_folded_goes_into_every_format(format, tmp_path):
    """Grouped queries: the factor of o_proj has nowhere to go, and is not made."""
    model, tokens = tiny_llama(num_hidden_layers=1), some_tokens()
    windows = torch.randint(3, VOCABULARY, (8, 24))
    report = kvopt.quantize(model, "awq_4bit_g32_sym_fold", calibration=windows, progress=False)
    assert any(row.method == "awq" for row in report.layers)
    kvopt.save_quantized(model, tmp_path / "m", format=format)
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert relative_error(logits(loaded, tokens), logits(model, tokens)) < 1e-5
