# SPDX-License-Identifier: Apache-2.0
"""Our exports in the formats' own loaders, theirs in ours, and adapters on top; each skips without its package."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig

import kvopt
from conftest import relative_error
from kvopt.reference import dynamic_map
from kvopt.weights.linear import QuantLinear
from tiny_models import logits, some_tokens, tiny_gpt2, tiny_llama


def quantised(model, recipe):
    kvopt.quantize(model, recipe, progress=False)
    return model


def plain_weights(model):
    """The dense weights of a dequantised copy, by module."""
    return {n: m.weight for n, m in kvopt.dequantize(model).named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("recipe", ["nf4", "fp4", "nf4_dq", "fp4_dq"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_bitsandbytes_reads_ours(make, recipe, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    model, tokens = quantised(make(), recipe), some_tokens()
    kvopt.save_quantized(model, tmp_path / "m", format="bnb")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    linears = {n: m for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    ours = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert set(linears) == set(ours)
    for name, module in linears.items():
        dense = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        bound = 2**-11 if recipe.endswith("dq") else 0  # they keep the expanded absmax in fp32
        assert relative_error(dense, ours[name].quantized_weight.dequantize()) <= bound, name
    assert (
        relative_error(logits(theirs, tokens), logits(model, tokens)) < 0.02
    )  # their CPU product is in bf16


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_we_read_bitsandbytes(kind, double, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    tiny_llama(dtype=torch.float16).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float16,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.float16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = kvopt.load_quantized(tmp_path / "theirs", device="cpu")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float16)
    kvopt.quantize(ours, kind + ("_dq" if double else ""), progress=False)
    tokens = some_tokens()
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            same = loaded.get_submodule(name)
            assert same.format == module.format
            got, expected = same.state_dict(), module.state_dict()
            assert torch.equal(got["codes"], expected["codes"])
            if not double:
                assert torch.equal(got["scale"], expected["scale"])
                continue
            # the mean of the absmax is summed in another order, so that a value at a bound may take its neighbour
            off = dynamic_map()[got["absmax"].int()] - dynamic_map()[expected["absmax"].int()]
            assert off.abs().max() < 0.02  # in units of the scale; the widest step is 0.014
            for part in ("absmax_scale", "absmax_offset"):
                assert torch.allclose(got[part], expected[part], rtol=1e-5)
    assert relative_error(logits(loaded, tokens), logits(ours, tokens)) < 1e-2


@pytest.mark.parametrize(
    "recipe", ["int4_g32", "int4_g32_sym", "int8", "int3_g32", "int2_g16_sym", "int8_dyn"]
)
def test_compressed_tensors_reads_ours(recipe, tmp_path):
    pytest.importorskip("compressed_tensors")
    model, tokens = quantised(tiny_llama(dtype=torch.float16), recipe), some_tokens()
    kvopt.save_quantized(model, tmp_path / "m", format="compressed-tensors")
    settings = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="will be overwritten"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=settings)
    expected = logits(model, tokens)
    for name, weight in plain_weights(model).items():
        assert relative_error(theirs.get_submodule(name).weight, weight) < 2**-10, (
            name
        )  # their product is in fp16
    bound = 0.03 if recipe == "int8_dyn" else 1e-2  # dequantised, they do not round activations
    assert relative_error(logits(theirs, tokens), expected) < bound


def test_gradients_reach_the_input_of_a_loaded_model(tmp_path):
    kvopt.save_quantized(quantised(tiny_llama(), "nf4"), tmp_path / "m")
    model = kvopt.load_quantized(tmp_path / "m", device="cpu")
    vectors = torch.randn(2, 7, 64)
    gradients = []
    for dense in (False, True):
        if dense:
            kvopt.dequantize(model)
        leaf = vectors.clone().requires_grad_()
        model(inputs_embeds=leaf).logits.square().sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(*gradients) < 1e-3


def test_lora_trains_on_a_loaded_model(tmp_path):
    peft = pytest.importorskip("peft")
    kvopt.save_quantized(quantised(tiny_llama(), "int4_g32"), tmp_path / "m")
    model = kvopt.load_quantized(tmp_path / "m", device="cpu")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=8)
    settings._register_custom_module({kvopt.QuantLinear: peft.tuners.lora.Linear})
    adapted = peft.get_peft_model(model, settings)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    packed = {n: b.clone() for n, b in adapted.named_buffers() if n.endswith("packed")}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    tokens = some_tokens()
    losses = []
    for _ in range(30):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(buffer, packed[n]) for n, buffer in adapted.named_buffers() if n in packed)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        kvopt.load_quantized(tmp_path / "m", device="cpu"), tmp_path / "adapter", config=settings
    )
    assert relative_error(logits(again, tokens), logits(adapted.eval(), tokens)) < 1e-5
