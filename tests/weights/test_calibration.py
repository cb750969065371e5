# SPDX-License-Identifier: Apache-2.0
"""Calibration data, falling back, the report, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvopt
from conftest import relative_error
from families import Routed, build
from kvopt.weights.calibration import MAX_WINDOW, prepare
from kvopt.weights.formats import quantize_to
from kvopt.weights.report import LayerReport
from kvopt.weights.solvers import SOLVERS, Solution


class Words:
    """A tokenizer: one token per word, and a beginning of sequence."""

    bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [3 + len(word) for word in text.split()]}


def tokens(windows: int = 11, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (windows, length))


# --- windows ---


def test_a_token_matrix_is_taken_as_it_is_and_a_tenth_held_out():
    model, windows = build("llama"), tokens(30)
    made = prepare(windows, None, model, seed=3)
    assert made.windows.shape == (27, 24) and made.held_out.shape == (3, 24)
    rows = {tuple(row) for row in windows.tolist()}
    assert {tuple(row) for row in [*made.windows.tolist(), *made.held_out.tolist()]} == rows
    again, other = prepare(windows, None, model, seed=3), prepare(windows, None, model, seed=4)
    assert again.fingerprint == made.fingerprint != other.fingerprint
    assert len(prepare(tokens(2), None, model, seed=0).held_out) == 1


def test_texts_are_joined_and_begin_with_bos():
    model = build("llama")
    texts = [" ".join(["abc"] * 40), " ".join(["abcdefg"] * 60)]
    made = prepare(texts, Words(), model, seed=0)
    stream = [0, *[6] * 40, 0, *[10] * 60]
    size = len(stream) // 10
    assert made.windows.shape[1] == size  # ten windows at least: one is a tenth
    expected = sorted(stream[i * size : (i + 1) * size] for i in range(len(stream) // size))
    assert sorted([*made.windows.tolist(), *made.held_out.tolist()]) == expected
    rows = prepare(({"text": text} for text in texts), Words(), model, seed=0)
    assert rows.fingerprint == made.fingerprint


def test_windows_fit_the_models_positions():
    model = build("llama")  # 64 positions
    made = prepare(torch.randint(3, 96, (64 * 20 + 5,)), None, model, seed=0)
    assert made.windows.shape[1] == made.held_out.shape[1] == 64
    assert len(made.windows) + len(made.held_out) == 20
    assert prepare(torch.randint(3, 90, (50_000,)), None, Routed(), seed=0).windows.shape[1] == MAX_WINDOW


def test_every_shape_of_tokens_means_the_same():
    model = build("llama")
    ids = torch.randint(3, 96, (200,))
    kinds: list[Any] = [
        ids,
        ids.tolist(),
        [ids[:77], [], ids[77:]],
        iter([ids.tolist()]),
        [{"input_ids": ids[None]}],
    ]
    kinds.append(ids.to(torch.int32))
    assert len({prepare(kind, None, model, seed=0).fingerprint for kind in kinds}) == 1


def test_one_window_is_halved():
    made = prepare(tokens(1, 24), None, build("llama"), seed=0)
    assert made.windows.shape == made.held_out.shape == (1, 12)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ("some words", ValueError, "tokenizer"),
        ([], ValueError, "no tokens"),
        (torch.zeros(0, 8, dtype=torch.int64), ValueError, "no tokens"),
        (torch.randn(4, 8), TypeError, "integer token ids"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), ValueError, "shape"),
        (torch.full((4, 8), 96), ValueError, r"96…96.*0…95"),
        (torch.full((4, 8), -1), ValueError, r"-1…-1"),
        (torch.full((4, 65), 5), ValueError, "64 positions"),
        (torch.full((1, 3), 5), ValueError, "too few"),
        (17, TypeError, "int"),
        ([object()], TypeError, "object"),
        ([{"words": "x"}], TypeError, "dict"),
    ],
)
def test_bad_calibration_is_refused_before_anything_changes(calibration, error, message):
    model = build("llama")
    with pytest.raises(error, match=message):
        kvopt.quantize(model, "gptq_4bit_g16", calibration=calibration, progress=False)
    assert not any(isinstance(module, kvopt.QuantLinear) for module in model.modules())


def test_methods_that_need_data_say_so():
    model = build("llama")
    for recipe in ("gptq_4bit_g16", "awq_4bit_g16", {"*.q_proj": "clip_4bit_g16", "*": "int8"}):
        with pytest.raises(ValueError, match="needs calibration"):
            kvopt.quantize(model, recipe, progress=False)
    assert not any(isinstance(module, kvopt.QuantLinear) for module in model.modules())
    report = kvopt.quantize(model, "hqq_4bit_g16", progress=False)
    assert all(row.method == "hqq" and row.output_error is None for row in report.layers)


# --- errors and falling back ---


@pytest.mark.parametrize(
    "recipe", ["int4_g16", "nf4_b32", "gptq_3bit_g16", "clip_3bit_g16", "hqq_3bit_g16", "awq_3bit_g16"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_errors_are_those_of_the_outputs(name, recipe):
    """Against the products themselves, on the last layer's last linear, whose inputs can be had from the model."""
    model: Any = build(name)
    last = "model.layers.1.mlp.down_proj" if name == "llama" else "transformer.h.1.mlp.c_proj"
    plain = model.get_submodule(last).weight.detach()
    weight = (plain if name == "llama" else plain.T).double()
    windows = tokens()
    report = kvopt.quantize(model, recipe, calibration=windows, progress=False)
    row = next(row for row in report.layers if row.name == last)
    captured = []
    model.get_submodule(last).register_forward_pre_hook(
        lambda module, args: captured.append(args[0].double())
    )
    made = prepare(windows, None, model, seed=0)
    quantised = model.get_submodule(last).quantized_weight.dequantize().double()
    for part, reported in [(made.windows, row.output_error), (made.held_out, row.held_out_error)]:
        captured.clear()
        with torch.no_grad():
            model(part)
        x = captured[0].reshape(-1, weight.shape[1])
        if (recipe.startswith("awq") and row.method == "awq") and name == "llama":
            # up → down: the factor is in the rows of up, so ŵ meets inputs that were divided by it
            assert model.get_submodule(last).quantized_weight.input_scale is None
            continue
        error = relative_error(x @ quantised.T, x @ weight.T)
        assert reported == pytest.approx(error, rel=2e-2)
    assert report.calibration_tokens == made.windows.numel()
    assert report.held_out_tokens == made.held_out.numel()


