# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on the CPU: a one-layer model whose weight is a compressed 4-bit constant, asymmetric groups of 128.

Two ways: as the plugin defaults (with AMX or AVX512-BF16 it then computes in bf16), and with fp32 inference and dynamic
quantisation of activations in groups of 128, which is its int8 path.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peers.base import Copies, Peer, Product, Unavailable

GROUP = 128


def int4(settings: dict[str, str]) -> Callable[[Tensor], Copies]:
    """A compiled ``MatMul`` over a 4-bit constant, with these properties on top of the latency hint."""

    def prepare(weight: Tensor) -> Copies:
        try:
            import openvino
        except ImportError as error:
            raise Unavailable(f"openvino is not installed ({error})") from error
        n, k = weight.shape
        if k % GROUP:
            raise Unavailable(f"takes K in multiples of {GROUP}")
        codes, zero, scale = _quantize(weight)
        core = openvino.Core()
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            **settings,
        }

        def copy() -> Product:
            own = [
                values.copy() for values in (codes, zero, scale)
            ]  # the plugin may read a constant where it lies
            request = core.compile_model(_model(openvino, *own, n, k), "CPU", options).create_infer_request()

            def enter(x: Tensor) -> None:
                request.set_input_tensor(openvino.Tensor(np.ascontiguousarray(x.numpy())))

            def run(_: None) -> Any:
                request.infer()
                return request, own  # which must live as long as the request

            return Product(
                run,
                n * k // 2 + n * k // GROUP * 5 // 2,
                enter,
                lambda done: torch.from_numpy(done[0].get_output_tensor().data.copy()),
            )

        return copy

    return prepare


def _quantize(weight: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, k = weight.shape
    w = weight.float().view(n, k // GROUP, GROUP)
    low, high = w.amin(2, keepdim=True).clamp(max=0), w.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-6).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (w / scale.float() + zero).round().clamp(0, 15)
    return _nibbles(codes), _nibbles(zero), scale.numpy()


def _nibbles(values: Tensor) -> np.ndarray:
    flat = values.to(torch.uint8).flatten()
    return (flat[0::2] | flat[1::2] << 4).numpy()


def _model(ov: Any, codes: np.ndarray, zero: np.ndarray, scale: np.ndarray, n: int, k: int) -> Any:
    from openvino import opset13 as op

    groups = k // GROUP
    u4 = ov.Type.u4
    q = op.convert(op.constant(ov.Tensor(codes, [n, groups, GROUP], u4)), "f16")
    z = op.convert(op.constant(ov.Tensor(zero, [n, groups, 1], u4)), "f16")
    w = op.multiply(op.subtract(q, z), op.constant(scale))
    dense = op.convert(op.reshape(w, op.constant(np.array([n, k], dtype=np.int64)), False), "f32")
    x = op.parameter([-1, k], np.float32)
    return ov.Model([op.matmul(x, dense, False, True)], [x])


def _version() -> str:
    return f"openvino {importlib.metadata.version('openvino')}"


_INT8 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP)}
PEERS = (
    Peer(
        *("openvino_int4_g128", ("cpu",), int4({}), 0.2, torch.float32, _version),
        {"cpu": "the plugin's defaults"},
    ),
    Peer(
        *("openvino_int4_g128_a8", ("cpu",), int4(_INT8), 0.2, torch.float32, _version),
        {"cpu": "fp32 inference with dynamic quantisation, groups of 128"},
    ),
)
