# SPDX-License-Identifier: Apache-2.0
"""The command line: ``kvopt run | quantize | eval | generate | bench | doctor``.

Exit codes: 0 done, 1 it ran and something failed, 2 bad usage or input. Results go to stdout, all else to stderr.
Heavy imports wait until a command needs them: ``kvopt --help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from kvopt._version import __version__
from kvopt.cli_numbers import capability, count, positive

DONE, FAILED, BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; usage errors leave through ``SystemExit(2)``, as argparse does."""
    words = sys.argv[1:] if argv is None else argv
    arguments = parser(words).parse_args(words)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        return _complain("interrupted", FAILED)
    except BrokenPipeError:  # the reader of our stdout went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if arguments.debug:
            raise
        return _complain(_one_line(error), _code_of(error))


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole grammar of the command line. With ``--budget-bits`` among ``words`` quantize takes no recipe."""
    top = argparse.ArgumentParser(
        prog="kvopt",
        description="Quantise a Hugging Face language model, compress its KV cache, and measure the cost and the gain.",
    )
    top.add_argument("--version", action="version", version=f"kvopt {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")

    run = _command(commands, "run", _run, "quantise, evaluate, benchmark; write table, JSON, CSV and figure")
    run.add_argument(
        "--model", default="llama-6m", help="embedded name, folder or hub id (default %(default)s)"
    )
    run.add_argument("--experiments", nargs="+", metavar="NAME", help="default: fp32 bf16 int8 int4_g128")
    run.add_argument("--recipe", nargs="+", metavar="R", help="further recipes, for instance int4_g32")
    run.add_argument(
        "--calibration", metavar="FILE", help="UTF-8 text for GPTQ, AWQ and clip among the recipes"
    )
    run.add_argument(
        "--calibration-windows", type=positive, metavar="N", help="at most N windows of it (default 128)"
    )
    run.add_argument("--cache", nargs="+", metavar="C", help="caches beside full (default sink_b256_s4)")
    run.add_argument(
        "--limit", type=count, metavar="N", help="at most N text windows and N recall stories; 0: none"
    )
    run.add_argument("--out", default="results", metavar="DIR", help="where files go (default %(default)s)")
    run.add_argument(
        "--quick", action="store_true", help="fewer texts and rounds: about two minutes on two cores"
    )
    run.add_argument(
        "--no-speed-model", action="store_true", help="leave out the 350 M random model, timed for speed"
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default %(default)s)")
    run.add_argument("--seed", type=int, default=0)

    quantize = _command(commands, "quantize", _quantize, "quantise a model into a folder, with a report")
    quantize.add_argument("model", help="embedded name, folder or hub id")
    if any(word.partition("=")[0] == "--budget-bits" for word in words):
        quantize.set_defaults(recipe=None)
    else:
        quantize.add_argument("recipe", help="for instance gptq_4bit_g128; none with --budget-bits")
    quantize.add_argument("out", help="the folder to write, absent or empty")
    quantize.add_argument(
        "--budget-bits",
        type=float,
        metavar="BITS",
        help="instead of a recipe: search for each linear's format, so many true bits per weight in the mean",
    )
    quantize.add_argument(
        "--method", metavar="M", help="with it: rtn (default), gptq, awq, clip or hqq chooses the codes"
    )
    quantize.add_argument(
        "--calibration",
        metavar="FILE",
        help="UTF-8 text that the model's inputs look like; GPTQ, AWQ, clip need it",
    )
    quantize.add_argument(
        "--windows", type=positive, metavar="N", help="at most N windows of it (default 128 of 2048 tokens)"
    )
    quantize.add_argument("--window", type=positive, metavar="TOKENS", help="tokens per window")
    quantize.add_argument(
        "--format", default="kvopt", help="kvopt, gptq, awq, compressed-tensors, bnb (default %(default)s)"
    )
    quantize.add_argument(
        "--resume",
        metavar="DIR",
        help="keeps finished layers there; the same command again goes on behind them",
    )
    quantize.add_argument("--seed", type=int, default=0)
    quantize.add_argument("--device", default="auto", help="where layers are quantised (default %(default)s)")
    quantize.add_argument("--dtype", default="auto", help="auto, fp32, bf16, fp16 (default %(default)s)")

    measure = _command(commands, "eval", _eval, "perplexity or recall of one model on a file")
    measure.add_argument("task", choices=("perplexity", "recall"))
    measure.add_argument(
        "file", nargs="?", help="UTF-8 text, or recall stories as JSON lines (default: embedded)"
    )
    measure.add_argument(
        "--window", type=positive, default=1024, help="tokens per window (default %(default)s)"
    )
    measure.add_argument(
        "--prefill",
        type=positive,
        help="unscored context per window (default 1; half a window with --cache)",
    )
    measure.add_argument("--limit", type=positive, metavar="N", help="at most N windows or stories")
    measure.add_argument("--history", action="store_true", help="recall: a story's questions as one dialogue")
    measure.add_argument(
        "--query-aware",
        action="store_true",
        help="recall: compress story and question together, not the story before the question is known",
    )
    _model_options(measure)

    generate = _command(commands, "generate", _generate, "continue a prompt")
    generate.add_argument("model", help="embedded name, folder or hub id")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=positive, default=64, metavar="N")
    _model_options(generate, model=False)

    bench = _command(commands, "bench", _bench, "time one product beside the dense one, or explain its path")
    bench.add_argument("--m", nargs="+", type=positive, default=[1, 16, 256], help="rows of activations")
    bench.add_argument("--n", type=positive, default=4096, help="rows of the weight (default %(default)s)")
    bench.add_argument("--k", type=positive, default=4096, help="columns (default %(default)s)")
    bench.add_argument("--recipe", nargs="+", default=["int4_g128"], metavar="R")
    bench.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    bench.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    bench.add_argument(
        "--explain", action="store_true", help="say which path a shape takes and why; runs nothing"
    )
    bench.add_argument(
        "--capability", type=capability, metavar="CC", help="--explain for this GPU: 75, 9.0 …"
    )
    bench.add_argument("--sms", type=positive, metavar="N", help="and its number of multiprocessors")

    _command(
        commands,
        "doctor",
        _doctor,
        "versions, devices, kernels, and what is missing; exit 1 if run can't work",
    )
    return top


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    """A sub-command with the options that all have."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    made.set_defaults(command=function)
    made.add_argument("--json", action="store_true", help="machine-readable on stdout, all else on stderr")
    made.add_argument("--quiet", action="store_true", help="no progress")
    made.add_argument("--debug", action="store_true", help="errors with their traceback")
    return made


