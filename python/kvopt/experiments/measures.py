# SPDX-License-Identifier: Apache-2.0
"""Single measurements of a model in hand, in the words of the experiment plan: memory, latency, throughput, sanity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import kvopt
from kvopt.experiments.benchmark import Contender, Timing, time_interleaved
from kvopt.experiments.config import BenchmarkConfig

_PROMPT = "The history of the city begins with"


def get_model_memory_footprint(model: torch.nn.Module) -> float:
    """Megabytes (10⁶ bytes) of every parameter and buffer of ``model``, each storage once."""
    return kvopt.model_nbytes(model) / 1e6


def measure_memory_usage(
    model: torch.nn.Module, prompt_tokens: int = 128, new_tokens: int = 8, cache: str = "full"
) -> dict[str, float | None]:
    """Memory of a model at rest and at work, in megabytes (10⁶ bytes).

    Returns:
        ``model_mb``; ``cache_mb`` after the prompt and the new tokens; ``peak_mb``: the model plus the growth of memory
        on the way, ``None`` where the system doesn't tell.
    """
    timing = _time(model, _random_prompt(model, prompt_tokens), new_tokens, cache, rounds=1, warmup=0)
    weights = get_model_memory_footprint(model)
    assert timing.cache_bytes is not None  # every first run weighs its cache
    return {
        "model_mb": weights,
        "cache_mb": timing.cache_bytes / 1e6,
        "peak_mb": None if timing.growth_bytes is None else weights + timing.growth_bytes / 1e6,
    }


def measure_inference_latency(
    model: torch.nn.Module,
    tokenizer: Any,
    prompt: str = _PROMPT,
    new_tokens: int = 16,
    cache: str = "full",
    rounds: int = 5,
    warmup: int = 1,
) -> dict[str, float]:
    """Median milliseconds to read ``prompt`` (``prefill_ms``) and per further token (``token_ms``), one sequence."""
    timing = _time(model, _encode(tokenizer, prompt), new_tokens, cache, rounds=rounds, warmup=warmup)
    return {"prefill_ms": timing.prefill_ms, "token_ms": 1e3 / timing.decode_tok_s}


def measure_throughput(
    model: torch.nn.Module,
    tokenizer: Any,
    prompt: str = _PROMPT,
    new_tokens: int = 32,
    batch_size: int = 1,
    cache: str = "full",
    rounds: int = 5,
    warmup: int = 1,
) -> dict[str, float | None]:
    """Decoded tokens per second over all rows: the median of the rounds and their standard deviation.

    Returns:
        ``decode_tok_s`` and ``decode_tok_s_std`` (``None`` for a single round).
    """
    rows = _encode(tokenizer, prompt).repeat(batch_size, 1)
    timing = _time(model, rows, new_tokens, cache, rounds=rounds, warmup=warmup)
    spread = timing.decode_tok_s_std
    return {
        "decode_tok_s": batch_size * timing.decode_tok_s,
        "decode_tok_s_std": None if spread is None else batch_size * spread,
    }


def run_quick_sanity_check(model: torch.nn.Module, tokenizer: Any, prompt: str = _PROMPT) -> dict[str, Any]:
    """Reads a prompt and continues it by eight tokens: does the model work at all?

    Returns:
        ``ok``: every logit of the prompt is finite; ``text``: the continuation.
    """
    ids = _encode(tokenizer, prompt).to(next(model.parameters()).device)
    with torch.inference_mode():
        finite = bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all())
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    return {"ok": finite, "text": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)}


def run_benchmarks(
    model: torch.nn.Module, tokenizer: Any, config: BenchmarkConfig | None = None, cache: str = "full"
) -> dict[str, float | None]:
    """Memory, prefill latency and decode throughput of one model in one go; the keys are those of a result record."""
    config = config or BenchmarkConfig()
    vocabulary = len(tokenizer)
    prompt = torch.arange(config.prompt_tokens)[None] % vocabulary
    timing = _time(model, prompt, config.new_tokens, cache, rounds=config.rounds, warmup=config.warmup)
    weights = kvopt.model_nbytes(model)
    return {
        "model_bytes": weights,
        "cache_bytes": timing.cache_bytes,
        "peak_memory_bytes": None if timing.growth_bytes is None else weights + timing.growth_bytes,
        "prompt_tokens": timing.prompt_tokens,
        "prefill_ms": timing.prefill_ms,
        "decode_tok_s": timing.decode_tok_s,
        "decode_tok_s_std": timing.decode_tok_s_std,
        "n_runs": timing.n_runs,
        "n_warmup": timing.n_warmup,
    }


@dataclass
class LLMBenchmark:
    """Several models on the same prompt, timed interleaved.

    .. code-block:: python

        bench = LLMBenchmark(prompt_tokens=512)
        bench.add("bf16", model)
        bench.add("int4 + sinks", small, cache="sink_b256_s4")
        for name, timing in bench.run().items():
            print(name, timing.prefill_ms, timing.decode_tok_s)
    """

    prompt_tokens: int = 512
    new_tokens: int = 32
    rounds: int = 5
    warmup: int = 1
    seed: int = 0
    contenders: list[Contender] = field(default_factory=list)

    def add(self, name: str, model: torch.nn.Module, cache: str = "full") -> None:
        """Adds a contender.

        Raises:
            ValueError: the name is taken.
        """
        if any(contender.name == name for contender in self.contenders):
            raise ValueError(f"LLMBenchmark: there is a contender {name!r} already")
        self.contenders.append(Contender(name, model, cache))

    def run(self) -> dict[str, Timing]:
        """Times all contenders in alternation on one random prompt; the result is in the order they were added.

        Raises:
            ValueError: there are no contenders.
        """
        if not self.contenders:
            raise ValueError("LLMBenchmark: add a contender first")
        prompt = _random_prompt(self.contenders[0].model, self.prompt_tokens, self.seed)
        timings = time_interleaved(
            self.contenders, prompt, self.new_tokens, rounds=self.rounds, warmup=self.warmup
        )
        return {contender.name: timing for contender, timing in zip(self.contenders, timings, strict=True)}


def _time(
    model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int, cache: str, *, rounds: int, warmup: int
) -> Timing:
    return time_interleaved([Contender("", model, cache)], prompt, new_tokens, rounds=rounds, warmup=warmup)[
        0
    ]


def _encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return ids


def _random_prompt(model: Any, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