def test_a_method_that_does_worse_than_rounding_is_not_used(monkeypatch):
    def poor(w: torch.Tensor, format: Any, statistics: Any, *, seed: int = 0) -> Solution:
        codes, scale, zero = quantize_to(w, format).codes()
        if w.shape[0] == 80:  # gate and up
            codes = torch.randint_like(codes, 0, 2**format.bits)
        return Solution(codes, scale, zero, damping=0.25)

    monkeypatch.setitem(SOLVERS, "gptq", poor)
    model = build("llama")
    rounded = build("llama")
    rounded.load_state_dict(model.state_dict())
    report = kvopt.quantize(model, "gptq_4bit_g16", calibration=tokens(), progress=False)
    for row in report.layers:
        assert row.held_out_error is not None and row.rtn_held_out_error is not None
        assert row.held_out_error <= row.rtn_held_out_error
        if "gate" in row.name or "up_proj" in row.name:
            assert row.method == "rtn" and "rounded to nearest: gptq had a held-out error of" in row.note
        else:
            assert row.method == "gptq" and row.damping == 0.25 and not row.note
    kvopt.quantize(rounded, "int4_g16", progress=False)  # all codes are those of rounding
    for (name, a), (_, b) in zip(model.named_buffers(), rounded.named_buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("recipe", ["gptq_3bit_g16", "awq_3bit_g16", "clip_3bit_g16", "hqq_3bit_g16"])
def test_never_worse_than_rounding_on_held_out_tokens(recipe):
    report = kvopt.quantize(build("llama"), recipe, calibration=tokens(40), progress=False)
    for row in report.layers:
        assert row.held_out_error is not None and row.rtn_held_out_error is not None
        assert row.held_out_error <= row.rtn_held_out_error
    assert any(row.method == recipe[: recipe.index("_")] for row in report.layers)


def test_inputs_that_are_not_finite_are_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj.*NaN or infinity"):
        kvopt.quantize(model, "int4_g16", calibration=tokens(), progress=False)


# --- the report ---


def test_report_as_frame_json_and_figure(tmp_path):
    report = kvopt.quantize(build("llama"), "gptq_4bit_g16", calibration=tokens(), progress=False, seed=5)
    frame = report.to_frame()
    assert {"method", "held_out_error", "rtn_held_out_error", "damping"} <= set(frame.columns)
    data = json.loads(report.to_json(tmp_path / "report.json"))
    assert data == json.loads((tmp_path / "report.json").read_text()) and data["seed"] == 5
    assert [LayerReport(**row) for row in data["layers"]] == report.layers
    assert "held-out" in str(report)
    for ending, magic in [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]:
        path = report.plot(tmp_path / f"errors.{ending}")
        assert path.read_bytes().startswith(magic)
    plain = kvopt.quantize(build("gpt2"), "int4_g16+head_int8", progress=False)
    assert plain.plot(tmp_path / "plain.png").stat().st_size > 1000
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="nothing was quantised"):
        kvopt.quantize(build("gpt2"), "bf16", progress=False).plot(tmp_path / "x.png")


def test_progress_shows_the_running_error(capsys):
    kvopt.quantize(build("llama"), "gptq_4bit_g16", calibration=tokens(), progress=True)
    shown = capsys.readouterr().err
    assert "quantising gptq_4bit_g16" in shown and "output error" in shown and "14/14" in shown


# --- going on after a kill ---


class Killed(Exception):
    pass


def run(
    model: Any, recipe: Any, windows: torch.Tensor | None, folder: Path | None, stop: str = "never"
) -> Any:
    def done(row: LayerReport) -> None:
        rows.append(row.name)
        if row.name.startswith(stop):
            raise Killed

    rows: list[str] = []
    report = kvopt.quantize(model, recipe, calibration=windows, progress=done, seed=7, resume=folder)
    assert sorted(rows) == sorted(row.name for row in report.layers)
    return report


