# SPDX-License-Identifier: Apache-2.0
"""``kvopt quantize``: a folder that loads, a report beside it, and errors that come before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvopt
from kvopt import assets, cli


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random model with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(assets.path("llama-6m"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The old king went into the forest and saw a red fox. " * 60)
    return tmp_path


def test_quantises_into_a_folder_that_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    command = ["quantize", str(folder / "model"), "gptq_4bit_g16", str(out), "--device", "cpu", "--json"]
    command += ["--calibration", str(folder / "text.txt"), "--window", "32", "--windows", "8", "--seed", "3"]
    assert cli.main(command) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((out / "quantization_report.json").read_text())
    assert shown["recipe"] == "gptq_4bit_g16" and shown["seed"] == 3 and len(shown["layers"]) == 14
    assert shown["calibration_tokens"] + shown["held_out_tokens"] == 8 * 32
    model = kvopt.load_quantized(out, device="cpu")
    assert sum(isinstance(module, kvopt.QuantLinear) for module in model.modules()) == 14
    assert torch.isfinite(model(torch.tensor([[0, 5, 6]])).logits).all()
    assert cli.main(command) == 2
    assert "not empty" in capsys.readouterr().err


def test_goes_on_from_finished_layers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", str(folder / "model"), "clip_4bit_g16", "--device", "cpu", "--quiet"]
    command += ["--calibration", str(folder / "text.txt"), "--resume", str(folder / "parts")]
    assert cli.main([*command, str(folder / "first")]) == 0
    assert len(list((folder / "parts").glob("*.safetensors"))) == 2
    assert cli.main([*command, str(folder / "second")]) == 0
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    assert "14 linears" in capsys.readouterr().out
    assert cli.main([*command, str(folder / "third"), "--seed", "1"]) == 2
    assert "seed" in capsys.readouterr().err and not (folder / "third").exists()


@pytest.mark.parametrize(
    "order", ["MODEL --budget-bits 4.5 OUT", "MODEL OUT --budget-bits=4.5", "--budget-bits 4.5 MODEL OUT"]
)
def test_searches_formats_for_a_budget(folder: Path, capsys: pytest.CaptureFixture[str], order: str) -> None:
    words = {"MODEL": str(folder / "model"), "OUT": str(folder / "out")}
    command = ["quantize", *(words.get(word, word) for word in order.split()), "--device", "cpu", "--json"]
    command += [
        "--calibration",
        str(folder / "text.txt"),
        "--window",
        "32",
        "--windows",
        "8",
        "--method",
        "clip",
    ]
    assert cli.main(command) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["budget_bits"] == 4.5 and set(shown["chosen"]) == {row["name"] for row in shown["layers"]}
    model = kvopt.load_quantized(folder / "out", device="cpu")
    packed = [m for m in model.modules() if isinstance(m, kvopt.QuantLinear)]
    weights = sum(m.in_features * m.out_features for m in packed)
    assert len(packed) == 14 and 8 * sum(row["nbytes"] for row in shown["layers"]) <= 4.5 * weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget-bits", "4.5"], "needs --calibration"),
        (["--budget-bits", "1", "--calibration", "TEXT"], "1 bits per weight are too few"),
        (["--budget-bits", "-3", "--calibration", "TEXT"], "positive"),
        (["--budget-bits", "4.5", "--method", "gptp", "--calibration", "TEXT"], "gptp"),
        (["int4_g16", "--method", "gptq"], "goes with --budget-bits"),
    ],
)
def test_a_bad_budget_leaves_no_folder(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(folder / "text.txt") if word == "TEXT" else word for word in arguments]
    recipe = [options.pop(0)] if not options[0].startswith("-") else []
    code = cli.main(
        [
            "quantize",
            str(folder / "model"),
            *recipe,
            str(folder / "out"),
            "--device",
            "cpu",
            "--quiet",
            *options,
        ]
    )
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["int5"], "int5"),
        (["bf16"], "'bf16' quantises nothing"),
        (["gptq_4bit_g16"], "needs calibration"),
        (["int4_g128"], "larger than the row"),
        (["int4_g16", "--format", "gguf"], "gguf"),
        (["int4_g16", "--device", "toaster"], "toaster"),
        (["int4_g16", "--calibration", "/nowhere.txt"], "No such file"),
        (["int4_g16", "--calibration", "TEXT", "--window", "900000"], "fewer than one window"),
    ],
)
def test_bad_input_leaves_no_folder(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, *options = [str(folder / "text.txt") if word == "TEXT" else word for word in arguments]
    code = cli.main(["quantize", str(folder / "model"), recipe, str(folder / "out"), "--quiet", *options])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()
