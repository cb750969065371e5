# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled operators, gives them fake implementations and gradients, and says once what is missing."""

from __future__ import annotations

import functools
import importlib
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvopt import reference
from kvopt._version import __version__

_ops_module: Any = None
_ops_error: str | None = None
_host_module: Any = None
_host_error: str | None = None

try:
    _ops_module = importlib.import_module("kvopt._ops")  # registers torch.ops.kvopt.*
except ImportError as error:
    _ops_error = f"kvopt's compiled operators could not be loaded: {error}"

try:
    _host_module = importlib.import_module("kvopt._host")
except ImportError as error:
    _host_error = f"kvopt's host module could not be loaded: {error}"


class FallbackWarning(UserWarning):
    """A slow reference implementation runs because no compiled kernel exists here."""


def missing_kernel_reason(device_type: str) -> str | None:
    """Why there is no compiled kernel for this device, or ``None`` where there is one."""
    if _ops_module is None:
        return _ops_error
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        return None if _ops_module.cuda_archs else f"kvopt has no CUDA kernels: {_ops_module.cuda_reason}"
    return f"kvopt has no kernels for device {device_type!r}"


def require_ops() -> Any:
    """The compiled module.

    Raises:
        RuntimeError: it could not be loaded.
    """
    if _ops_module is None:
        raise RuntimeError(_ops_error)
    return _ops_module


def announce_fallback(device_type: str) -> None:
    """Says once per device that the reference implementation runs instead of a kernel.

    Raises:
        RuntimeError: ``KVOPT_FALLBACK=error``.
    """
    reason = missing_kernel_reason(device_type)
    if os.environ.get("KVOPT_FALLBACK", "warn") == "error":
        raise RuntimeError(f"{reason}; KVOPT_FALLBACK=error forbids the reference implementation")
    if device_type not in _announced:
        _announced.add(device_type)
        warnings.warn(
            f"{reason}; the slow reference implementation is used instead", FallbackWarning, stacklevel=3
        )


# Device types with compiled kernels: a plain set, so that a compiled graph can read it as a constant.
compiled = frozenset(device for device in ("cpu", "cuda") if missing_kernel_reason(device) is None)
_announced: set[str] = set()


def release_free_memory() -> None:
    """Hands memory that was freed back to the operating system, where the C allocator kept it (the CPU's only)."""
    if _host_module is not None:
        _host_module.release_free_memory()


def build_info() -> dict[str, Any]:
    """Versions, what was compiled and for which hardware, and what is missing here and why.

    Keys: ``kvopt``, ``python``, ``torch``, ``torch_cuda``, ``ops`` (bool), ``cuda_archs`` (list), ``isa_compiled``,
    ``isa_best``, ``isa_selected``, ``compiler`` and ``missing`` (list of sentences).
    """
    info: dict[str, Any] = {
        "kvopt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "ops": _ops_module is not None,
        "cuda_archs": _ops_module.cuda_archs.split() if _ops_module is not None else [],
        "isa_compiled": [],
        "isa_best": None,
        "isa_selected": None,
        "compiler": None,
    }
    missing = [error for error in (_ops_error, _host_error) if error]
    if _host_module is not None:
        try:
            info.update(_host_module.build_info())
        except RuntimeError as error:
            missing.append(str(error))
    if _ops_module is not None and not _ops_module.cuda_archs:
        missing.append(f"no CUDA kernels: {_ops_module.cuda_reason}")
    if not torch.cuda.is_available():
        missing.append("torch sees no GPU")
    info["missing"] = missing
    return info


