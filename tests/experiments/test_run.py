# SPDX-License-Identifier: Apache-2.0
"""The main job on a tiny model with a tiny text, its table and its figure."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvopt.experiments import runner
from kvopt.experiments.config import (
    EXPERIMENTS,
    BenchmarkConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    QuantizationConfig,
    QuantMethod,
    experiment_for,
    find_experiment,
)
from kvopt.experiments.loading import InputError
from kvopt.experiments.plan import make_plan
from kvopt.experiments.plots import draw
from kvopt.experiments.results import Results
from kvopt.experiments.runner import Outcome, run
from kvopt.experiments.table import print_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers over single letters, a text and stories for it."""
    out = tmp_path_factory.mktemp("tiny")
    letters = "\n !\"'()*,-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = {"<s>": 0, "<pad>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", pad_token="<pad>").save_pretrained(out)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    (out / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    row = {
        "id": "a",
        "length": "x",
        "story": "Ann was here.",
        "questions": ["Who?", "Why?"],
        "answers": ["Ann", "No"],
    }
    (out / "stories.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    return out


def experiments(folder: Path, *recipes: str, **evaluation: Any) -> list[ExperimentConfig]:
    texts = {"text": str(folder / "text.txt"), "stories": str(folder / "stories.jsonl")}
    return [
        experiment_for(recipe).replace(
            model=ModelConfig(str(folder), "cpu"),
            eval=EvalConfig(
                **{**texts, "windows": 3, "window": 48, "prefill": 24, "documents": 2, **evaluation}
            ),
            benchmark=BenchmarkConfig(prompt_tokens=40, new_tokens=3, rounds=2, warmup=1),
            seed=5,
        )
        for recipe in recipes
    ]


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    return run(experiments(folder, "fp32", "bf16", "int8", "int4_g32"), ["full", "sink_b16_s4"], quiet=True)


def test_every_experiment_with_every_cache(outcome: Outcome) -> None:
    assert outcome.failures == []
    records = outcome.results.records
    names = ["fp32", "bf16", "int8", "int4_g32"]
    assert [(r.experiment, r.cache) for r in records] == [
        (n, c) for n in names for c in ("full", "sink_b16_s4")
    ]
    for record in records:
        for name in ("bits_per_weight", "model_bytes", "cache_bytes", "perplexity", "perplexity_stderr", "recall",
                     "prefill_ms", "decode_tok_s", "decode_tok_s_std", "seconds"):  # fmt: skip
            assert getattr(record, name) is not None, name
        assert (record.prompt_tokens, record.n_runs, record.n_warmup, record.n_documents) == (40, 2, 1, 2)
        assert (record.seed, record.em, record.f1) == (5, None, None)


def test_recipes_that_need_data_take_the_calibration_text(folder: Path) -> None:
    from kvopt.experiments.loading import load_quantized_model, quantized_copies

    (plain,) = experiments(folder, "gptq_4bit_g32")
    with pytest.raises(InputError, match="needs calibration"):
        load_quantized_model(plain)
    text = str(folder / "text.txt")
    plan = make_plan(str(folder), recipes=["gptq_4bit_g32"], device="cpu", calibration=text, seed=5)
    model, _ = load_quantized_model(plan.experiments[-1])
    few = make_plan(
        str(folder), recipes=["gptq_4bit_g32"], device="cpu", calibration=text, calibration_windows=2
    )
    assert [config.quantization.calibration for config in plan.experiments] == [text] * 3
    other, _ = load_quantized_model(few.experiments[-1])
    dense, _ = load_quantized_model(plan.experiments[0])
    (rounded,) = quantized_copies(dense, [plain])  # for speed any codes do
    states = [m.state_dict()["model.layers.1.mlp.down_proj.codes"] for m in (model, other, rounded.model)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(states))
    missing = make_plan(str(folder), recipes=["gptq_4bit_g32"], device="cpu", calibration="/nowhere.txt")
    with pytest.raises(InputError, match="No such file"):
        load_quantized_model(missing.experiments[-1])


def test_sizes_shrink_as_they_should(outcome: Outcome) -> None:
    of = {(r.experiment, r.cache): r for r in outcome.results.records}
    sizes = [of[name, "full"].model_bytes for name in ("fp32", "bf16")]
    assert 0 <= 2 * sizes[1] - sizes[0] < 1000  # all but the rotary frequencies, which stay fp32
    bits = [of[name, "full"].bits_per_weight for name in ("fp32", "bf16", "int8", "int4_g32")]
    assert bits[:2] == [32.0, 16.0] and 8 < bits[2] < 9 and 4 < bits[3] < 6
    for name in ("fp32", "int8"):
        assert of[name, "sink_b16_s4"].cache_bytes < of[name, "full"].cache_bytes


def test_notes_say_how_it_was_measured(outcome: Outcome) -> None:
    notes = {(r.experiment, r.cache): r.note for r in outcome.results.records}
    assert "one forward pass" in notes["int8", "full"]
    assert "token by token through sink_b16_s4" in notes["int8", "sink_b16_s4"]
    assert "story compressed before the question" in notes["int8", "sink_b16_s4"]
    assert sum("baseline: the faster" in note for note in notes.values()) == 1
    assert sum("perplexity over the baseline's" in note for note in notes.values()) == len(notes) - 1


def test_speed_only_rows_have_no_accuracy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = runner.speed_model.build
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    monkeypatch.setattr(
        runner.speed_model,
        "build",
        lambda seed, device: build(seed, device=device, intermediate_size=32, **small),
    )
    speed = BenchmarkConfig(prompt_tokens=8, new_tokens=2, rounds=1, warmup=0)
    done = run(experiments(folder, "bf16", "int8", windows=0, documents=0), ["full"], speed=speed, quiet=True)
    main, large = done.results.records[:2], done.results.records[2:]
    assert [r.experiment for r in large] == ["bf16", "int8"]
    assert all("speed only" in r.note and r.perplexity is None and r.recall is None for r in large)
    assert all(r.decode_tok_s is not None and r.decode_tok_s_std is None for r in large)
    assert all(r.perplexity is None and r.recall is None and r.decode_tok_s is not None for r in main)


def test_one_failing_measure_does_not_stop_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(model: Any, windows: Any, *, cache: str | None, **_: Any) -> None:
        raise FloatingPointError("perplexity, windows 0…1: 2 of 2 positions are NaN or infinite")

    monkeypatch.setattr(runner, "perplexity", nan)
    done = run(experiments(folder, "fp32"), ["full"], quiet=True)
    (record,) = done.results.records
    assert record.perplexity is None and "perplexity failed: perplexity, windows" in record.note
    assert record.recall is not None and record.decode_tok_s is not None
    assert done.failures and "NaN" in done.failures[0]
    with pytest.raises(FloatingPointError):
        run(experiments(folder, "fp32"), ["full"], quiet=True, debug=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ModelConfig("/nowhere/at/all", "cpu")}, "no such folder"),
        ({"quantization": QuantizationConfig(QuantMethod.INT4, group_size=128)}, "group"),
        ({"eval": EvalConfig(text="/nowhere/text.txt")}, "text.txt"),
    ],
)
def test_bad_input_is_known_before_anything_is_measured(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    (config,) = experiments(folder, "fp32")
    with pytest.raises(InputError, match=message) as caught:
        run([dataclasses.replace(config, **change)], ["full"], quiet=True)
    assert "\n" not in str(caught.value)


def test_unknown_cache(folder: Path) -> None:
    with pytest.raises(InputError, match="sinc_b8"):
        run(experiments(folder, "fp32"), ["sinc_b8"], quiet=True)


def test_figure_is_drawn(outcome: Outcome, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = draw(outcome.results, tmp_path / "figure.png")
    pixels = imread(path)
    assert pixels.shape[0] > 1000 and pixels.shape[1] > 1500
    assert len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3).round(2).tolist()}) > 20
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_figure_of_unmeasured_records(outcome: Outcome, tmp_path: Path) -> None:
    bare = [
        dataclasses.replace(
            r, perplexity=None, recall=None, prefill_ms=None, decode_tok_s=None, cache_bytes=None
        )
        for r in outcome.results.records
    ]
    draw(Results(outcome.results.machine, bare, "0"), tmp_path / "figure.png")
    with pytest.raises(ValueError, match="no records"):
        draw(Results({}, [], "0"), tmp_path / "none.png")


