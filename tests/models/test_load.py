# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil

import pytest
import torch

import kvopt
from kvopt import assets
from kvopt.models.load import find_model

EMBEDDED = assets.path("llama-6m")


def test_embedded_model_loads_and_speaks():
    model, tokenizer = kvopt.load("llama-6m", device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    tokens = tokenizer("The king of", return_tensors="pt")
    assert tokens.input_ids[0, 0] == 0
    out = model.generate(**tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape[1] == tokens.input_ids.shape[1] + 5


def test_short_last_group_of_the_embedded_model():
    model, _ = kvopt.load("llama-6m", recipe="int4_g128", device="cpu", progress=False)
    down = model.model.layers[0].mlp.down_proj  # K = 704 = 5 x 128 + 64
    assert down.in_features == 704 and down.quantized_weight.codes()[1].shape == (256, 6)


def test_dtype_recipe_sets_the_type():
    assert kvopt.load("llama-6m", recipe="fp32", device="cpu")[0].dtype == torch.float32
    assert kvopt.load("llama-6m", dtype="fp16", device="cpu")[0].dtype == torch.float16
    with pytest.raises(ValueError, match="contradicts"):
        kvopt.load("llama-6m", recipe="fp32", dtype="bf16", device="cpu")


@pytest.mark.parametrize("name", ["./nothing-here", "/nowhere/at/all", ""])
def test_missing_folder(name):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_model(name)


def test_missing_hub_model_is_a_clear_error():
    with pytest.raises(FileNotFoundError, match=r"not an embedded model \(llama-6m\)"):
        kvopt.load("llama-7m")


def test_damaged_safetensors(tmp_path):
    for damage in ("truncated", "garbage"):
        folder = tmp_path / damage
        shutil.copytree(EMBEDDED, folder)
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"\xff" * 64 + data[64:])
        with pytest.raises(ValueError, match=r"damaged safetensors file model\.safetensors"):
            kvopt.load(folder)


def test_folder_without_safetensors(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        kvopt.load(folder)
    shutil.copy(EMBEDDED / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        kvopt.load(folder)


def test_bad_recipe_dtype_and_device_are_refused():
    with pytest.raises(ValueError, match="did you mean"):
        kvopt.load("llama-6m", recipe="int5")
    with pytest.raises(ValueError, match="not a floating type"):
        kvopt.load("llama-6m", dtype="int32")
    with pytest.raises(ValueError, match="not a device"):
        kvopt.load("llama-6m", device="gpu7x")


def test_bfloat16_becomes_float16_where_it_is_not_native(monkeypatch):
    """The rule of a T4 (sm_75), on a pretended device: the model stays on the CPU."""
    monkeypatch.setattr("kvopt.models.load.native_bfloat16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.warns(UserWarning, match="no native bfloat16"):
        model, _ = kvopt.load("llama-6m", device="cpu")
    assert model.dtype == torch.float16