def _model_options(command: argparse.ArgumentParser, model: bool = True) -> None:
    if model:
        command.add_argument(
            "--model", default="llama-6m", help="embedded name, folder or hub id (%(default)s)"
        )
    command.add_argument(
        "--recipe", metavar="R", help="weights, for instance int4_g128 (default: as they are)"
    )
    command.add_argument(
        "--cache", metavar="C", help="KV cache, for instance sink_b256_s4 (default: dynamic)"
    )
    command.add_argument("--device", default="auto")
    command.add_argument("--dtype", default="auto", help="auto, fp32, bf16, fp16 (default %(default)s)")


def _run(arguments: argparse.Namespace) -> int:
    from kvopt.experiments.plan import make_plan

    with _input():
        plan = make_plan(
            model=arguments.model,
            experiments=arguments.experiments or (),
            recipes=arguments.recipe or (),
            caches=arguments.cache,
            limit=arguments.limit,
            quick=arguments.quick,
            speed=not arguments.no_speed_model,
            device=arguments.device,
            seed=arguments.seed,
            calibration=arguments.calibration,
            calibration_windows=arguments.calibration_windows,
        )
        from kvopt.experiments.results import require_writable

        out = require_writable(arguments.out)
    _hush()
    from kvopt.experiments.report import write_report
    from kvopt.experiments.runner import run
    from kvopt.experiments.table import print_table

    outcome = run(
        plan.experiments, plan.caches, speed=plan.speed, quiet=arguments.quiet, debug=arguments.debug
    )
    # What was measured is shown before it is written: a full disk must not cost it.
    if arguments.json:
        print(outcome.results.to_json(), end="", flush=True)
    else:
        print_table(outcome.results.records)
    try:
        paths = write_report(outcome.results, out)
    except OSError as error:
        return _complain(f"results could not be written: {_one_line(error)}", FAILED)
    if not arguments.quiet:
        print("wrote " + ", ".join(map(str, paths)), file=sys.stderr)
    if arguments.quiet:
        for failure in outcome.failures:
            _complain(failure, FAILED)
    elif outcome.failures:
        _complain(
            f"{len(outcome.failures)} measurements failed, see above and the notes of the records", FAILED
        )
    return FAILED if outcome.failures else DONE