def test_table_shows_dashes_for_what_was_not_measured(outcome: Outcome) -> None:
    text = io.StringIO()
    records = [dataclasses.replace(outcome.results.records[0], recall=None), *outcome.results.records[1:]]
    print_table(records, text)
    lines = [line for line in text.getvalue().splitlines() if "fp32" in line and "full" in line]
    assert len(lines) == 1 and "–" in lines[0]
    assert "\x1b" not in text.getvalue()


def test_registry_and_recipe_strings() -> None:
    assert {name: str(config.quantization) for name, config in EXPERIMENTS.items()} == {
        "fp32": "fp32",
        "bf16": "bf16",
        "int8": "int8",
        "int4_g128": "int4_g128",
    }
    assert experiment_for("int8") is EXPERIMENTS["int8"]
    assert str(experiment_for("int4_g32_sym").quantization) == "int4_g32_sym"
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        find_experiment("int9")


def test_plan_always_has_a_baseline() -> None:
    names = lambda plan: [config.name for config in plan.experiments]  # noqa: E731
    assert names(make_plan()) == ["fp32", "bf16", "int8", "int4_g128"]
    assert names(make_plan(experiments=["int8"])) == ["fp32", "bf16", "int8"]
    assert names(make_plan(experiments=["bf16"], recipes=["int4_g64"])) == ["bf16", "int4_g64"]
    assert make_plan().caches == ("full", "sink_b256_s4")
    assert make_plan(caches=["window_b64", "full"]).caches == ("full", "window_b64")
    assert make_plan(limit=0).experiments[0].eval.windows == 0
    assert make_plan(speed=False).speed is None
