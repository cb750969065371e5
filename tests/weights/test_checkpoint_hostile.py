# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile checkpoints: a clear error that names file and tensor, before anything of theirs is used."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kvopt
from tiny_models import tiny_llama

Q = "model.layers.0.self_attn.q_proj"
RECIPES = dict.fromkeys(("kvopt", "gptq", "awq", "compressed-tensors"), "int4_g32") | {"bnb": "nf4_dq"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each format."""
    root = tmp_path_factory.mktemp("saved")
    for format, recipe in RECIPES.items():
        model = tiny_llama(num_hidden_layers=1)
        kvopt.quantize(model, recipe, progress=False)
        kvopt.save_quantized(model, root / format, format=format)
    return root


@pytest.fixture
def folder_of(saved, tmp_path):
    """A copy of a format's folder, with its tensors and its configuration changed by functions."""

    def make(format, tensors=None, config=None):
        folder = tmp_path / format
        folder.mkdir()
        content = load_file(saved / format / "model.safetensors")
        if tensors is not None:
            tensors(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        described = json.loads((saved / format / "config.json").read_text())
        if config is not None:
            config(described)
        (folder / "config.json").write_text(json.dumps(described))
        return folder

    return make


def put(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def drop(name):
    return lambda tensors: tensors.pop(name)


TENSORS = [
    (
        "kvopt",
        put(f"{Q}.codes", lambda t: t[:, 1:]),
        rf"model.safetensors: {Q}.codes: expected shape \(64, 32\)",
    ),
    ("kvopt", put(f"{Q}.codes", lambda t: t.int()), f"{Q}.codes: expected uint8, got I32"),
    ("kvopt", put(f"{Q}.scale", lambda t: t.T), rf"{Q}.scale: expected shape \(64, 2\), got \(2, 64\)"),
    ("kvopt", put(f"{Q}.scale", lambda t: t * float("nan")), f"{Q}.scale: a value is not finite"),
    ("kvopt", put(f"{Q}.bias", lambda t: t[1:]), rf"{Q}.bias: expected shape \(64,\)"),
    ("kvopt", drop(f"{Q}.zero"), f"model.safetensors: the tensor '{Q}.zero' is missing"),
    ("kvopt", drop(f"{Q}.codes"), f"the tensor '{Q}.codes' is missing"),
    ("kvopt", drop(f"{Q}.bias"), f"the tensor '{Q}.bias' is missing"),
    ("kvopt", drop("model.norm.weight"), "model.safetensors: the tensor 'model.norm.weight' is missing"),
    ("kvopt", drop("model.embed_tokens.weight"), "'model.embed_tokens.weight' is missing"),
    (
        "kvopt",
        put("lm_head.weight", lambda t: t[1:]),
        r"lm_head.weight: expected shape \(96, 64\), got \(95, 64\)",
    ),
    (
        "kvopt",
        lambda t: t.update({"x.codes": t[f"{Q}.codes"].clone()}),
        "x.codes: the quantization_config lists no",
    ),
    (
        "kvopt",
        lambda t: t.update({f"{Q}.order": torch.zeros(64, dtype=torch.int32)}),
        f"{Q}.order: expected each of",
    ),
    ("gptq", drop(f"{Q}.qzeros"), f"the tensor '{Q}.qzeros' is missing"),
    ("gptq", put(f"{Q}.qweight", lambda t: t.T), rf"{Q}.qweight: expected shape \(8, 64\), got \(64, 8\)"),
    ("gptq", put(f"{Q}.scales", lambda t: t * float("inf")), f"{Q}.scales: a value is not finite"),
    ("gptq", put(f"{Q}.g_idx", lambda t: t * 0), f"{Q}.g_idx: expected 2 groups of 32 columns each"),
    ("gptq", put(f"{Q}.g_idx", lambda t: t - 9), f"{Q}.g_idx: expected 2 groups of 32 columns each"),
    ("awq", put(f"{Q}.qweight", lambda t: t[1:]), rf"{Q}.qweight: expected shape \(64, 8\), got \(63, 8\)"),
    ("awq", drop(f"{Q}.scales"), f"the tensor '{Q}.scales' is missing"),
    ("compressed-tensors", put(f"{Q}.weight_shape", lambda t: t * 10**12), f"{Q}.weight_shape: says"),
    (
        "compressed-tensors",
        put(f"{Q}.weight_packed", torch.Tensor.long),
        "weight_packed: expected int32, got I64",
    ),
    ("compressed-tensors", drop(f"{Q}.weight_zero_point"), f"the tensor '{Q}.weight_zero_point' is missing"),
    ("bnb", put(f"{Q}.weight", lambda t: t[1:]), rf"{Q}.weight: expected shape \(2048, 1\), got \(2047, 1\)"),
    ("bnb", put(f"{Q}.weight.quant_map", lambda t: t + 1), f"{Q}.weight.quant_map: not the values"),
    (
        "bnb",
        put(f"{Q}.weight.nested_quant_map", lambda t: -t),
        f"{Q}.weight.nested_quant_map: not the values",
    ),
    ("bnb", put(f"{Q}.weight.quant_state.bitsandbytes__nf4", lambda t: t[3:]), "bitsandbytes__nf4: no JSON"),
    (
        "bnb",
        put(
            f"{Q}.weight.quant_state.bitsandbytes__nf4", lambda t: torch.full((10**6,), 91, dtype=torch.uint8)
        ),
        "expected at most 65536 bytes",
    ),
]


@pytest.mark.parametrize(("format", "change", "message"), TENSORS)
def test_a_damaged_tensor_is_named(folder_of, format, change, message):
    with pytest.raises(ValueError, match=message):
        kvopt.load_quantized(folder_of(format, change), device="cpu")


def quantization(**settings):
    return lambda config: config["quantization_config"].update(settings)


def group(**settings):
    return lambda config: config["quantization_config"]["groups"][0].update(settings)


def ct_group(**settings):
    return lambda config: config["quantization_config"]["config_groups"]["group_0"].update(settings)


def ct_weights(**settings):
    return lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(
        settings
    )


CONFIGS = [
    ("kvopt", lambda c: c.pop("quantization_config"), "has no quantization_config"),
    (
        "kvopt",
        quantization(quant_method="ternary"),
        "quant_method 'ternary' is not read; possible: kvopt, gptq, awq",
    ),
    ("kvopt", quantization(version=2), "version 2 is not known"),
    ("kvopt", quantization(groups="all"), "'groups' must be a list of objects"),
    ("kvopt", group(bits=5), "bits must be 2, 3, 4 or 8, got 5"),
    ("kvopt", group(bits=4.0), "no format of ours: bits 4.0"),
    ("kvopt", group(group_size=10**30), "group size must be a multiple of 16"),
    ("kvopt", group(group_size=1024), "q_proj: group size 1024 is larger than the row: K = 64"),
    ("kvopt", group(group_size=True), "no format of ours"),
    ("kvopt", group(scheme="ternary"), "no format of ours"),
    (
        "kvopt",
        group(scheme="nf4", double_quantized=True, group_size=64),
        f"the tensor '{Q}.absmax' is missing",
    ),
    ("kvopt", group(modules=[7]), "'modules' must be a list of names"),
    ("kvopt", group(modules=[Q, Q]), "'model.layers.0.self_attn.q_proj' is listed twice"),
    ("kvopt", group(modules=[]), "down_proj.codes: the quantization_config lists no such module"),
    (
        "kvopt",
        lambda c: c["quantization_config"]["groups"][0]["modules"].append("model.norm"),
        "a LlamaRMSNorm in",
    ),
    (
        "kvopt",
        lambda c: c["quantization_config"]["groups"][0]["modules"].append("model.x"),
        "model has no such module",
    ),
    (
        "kvopt",
        lambda c: c["quantization_config"]["groups"][0]["modules"].append(""),
        "a LlamaForCausalLM in the model",
    ),
    (
        "kvopt",
        quantization(tied_embedding="model.norm"),
        "tied_embedding 'model.norm' is not the model's embedding",
    ),
    ("kvopt", quantization(tied_embedding="model.embed_tokens"), "no quantised output head of its shape"),
    ("kvopt", lambda c: c.update(num_hidden_layers=10**9), "1000000000 layers, and the files hold"),
    ("kvopt", lambda c: c.update(vocab_size=10**12), "expected shape .1000000000000, 64"),
    ("kvopt", lambda c: c.update(hidden_size="a"), "can't be loaded: "),
    ("kvopt", lambda c: c.update(model_type="nonsense"), "nonsense"),
    ("gptq", quantization(bits=5), "'bits' must be 2, 3, 4 or 8, got 5"),
    ("gptq", quantization(group_size=0), "'group_size' must be -1 or positive, got 0"),
    ("gptq", quantization(group_size=48), r"scales: expected shape|expected 2 groups|must be a multiple"),
    ("gptq", quantization(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not read"),
    ("gptq", quantization(dynamic={"+:(": {}}), "dynamic"),
    ("awq", quantization(version="gemv"), "AWQ version 'gemv' is not read; possible: gemm"),
    ("awq", quantization(bits="4"), "'bits' must be 4, got '4'"),
    (
        "compressed-tensors",
        ct_group(format="float-quantized"),
        "group_0: format 'float-quantized' is not read",
    ),
    ("compressed-tensors", ct_weights(type="float"), "integer weights are needed"),
    ("compressed-tensors", ct_weights(strategy="tensor"), "strategy 'tensor' is not read"),
    ("compressed-tensors", ct_weights(num_bits=3), "weight_packed: expected shape"),
    (
        "compressed-tensors",
        ct_group(input_activations={"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}),
        "activations with strategy 'tensor' are not read",
    ),
    ("bnb", quantization(load_in_4bit=False, load_in_8bit=True), "only 4-bit checkpoints are read"),
]


@pytest.mark.parametrize(("format", "change", "message"), CONFIGS)
def test_a_wrong_configuration_is_named(folder_of, format, change, message):
    with pytest.raises(ValueError, match=message):
        kvopt.load_quantized(folder_of(format, config=change), device="cpu")


def test_pickled_weights_are_not_opened(folder_of, tmp_path):
    folder = folder_of("kvopt")
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"pytorch_model.bin is pickled, which is not read"):
        kvopt.load_quantized(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"model.safetensors: damaged safetensors file"):
        kvopt.load_quantized(folder)
    assert not (tmp_path / "exploded").exists()


def test_truncated_and_huge_files(folder_of):
    folder = folder_of("kvopt")
    whole = (folder / "model.safetensors").read_bytes()
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + header_bytes])
    damaged = [whole[:-1], whole[:100], b"", struct.pack("<Q", 2**60) + whole[8:], whole + b"more"]
    for shape, end in ([10**9, 10**9], 10**18), ([2**40, 2**40], 64), ([-1, 4], 64):
        header[f"{Q}.codes"] |= {"shape": shape, "data_offsets": [0, end]}
        text = json.dumps(header).encode()
        damaged.append(struct.pack("<Q", len(text)) + text + whole[8 + header_bytes :])
    for content in damaged:
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors: damaged safetensors file"):
            kvopt.load_quantized(folder)


def test_an_index_stays_in_its_folder(folder_of, tmp_path):
    folder = folder_of("kvopt")
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    names = list(load_file(outside))
    for path in (
        "../outside.safetensors",
        str(outside),
        "sub/../../outside.safetensors",
        "..",
        "x.bin",
        7,
        None,
    ):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, path)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"expected a \*.safetensors file of this folder"):
            kvopt.load_quantized(folder)
    for path in ("../outside.safetensors", str(outside)):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, path)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="is not in the checkpoint's folder"):
            AutoModelForCausalLM.from_pretrained(folder)
    for content, message in (
        ({"weight_map": {"a": "gone.safetensors"}}, "names gone.safetensors, which is not there"),
        ({"weight_map": {}}, "expected an object 'weight_map'"),
        ([], "expected a JSON object, got list"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            kvopt.load_quantized(folder)


def test_a_tensor_in_two_files(folder_of):
    folder = folder_of("kvopt")
    content = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({f"{Q}.codes": content[f"{Q}.codes"]}, folder / "b.safetensors")
    index = {"weight_map": dict.fromkeys(content, "a.safetensors") | {f"{Q}.codes": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"b.safetensors: '{Q}.codes' is also in a.safetensors"):
        kvopt.load_quantized(folder)


def test_json_that_is_none(folder_of):
    folder = folder_of("kvopt")
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config.json"):
            kvopt.load_quantized(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json"):
        kvopt.load_quantized(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        kvopt.load_quantized(folder / "gone")


def test_code_of_the_checkpoint_is_not_run(folder_of, tmp_path):
    def remote(config):
        config.pop("model_type")
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}

    folder = folder_of("kvopt", config=remote)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    with pytest.raises(ValueError):
        kvopt.load_quantized(folder)
    assert not (tmp_path / "exploded").exists()


def test_from_pretrained_checks_the_quantised_tensors_too(folder_of):
    with pytest.raises(ValueError, match=f"the tensor '{Q}.scale' is missing"):
        AutoModelForCausalLM.from_pretrained(folder_of("kvopt", drop(f"{Q}.scale")))
