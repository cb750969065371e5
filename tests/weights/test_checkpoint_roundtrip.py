# SPDX-License-Identifier: Apache-2.0
"""Save, load, and the same logits: our own format bit for bit, the others through our own loader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import kvopt
from conftest import DEVICES
from kvopt.weights.checkpoint.load import Slot
from kvopt.weights.linear import QuantLinear, TiedEmbedding
from tiny_models import logits, some_tokens, tiny_gpt2, tiny_llama

RECIPES = [
    *("int8", "int8_dyn", "int4_g32", "int4_g48_sym", "int4_gc", "int3_g32", "int3_gc_sym", "int2_g16"),
    *("nf4", "nf4_b32_dq", "fp4_dq", "fp4", "int4_g32+a8", "int4_g32+head_int8", "nf4_dq+head_fp4_dq"),
    *({"*mlp*": "int3_g32", "*": "int8"}, "hqq_4bit_g32", "hqq_8bit_g32"),
]
MODELS = {"llama": tiny_llama, "tied": lambda: tiny_llama(tied=True), "gpt2": tiny_gpt2}
CASES = [(kind, recipe) for kind in ("llama", "gpt2") for recipe in RECIPES]
CASES += [("tied", recipe) for recipe in RECIPES if "head" in recipe]


def quantised(model, recipe):
    kvopt.quantize(model, recipe, progress=False)
    return model


@pytest.mark.parametrize(("kind", "recipe"), CASES, ids=str)
def test_our_format_gives_the_same_logits_bit_for_bit(kind, recipe, tmp_path):
    model, tokens = quantised(MODELS[kind](), recipe), some_tokens()
    expected = logits(model, tokens)
    kvopt.save_quantized(model, tmp_path / "m")
    for loaded in (
        kvopt.load_quantized(tmp_path / "m", device="cpu"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
    ):
        assert torch.equal(logits(loaded, tokens), expected)
        assert not loaded.training
        assert not any(isinstance(m, Slot) for m in loaded.modules())
        assert kvopt.model_nbytes(loaded) == kvopt.model_nbytes(model)
        kinds = {name: (type(m), m.format) for name, m in model.named_modules() if isinstance(m, QuantLinear)}
        assert kinds == {
            n: (type(m), m.format) for n, m in loaded.named_modules() if isinstance(m, QuantLinear)
        }


FAMILIES = {
    "gemma2": {"head_dim": 16, "num_key_value_heads": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32},
    "mixtral": {
        "num_key_value_heads": 2,
        "num_local_experts": 2,
    },  # its experts are renamed and merged when read
    "phi": {},
    "gpt_neox": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    common = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **common, **ends, **FAMILIES[family])
    model, tokens = quantised(AutoModelForCausalLM.from_config(config).eval(), "int4_g32"), some_tokens()
    for format in ("kvopt", "gptq"):
        kvopt.save_quantized(model, tmp_path / format, format=format)
        loaded = kvopt.load_quantized(tmp_path / format, device="cpu")
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_quantising_while_loading_is_refused(tmp_path):
    from kvopt.models.hf import KvoptConfig

    tiny_llama().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="kvopt quantises a loaded model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=KvoptConfig())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_stay(dtype, tmp_path):
    model, tokens = quantised(tiny_llama(tied=True, dtype=dtype), "int4_g32+head_int8"), some_tokens()
    kvopt.save_quantized(model, tmp_path / "m")
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert loaded.dtype == dtype and torch.equal(logits(loaded, tokens), logits(model, tokens))
    wide = kvopt.load_quantized(tmp_path / "m", device="cpu", dtype="float32")
    assert logits(wide, tokens).dtype == torch.float32


def test_a_quantised_head_and_its_embedding_are_stored_once(tmp_path):
    model = quantised(tiny_llama(tied=True), "int4_g32+head_int8")
    kvopt.save_quantized(model, tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "lm_head.codes" in names and not any("embed_tokens" in name for name in names)
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert isinstance(loaded.model.embed_tokens, TiedEmbedding)
    assert loaded.model.embed_tokens._head[0] is loaded.lm_head


def test_a_plain_tied_head_stays_tied(tmp_path):
    kvopt.save_quantized(quantised(tiny_llama(tied=True), "int8"), tmp_path / "m")
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_shards(tmp_path):
    model, tokens = quantised(tiny_gpt2(), "int4_g32"), some_tokens()
    kvopt.save_quantized(model, tmp_path / "m", shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert torch.equal(
        logits(kvopt.load_quantized(tmp_path / "m", device="cpu"), tokens), logits(model, tokens)
    )


def test_full_precision_never_exists(tmp_path):
    kvopt.save_quantized(quantised(tiny_llama(vocab_size=32), "int4_g32"), tmp_path / "m")
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            nonlocal largest
            result = function(*arguments, **(settings or {}))
            if (
                isinstance(result, torch.Tensor)
                and result.is_floating_point()
                and result.device.type == "cpu"
            ):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert 0 < largest < 64 * 64 * 4  # a projection in fp32; the smallest is k_proj, 32 * 64 * 4


def test_what_is_loaded_can_be_saved_again_by_transformers(tmp_path):
    model, tokens = quantised(tiny_llama(), "nf4_dq"), some_tokens()
    kvopt.save_quantized(model, tmp_path / "a", format="bnb")
    kvopt.load_quantized(tmp_path / "a", device="cpu").save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "kvopt"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_loaded_model_saved_after_dequantising_is_a_plain_one(tmp_path):
    model = quantised(tiny_llama(tied=True), "int8+head_int8")
    kvopt.save_quantized(model, tmp_path / "m")
    loaded, tokens = kvopt.load_quantized(tmp_path / "m", device="cpu"), some_tokens()
    kvopt.dequantize(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain, tokens), logits(loaded, tokens))


def test_dequantising_a_loaded_model(tmp_path):
    model, tokens = quantised(tiny_gpt2(), "int4_g32"), some_tokens()
    kvopt.save_quantized(model, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").dequantize()
    assert not any(isinstance(m, QuantLinear) for m in loaded.modules())
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.allclose(logits(loaded, tokens), logits(model, tokens), atol=1e-4)


def test_kvopt_load_takes_a_quantised_folder(tmp_path):
    model, tokenizer = kvopt.load("llama-6m", recipe="int4_g128", device="cpu", progress=False)
    kvopt.save_quantized(model, tmp_path / "m", tokenizer=tokenizer)
    loaded, again = kvopt.load(tmp_path / "m", device="cpu")
    tokens = again("Once upon a time", return_tensors="pt").input_ids
    assert torch.equal(tokens, tokenizer("Once upon a time", return_tensors="pt").input_ids)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    with pytest.raises(ValueError, match="is quantised already; leave out the recipe int8"):
        kvopt.load(tmp_path / "m", recipe="int8")


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_onto_a_gpu(tmp_path):
    model, tokens = quantised(tiny_llama(dtype=torch.float16), "int4_g32"), some_tokens().cuda()
    kvopt.save_quantized(model, tmp_path / "m")
    loaded = kvopt.load_quantized(tmp_path / "m", device="cuda")
    assert torch.equal(logits(loaded, tokens), logits(model.cuda(), tokens))


FOREIGN = [
    *[
        ("gptq", r)
        for r in ("int4_g32", "int8", "int2_g16_sym", "int3_g32", "int3_gc_sym", "int4_g32+head_int4_g32")
    ],
    *[("awq", r) for r in ("int4_g32", "int4_g32_sym", "int4_gc")],
    *[
        ("compressed-tensors", r)
        for r in ("int4_g32", "int4_g32_sym", "int8", "int8_dyn", "int3_g32", "int2_g16")
    ],
    *[("compressed-tensors", r) for r in ("int4_g32+head_int8", "int8_dyn+head_int8")],
    *[("bnb", r) for r in ("nf4", "nf4_dq", "fp4_b32", "fp4_dq", "nf4+head_nf4")],
]


@pytest.mark.parametrize(("format", "recipe"), FOREIGN)
def test_foreign_formats_lose_nothing(format, recipe, tmp_path):
    model, tokens = quantised(tiny_llama(dtype=torch.float16), recipe), some_tokens()
    kvopt.save_quantized(model, tmp_path / "m", format=format)
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    formats = {name: m.format for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert formats == {name: m.format for name, m in loaded.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize(
    ("format", "recipe"), [("gptq", "int4_g32"), ("gptq", "int3_g32_sym"), ("bnb", "nf4_dq")]
)
def test_foreign_formats_hold_conv1d(format, recipe, tmp_path):
    model, tokens = quantised(tiny_gpt2(), recipe), some_tokens()
    kvopt.save_quantized(model, tmp_path / "m", format=format)
    loaded = kvopt.load_quantized(tmp_path / "m", device="cpu")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert loaded.transformer.h[0].attn.c_attn.source == "conv1d"


def test_part_of_a_model_is_quantised(tmp_path):
    for format, recipe, key in (
        ("gptq", "int4_g32", "dynamic"),
        ("awq", "int4_g32", "modules_to_not_convert"),
        ("compressed-tensors", "int4_g32", "ignore"),
        ("bnb", "nf4", "llm_int8_skip_modules"),
    ):
        model, tokens = quantised(tiny_llama(), {"*mlp*": recipe}), some_tokens()
        kvopt.save_quantized(model, tmp_path / format, format=format)
        loaded = kvopt.load_quantized(tmp_path / format, device="cpu")
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
        assert type(loaded.model.layers[0].self_attn.q_proj) is nn.Linear
        config = json.loads((tmp_path / format / "config.json").read_text())["quantization_config"]
        assert "self_attn" in str(config[key]) and "mlp" not in str(config[key])


REFUSED = [
    ("gptq", "nf4", "q_proj: nf4 has a code book, not integers"),
    ("gptq", "int4_g48", "q_proj: int4_g48 of 64 columns ends with a short group of 16"),
    ("gptq", "int8_dyn", "int8_dyn takes int8 activations"),
    ("gptq", "int4_g32+a8", "takes int8 activations per group"),
    (
        "gptq",
        "int4_g32+head_int8",
        "lm_head: one number of bits and group size is needed, got int8 beside int4_g32",
    ),
    ("awq", "int3_g32", "q_proj: int3_g32 has 3 bits; possible: 4"),
    ("awq", "int4_g32+head_int4_g32", "lm_head: its readers take the output head as it is"),
    ("compressed-tensors", "fp4", "has a code book"),
    ("bnb", "int4_g64", "int4_g64 is neither nf4 nor fp4"),
    ("bnb", "nf4+head_fp4", "lm_head: one format is needed, got fp4 beside nf4"),
    ("bnb", "nf4+a8", "takes int8 activations"),
    ("ggml", "int8", "unknown format 'ggml'; possible: awq, bnb, compressed-tensors, gptq, kvopt"),
]


@pytest.mark.parametrize(("format", "recipe", "message"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(format, recipe, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        kvopt.save_quantized(quantised(tiny_llama(), recipe), tmp_path / "m", format=format)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="embed_tokens: the embedding shares the quantised table"):
        kvopt.save_quantized(quantised(tiny_llama(tied=True), "nf4+head_nf4"), tmp_path / "m", format="bnb")
    with pytest.raises(ValueError, match=r"c_attn: its readers know nn\.Linear only"):
        kvopt.save_quantized(quantised(tiny_gpt2(), "int4_g32"), tmp_path / "m", format="awq")
    with pytest.raises(ValueError, match="nothing is quantised"):
        kvopt.save_quantized(tiny_llama(), tmp_path / "m")
    with pytest.raises(ValueError, match="expected a Hugging Face model, got Linear"):
        kvopt.save_quantized(nn.Linear(2, 2), tmp_path / "m")
    blocks = quantised(tiny_llama(intermediate_size=96), "nf4")
    with pytest.raises(ValueError, match="down_proj: blocks of 64 cross the rows of 96 columns"):
        kvopt.save_quantized(blocks, tmp_path / "m", format="bnb")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        kvopt.save_quantized(quantised(tiny_llama(), "int8"), tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["mine"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            assert any(Path(folder).glob("*.safetensors"))
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        kvopt.save_quantized(quantised(tiny_llama(), "int8"), tmp_path / "m", tokenizer=Tokenizer())
    assert list(tmp_path.iterdir()) == []


FIRST = ["import kvopt", "import transformers", "from transformers import AutoModelForCausalLM"]


@pytest.mark.parametrize("first", FIRST)
def test_import_order_does_not_matter(first, tmp_path):
    kvopt.save_quantized(quantised(tiny_llama(), "int8"), tmp_path / "m")
    code = (
        f"{first}; import kvopt, importlib; importlib.reload(kvopt)\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'm')!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "QuantLinear", done.stderr


def test_import_kvopt_does_not_import_transformers():
    code = "import kvopt, sys; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
