# SPDX-License-Identifier: Apache-2.0
"""The main job: load and quantise, time everything interleaved, measure accuracy.

Two stages, so that bad input costs no time: everything is loaded and quantised first, and any failure there is the
caller's to mend (:class:`InputError`). What fails later, for instance NaN logits of one recipe, is noted in that
experiment's record, the others go on, and the run counts as failed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import kvopt
from kvopt import assets
from kvopt.eval import (
    PerplexityResult,
    RecallDocument,
    paired_ratio,
    perplexity,
    read_documents,
    read_recall,
    recall,
    windows_of,
)
from kvopt.experiments import speed_model
from kvopt.experiments.benchmark import Contender, time_interleaved
from kvopt.experiments.config import BenchmarkConfig, EvalConfig, ExperimentConfig
from kvopt.experiments.loading import InputError, Loaded, input_errors, load_all, one_line, quantized_copies
from kvopt.experiments.machine import stamp
from kvopt.experiments.memory import bits_per_weight
from kvopt.experiments.progress import Steps
from kvopt.experiments.results import Record, Results, best

SPEED_ONLY = "speed only: random weights"


@dataclass
class Outcome:
    """What a run gives back: its results, and what failed (empty when all went well)."""

    results: Results
    failures: list[str]


@dataclass
class _Texts:
    """What is read: windows and stories for accuracy (``None`` or empty where left out), a prompt for speed."""

    windows: torch.Tensor | None
    stories: list[RecallDocument]
    prompt: torch.Tensor
    prefill: int


_Key = tuple[str, str]  # experiment, cache


class _Run:
    """The state of one run: records by experiment and cache, and what failed."""

    def __init__(self, steps: Steps, debug: bool) -> None:
        self.steps = steps
        self.debug = debug
        self.failures: list[str] = []

    def failed(self, record: Record, what: str, error: Exception) -> None:
        if self.debug:
            raise error
        text = f"{record.experiment} with {record.cache}: {what} failed: {one_line(error)}"
        record.add_note(f"{what} failed: {one_line(error)}")
        self.failures.append(text)
        self.steps.say(text)


def run(
    experiments: Sequence[ExperimentConfig],
    caches: Sequence[str] = ("full",),
    *,
    speed: BenchmarkConfig | None = None,
    quiet: bool = False,
    debug: bool = False,
) -> Outcome:
    """Measures every experiment with every cache.

    What quantised models leave unquantised is 16 bits wide unless that is slow on this machine (found by a short race
    between the baselines among the experiments), or their configuration names a type.

    Args:
        experiments: on the same model, with the same evaluation and benchmark; the first one's are used.
        caches: cache specs; ``full`` is transformers' own cache.
        speed: also time a random-weight model of 350 M parameters with this, in rows marked *speed only*.
        quiet: nothing on stderr.
        debug: let failures through instead of noting them.

    Raises:
        InputError: a model, recipe, cache spec, device or text that can't be used.
    """
    if not experiments or not caches:
        raise InputError("run: needs at least one experiment and one cache")
    first = experiments[0]
    with input_errors():
        names = list(dict.fromkeys(str(kvopt.CacheSpec.parse(spec)) for spec in caches))
    steps = Steps(2 + len(experiments) * len(names) + (2 if speed else 0), quiet)
    job = _Run(steps, debug)
    began = time.perf_counter()

    with steps.step(f"load {first.model.name} and quantise: {', '.join(e.name for e in experiments)}"):
        loaded = load_all(experiments)
        texts = _read_texts(loaded[0], first.eval, first.benchmark)
        with input_errors():
            for spec in names:
                kvopt.Cache(loaded[0].model, spec)
    records = _blank_records(loaded, names, first.model.name)
    with steps.step(f"time {len(records)} contenders, interleaved"):
        _time(job, loaded, records, texts.prompt, first.benchmark)
    measured: dict[_Key, PerplexityResult] = {}
    for item in loaded:
        for spec in names:
            if "failed" in records[item.config.name, spec].note:  # what can't decode can't be scored
                continue
            with steps.step(f"accuracy of {item.config.name} with {spec}"):
                _measure_accuracy(job, item, records[item.config.name, spec], texts, first.eval, measured)
    rows = list(records.values())
    _compare(rows, measured)
    loaded.clear()
    if speed is not None:
        rows += _time_speed_model(job, experiments, speed)
    steps.say(f"{time.perf_counter() - began:.0f} s in all")
    return Outcome(Results(stamp().to_dict(), rows, kvopt.__version__), job.failures)


def _read_texts(item: Loaded, config: EvalConfig, benchmark: BenchmarkConfig) -> _Texts:
    """Tokenises what will be read, cut to what the model's context holds."""
    context = getattr(item.model.config, "max_position_embeddings", None) or 1 << 30
    window = min(config.window, context)
    prefill = config.prefill if window == config.window else max(1, window // 2)
    with input_errors():
        documents = read_documents(config.text or assets.path("wiki-heldout.txt"))
        windows = windows_of(documents, item.tokenizer, window, config.windows) if config.windows else None
        file = config.stories or assets.path("recall.jsonl")
        stories = read_recall(file, config.documents) if config.documents else []
        length = min(benchmark.prompt_tokens, context - benchmark.new_tokens)
        prompt = windows_of(documents, item.tokenizer, length, 1)
    return _Texts(windows, stories, prompt, prefill)


def _blank_records(loaded: Sequence[Loaded], caches: Sequence[str], model: str) -> dict[_Key, Record]:
    return {
        (item.config.name, spec): Record(
            experiment=item.config.name,
            model=model,
            recipe=str(item.config.quantization),
            cache=spec,
            seed=item.config.seed,
            bits_per_weight=bits_per_weight(item.model),
            model_bytes=kvopt.model_nbytes(item.model),
        )
        for item in loaded
        for spec in caches
    }


def _time(
    job: _Run,
    loaded: Sequence[Loaded],
    records: dict[_Key, Record],
    prompt: torch.Tensor,
    config: BenchmarkConfig,
) -> None:
    """Times all models with all caches interleaved and fills in the records."""
    items = {item.config.name: item for item in loaded}
    contenders: dict[_Key, Contender] = {}
    for (name, spec), record in records.items():
        contender = Contender(name, items[name].model, spec, items[name].attention)
        try:  # one that can't run at all must not take the others along
            time_interleaved([contender], prompt[:, :8], 2, rounds=1, warmup=0)
            contenders[name, spec] = contender
        except Exception as error:
            job.failed(record, "decoding", error)
    timings = time_interleaved(
        list(contenders.values()),
        prompt,
        config.new_tokens,
        rounds=config.rounds,
        warmup=config.warmup,
        progress=job.steps,
    )
    for key, timing in zip(contenders, timings, strict=True):
        record = records[key]
        record.cache_bytes = timing.cache_bytes
        if timing.growth_bytes is not None and record.model_bytes is not None:
            record.peak_memory_bytes = record.model_bytes + timing.growth_bytes
        record.prompt_tokens = timing.prompt_tokens
        record.prefill_ms = timing.prefill_ms
        record.decode_tok_s = timing.decode_tok_s
        record.decode_tok_s_std = timing.decode_tok_s_std
        record.n_runs, record.n_warmup = timing.n_runs, timing.n_warmup
        record.seconds = sum(timing.prefill_seconds) + sum(timing.decode_seconds)


def _measure_accuracy(
    job: _Run,
    item: Loaded,
    record: Record,
    texts: _Texts,
    config: EvalConfig,
    measured: dict[_Key, PerplexityResult],
) -> None:
    """Perplexity and recall of one model with one cache, plain where the cache is ``full``."""
    cache = None if record.cache == "full" else record.cache
    if texts.windows is not None:
        try:
            p = perplexity(item.model, texts.windows, cache=cache, prefill=texts.prefill, progress=job.steps)
            record.perplexity, record.perplexity_stderr = p.perplexity, p.stderr
            record.seconds = (record.seconds or 0.0) + p.seconds
            record.add_note(p.note)
            measured[record.experiment, record.cache] = p
        except Exception as error:
            job.failed(record, "perplexity", error)
    if texts.stories:
        try:
            r = recall(
                item.model,
                item.tokenizer,
                texts.stories,
                cache=cache,
                history=config.history,
                progress=job.steps,
            )
            record.recall, record.recall_stderr, record.n_documents = r.recall, r.stderr, r.n_documents
            record.seconds = (record.seconds or 0.0) + r.seconds
            record.add_note(r.note)
        except Exception as error:
            job.failed(record, "recall", error)


def _compare(records: Sequence[Record], measured: dict[_Key, PerplexityResult]) -> None:
    """Notes which record is the baseline, and every other perplexity over the baseline's, in pairs of windows."""
    baseline = best(records)
    if baseline is None:
        return
    baseline.add_note("baseline: the faster of the unquantised types")
    reference = measured.get((baseline.experiment, baseline.cache))
    for record in records:
        own = measured.get((record.experiment, record.cache))
        if record is not baseline and own is not None and reference is not None:
            ratio, error = paired_ratio(own, reference)
            spread = "" if error is None else f" ± {error:.4f}"
            record.add_note(f"perplexity over the baseline's {ratio:.4f}{spread} (paired)")


def _time_speed_model(
    job: _Run, experiments: Sequence[ExperimentConfig], config: BenchmarkConfig
) -> list[Record]:
    """Rows of a model large enough to be bound by memory; nothing but sizes and speed in them."""
    seed = experiments[0].seed
    device = experiments[0].model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with job.steps.step(f"build {speed_model.NAME} and quantise it"):
        base = speed_model.build(seed, device=device)
        loaded = quantized_copies(base, experiments)
        del base
    generator = torch.Generator().manual_seed(seed)
    vocabulary = loaded[0].model.config.vocab_size
    prompt = torch.randint(vocabulary, (1, config.prompt_tokens), generator=generator)
    records = _blank_records(loaded, ["full"], speed_model.NAME)
    with job.steps.step(f"time {speed_model.NAME}: {len(records)} contenders, interleaved"):
        _time(job, loaded, records, prompt, config)
    for record in records.values():
        record.add_note(SPEED_ONLY)
    baseline = best(list(records.values()))
    if baseline is not None:
        baseline.add_note("baseline: the faster of the unquantised types")
    return list(records.values())
