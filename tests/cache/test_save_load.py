# SPDX-License-Identifier: Apache-2.0
"""A cache on disk: the same continuation bit for bit, and files that were tampered with end in a clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from cache.tiny_models import TINY, left_padded, random_ids, run_forced, tiny_llama
from kvopt.cache import Cache
from kvopt.cache.policies import POLICIES, Policy, Tokens, register_policy

MODELS = sorted(TINY)
SPECS = [
    *(
        "full",
        "window_b24",
        "sink_b24_s4",
        "h2o_b24",
        "h2o_p30+ada",
        "tova_b24",
        "pyramidkv_b40",
        "snapkv_b40_grow",
    ),
    *(
        "random_b24_seed3",
        "kvzip_b24",
        "full+int4_g8_r16",
        "full+fp8",
        "h2o_b40+ada+int2_g4_r8",
        "sink_b40_s2+int8_g8_r16",
    ),
    *(
        "full+minicache",
        "full+minicache_k0+int4_g8_r16",
        "h2o_b24+minicache_k20",
        "h2o_p40+ada+minicache+int4_g4_r8",
        "snapkv_b40_grow+minicache+fp8",
        "sink_b40_s2+minicache_t50",
        "kvzip_b24+minicache_k100",
    ),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_loaded_cache_continues_bit_for_bit(name: str, spec: str, tmp_path: Path) -> None:
    model = TINY[name]()
    ids, mask = left_padded([random_ids(1, 70), random_ids(1, 41)])
    cache = Cache(model, spec)
    run_forced(model, cache, ids, random_ids(2, 11), mask)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    cache.save(tmp_path / "state.safetensors")
    loaded = Cache.load(tmp_path / "state.safetensors", model)
    assert str(loaded.spec) == str(cache.spec) and loaded.nbytes() == cache.nbytes()
    assert torch.equal(loaded.lengths(), cache.lengths()) and loaded.get_seq_length() == 81
    for layer in range(2):
        for what in ("positions", "keys", "values"):
            assert torch.equal(getattr(loaded, what)(layer), getattr(cache, what)(layer))
    turn, more = random_ids(3, 14), random_ids(3, 20)
    expected = run_forced(model, cache, more, more)  # several tokens, one by one, several again
    assert torch.equal(run_forced(model, loaded, more, more), expected)
    assert torch.equal(run_forced(model, loaded, turn, turn), run_forced(model, cache, turn, turn))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model, ids, more = tiny_llama(), random_ids(2, 60), random_ids(2, 30)
    caches = [Cache(model, "h2o_b24+int4_g4_r8"), Cache(model, "h2o_b24+int4_g4_r8")]
    for cache in caches:
        run_forced(model, cache, ids, more)
    caches[0].save(tmp_path / "a")
    got, expected = (run_forced(model, cache, more, more) for cache in caches)
    assert torch.equal(got, expected)


def test_generate_goes_on_with_a_loaded_prefix(tmp_path: Path) -> None:
    model, ids = tiny_llama(), random_ids(1, 40)
    options: dict[str, Any] = dict(max_new_tokens=30, min_new_tokens=30, do_sample=False)
    cache = Cache(model, "h2o_b24+int8_g8_r8")
    model.generate(ids[:, :30], past_key_values=cache, max_new_tokens=1)
    cache.save(tmp_path / "prefix")
    a = model.generate(ids, past_key_values=cache, **options)
    b = model.generate(ids, past_key_values=Cache.load(tmp_path / "prefix", model), **options)
    assert torch.equal(a, b)


def test_what_can_not_be_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="empty"):
        Cache(model, "full").save(tmp_path / "x")
    cache = Cache(model, "full")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_forced(model, cache, random_ids(1, 4), random_ids(1, 0))
    handle.remove()
    with pytest.raises(RuntimeError, match=r"cache.reset\(\)"):
        cache.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    model = tiny_llama()
    cache = Cache(model, "h2o_b24+int4_g8_r8")
    run_forced(model, cache, random_ids(2, 40), random_ids(2, 20))
    cache.save(tmp_path / "state")
    return model, tmp_path / "state"


Tensors = dict[str, torch.Tensor]


def _set(name: str, index: tuple[Any, ...], value: float) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        tensors[name][index] = value

    return change


def _header(name: str, value: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        header[name] = value

    return change


def _replace(
    name: str, make: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


def _drop(name: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        del tensors[name]

    return change


def _repeat_position(tensors: Tensors, header: dict[str, Any]) -> None:
    tensors["0.positions"][0, -1] = tensors["0.positions"][0, -2]


HOSTILE: list[tuple[str, Callable[[Tensors, dict[str, Any]], None], str]] = [
    ("version", _header("version", 2), "version 2, this kvopt reads 1"),
    ("no version", _header("version", None), "version None"),
    ("spec type", _header("spec", 5), "header is damaged"),
    ("spec", _header("spec", "h3o_b24"), "unknown policy 'h3o'"),
    ("other spec", _header("spec", "h2o_b32+int4_g8_r8"), "'budget' is not that of h2o_b32"),
    ("other codec", _header("spec", "h2o_b24+int8_g8_r8"), "layer 0: 'packed_keys' is"),
    ("other policy", _header("spec", "window_b24+int4_g8_r8"), "layer 0: 'scores' is"),
    ("columns", _header("columns", 20), "'count' is out of range"),
    ("huge columns", _header("columns", 2**40), "header is damaged"),
    ("chunk", _header("chunk", -1), "header is damaged"),
    ("boolean", _header("columns", True), "header is damaged"),
    ("model", _header("model", {"type": "llama"}), "is of the model"),
    ("count", _set("count", (0,), -5), "'count' is out of range"),
    ("negative begin", _set("1.segments", (0, 0, 0), -8), "layer 1: 'segments' has negative"),
    ("overlap", _set("1.segments", (0, 1, 2), 0), "do not follow one another"),
    ("beyond the end", _set("1.segments", (0, 1, 3), 4000), "do not follow one another"),
    ("huge", _set("1.segments", (1, 1, 1), 2**31 - 8), "do not follow one another"),
    ("part of a group", _set("1.segments", (0, 1, 1), 12), "parts of groups|do not follow"),
    ("too long", _set("0.lengths", (1, 1, 1), 1000), "'lengths' exceed"),
    ("negative length", _set("0.lengths", (1, 1, 0), -8), "'lengths' exceed"),
    ("length of part of a group", _set("0.lengths", (0, 0, 0), 4), "'lengths' has parts of groups"),
    ("short", _set("0.lengths", (0, 0, 0), 8), "'lengths' are not those of"),
    ("position", _set("0.positions", (0, -1), 10**6), "'positions' repeat or are out of range"),
    ("negative position", _set("0.positions", (0, -1), -3), "'positions' repeat or are out of range"),
    ("repeated position", _repeat_position, "'positions' repeat"),
    ("NaN key", _set("1.plain_keys", (0, 0, 0), float("nan")), "not finite"),
    ("infinite scale", _set("1.key_scale", (0, 0, 0, 0), float("inf")), "not finite"),
    ("NaN score", _set("1.scores", (0, 0), float("nan")), "'scores' has NaN"),
    ("budget", _set("budget", (0,), 23), "'budget' is not that of"),
    ("budget of nothing", _set("budget", (0,), 0), "'budget' is out of range"),
    ("limit", _set("0.limit", (0, 0), 25), "'lengths' are not those|'limit'"),
    ("limit of nothing", _set("0.limit", (0, 0), 0), "'limit' is out of range"),
    ("dtype", _replace("0.plain_keys", lambda t: t.half()), "'plain_keys' is torch.float16"),
    ("shape", _replace("0.packed_values", lambda t: t[:, :, :4]), "'packed_values' is"),
    ("rows", _replace("1.lengths", lambda t: t[:1]), r"'lengths' is .* expected torch.int32 \(2, 2, 2\)"),
    ("two dimensions", _replace("0.packed_keys", lambda t: t.flatten(1)), "of three dimensions"),
    (
        "missing",
        _drop("1.plain_values"),
        "layer 1: no tensor 'plain_values'",
    ),
    ("no count", _drop("count"), "no tensor 'count'"),
    ("more", lambda tensors, _: tensors.update({"1.extra": torch.ones(1)}), "layer 1: unknown tensors extra"),
    ("more layers", lambda tensors, _: tensors.update({"2.limit": torch.ones(1)}), "unknown tensors 2.limit"),
]


@pytest.mark.parametrize(
    ("change", "says"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_tampered_files_are_refused(
    change: Callable[[Tensors, dict[str, Any]], None], says: str, saved: tuple[Any, Path]
) -> None:
    model, path = saved
    tensors = load_file(path)
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["kvopt.cache"])
    change(tensors, header)
    save_file(tensors, path, {"kvopt.cache": json.dumps(header)})
    with pytest.raises(ValueError, match=f"(?s)kvopt.Cache.load: .*({says})"):
        Cache.load(path, model)


def _add_shared(tensors: Tensors, header: dict[str, Any]) -> None:
    tensors["1.packed_keys"] = tensors["0.packed_keys"].clone()


def _swap_positions(tensors: Tensors, header: dict[str, Any]) -> None:
    """Two tokens of the upper layer change places in the plain part."""
    begin = tensors["0.packed_keys"].shape[1]
    tensors["1.positions"][0, begin : begin + 2] = tensors["1.positions"][0, begin : begin + 2].flip(0)


def _other_parts(tensors: Tensors, header: dict[str, Any]) -> None:
    """The capacity of each segment stays, but a group of it becomes plain."""
    tensors["0.segments"][..., 1] -= 8
    tensors["0.segments"][..., 3] += 8
    tensors["0.segments"][:, 1, 0] -= 8
    tensors["0.segments"][:, 1, 2] += 8
    tensors["0.lengths"][..., 0] -= 8
    for name in ("plain_keys", "plain_values"):
        tensors[f"0.{name}"] = torch.nn.functional.pad(tensors[f"0.{name}"], (0, 0, 0, 16))
    tensors["0.positions"] = torch.nn.functional.pad(tensors["0.positions"], (0, 16))


HOSTILE_PAIRS: list[tuple[str, Callable[[Tensors, dict[str, Any]], None], str]] = [
    ("twice", _add_shared, "layer 1: packed_keys belong to the layer below"),
    (
        "segments of the upper",
        lambda t, _: t.update({"1.segments": t["0.segments"].clone()}),
        "belong to the layer",
    ),
    ("other places", _swap_positions, "layer 1: it holds other tokens than the layer below"),
    ("other token", _set("1.positions", (0, -1), 0), "'positions' repeat|other tokens than the layer below"),
    ("fewer", _set("1.lengths", (0, 0, 1), 5), "layer 1: 'lengths' are not those of"),
    ("other parts", _other_parts, "layer 0: '.*' is|'segments' are not those of|'lengths' are not those"),
    ("NaN factor", _set("0.factors", (0, 0, 0), float("nan")), "layer 0: keys or values are not finite"),
    ("infinite factor", _set("1.factors", (1, 0, 1), float("inf")), "layer 1: keys or values are not finite"),
    ("no factors", _drop("1.factors"), "layer 1: no tensor 'factors'"),
    ("factors of one", _replace("1.factors", lambda t: t[..., :1]), "layer 1: 'factors' is"),
    ("nothing shared", _drop("0.packed_values"), "layer 0: no tensor 'packed_values'"),
    ("limit", _set("1.limit", (0, 0), 23), "'lengths' are not those|'limit'"),
    ("not merged", _header("spec", "h2o_b24+int4_g8_r8"), "layer 0: 'factors' is"),
    ("more retained", _header("spec", "h2o_b24+minicache_k90+int4_g8_r8"), "'segments' are not those of"),
    (
        "budgets apart",
        _header("spec", "h2o_b24+pyramid+minicache+int4_g8_r8"),
        "'pyramid' gives the two layers",
    ),
]


@pytest.mark.parametrize(
    ("change", "says"), [case[1:] for case in HOSTILE_PAIRS], ids=[case[0] for case in HOSTILE_PAIRS]
)
def test_tampered_pairs_are_refused(
    change: Callable[[Tensors, dict[str, Any]], None], says: str, tmp_path: Path
) -> None:
    model, path = tiny_llama(), tmp_path / "state"
    cache = Cache(model, "h2o_b24+minicache_k0+int4_g8_r8")
    run_forced(model, cache, random_ids(2, 40), random_ids(2, 20))
    cache.save(path)
    tensors = load_file(path)
    assert not {"1.packed_keys", "1.packed_values", "1.key_scale", "1.value_scale", "1.segments"} & set(
        tensors
    )
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["kvopt.cache"])
    change(tensors, header)
    save_file(tensors, path, {"kvopt.cache": json.dumps(header)})
    with pytest.raises(ValueError, match=f"(?s)kvopt.Cache.load: .*({says})"):
        Cache.load(path, model)


@pytest.mark.parametrize("content", [b"", b"\x08", b"{}", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0" + b"[" * 16])
def test_files_of_something_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ValueError, match=r"kvopt\.Cache\.load: .*state"):
        Cache.load(tmp_path / "state", tiny_llama())


def test_truncated_anywhere(saved: tuple[Any, Path]) -> None:
    model, path = saved
    whole = path.read_bytes()
    for length in sorted(
        {1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1, *torch.randint(len(whole), (10,)).tolist()}
    ):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"kvopt\.Cache\.load"):
            Cache.load(path, model)


def test_other_headers_folders_and_models(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    for other in (tiny_llama(dtype=torch.float64), TINY["gpt2"]()):
        with pytest.raises(ValueError, match=r"is of the model.*this one is"):
            Cache.load(path, other)
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="there is no file"):
            Cache.load(missing, model)
    tensors = load_file(path)
    for text in ("", "[" * 100_000, "null", '"text"', "[1, 2]", '{"version": 1}'):
        save_file(tensors, path, {"kvopt.cache": text})
        with pytest.raises(ValueError, match=r"not written by kvopt\.Cache\.save|header is damaged"):
            Cache.load(path, model)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not written by"):
        Cache.load(path, model)


def test_registered_policy_must_be_there(tmp_path: Path) -> None:
    @register_policy("parity")
    class Parity(Policy):
        def priority(self, tokens: Tokens) -> torch.Tensor:
            return tokens.positions % 2

    model = tiny_llama()
    try:
        cache = Cache(model, "parity_b8")
        run_forced(model, cache, random_ids(1, 20), random_ids(1, 0))
        cache.save(tmp_path / "state")
        assert torch.equal(Cache.load(tmp_path / "state", model).keys(1), cache.keys(1))
    finally:
        del POLICIES["parity"]
    with pytest.raises(ValueError, match="unknown policy 'parity'"):
        Cache.load(tmp_path / "state", model)