def _quantize(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    _hush()
    import kvopt
    from kvopt.eval import read_documents, windows_of
    from kvopt.files import write_whole
    from kvopt.models.load import as_device
    from kvopt.weights.budget import check_bits, method_of
    from kvopt.weights.checkpoint.formats import codec_named

    out = Path(arguments.out)
    with _input():
        recipe: Any = arguments.method
        if arguments.budget_bits is None:
            recipe = kvopt.Recipe.parse(arguments.recipe)
            if recipe.format is None:
                raise ValueError(f"recipe {str(recipe)!r} quantises nothing")
            if arguments.method is not None:
                raise ValueError("--method goes with --budget-bits; a recipe names its own")
        else:
            method_of(recipe), check_bits(arguments.budget_bits)
            if arguments.calibration is None:
                raise ValueError("--budget-bits needs --calibration FILE")
        codec_named(arguments.format)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"out: {out} is there and not empty")
        device = as_device(arguments.device)
        texts: Any = None if arguments.calibration is None else read_documents(arguments.calibration)
        model, tokenizer = kvopt.load(arguments.model, device="cpu", dtype=arguments.dtype)
        if texts is not None and (arguments.windows or arguments.window):
            texts = windows_of(texts, tokenizer, arguments.window or 2048, arguments.windows or 128)
        report = kvopt.quantize(
            model,
            recipe,
            texts,
            tokenizer,
            progress=not arguments.quiet,
            seed=arguments.seed,
            device=device,
            resume=arguments.resume,
            budget_bits=arguments.budget_bits,
        )
    with _input():
        kvopt.save_quantized(model, out, arguments.format, tokenizer)
    write_whole(out / "quantization_report.json", report.to_json().encode())
    if arguments.json:
        print(report.to_json(), end="")
    else:
        print(report)
    return DONE


