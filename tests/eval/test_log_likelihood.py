# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood through a cache: the plain forward's where nothing is lost, that of a mask where tokens are."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kvopt
from kvopt import ops_kv
from kvopt.eval import log_likelihood, log_likelihood_rolling
from kvopt.eval.log_likelihood import rolling_windows

VOCABULARY = 97
Request = tuple[list[int], list[int]]


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.3,
        **settings,
    )
    return LlamaForCausalLM(config).double().eval()


def tiny_gpt2(positions: int = 128) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=positions, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).double().eval()


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def tokens(count: int) -> list[int]:
    return [random.randrange(VOCABULARY) for _ in range(count)]


def some_requests(count: int = 7, longest: int = 60) -> list[Request]:
    """The first context and the second continuation are one token long."""
    sizes = [(random.randint(1, longest), random.randint(1, 20)) for _ in range(count)]
    sizes[0], sizes[1] = (1, sizes[0][1]), (sizes[1][0], 1)
    return [(tokens(before), tokens(after)) for before, after in sizes]


@torch.no_grad()
def exact(
    model: Any, request: Request, budget: int | None = None, chunk: int = 1
) -> tuple[float, bool, float]:
    """In fp64 from one forward: log probability, greedy, and how far the logits' rounding to fp32 may move the first.

    With a budget the queries behind the context see the newest ``budget`` tokens only: of what came before their chunk,
    and their chunk; of one token at a time, itself among them.
    """
    context, continuation = request
    ids = torch.tensor([context + continuation[:-1]])
    n, before = ids.shape[1], len(context)
    options = {}
    if budget is not None:
        query, key = torch.arange(n)[:, None], torch.arange(n)[None]
        begin = before + (query - before) // chunk * chunk
        oldest = query - budget + 1 if chunk == 1 else begin - budget
        seen = (key <= query) & ((query < before) | (key >= oldest))
        options["attention_mask"] = torch.zeros(n, n, dtype=torch.float64).masked_fill(~seen, -torch.inf)[
            None, None
        ]
    model.set_attn_implementation("sdpa")
    logits = model(ids, use_cache=False, **options).logits[0, before - 1 :]
    log_probability = logits.log_softmax(-1)
    targets = torch.tensor(continuation)
    picked = log_probability.gather(1, targets[:, None])
    # Each logit is rounded to fp32 (half an ulp), so is the log-sum-exp of numbers that moved as much, once more by
    # its own arithmetic: V terms of exp and sum, relative to it 2 (V + 4) half ulps, and by the last subtraction.
    largest = max(logits.abs().max().item(), logits.logsumexp(-1).abs().max().item()) + 1.0
    tolerance = len(continuation) * 2.0**-24 * (4 * largest + 2 * (VOCABULARY + 4))
    return picked.sum().item(), bool((logits.argmax(-1) == targets).all()), tolerance


def check(result: Any, expected: list[tuple[float, bool, float]]) -> None:
    for (value, greedy), (exact_value, exact_greedy, tolerance) in zip(result.scores, expected, strict=True):
        assert abs(value - exact_value) <= tolerance
        assert greedy is exact_greedy


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("cache", [None, "full", "window_b90", "h2o_b90"])
@pytest.mark.parametrize("name", MODELS)
def test_where_nothing_is_lost_it_is_the_plain_forward(name: str, cache: str | None, batch_size: int) -> None:
    model, requests = MODELS[name](), some_requests()
    result = log_likelihood(model, requests, cache=cache, batch_size=batch_size)
    check(result, [exact(model, request) for request in requests])
    assert result.tokens == tuple(len(continuation) for _, continuation in requests)
    assert all(nbytes > 0 for nbytes in result.cache_bytes) == (cache is not None)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("name", MODELS)
def test_a_window_is_an_explicit_mask_and_not_the_plain_forward(name: str, chunk: int) -> None:
    model = MODELS[name]()
    requests = [(tokens(random.randint(15, 50)), tokens(random.randint(6, 20))) for _ in range(5)]
    result = log_likelihood(model, requests, cache="window_b8", chunk=chunk, batch_size=3)
    check(result, [exact(model, request, budget=8, chunk=chunk) for request in requests])
    plain = [exact(model, request)[0] for request in requests]
    assert max(abs(value - other) for (value, _), other in zip(result.scores, plain, strict=True)) > 1e-2