def same(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "recipe",
    [
        "gptq_3bit_g16",
        "awq_4bit_g16",
        "nf4_b32_dq",
        {"*.down_proj": "clip_4bit_g16", "lm_head": "int8", "*": "awq_3bit_g16"},
    ],
)
def test_going_on_after_a_kill_gives_the_same_model_bit_for_bit(recipe, tmp_path):
    windows = tokens()
    models: list[Any] = [build("llama-mha-bias")]
    models += [build("llama-mha-bias") for _ in range(2)]
    for other in models[1:]:
        other.load_state_dict(models[0].state_dict())
    whole, killed, resumed = models
    expected = run(whole, recipe, windows, None)
    with pytest.raises(Killed):
        run(killed, recipe, windows, tmp_path, stop="model.layers.1.self_attn.o_proj")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layer-00000.safetensors"]
    (tmp_path / ".layer-00001.safetensors.x.tmp").write_bytes(b"half")  # as a kill leaves it
    report = run(resumed, recipe, windows, tmp_path)
    assert same(whole, resumed)
    assert [(r.name, r.method, r.held_out_error) for r in report.layers] == [
        (r.name, r.method, r.held_out_error) for r in expected.layers
    ]
    assert report.layers[0].seconds != expected.layers[0].seconds  # the first run's own
    again = build("llama-mha-bias")
    with pytest.raises(ValueError, match="another model"):
        run(again, recipe, windows, tmp_path)


KILLED = """
import os, signal, sys, torch
from families import build
import kvopt

torch.set_num_threads(int(sys.argv[3]))
torch.manual_seed(int(sys.argv[2]))
model, windows, rows = build("llama"), torch.randint(3, 96, (11, 24)), []


def done(row):
    rows.append(row)
    if len(rows) == 11:
        os.kill(os.getpid(), signal.SIGKILL)


kvopt.quantize(model, "gptq_3bit_g16", calibration=windows, progress=done, seed=7, resume=sys.argv[1])
"""


def test_a_killed_process_is_taken_up(tmp_path):
    seed = torch.initial_seed() % 2**31
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(seed), str(torch.get_num_threads())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [file.name for file in tmp_path.glob("layer-*")] == ["layer-00000.safetensors"]
    models = []
    for folder in (tmp_path, None):
        torch.manual_seed(seed)
        models.append(build("llama"))
        run(models[-1], "gptq_3bit_g16", torch.randint(3, 96, (11, 24)), folder)
    assert same(*models)


def test_going_on_without_data(tmp_path):
    model, other = build("gpt2"), build("gpt2")
    other.load_state_dict(model.state_dict())
    with pytest.raises(Killed):
        run(model, "hqq_4bit_g16", None, tmp_path, stop="transformer.h.1.mlp")
    fresh, plain = build("gpt2"), build("gpt2")
    fresh.load_state_dict(other.state_dict())
    plain.load_state_dict(other.state_dict())
    run(fresh, "hqq_4bit_g16", None, tmp_path)
    run(plain, "hqq_4bit_g16", None, None)
    assert same(fresh, plain)


def test_parts_of_another_run_or_damaged_ones_are_refused(tmp_path):
    model, windows = build("llama"), tokens()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def fresh() -> Any:
        copy = build("llama")
        copy.load_state_dict(state)
        return copy

    run(model, "gptq_4bit_g16", windows, tmp_path)
    run(fresh(), "gptq_4bit_g16", windows, tmp_path)  # all parts are there: the same again
    others = [("gptq_3bit_g16", windows), ("gptq_4bit_g16", windows.flip(0)), ("gptq_4bit_g16", None)]
    for recipe, data in others[:2]:
        with pytest.raises(ValueError, match="another model, recipe, calibration"):
            run(fresh(), recipe, data, tmp_path)
    part = tmp_path / "layer-00001.safetensors"
    good = part.read_bytes()
    for bad in (good[:-20], b"", good[:40]):
        part.write_bytes(bad)
        with pytest.raises(ValueError, match=r"layer-00001\.safetensors is"):
            run(fresh(), "gptq_4bit_g16", windows, tmp_path)
    part.write_bytes(good)
    tensors = load_file(part)
    from safetensors import safe_open

    with safe_open(part, framework="pt") as file:
        metadata = file.metadata()
    name = "model.layers.1.mlp.down_proj.codes"
    for change in ({name: tensors[name][:-1].contiguous()}, {name: None}):
        kept = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_file(kept, part, metadata)
        with pytest.raises(ValueError, match="does not fit"):
            run(fresh(), "gptq_4bit_g16", windows, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="no folder"):
        run(fresh(), "gptq_4bit_g16", windows, tmp_path / "file")


def test_same_seed_same_model():
    windows = tokens()
    first, second = build("llama"), build("llama")
    second.load_state_dict(first.state_dict())
    run(first, "gptq_3bit_g16", windows, None)
    run(second, "gptq_3bit_g16", windows, None)
    assert same(first, second)
