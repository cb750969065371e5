# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvopt
from kvopt.experiments import benchmark, speed_model
from kvopt.experiments.benchmark import Contender, Timing, time_interleaved
from kvopt.experiments.measures import (
    LLMBenchmark,
    get_model_memory_footprint,
    measure_memory_usage,
    measure_throughput,
)
from kvopt.experiments.memory import bits_per_weight, peak_growth


def tiny(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def test_rounds_interleave_and_warmup_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, bool, bool]] = []

    def fake(
        contender: Contender, prompt: torch.Tensor, timing: Timing, *, counts: bool, watch_memory: bool
    ) -> None:
        order.append((contender.name, counts, watch_memory))

    monkeypatch.setattr(benchmark, "run_once", fake)
    time_interleaved([Contender("a", None), Contender("b", None)], torch.zeros(1, 3), 2, rounds=3, warmup=2)
    assert [name for name, _, _ in order] == list("abbaabbaab")
    assert [counts for _, counts, _ in order] == [False] * 4 + [True] * 6
    assert [watch for _, _, watch in order] == [True] * 2 + [False] * 8


def test_medians_and_spread() -> None:
    timing = Timing(5, 10, 1, prefill_seconds=[0.3, 0.1, 0.2], decode_seconds=[1.0, 2.0, 0.5])
    assert timing.prefill_ms == 200.0
    assert timing.decode_tok_s == 10.0
    assert timing.decode_tok_s_std == pytest.approx(7.6376, abs=1e-3)
    assert timing.n_runs == 3
    assert Timing(5, 10, 0, [1.0], [1.0]).decode_tok_s_std is None


def test_cache_bytes_are_those_of_the_tensors() -> None:
    model = tiny()
    full, sink = time_interleaved(
        [Contender("a", model, "full", "sdpa"), Contender("b", model, "sink_b16_s4")],
        torch.randint(64, (1, 60)),
        4,
        rounds=1,
        warmup=0,
    )
    assert full.cache_bytes == 2 * 2 * 64 * 32 * 4  # layers, keys and values, tokens, head size, fp32
    assert sink.cache_bytes is not None and 2 * 2 * 16 * 32 * 4 <= sink.cache_bytes < full.cache_bytes / 2
    assert full.n_runs == 1 and full.prefill_seconds[0] > 0


def test_baseline_runs_with_its_own_attention() -> None:
    model = tiny()
    kvopt.Cache(model, "sink_b16_s4")
    assert model.config._attn_implementation != "sdpa"
    time_interleaved(
        [Contender("a", model, "full", "sdpa")], torch.randint(64, (1, 8)), 1, rounds=1, warmup=0
    )
    assert model.config._attn_implementation == "sdpa"


def test_bits_per_weight_counts_scales_and_leaves_the_head_out() -> None:
    model = tiny(torch.bfloat16)
    assert bits_per_weight(model) == 16.0
    report = kvopt.quantize(model, "int8", progress=False)
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, kvopt.QuantLinear))
    assert bits_per_weight(model) == pytest.approx(8 * sum(layer.nbytes for layer in report.layers) / weights)


def test_peak_growth_sees_what_was_allocated() -> None:
    size = 64 << 20
    with peak_growth(torch.device("cpu")) as growth:
        torch.ones(size, dtype=torch.uint8)
    if growth.nbytes is None:
        pytest.skip("this system does not tell the resident set's peak")
    assert 0.8 * size < growth.nbytes < 2 * size


def test_bad_counts() -> None:
    with pytest.raises(ValueError, match="rounds ≥ 1"):
        time_interleaved([], torch.zeros(1, 1), 1, rounds=0)


def test_speed_model_is_seeded() -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    one, two, other = (
        speed_model.build(s, vocab_size=32, intermediate_size=32, head_dim=64, **small) for s in (1, 1, 2)
    )
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight is one.model.embed_tokens.weight and one.dtype == torch.bfloat16


def test_named_measures() -> None:
    model = tiny()
    assert get_model_memory_footprint(model) == kvopt.model_nbytes(model) / 1e6
    memory = measure_memory_usage(model, prompt_tokens=12, new_tokens=2)
    assert memory["cache_mb"] == 2 * 2 * 14 * 32 * 4 / 1e6

    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[1, 2, 3]])}

    one = measure_throughput(model, Tokenizer(), new_tokens=4, batch_size=2, rounds=2, warmup=0)
    assert one["decode_tok_s"] is not None and one["decode_tok_s"] > 0

    bench = LLMBenchmark(prompt_tokens=8, new_tokens=2, rounds=1, warmup=0)
    bench.add("full", model)
    bench.add("sink", model, "sink_b8_s2")
    with pytest.raises(ValueError, match="already"):
        bench.add("full", model)
    assert list(bench.run()) == ["full", "sink"]
