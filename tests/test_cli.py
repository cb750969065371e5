# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, one-line errors, and what goes to stdout and to stderr."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvopt import assets, cli


def kvopt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kvopt.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: one line, no traceback; nothing on stdout."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("kvopt: ")]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(assets.path("llama-6m"), tmp_path / "model"))


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, kvopt.cli; kvopt.cli.parser(); print('torch' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    started = time.perf_counter()
    help_text = kvopt("--help")
    assert help_text.returncode == 0 and time.perf_counter() - started < 5
    assert all(command in help_text.stdout for command in ("run", "eval", "generate", "bench", "doctor"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run", "--limit", "-1"],
        ["run", "--limit", "x"],
        ["eval", "beauty"],
        ["generate", "llama-6m"],
        ["generate", "llama-6m", "Hi", "--max-new-tokens", "0"],
        ["bench", "--m", "0"],
        ["bench", "--explain", "--capability", "hopper"],
    ],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: kvopt" in capsys.readouterr().err


def test_the_main_job_as_json(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    options = "run --quick --json --no-speed-model --limit 1 --experiments bf16 int8 --cache sink_b256_s4 --device cpu"
    done = kvopt(*options.split(), "--out", str(out), "--seed", "3")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data == json.loads((out / "results.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["results.csv", "results.json", "results.png"]
    assert [(r["experiment"], r["cache"]) for r in data["records"]] == [
        ("bf16", "full"),
        ("bf16", "sink_b256_s4"),
        ("int8", "full"),
        ("int8", "sink_b256_s4"),
    ]
    of = {(r["experiment"], r["cache"]): r for r in data["records"]}
    assert all(r["seed"] == 3 and r["perplexity"] > 5 and r["decode_tok_s"] > 0 for r in of.values())
    assert of["int8", "full"]["perplexity"] == pytest.approx(of["bf16", "full"]["perplexity"], rel=0.01)
    assert of["int8", "full"]["model_bytes"] < 0.7 * of["bf16", "full"]["model_bytes"]
    assert of["bf16", "sink_b256_s4"]["cache_bytes"] < 0.3 * of["bf16", "full"]["cache_bytes"]
    assert "accuracy of int8 with full" in done.stderr  # progress


def test_missing_model_in_its_own_process(tmp_path: Path) -> None:
    done = kvopt("run", "--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--recipe", "int5"], "int5"),
        (["run", "--recipe", "int4_g100"], "g100"),
        (["run", "--recipe", "int4_g512", "--limit", "0"], "512"),
        (["run", "--experiments", "int9"], "did you mean 'int8'"),
        (["run", "--cache", "sinc_b8"], "did you mean 'sink'"),
        (["eval", "perplexity", "/nowhere.txt"], "No such file"),
        (["eval", "perplexity", "--cache", "h2o_b0"], "h2o"),
        (["eval", "recall", "--recipe", "int4_g128_wrong"], "wrong"),
        (["eval", "perplexity", "--window", "900000"], "fewer than one window"),
        (["eval", "perplexity", "--device", "toaster"], "toaster"),
        (["generate", "/nowhere", "Hi"], "no such folder"),
        (["generate", "llama-6m", "Hi", "--dtype", "int3"], "int3"),
        (["bench", "--recipe", "bf16"], "'bf16' quantises nothing"),
        (["bench", "--recipe", "int4_g128", "--k", "64"], "larger than the row"),
        (["bench", "--capability", "90", "--sms", "132"], "describe a GPU to --explain"),
        (["bench", "--explain", "--device", "cpu", "--sms", "132"], "describe a GPU to --explain"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # `run` makes its folder here
    assert cli.main([*arguments, "--quiet"]) == 2
    assert message in complaint(capsys)


def test_corrupt_safetensors(model_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = model_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    assert cli.main(["run", "--model", str(model_copy), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "safetensors" in complaint(capsys)
    assert list((tmp_path / "out").iterdir()) == []


def test_unwritable_folder_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    started = time.perf_counter()
    assert cli.main(["run", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "Not a directory" in complaint(capsys) and time.perf_counter() - started < 10


def test_full_disk_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is still shown, exit code 1, and neither a half-written nor a temporary file is left."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    options = (
        f"run --quick --quiet --no-speed-model --limit 0 --experiments bf16 --device cpu --out {tmp_path}"
    )
    assert cli.main(options.split()) == 1
    out, err = capsys.readouterr()
    assert "results could not be written" in err and "No space left on device" in err
    assert "bf16" in out and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_standard_output() -> None:
    """Results that can't be printed are not a success."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvopt.cli", "doctor", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode != 0


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="no such folder"):
        cli.main(["generate", "/nowhere", "Hi", "--debug"])


def test_generate_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        "llama-6m",
        "The city of Paris",
        "--max-new-tokens",
        "5",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert cli.main(arguments) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("The city of Paris") and len(plain) > 20
    assert cli.main([*arguments, "--cache", "sink_b256_s4", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert plain == f"{row['prompt']}{row['text']}\n"  # five tokens fit into the budget
    assert row["new_tokens"] == 5 and row["cache_bytes"] > 0


def test_eval_both_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--quiet", "--json"]
    assert cli.main(["eval", "perplexity", "--window", "256", "--limit", "2", *options]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (
        10 < row["perplexity"] < 100 and row["tokens_per_window"] == 255 and "one forward pass" in row["note"]
    )
    text = tmp_path / "text.txt"
    text.write_text("The city lies on the river. " * 60)
    through = ["eval", "perplexity", str(text), "--window", "128", "--limit", "1", "--cache", "sink_b32_s4"]
    assert cli.main([*through, *options]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["prefill"] == 64 and row["stderr"] is None and row["cache"] == "sink_b32_s4"
    assert cli.main(["eval", "recall", "--limit", "1", *options]) == 0
    assert json.loads(capsys.readouterr().out)["recall"] > 0.5


def test_bench_explains_without_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each recipe and M, in order; a shape far too large for memory shows that nothing runs."""
    import torch

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("--explain made a tensor")

    for name in ("randn", "empty", "zeros"):
        monkeypatch.setattr(torch, name, forbidden)
    shape = ["--n", "1000000", "--k", "1048576", "--device", "cpu", "--explain"]
    arguments = ["bench", "--m", "1", "16", "--recipe", "int4_g128", "int8_dyn", *shape]
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert err == ""
    assert [(row["recipe"], row["m"]) for row in rows] == [
        *(("int4_g128", 1), ("int4_g128", 16)),
        *(("int8_dyn", 1), ("int8_dyn", 16)),
    ]
    assert all(row["n"] == 1_000_000 and row["device"] == "cpu" and len(row["path"]) > 10 for row in rows)
    assert rows[0]["path"] != rows[2]["path"]  # 16-bit activations and int8 ones are different kernels
    assert cli.main(arguments) == 0
    plain = capsys.readouterr().out
    assert all(row["path"].splitlines()[0] in plain for row in rows) and "M = 16" in plain


def test_bench_explains_the_instruction_set_in_use() -> None:
    options = "bench --explain --m 1 --n 64 --k 64 --recipe int8 --device cpu"
    done = kvopt(*options.split(), KVOPT_ISA="scalar")
    assert done.returncode == 0, done.stderr
    assert "scalar" in done.stdout


def test_bench_explains_a_gpu_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    import kvopt

    options = "bench --explain --m 1 8192 --n 28672 --k 4096 --json"
    code = cli.main([*options.split(), "--capability", "9.0", "--sms", "132"])
    if not kvopt.build_info()["cuda_archs"]:
        assert code == 2 and "CUDA" in complaint(capsys)
        return
    hopper = [row["path"] for row in json.loads(capsys.readouterr().out)]
    assert code == 0 and hopper[0] != hopper[1]  # one row of x and thousands are different kernels
    assert cli.main([*options.split(), "--capability", "75", "--sms", "40"]) == 0
    turing = [row["path"] for row in json.loads(capsys.readouterr().out)]
    assert all(turing) and turing[1] != hopper[1]


def test_bench_measures(capsys: pytest.CaptureFixture[str]) -> None:
    options = "bench --m 1 3 --n 48 --k 64 --recipe int8 --device cpu --dtype fp32"
    assert cli.main([*options.split(), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for row, m in zip(rows, (1, 3), strict=True):
        assert (row["m"], row["n"], row["k"], row["recipe"], row["dtype"]) == (m, 48, 64, "int8", "fp32")
        assert 0 < row["relative_error"] < 0.02 and row["microseconds"] > 0 and row["gb_per_s"] > 0
        assert row["speedup"] == pytest.approx(row["dense_microseconds"] / row["microseconds"])
    assert cli.main(options.split()) == 0
    assert "dense" in capsys.readouterr().out


def test_doctor() -> None:
    done = kvopt("doctor", "--json")
    diagnosis = json.loads(done.stdout)
    assert done.returncode == 0 and diagnosis["can_run"]
    assert diagnosis["versions"]["torch"] and diagnosis["devices"][0].startswith("cpu: ")


def test_doctor_names_the_command_that_mends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvopt import doctor

    monkeypatch.setattr(
        doctor, "_version", lambda name: {"rich": None, "transformers": "4.57.1"}.get(name, "9.9")
    )
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pip install 'rich'" in out and "pip install -U 'transformers>=5.3'" in out
    assert "can NOT work" in out
