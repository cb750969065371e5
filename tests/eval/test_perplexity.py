# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvopt.eval import paired_ratio, perplexity, windows_of
from kvopt.eval.statistics import ratio_with_stderr


@pytest.fixture
def model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.6,
    )
    return LlamaForCausalLM(config).eval()


def in_fp64(model: LlamaForCausalLM, windows: torch.Tensor, prefill: int) -> list[float]:
    """Summed negative log-likelihood per window, the slow and obvious way: one forward per scored token."""
    wide = LlamaForCausalLM(model.config).double().eval()
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    sums = []
    with torch.no_grad():
        for window in windows:
            total = 0.0
            for position in range(prefill, len(window)):
                logits = wide(window[None, :position], use_cache=False).logits[0, -1]
                total -= torch.log_softmax(logits, -1)[window[position]].item()
            sums.append(total)
    return sums


@pytest.mark.parametrize("prefill", [1, 7])
def test_equals_a_separate_fp64_computation(model: LlamaForCausalLM, prefill: int) -> None:
    windows = torch.randint(97, (3, 20))
    expected = in_fp64(model, windows, prefill)
    result = perplexity(model, windows, prefill=prefill)
    assert result.window_nll == pytest.approx(expected, rel=2e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / (3 * (20 - prefill))), rel=2e-5)
    assert result.tokens_per_window == 20 - prefill


@pytest.mark.parametrize("cache", ["full", "window_b64", "sink_b64_s4"])
def test_through_a_cache_that_holds_everything_equals_plain(model: LlamaForCausalLM, cache: str) -> None:
    windows = torch.randint(97, (5, 40))
    plain = perplexity(model, windows, prefill=13)
    through = perplexity(model, windows, cache=cache, prefill=13, batch_size=2)
    assert through.window_nll == pytest.approx(plain.window_nll, rel=1e-5)
    assert through.tokens_per_window == plain.tokens_per_window


def test_through_a_window_equals_an_explicit_mask(model: LlamaForCausalLM) -> None:
    """The prompt is attended in full; every later query sees only the newest 8 tokens, at their own positions."""
    windows = torch.randint(97, (2, 30))
    prefill, budget = 12, 8
    through = perplexity(model, windows, cache=f"window_b{budget}", prefill=prefill)
    # Keys and values of deeper layers depend on what their own queries saw, so one masked forward is the same thing.
    query, key = torch.arange(30)[:, None], torch.arange(30)[None]
    seen = (key <= query) & ((query < prefill) | (key > query - budget))
    mask = torch.zeros(30, 30).masked_fill(~seen, float("-inf"))[None, None].expand(2, 1, -1, -1)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(windows, attention_mask=mask, use_cache=False).logits[:, prefill - 1 : -1]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), windows[:, prefill:], reduction="none"
    ).sum(1)
    assert through.window_nll == pytest.approx(expected.tolist(), rel=1e-4)
    assert through.window_nll != pytest.approx(
        perplexity(model, windows, prefill=prefill).window_nll, rel=1e-3
    )


@pytest.mark.parametrize("cache", [None, "full"])
def test_nan_logits_never_pass(model: LlamaForCausalLM, cache: str | None) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        perplexity(model, torch.randint(97, (2, 10)), cache=cache, prefill=3)


def test_one_bad_token_in_one_window_is_found(model: LlamaForCausalLM) -> None:
    windows = torch.randint(96, (4, 10))
    windows[2, 6] = 96
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = float("inf")
    with pytest.raises(FloatingPointError, match="windows 2…3"):
        perplexity(model, windows, batch_size=2)


def test_bad_arguments(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="prefill must be 1…9"):
        perplexity(model, torch.zeros(1, 10, dtype=torch.int64), prefill=10)
    with pytest.raises(ValueError, match="expected \\(windows, tokens\\)"):
        perplexity(model, torch.zeros(10, dtype=torch.int64))


def test_training_mode_is_put_back(model: LlamaForCausalLM) -> None:
    model.train()
    perplexity(model, torch.randint(97, (1, 10)))
    assert model.training


def test_standard_error_is_the_spread_of_windows(seed: int) -> None:
    """Against a bootstrap over clusters of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(50, 150, (60,), generator=generator).double()
    sums = counts * (3 + 0.3 * torch.randn(60, generator=generator).double())
    ratio, error = ratio_with_stderr(sums.tolist(), counts.tolist())
    draws = torch.randint(60, (4000, 60), generator=generator)
    bootstrap = (sums[draws].sum(1) / counts[draws].sum(1)).std().item()
    assert ratio == pytest.approx((sums.sum() / counts.sum()).item())
    assert error == pytest.approx(bootstrap, rel=0.12)


def test_one_cluster_has_no_standard_error() -> None:
    assert ratio_with_stderr([6.0], [3.0]) == (2.0, None)
    with pytest.raises(ValueError):
        ratio_with_stderr([], [])
    with pytest.raises(ValueError):
        ratio_with_stderr([0.0], [0.0])


def test_paired_ratio_is_sharper_than_the_parts(model: LlamaForCausalLM) -> None:
    windows = torch.randint(97, (8, 20))
    a = perplexity(model, windows)
    with torch.no_grad():
        model.lm_head.weight += 0.001 * torch.randn_like(model.lm_head.weight)
    b = perplexity(model, windows)
    ratio, error = paired_ratio(b, a)
    assert ratio == pytest.approx(b.perplexity / a.perplexity)
    assert error is not None and a.stderr is not None and error < 0.3 * a.stderr / a.perplexity
    with pytest.raises(ValueError, match="different windows"):
        paired_ratio(a, perplexity(model, windows[:, :-1]))


class Letters:
    """A tokenizer of letters, with a beginning-of-sequence token or without."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_windows_are_a_stream_of_documents_that_begin_with_bos() -> None:
    windows = windows_of(["abc", "defg"], Letters(0), window=4)
    assert windows.tolist() == [[0, 97, 98, 99], [0, 100, 101, 102]]  # "g" is less than a window
    assert windows_of(["abc", "defg"], Letters(None), window=3).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert windows_of(["abc", "defg"], Letters(0), window=4, limit=1).shape == (1, 4)
    with pytest.raises(ValueError, match="fewer than one window"):
        windows_of(["abc"], Letters(0), window=5)