@pytest.mark.parametrize("prefill", ["full", 16])
@pytest.mark.parametrize("chunk", [1, 6])
@pytest.mark.parametrize(
    "cache", ["sink_b12_s4", "h2o_b12+int4_g4_r4", "tova_b12+fp8", "snapkv_b12_w4", "kvzip_b12", "random_b12"]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_what_each_gives_alone(name: str, cache: str, chunk: int, prefill: Any) -> None:
    model, requests = MODELS[name](), some_requests()
    together = log_likelihood(model, requests, cache=cache, chunk=chunk, prefill=prefill, batch_size=4)
    alone = log_likelihood(model, requests, cache=cache, chunk=chunk, prefill=prefill, batch_size=1)
    bounds = [exact(model, request)[2] for request in requests]
    for (value, greedy), (expected, first), bound in zip(together.scores, alone.scores, bounds, strict=True):
        assert abs(value - expected) <= 2 * bound
        assert greedy is first


def test_what_is_read_is_the_compressed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, budget = tiny_llama(), 16
    requests = [(tokens(40), tokens(9)), (tokens(31), tokens(9))]
    read: list[int] = []
    attend = ops_kv.kv_attention_decode

    def spy(query: torch.Tensor, store: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        read.append(int(store.lengths.sum(-1).max()))
        return attend(query, store, *args, **kwargs)

    monkeypatch.setattr(ops_kv, "kv_attention_decode", spy)
    result = log_likelihood(model, requests, cache=f"h2o_b{budget}+int4_g4_r4", batch_size=2)
    assert read == [budget] * (2 * 8)  # two layers, eight tokens read after the context
    expected = kvopt.cache_bytes(model, f"h2o_b{budget}+int4_g4_r4", 2, [40, 31], 8)
    assert result.cache_bytes == (expected.steady // 2,) * 2
    read.clear()
    log_likelihood(model, requests, cache=None)
    assert not read


@pytest.mark.parametrize("cache", [None, "full"])
def test_greedy_means_every_token(cache: str | None) -> None:
    model = tiny_llama()
    contexts = [tokens(n) for n in (3, 11, 7)]
    with torch.no_grad():
        chosen = [
            model.generate(torch.tensor([c]), max_new_tokens=6, do_sample=False, eos_token_id=None)[
                0, len(c) :
            ].tolist()
            for c in contexts
        ]
    others = [[*ids[:5], (ids[5] + 1) % VOCABULARY] for ids in chosen]
    requests = [*zip(contexts, chosen, strict=True), *zip(contexts, others, strict=True)]
    result = log_likelihood(model, requests, cache=cache)
    assert [greedy for _, greedy in result.scores] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("cache", [None, "full"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_too_long_is_cut_off_on_the_left(name: str, cache: str | None) -> None:
    """As the harness does it: the last ``max_length`` tokens before the continuation's last one are read."""
    model, limit = MODELS[name](), 30
    requests = [(tokens(n), tokens(m)) for n, m in ((40, 12), (29, 2), (30, 1), (200, 30), (1, 30), (3, 28))]
    kept = [(context[-(limit + 1 - len(after)) :], after) for context, after in requests]
    result = log_likelihood(model, requests, cache=cache, max_length=limit)
    check(result, [exact(model, request) for request in kept])


@pytest.mark.parametrize("cache", [None, "full", "window_b20"])
def test_padding_never_goes_beyond_a_table_of_positions(cache: str | None) -> None:
    """A long context and a long continuation, each of which fits, would not fit if padded to one another's length."""
    model = tiny_gpt2(positions=40)
    requests = [
        (tokens(40), tokens(1)),
        (tokens(2), tokens(39)),
        (tokens(20), tokens(21)),
        (tokens(99), tokens(5)),
    ]
    result = log_likelihood(model, requests, cache=cache)
    budget = 20 if cache == "window_b20" else None
    kept = [(context[-(41 - len(after)) :], after) for context, after in requests]
    check(result, [exact(model, request, budget) for request in kept])


@pytest.mark.parametrize("context", [1, 7, 20])
@pytest.mark.parametrize("length", [1, 2, 19, 20, 21, 100])
def test_windows_score_every_token_once(length: int, context: int) -> None:
    limit, ids = 20, list(range(1000, 1000 + length))
    windows = rolling_windows(ids, 7, limit, context)
    assert [token for _, scored in windows for token in scored] == ids
    stream, end = [7, *ids], 0
    for number, (before, scored) in enumerate(windows):
        end += len(scored)
        assert scored and before + scored == stream[end + 1 - len(before) - len(scored) : end + 1]
        assert len(before) + len(scored) - 1 <= limit
        assert len(before) == 1 if number == 0 else len(before) >= context
    assert all(len(before) + len(scored) - 1 == limit for before, scored in windows[1:])


class Tokenizer:
    """A token for each character, two characters as one where they are the same."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids: list[int] = [1] if add_special_tokens else []
        position = 0
        while position < len(text):
            twice = text[position : position + 2] == 2 * text[position]
            ids.append(3 + (2 * ord(text[position]) + twice) % (VOCABULARY - 3))
            position += 1 + twice
        return {"input_ids": ids}


def test_strings_are_split_as_the_harness_does_it() -> None:
    model, tokenizer = tiny_llama(), Tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    strings = [("abba", "cd"), ("ab  ", "cd"), ("", "abc"), ("  ", "abc")]
    # Spaces go over to the continuation, where two of them are one token; nothing before it is the bos token.
    pairs = [(ids("abba"), ids("cd")), (ids("ab"), ids("  cd")), ([1], ids("abc")), ([1], ids("  abc"))]
    for add in (False, True):
        got = log_likelihood(model, strings, tokenizer, cache="full", add_bos_token=add)
        if add:
            pairs = [(context if context == [1] else [1, *context], after) for context, after in pairs]
        check(got, [exact(model, pair) for pair in pairs])


@pytest.mark.parametrize("cache", [None, "full", "window_b9"])
def test_rolling_sums_its_windows(cache: str | None) -> None:
    model, tokenizer, limit, context = tiny_llama(), Tokenizer(), 25, 6
    texts = [tokens(70), tokens(25), tokens(1), tokens(26)]
    result = log_likelihood_rolling(
        model, texts, tokenizer, cache=cache, max_length=limit, context=context, batch_size=3
    )
    budget = 9 if cache == "window_b9" else None
    for text, (value, _), count in zip(texts, result.scores, result.tokens, strict=True):
        parts = [exact(model, window, budget) for window in rolling_windows(text, 1, limit, context)]
        assert abs(value - sum(part[0] for part in parts)) <= sum(part[2] for part in parts)
        assert count == len(text)
    total = sum(value for value, _ in result.scores)
    assert result.perplexity == pytest.approx(math.exp(-total / sum(map(len, texts))))
    assert ("through window_b9" in result.note) == (cache == "window_b9")


@pytest.mark.parametrize("cache", [None, "full"])
def test_nan_logits_never_pass(cache: str | None) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        log_likelihood(model, [(tokens(4), tokens(3))], cache=cache)


def test_nothing_asked_nothing_read() -> None:
    result = log_likelihood(tiny_llama(), [])
    assert result.scores == () and result.tokens == () and result.cache_bytes == ()


@pytest.mark.parametrize(
    ("requests", "options", "message"),
    [
        ([([1], [])], {}, "request 0 has an empty continuation"),
        ([([1], [2]), ([1], [2] * 10)], {"max_length": 9}, "request 1 has 10 tokens, max_length is 9"),
        ([("a", "b")], {}, "strings need a tokenizer"),
        ([([], [3])], {}, "nothing can stand before the first token"),
        ([([1], [2])], {"chunk": 0}, "chunk must be 1 or more"),
        ([([1], [2])], {"batch_size": 0}, "batch_size must be 1 or more"),
        ([([1], [2])], {"max_length": 0}, "max_length must be 1 or more"),
        ([([1], [2])], {"cache": "windw_b8"}, "windw"),
    ],
)
def test_what_makes_no_sense_is_refused(requests: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihood(tiny_llama(), requests, **options)


def test_rolling_refuses_an_empty_text_and_too_much_context() -> None:
    model, tokenizer = tiny_llama(), Tokenizer()
    with pytest.raises(ValueError, match="text 1 is empty"):
        log_likelihood_rolling(model, ["a", ""], tokenizer)
    with pytest.raises(ValueError, match="context must be 1…10"):
        log_likelihood_rolling(model, ["a"], tokenizer, max_length=10, context=11)