def _register() -> None:
    fake: Callable[[str], Callable[[Any], Any]] = torch.library.register_fake

    @fake("kvopt::qlinear")
    def _(
        x: Tensor,
        packed: Tensor,
        meta: Tensor,
        bias: Tensor | None,
        n: int,
        bits: int,
        group_size: int,
        scheme: int,
        activation_bits: int = 16,
        input_scale: Tensor | None = None,
        low_rank_x: Tensor | None = None,
        low_rank_w: Tensor | None = None,
        swiglu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], n // 2 if swiglu else n))

    @fake("kvopt::qlinear_outliers")
    def _(
        x: Tensor,
        packed: Tensor,
        meta: Tensor,
        bias: Tensor | None,
        n: int,
        threshold: float,
        input_scale: Tensor | None = None,
        low_rank_x: Tensor | None = None,
        low_rank_w: Tensor | None = None,
        swiglu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], n // 2 if swiglu else n))

    @fake("kvopt::wquant_rtn")
    def _(weight: Tensor, bits: int, group_size: int, scheme: int) -> tuple[Tensor, Tensor, Tensor]:
        return _plain_like(weight, group_size)

    @fake("kvopt::wquant_pack")
    def _(
        codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, scheme: int
    ) -> tuple[Tensor, Tensor]:
        n, k = codes.shape
        layout = reference.layout_of(codes.device)
        size = reference.packed_bytes(n, k, bits, scheme, layout)
        count = reference.meta_count(n, reference.group_count(k, group_size), scheme, layout)
        return codes.new_empty(size), codes.new_empty(count, dtype=torch.int16)

    @fake("kvopt::wquant_unpack")
    def _(
        packed: Tensor, meta: Tensor, n: int, k: int, bits: int, group_size: int, scheme: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        half = functools.partial(
            packed.new_empty, (n, reference.group_count(k, group_size)), dtype=torch.float16
        )
        return packed.new_empty((n, k)), half(), half()

    @fake("kvopt::wquant_dequantize")
    def _(
        packed: Tensor,
        meta: Tensor,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        scheme: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return packed.new_empty((n, k), dtype=dtype)

    @fake("kvopt::wquant_expand_scales")
    def _(
        absmax_codes: Tensor,
        absmax_scale: Tensor,
        offset: Tensor,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        scheme: int,
    ) -> Tensor:
        layout = reference.layout_of(absmax_codes.device)
        count = reference.meta_count(n, reference.group_count(k, group_size), scheme, layout)
        return absmax_codes.new_empty(count, dtype=torch.int16)

    @fake("kvopt::wsearch")
    def _(
        weight: Tensor,
        importance: Tensor | None,
        bits: int,
        group_size: int,
        scheme: int,
        steps: int,
        smallest: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _plain_like(weight, group_size)

    @fake("kvopt::wsearch_hqq")
    def _(
        weight: Tensor,
        bits: int,
        group_size: int,
        scheme: int,
        iterations: int,
        beta: float,
        kappa: float,
        norm: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _plain_like(weight, group_size)

    @fake("kvopt::gptq_block")
    def _(
        weight: Tensor,
        factor: Tensor,
        importance: Tensor | None,
        scale: Tensor | None,
        zero: Tensor | None,
        begin: int,
        end: int,
        bits: int,
        group_size: int,
        scheme: int,
        steps: int,
        smallest: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, size = weight.shape[0], end - begin
        groups = 0 if scale is not None else reference.group_count(size, group_size)
        half = functools.partial(weight.new_empty, (n, groups), dtype=torch.float16)
        return weight.new_empty((n, size), dtype=torch.uint8), weight.new_empty((n, size)), half(), half()

    torch.library.register_autograd("kvopt::qlinear", _qlinear_backward, setup_context=_qlinear_remember)
    torch.library.register_autograd(
        "kvopt::qlinear_outliers", _outliers_backward, setup_context=_outliers_remember
    )


def _register_kv() -> None:
    fake: Callable[[str], Callable[[Any], Any]] = torch.library.register_fake

    @fake("kvopt::kv_select_scores")
    def _(
        query: Tensor,
        key: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        scale: float,
        maximum: bool,
    ) -> Tensor:
        return key.new_empty(key.shape[:3], dtype=torch.float32)

    @fake("kvopt::kv_quant_pack")
    def _(*store_and_tokens: Any) -> None:
        return None

    @fake("kvopt::kv_evict_append")
    def _(*store_and_token: Any) -> None:
        return None

    @fake("kvopt::kv_quant_unpack")
    def _(
        segments: Tensor,
        lengths: Tensor,
        positions: Tensor,
        scores: Tensor,
        plain_keys: Tensor,
        plain_values: Tensor,
        packed_keys: Tensor,
        packed_values: Tensor,
        key_scale: Tensor,
        value_scale: Tensor,
        factors: Tensor,
        codec: int,
        group: int,
        slots: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = (segments.shape[0], segments.shape[1], slots)
        dim = plain_keys.shape[2]
        vectors = functools.partial(plain_keys.new_empty, (*shape, dim))
        return vectors(), vectors(), positions.new_empty(shape)

    @fake("kvopt::kv_attention_decode")
    def _(query: Tensor, *store_and_options: Any) -> Tensor:
        return query.new_empty(query.shape)

    @fake("kvopt::kv_merge_pair")
    def _(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        number = functools.partial(a.new_empty, a.shape[:3], dtype=torch.float32)
        return a.new_empty(a.shape), number(), number(), number()

    @fake("kvopt::kv_merge_evict")
    def _(*stores_and_rule: Any) -> None:
        return None


def _plain_like(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty codes, scale and zero for a weight (N, K)."""
    n, k = weight.shape
    half = functools.partial(weight.new_empty, (n, reference.group_count(k, group_size)), dtype=torch.float16)
    return weight.new_empty((n, k), dtype=torch.uint8), half(), half()


def _qlinear_remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, meta, bias, *ctx.format, input_scale, low_rank_x, low_rank_w, ctx.swiglu, residual = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, packed, meta, bias, input_scale, low_rank_x, low_rank_w)


def _qlinear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of everything but the packed weight.

    ``h = (x * input_scale) @ w^T + bias + low_rank_x @ low_rank_w^T``, then SwiGLU and residual. Rounding activations
    to int8 counts as the identity ("straight through"). SwiGLU computes ``h`` a second time instead of keeping it.
    """
    x, packed, meta, bias, input_scale, low_rank_x, low_rank_w = ctx.saved_tensors
    n, bits, group_size, scheme, activation_bits = ctx.format

    def product() -> Tensor:
        h: Tensor = torch.ops.kvopt.qlinear(
            *(x, packed, meta, bias, n, bits, group_size, scheme, activation_bits),
            *(input_scale, low_rank_x, low_rank_w),
        )
        return h

    return _gradients(ctx, grad, product, (n, x.shape[-1], bits, group_size, scheme), (9, 10, 11, 13))


def _outliers_remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, meta, bias, ctx.n, ctx.threshold, *scaled, ctx.swiglu, residual = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, packed, meta, bias, *scaled)


def _outliers_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same of a product with outlier columns, which the gradients do not tell from the others."""
    x, packed, meta, bias, input_scale, low_rank_x, low_rank_w = ctx.saved_tensors

    def product() -> Tensor:
        h: Tensor = torch.ops.kvopt.qlinear_outliers(
            *(x, packed, meta, bias, ctx.n, ctx.threshold, input_scale, low_rank_x, low_rank_w)
        )
        return h

    k = x.shape[-1]
    format = (ctx.n, k, 8, k, int(reference.Scheme.INT8_DYNAMIC))
    return _gradients(ctx, grad, product, format, (6, 7, 8, 10))


def _gradients(
    ctx: Any,
    grad: Tensor,
    product: Callable[[], Tensor],
    format: tuple[int, int, int, int, int],
    places: tuple[int, int, int, int],
) -> tuple[Tensor | None, ...]:
    """What both backward functions share.

    Args:
        ctx: with what was remembered.
        grad: of the result.
        product: gives ``h``, that before SwiGLU.
        format: N, K, bits, group size, scheme.
        places: of input_scale, low_rank_x, low_rank_w and residual among the arguments; x is first, bias fourth.
    """
    x, packed, meta, _, input_scale, low_rank_x, low_rank_w = ctx.saved_tensors
    at_scale, at_low_rank_x, at_low_rank_w, at_residual = places
    n, k = format[:2]
    needs = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * len(needs)
    if ctx.has_residual and needs[at_residual]:
        grads[at_residual] = grad
    if ctx.swiglu:
        gate, up = (part.float() for part in reference.split_swiglu(product()))
        slope = gate.sigmoid()
        to_up = grad * gate * slope
        to_gate = grad * up * slope * (1 + gate * (1 - slope))
        grad = reference.join_swiglu(to_gate, to_up).to(grad.dtype)
    rows = grad.reshape(-1, n)
    if needs[0] or (input_scale is not None and needs[at_scale]):
        weight = torch.ops.kvopt.wquant_dequantize(packed, meta, *format, x.dtype)
        grad_scaled = grad @ weight
        if input_scale is None:
            grads[0] = grad_scaled
        else:
            grads[0] = grad_scaled * input_scale
            if needs[at_scale]:
                grads[at_scale] = (grad_scaled.float() * x.float()).reshape(-1, k).sum(dim=0).to(x.dtype)
    if ctx.has_bias and needs[3]:
        grads[3] = rows.sum(dim=0)
    if low_rank_x is not None:
        if needs[at_low_rank_x]:
            grads[at_low_rank_x] = grad @ low_rank_w
        if needs[at_low_rank_w]:
            grads[at_low_rank_w] = rows.T @ low_rank_x.reshape(-1, low_rank_x.shape[-1])
    return tuple(grads)


if _ops_module is not None:
    _register()
    _register_kv()