def _eval(arguments: argparse.Namespace) -> int:
    from kvopt.experiments.progress import Steps

    _hush()
    import dataclasses

    import kvopt
    from kvopt import assets
    from kvopt.eval import perplexity, read_documents, read_recall, recall, windows_of

    steps = Steps(1, arguments.quiet)
    result: Any
    texts: Any
    with _input():
        scores_text = arguments.task == "perplexity"
        file = arguments.file or assets.path("wiki-heldout.txt" if scores_text else "recall.jsonl")
        texts = read_documents(file) if scores_text else read_recall(file, arguments.limit)
        model, tokenizer = _load(arguments)
        cache = None if arguments.cache is None else str(kvopt.CacheSpec.parse(arguments.cache))
    with steps.step(f"{arguments.task} of {arguments.model} on {file}") as on:
        if scores_text:
            with _input():
                windows = windows_of(texts, tokenizer, arguments.window, arguments.limit)
            prefill = arguments.prefill or (1 if cache is None else max(1, arguments.window // 2))
            result = perplexity(model, windows, cache=cache, prefill=prefill, progress=on)
        else:
            with _input():
                if arguments.history and arguments.query_aware:
                    raise ValueError(
                        "--query-aware asks each question alone, it can't be joined with --history"
                    )
            how = {"history": arguments.history, "query_aware": arguments.query_aware}
            result = recall(model, tokenizer, texts, cache=cache, progress=on, **how)
    if arguments.json:
        row = {
            "model": arguments.model,
            "recipe": arguments.recipe,
            "file": str(file),
            **dataclasses.asdict(result),
        }
        print(json.dumps({**row, "note": result.note}, allow_nan=False))
    else:
        value, scale = (result.perplexity, 1) if scores_text else (result.recall, 100)
        error = "" if result.stderr is None else f" ± {scale * result.stderr:.3f}"
        print(f"{arguments.task} {scale * value:.3f}{error}{'' if scores_text else ' %'}")
        print(result.note, file=sys.stderr)
    return DONE


def _generate(arguments: argparse.Namespace) -> int:
    _hush()
    import kvopt

    with _input():
        model, tokenizer = _load(arguments)
        cache = None if arguments.cache is None else kvopt.Cache(model, arguments.cache)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not inputs["input_ids"].shape[1]:
        return _complain("prompt: it has no tokens", BAD_INPUT)
    extra = {} if cache is None else {"past_key_values": cache}
    out = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False, **extra)
    new = out[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if arguments.json:
        held = None if cache is None else cache.nbytes()
        row = {"model": arguments.model, "recipe": arguments.recipe, "cache": arguments.cache}
        row |= {"prompt": arguments.prompt, "text": text, "new_tokens": len(new), "cache_bytes": held}
        print(json.dumps(row, ensure_ascii=False))
    else:
        print(arguments.prompt + text)
    return DONE


def _bench(arguments: argparse.Namespace) -> int:
    import torch

    from kvopt.weights import Recipe

    described = arguments.capability is not None or arguments.sms is not None
    device = arguments.device
    if device == "auto":
        device = "cuda" if described or torch.cuda.is_available() else "cpu"
    with _input():
        if described and not (arguments.explain and device == "cuda"):
            raise ValueError("--capability and --sms describe a GPU to --explain")
        if not arguments.explain and device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU")
        formats = {}
        for recipe in map(Recipe.parse, arguments.recipe):
            if recipe.format is None:
                raise ValueError(f"recipe {str(recipe)!r} quantises nothing")
            recipe.format.group_columns(arguments.k)
            formats[str(recipe)] = recipe.format
    name = {"cpu": "bf16", "cuda": "fp16"}[device] if arguments.dtype == "auto" else arguments.dtype
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    shape = {"n": arguments.n, "k": arguments.k, "dtype": name, "device": device}
    rows: list[dict[str, Any]] = []
    for recipe_name, format in formats.items():
        for m in arguments.m:
            row: dict[str, Any] = {"m": m, **shape, "recipe": recipe_name}
            if arguments.explain:
                from kvopt import ops

                with _input():
                    row["path"] = ops.explain_qlinear(
                        *(m, arguments.n, arguments.k, format, device, dtype),
                        capability=arguments.capability,
                        multiprocessors=arguments.sms,
                    )
            else:
                from dataclasses import asdict

                from kvopt.experiments.products import time_product

                row |= asdict(
                    time_product(m, arguments.n, arguments.k, recipe_name, device=device, dtype=dtype)
                ) | {"dtype": name}
            rows.append(row)
            if not arguments.json:
                _print_bench(row)
    if arguments.json:
        print(json.dumps(rows, allow_nan=False, ensure_ascii=False))
    return DONE


def _print_bench(row: dict[str, Any]) -> None:
    print(f"{row['recipe']}, {row['dtype']}, {row['device']}: M = {row['m']}, N = {row['n']}, K = {row['k']}")
    if "path" in row:
        print("\n".join("  " + line for line in row["path"].splitlines()))
        return
    print(
        f"  {row['microseconds']:.1f} us, {row['gb_per_s']:.1f} GB/s; dense {row['dense_microseconds']:.1f} us: "
        f"{row['speedup']:.2f}x; relative error {row['relative_error']:.2g}"
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from kvopt.doctor import diagnose, print_diagnosis

    diagnosis = diagnose()
    if arguments.json:
        print(json.dumps(diagnosis.to_dict(), indent=1, ensure_ascii=False))
    else:
        print_diagnosis(diagnosis)
    return DONE if diagnosis.can_run else FAILED


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import kvopt

    recipe = arguments.recipe
    return kvopt.load(
        arguments.model,
        recipe=recipe,
        device=arguments.device,
        dtype=arguments.dtype,
        progress=not arguments.quiet,
    )


class _BadInput(Exception):
    """Wraps an error that the user's input caused."""


class _input:
    """What fails inside is the fault of the input: exit code 2."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | OSError | KeyError | RuntimeError | AssertionError):
            raise _BadInput(_one_line(error)) from error


def _code_of(error: Exception) -> int:
    if isinstance(error, _BadInput):
        return BAD_INPUT
    if "kvopt.experiments.loading" in sys.modules:
        from kvopt.experiments.loading import InputError

        if isinstance(error, InputError):
            return BAD_INPUT
    return FAILED


def _complain(text: str, code: int) -> int:
    print(f"kvopt: {text}", file=sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def _hush() -> None:
    """Keeps transformers' own bars and advice out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
