# SPDX-License-Identifier: Apache-2.0
"""What the formats' own packages wrote (``tests/data/make_checkpoints.py``), read, and written as they wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import relative_error
from kvopt.weights.checkpoint.files import TensorFiles
from kvopt.weights.checkpoint.formats import CODECS

DATA = Path(__file__).parent.parent / "data"
CPU = torch.device("cpu")


def cases(file):
    with safe_open(DATA / f"{file}.safetensors", framework="pt") as handle:
        return json.loads(handle.metadata()["configs"])


BNB, COMPRESSED, GPTQMODEL = (cases(f) for f in ("bitsandbytes", "compressed_tensors", "gptqmodel"))


def read(codec, file, case, config):
    """The weight, what the package made of it, and the tensors that it stored."""
    path = DATA / f"{file}.safetensors"
    with safe_open(path, framework="pt") as handle:
        names = [name for name in handle.keys() if name.startswith(f"{case}.")]  # noqa: SIM118 (not a mapping)
        stored = {name.removeprefix(f"{case}."): handle.get_tensor(name) for name in names}
        dequantized = handle.get_tensor(f"{case}/dequantized")
    with TensorFiles([path]) as files:
        weight = CODECS[codec].read(files, config, case, tuple(dequantized.shape))
    return weight.linear(None, "linear", CPU), dequantized, stored


def check_written(codec, module, config, stored):
    written = CODECS[codec].tensors(module, config)
    assert set(written) <= set(stored)
    for name, tensor in written.items():
        assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize("case", [case for case in BNB if not case.endswith("_dq")])
def test_bitsandbytes_bit_for_bit(case):
    config = BNB[case] | {"bnb_4bit_compute_dtype": "float16"}
    module, dequantized, stored = read("bnb", "bitsandbytes", case, config)
    assert str(module.format) == case
    assert torch.equal(module.quantized_weight.dequantize(torch.float16), dequantized)
    state = f"weight.quant_state.bitsandbytes__{case}"
    written = CODECS["bnb"].tensors(module, config)
    for name in ("weight", "weight.absmax", "weight.quant_map"):
        assert written[name].dtype == stored[name].dtype and torch.equal(written[name], stored[name]), name
    assert json.loads(bytes(written[state].tolist())) == json.loads(bytes(stored[state].tolist()))


@pytest.mark.parametrize("case", [case for case in BNB if case.endswith("_dq")])
def test_bitsandbytes_double_quantised(case):
    config = BNB[case] | {"bnb_4bit_compute_dtype": "float16"}
    module, dequantized, stored = read("bnb", "bitsandbytes", case, config)
    assert str(module.format) == case
    # they keep the expanded absmax in fp32, we round it to fp16; theirs rounds the product
    assert relative_error(module.quantized_weight.dequantize(), dequantized) < 2**-11
    written = CODECS["bnb"].tensors(module, config)
    assert set(written) == set(stored)
    state = f"weight.quant_state.bitsandbytes__{case.removesuffix('_dq')}"
    assert json.loads(bytes(written.pop(state).tolist())) == json.loads(bytes(stored[state].tolist()))
    for name, tensor in written.items():
        assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors_bit_for_bit(case):
    module, dequantized, stored = read("compressed-tensors", "compressed_tensors", case, COMPRESSED[case])
    assert torch.equal(module.quantized_weight.dequantize(torch.float16), dequantized)
    weights = COMPRESSED[case]["config_groups"]["group_0"]["weights"]
    assert module.format.symmetric == weights["symmetric"] and module.format.bits == weights["num_bits"]
    assert (module.format.activation_bits == 8) == case.startswith("int8")
    if case != "int8_asym_gc":  # int8 activations with zero points: read, and not written
        check_written("compressed-tensors", module, COMPRESSED[case], stored)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("case", [case for case in GPTQMODEL if case != "awq"])
def test_gptqmodel_bit_for_bit(case, version, tmp_path):
    config = GPTQMODEL[case] | {"checkpoint_format": version}
    path = tmp_path / "one.safetensors"
    with safe_open(DATA / "gptqmodel.safetensors", framework="pt") as handle:
        stored = {
            n: handle.get_tensor(f"{case}.{n}") for n in ("qweight", "qzeros", "scales", "g_idx", "qzeros_v1")
        }
        dequantized = handle.get_tensor(f"{case}/dequantized")
    first = stored.pop("qzeros_v1")
    if version == "gptq":
        stored["qzeros"] = first
    save_file({f"m.{name}": tensor for name, tensor in stored.items()}, path)
    with TensorFiles([path]) as files:
        assert CODECS["gptq"].modules(files, config) == ["m"]
        weight = CODECS["gptq"].read(files, config, "m", tuple(dequantized.shape))
    module = weight.linear(None, "linear", CPU)
    assert (weight.order is not None) == case.endswith("_ordered")
    assert torch.equal(module.quantized_weight.dequantize(torch.float16), dequantized)
    x = torch.randn(3, dequantized.shape[1])
    assert relative_error(module(x), x @ module.quantized_weight.dequantize().T) < 1e-3
    if version == "gptq_v2" or "_sym" in case:  # version 1 is not written where a zero point is 0
        check_written("gptq", module, config, stored)


def test_awq_bit_for_bit():
    config = GPTQMODEL["awq"]
    module, dequantized, stored = read("awq", "gptqmodel", "awq", config)
    assert torch.equal(module.quantized_weight.dequantize(torch.float16), dequantized)
    check_written("awq", module, config, stored)
