# SPDX-License-Identifier: Apache-2.0
"""Writes the golden checkpoints of ``tests/weights/test_checkpoint_golden.py`` with the formats' own packages.

    pip install bitsandbytes==0.50.2 compressed-tensors==0.20.0 gptqmodel==7.7.0
    python tests/data/make_checkpoints.py

Each file holds, for each case, the tensors that the package stores under ``<case>.`` and the weight that it reads
back from them under ``<case>/dequantized``; what belongs into a quantization_config is in the file's metadata. GPTQ's
zero points are there in both versions. gptqmodel writes AWQ's format too (AutoAWQ is archived). The values are random
from a fixed seed, so that a second run changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
N, K, GROUP = 32, 32, 16
SEED = 20261121
Case = tuple[dict[str, Tensor], Tensor, dict[str, Any]]


def save(file: str, cases: dict[str, Case]) -> None:
    """One file from its cases: tensors, the weight (N, K) and the configuration of each."""
    tensors = {}
    for case, (stored, dequantized, _) in cases.items():
        tensors |= {f"{case}.{name}": tensor.contiguous() for name, tensor in stored.items()}
        tensors[f"{case}/dequantized"] = dequantized.contiguous()
    configs = json.dumps({case: config for case, (_, _, config) in cases.items()})
    save_file(tensors, HERE / file, metadata={"configs": configs})  # one entry: their order isn't kept
    (HERE / file).chmod(0o644)
    print(f"{file}: {(HERE / file).stat().st_size} bytes, {len(cases)} cases")


def bitsandbytes() -> dict[str, Case]:
    import bitsandbytes as bnb

    cases: dict[str, Case] = {}
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            # 261 absmax are more than a block of 256 that shares a scale
            rows, columns = (261, 64) if double and kind == "nf4" else (N, 2 * K)
            weight = (torch.randn(rows, columns) * 0.05).half()
            linear = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compress_statistics=double)
            linear.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type=kind, compress_statistics=double, blocksize=64
            )
            linear.to("cpu")
            back = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            stored = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
            cases[kind + ("_dq" if double else "")] = (stored, back, {"load_in_4bit": True})
    return cases


def compressed_tensors() -> dict[str, Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    cases: dict[str, Case] = {}
    kinds = [
        ("pack-quantized", bits, symmetric, True) for bits in (2, 3, 4, 8) for symmetric in (True, False)
    ]
    kinds += [("pack-quantized", 4, True, False), ("pack-quantized", 8, False, False)]
    kinds += [("int-quantized", 8, symmetric, False) for symmetric in (True, False)]
    for kind, bits, symmetric, grouped in kinds:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        groups = K // GROUP if grouped else 1
        scale = (torch.rand(N, groups) * 0.02 + 0.005).half()
        zero = torch.randint(low, high + 1, (N, groups), dtype=torch.int8)
        if symmetric:
            zero.zero_()
        codes = torch.randint(low, high + 1, (N, K))
        columns = K // groups
        weight = (codes - zero.repeat_interleave(columns, 1)) * scale.repeat_interleave(columns, 1)
        group: dict[str, Any] = {
            "targets": ["Linear"],
            "format": kind,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group" if grouped else "channel",
                "group_size": GROUP if grouped else None,
                "dynamic": False,
            },
        }
        if kind == "int-quantized":
            group["input_activations"] = {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            }  # fmt: skip
        scheme = QuantizationScheme(**{name: value for name, value in group.items() if name != "format"})
        compressor = BaseCompressor.get_value_from_registry(kind)
        state = {"weight": weight, "weight_scale": scale}
        if not symmetric:
            state["weight_zero_point"] = zero
        stored = compressor.compress(state, scheme)
        back = compressor.decompress(stored, scheme)["weight"]
        name = f"{kind.partition('-')[0]}{bits}_{'sym' if symmetric else 'asym'}_{'g16' if grouped else 'gc'}"
        cases[name] = (stored, back.half(), {"format": kind, "config_groups": {"group_0": group}})
    return cases


def _grid(bits: int, symmetric: bool, g_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight on a grid, its scales and zero points (N, groups); asymmetric zeros have both ends of the range."""
    groups = K // GROUP
    scale = (torch.rand(N, groups) * 0.02 + 0.005).half().float()
    zero = torch.randint(0, 2**bits, (N, groups)).float()
    zero[:2, 0] = torch.tensor([0.0, 2.0**bits - 1])
    if symmetric:
        zero.fill_(2 ** (bits - 1))
    codes = torch.randint(0, 2**bits, (N, K)).float()
    return (codes - zero[:, g_idx]) * scale[:, g_idx], scale, zero


def gptqmodel() -> dict[str, Case]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    cases: dict[str, Case] = {}
    plain = torch.arange(K) // GROUP
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for ordered in (False, True):
                g_idx = plain[torch.randperm(K)] if ordered else plain
                weight, scale, zero = _grid(bits, symmetric, g_idx)
                linear = nn.Linear(K, N, bias=False)
                linear.weight.data = weight
                module = TorchLinear(
                    bits=bits, group_size=GROUP, sym=symmetric, desc_act=ordered,
                    in_features=K, out_features=N, bias=False,
                )  # fmt: skip
                module.pack_block(linear, scale.clone(), zero.clone(), g_idx.to(torch.int32))
                back = module.dequantize_weight().T.half()
                stored = {
                    name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")
                }
                settings = QuantizeConfig(bits=bits, group_size=GROUP, sym=symmetric, desc_act=ordered)
                convert_gptq_v2_to_v1_format_module(module, settings)
                stored["qzeros_v1"] = module.qzeros.clone()
                config = {
                    "quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": symmetric,
                    "desc_act": ordered, "checkpoint_format": "gptq_v2",
                }  # fmt: skip
                name = f"gptq{bits}_{'sym' if symmetric else 'asym'}{'_ordered' if ordered else ''}"
                cases[name] = (stored, back, config)
    weight, scale, zero = _grid(4, False, plain)
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data = weight
    awq = AwqTorchLinear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=K, out_features=N, bias=False
    )
    awq.pack(linear, scale.half(), zero.half())
    back = awq._dequantize_weight_for_inference(torch.empty(1, K), dtype=torch.float16).T
    stored = {name: getattr(awq, name).clone() for name in ("qweight", "qzeros", "scales")}
    cases["awq"] = (stored, back, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"})
    return cases


if __name__ == "__main__":
    for make in (bitsandbytes, compressed_tensors, gptqmodel):
        torch.manual_seed(SEED)
        save(f"{make.__name__}.safetensors", make())
