# SPDX-License-Identifier: Apache-2.0
"""LLM.int8()'s product against fp64, for any number of outlier columns."""

from __future__ import annotations

import random

import pytest
import torch

from conftest import DEVICES, relative_error
from kvopt import ops
from kvopt.reference_outliers import outliers_unrounded
from kvopt.weights.formats import QuantizedWeight, WeightFormat
from ops.formats import DTYPES, fused, in_torch, int8_rows, make

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FORMAT = WeightFormat(8, None, 4, outlier_threshold=6.0)


def rows(m: int, k: int, count: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Activations (M, K) of which ``count`` columns are outliers; the int8 codes of the others nobody can doubt."""
    order = torch.randperm(k)
    outside, inside = order[:count], order[count:]
    x = torch.randn(m, k).clamp(-5, 5)
    if len(inside):
        x[:, inside] = int8_rows(m, len(inside), len(inside), "cpu", torch.float32) / 32
    sizes = torch.tensor([6.0, 6.5, 60.0])[torch.randint(0, 3, (count,))]
    x[torch.randint(0, m, (count,)), outside] = sizes * (1 - 2 * torch.randint(0, 2, (count,)))
    return x.to(device, dtype)


def counts(k: int) -> list[int]:
    """None, one, few, many, all."""
    return [0, 1, random.randrange(2, 9), random.randrange(9, k), k]


def product(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None, **options: object):
    threshold = options.pop("threshold", 6.0)
    return ops.qlinear_outliers(x, weight.packed, weight.meta, bias, weight.shape[0], threshold, **options)


def check(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
    """Each output within what rounding it once, and one of the two parts of its sum once, may cost."""
    y = product(x, weight, bias)
    assert y.dtype == x.dtype
    v, dense = x.double(), weight.dequantize().double()
    outside = (v.abs() >= 6).any(dim=0)
    inside = v.masked_fill(outside, 0)
    scale = inside.abs().amax(dim=1, keepdim=True).clamp(min=1e-300) / 127
    part = v[:, outside] @ dense[:, outside].T
    expected = (inside / scale).round() * scale @ dense.T + part + (0 if bias is None else bias.double())
    unit = 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
    size = v.abs() @ dense.abs().T + 1e-6 + (0 if bias is None else bias.double().abs())
    larger = torch.maximum(part.abs(), (expected - part).abs())
    subnormal = unit * torch.finfo(x.dtype).tiny  # half a step of the smallest numbers
    allowed = 1.01 * unit * (larger + expected.abs()) + 2e-6 * size + subnormal
    assert torch.isfinite(y).all()
    assert ((y.double() - expected).abs() <= allowed).all()


@each_device
@each_dtype
@pytest.mark.parametrize(("n", "k"), [(65, 704), (31, 77), (256, 128)])
def test_every_m_and_number_of_outliers(device, dtype, n, k):
    weight = make(n, k, FORMAT, device)
    bias = torch.randn(n, device=device, dtype=dtype)
    for m in (*range(1, 18), 33, 140):
        for count in counts(k):
            check(rows(m, k, count, device, dtype), weight, random.choice([bias, None]))


@each_device
@each_dtype
def test_odd_n_and_k_tail(device, dtype):
    for _ in range(40):
        n, k = random.randrange(1, 200), random.randrange(10, 600)
        x = rows(random.randrange(1, 40), k, random.choice(counts(k)), device, dtype)
        check(x, make(n, k, FORMAT, device), None)


@each_device
@each_dtype
@pytest.mark.parametrize(("n", "k"), [(520, 4096), (1536, 2056)])
def test_sizes_of_a_model(device, dtype, n, k):
    """Large enough for several threads or blocks to find and to multiply."""
    weight = make(n, k, FORMAT, device)
    for m in (1, 8, 33, 160, 513) if device == "cuda" else (1, 40):
        for count in (0, 5, 200):
            check(rows(m, k, count, device, dtype), weight, None)


@each_device
@each_dtype
@pytest.mark.parametrize("m", [1, 12, 150])
@pytest.mark.parametrize("swiglu", [False, True])
def test_everything_else_in_the_same_call(device, dtype, m, swiglu):
    n, k = 96, 160
    weight = make(n, k, FORMAT, device)
    bias = torch.randn(n, device=device, dtype=dtype)
    powers = 2.0 ** torch.randint(-1, 2, (k,))
    x = (rows(m, k, 7, "cpu", torch.float32) / powers).to(device, dtype)
    options = {
        "input_scale": powers.to(device, dtype),
        "low_rank_x": torch.randn(m, 5, device=device, dtype=dtype),
        "low_rank_w": torch.randn(n, 5, device=device, dtype=dtype),
        "swiglu": swiglu,
        "residual": torch.randn(m, n // 2 if swiglu else n, device=device, dtype=dtype),
    }
    expected = outliers_unrounded(x, weight.dequantize().double(), bias, 6.0, **options)
    bound = 1e-5 if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps
    assert relative_error(product(x, weight, bias, **options), expected) < bound
    without = options | {"input_scale": None}
    scaled = (x.float() * powers.to(device)).to(dtype)
    assert relative_error(product(scaled, weight, bias, **without), expected) < bound


@each_device
@each_dtype
def test_without_outliers_it_is_int8_dyn(device, dtype):
    weight = make(130, 320, FORMAT, device)
    for m in (1, 2, 7, 40, 200):
        x = torch.randn(m, 320, device=device, dtype=dtype).clamp(-5.5, 5.5)
        assert torch.equal(product(x, weight), fused(x, weight, None))


@each_device
def test_outliers_are_what_int8_dyn_loses(device):
    weight = make(96, 512, FORMAT, device)
    x = torch.randn(24, 512, device=device)
    x[:, [3, 77, 500]] *= 100
    inside = x.clone()
    inside[:, [3, 77, 500]] = 0
    exact = x.double() @ weight.dequantize().double().T
    of_inside = inside.double() @ weight.dequantize().double().T
    scale = (of_inside.norm() / exact.norm()).item()
    assert relative_error(product(x, weight), exact) < 0.02 * scale
    assert relative_error(fused(x, weight, None), exact) > 0.2 * scale


@each_device
@each_dtype
def test_all_columns_outside_is_the_unrounded_product(device, dtype):
    weight = make(64, 200, FORMAT, device)
    x = torch.randn(20, 200, device=device, dtype=dtype)
    x[0] = x[0].abs() + 0.2
    exact = x.double() @ weight.dequantize().double().T
    bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(product(x, weight, threshold=0.1), exact) < bound


@each_device
@each_dtype
@pytest.mark.parametrize("m", [1, 9])
def test_the_threshold_itself_is_outside(device, dtype, m):
    """One column that alone makes a token's scale: what it leaves behind tells where it went."""
    k = 64
    weight = make(32, k, FORMAT, device)
    x = torch.zeros(m, k, device=device, dtype=dtype)
    x[:, 1] = 0.01
    for value, outside in ((6.0, True), (-6.0, True), (5.96875, False)):
        x[0, 5] = value
        y = product(x, weight)[0].double()
        exact = x[0].double() @ weight.dequantize().double().T
        kept = (y - value * weight.dequantize()[:, 5].double()).norm() > 0.3 * (
            0.01 * weight.dequantize()[:, 1].double()
        ).norm()
        if dtype == torch.float32:
            assert kept == outside  # 0.01 is a fifth of a step of 5.97 / 127
        assert relative_error(y, exact) < 0.02


@each_device
@each_dtype
@pytest.mark.parametrize("m", [1, 3, 20])
def test_nan_and_infinity_stay_in_their_row(device, dtype, m):
    k = 160
    weight = make(40, k, FORMAT, device)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(m, k, device=device, dtype=dtype)
        row = random.randrange(m)
        x[row, random.randrange(k)] = value
        y = product(x, weight)
        assert y[row].isnan().all()
        assert torch.isfinite(torch.cat([y[:row], y[row + 1 :]])).all()


@each_device
@each_dtype
def test_empty_batch_and_many_dimensions(device, dtype):
    weight = make(48, 128, FORMAT, device)
    assert product(torch.zeros(2, 0, 128, device=device, dtype=dtype), weight).shape == (2, 0, 48)
    x = torch.randn(3, 128, 5, device=device, dtype=dtype).mul(3).transpose(1, 2)
    y = product(x, weight)
    assert y.shape == (3, 5, 48)
    assert torch.equal(y, product(x.reshape(15, 128), weight).view(3, 5, 48))
    assert product(x[0, 0], weight).shape == (48,)


@each_device
def test_run_to_run_changes_nothing(device):
    weight = make(130, 320, FORMAT, device)
    for m in (1, 20, 150):
        x = torch.randn(m, 320, device=device) * 4
        first = product(x, weight)
        assert all(torch.equal(product(x, weight), first) for _ in range(5))


@each_device
@each_dtype
def test_opcheck_with_gradients(device, dtype):
    weight = make(32, 128, FORMAT, device)
    x = torch.randn(3, 128, device=device, dtype=dtype).mul(3).requires_grad_()
    bias = torch.randn(32, device=device, dtype=dtype, requires_grad=True)
    options = {
        "input_scale": torch.rand(128, device=device, dtype=dtype).add(0.5).requires_grad_(),
        "low_rank_x": torch.randn(3, 4, device=device, dtype=dtype, requires_grad=True),
        "low_rank_w": torch.randn(32, 4, device=device, dtype=dtype, requires_grad=True),
        "swiglu": random.choice([False, True]),
    }
    options["residual"] = torch.randn(3, 16 if options["swiglu"] else 32, device=device, dtype=dtype)
    arguments = (x, weight.packed, weight.meta, bias, 32, 6.0)
    torch.library.opcheck(torch.ops.kvopt.qlinear_outliers, arguments, options)


@each_device
@pytest.mark.parametrize("swiglu", [False, True])
def test_gradients_are_those_of_plain_torch(device, swiglu):
    weight = make(48, 96, FORMAT, device)
    x = torch.randn(2, 5, 96, device=device)
    x[..., [4, 90]] *= 20
    bias = torch.randn(48, device=device)
    options = {
        "input_scale": torch.rand(96, device=device) + 0.5,
        "low_rank_x": torch.randn(2, 5, 4, device=device),
        "low_rank_w": torch.randn(48, 4, device=device),
        "residual": torch.randn(2, 5, 24 if swiglu else 48, device=device),
    }
    tensors = {"x": x, "bias": bias, **options}
    for t in tensors.values():
        t.requires_grad_()
    upstream = torch.randn(2, 5, 24 if swiglu else 48, device=device)
    product(x, weight, bias, swiglu=swiglu, **options).backward(upstream)
    got = {name: t.grad for name, t in tensors.items()}
    for t in tensors.values():
        t.grad = None
    in_torch(x, weight, bias, swiglu=swiglu, **options).backward(upstream)
    for name, t in tensors.items():
        assert relative_error(got[name], t.grad) < (3e-2 if swiglu else 5e-4), name


@each_device
def test_compiles_without_graph_breaks(device):
    torch._dynamo.reset()
    weight = make(64, 128, FORMAT, device)

    def f(x: torch.Tensor) -> torch.Tensor:
        return product(x * 2, weight, residual=x[:, :64]) + 1

    x = torch.randn(3, 128, device=device) * 3
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@each_device
def test_errors_name_the_argument(device):
    weight = make(32, 96, FORMAT, device)
    x = torch.randn(2, 96, device=device)
    first = [x, weight.packed, weight.meta, None, 32, 6.0]

    def refused(message: str, changes: dict[int, object], **options: object) -> None:
        arguments = [changes.get(i, value) for i, value in enumerate(first)]
        with pytest.raises(RuntimeError, match=f"qlinear_outliers: {message}"):
            torch.ops.kvopt.qlinear_outliers(*arguments, **options)

    for threshold in (0.0, -1.0, float("inf"), float("nan")):
        refused("threshold must be a positive number", {5: threshold})
    refused("packed must have shape", {0: x[:, :32].contiguous()})
    refused("x must be float32, float16 or bfloat16", {0: x.double()})
    refused("x must have at least one dimension", {0: x[0, 0]})
    refused("bias must have the dtype", {3: torch.ones(32, device=device).half()})
    refused(r"input_scale must have shape \(96\), got \(95\)", {}, input_scale=x[0, :95].contiguous())


@needs_gpu
def test_cpu_equals_gpu():
    on_cpu = make(96, 704, FORMAT, "cpu")
    on_gpu = on_cpu.to("cuda")
    for m in (1, 6, 200):
        x = rows(m, 704, 30, "cpu", torch.float32)
        assert relative_error(product(x.cuda(), on_gpu), product(x, on_cpu)) < 1e-5


@needs_gpu
@pytest.mark.parametrize("m", [1, 8, 100, 600])
def test_a_captured_graph_takes_any_number_of_outliers(m):
    """Recorded without outliers, replayed with: the host cannot have known."""
    weight = make(256, 512, FORMAT, "cuda")
    x = torch.randn(m, 512, device="cuda", dtype=torch.float16).clamp(-5, 5)
    product(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x, weight)
    for count in (0, 1, 100, 512, 3):
        x.copy_(rows(m, 512, count, "cuda", torch.float16))
        graph.replay()
        assert torch.equal(y, product(x, weight))


@needs_gpu
def test_the_host_never_waits():
    weight = make(256, 512, FORMAT, "cuda")
    x = rows(40, 512, 5, "cuda", torch.float16)
    product(x, weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        product(x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_equals_bitsandbytes():
    """The same scales and outliers as ``Linear8bitLt`` with a threshold."""
    bnb = pytest.importorskip("bitsandbytes")
    n, k, m = 64, 128, 9
    dense = torch.randint(-127, 128, (n, k)) * 2.0**-9
    dense[torch.arange(n), torch.randint(0, k, (n,))] = 127 * 2.0**-9  # SCB / 127 is exact in fp16
    theirs = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict({"weight": dense})
    theirs = theirs.to("cpu")
    weight = make(n, k, FORMAT, "cpu")
    codes = (dense * 2**9 + 128).to(torch.uint8)
    weight = QuantizedWeight.from_codes(
        codes, torch.full((n, 1), 2.0**-9).half(), torch.full((n, 1), 128.0).half(), FORMAT
    )
    x = int8_rows(m, k, k, "cpu", torch.float32) / 32
    outside = torch.randperm(k)[:5]
    x[:, outside] = 0.03125  # never a token's largest, which bitsandbytes takes of these columns too
    others = [c for c in range(k) if c not in outside.tolist()]
    x[:, others[0]] = 127 / 64  # a power of two to each scale
    x[torch.randint(0, m, (5,)), outside] = torch.tensor([6.0, -6.5, 20.0, 60.0, -30.0])
    # On the CPU theirs leaves activations unrounded, so it is handed the rounded ones: steps of 1/64, but for outliers.
    rounded = (x * 64).round() / 64
    rounded[:, outside] = x[:, outside]
    got, expected = product(x.half(), weight).double(), theirs(rounded.half()).double()
    # Ours is rounded to fp16 once; theirs behind each of the two products and their sum.
    outer = rounded[:, outside].double() @ dense[:, outside].double().T
    whole = rounded.double() @ dense.double().T
    sizes = (whole - outer).abs() + outer.abs() + 2 * whole.abs()
    assert ((got - expected).abs() <= sizes * 2.0**-11 * 1.01 + 2.0**-24).all()
    assert relative_error(fused(x.half(), weight, None), expected) > 5e-3
