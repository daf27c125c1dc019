"""Every command as a person types it: output, files, exit codes, one-line errors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch

from open_mythos import __version__, cli, demo

COMMANDS = ("prepare", "train", "generate", "bench", "eval", "inspect", "report", "demo")
FEW = ("train.steps=2", "train.save_every=0", "train.batch_size=2", "eval.examples=2", "eval.loops=[1,2]")
# Configs that need a network or a GPU as they stand: the same, small and on files of this machine.
SMALL = {
    "fineweb-edu": (
        "data.tokenizer=bytes", "data.seq_len=32", "model.vocab_size=259", "model.eos_token_id=257", "model.dim=32",
        "model.n_heads=2", "model.n_kv_heads=1", "model.kv_lora_rank=16", "model.q_lora_rank=16",
        "model.qk_rope_head_dim=8", "model.qk_nope_head_dim=8", "model.v_head_dim=8", "model.expert_dim=16",
    )
}  # fmt: skip


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def mythos(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run a command in this process, which saves importing torch each time."""

    def call(*args: object) -> Result:
        threads = torch.get_num_threads()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(arg) for arg in args])
        assert torch.get_num_threads() == threads
        out, err = capsys.readouterr()
        return Result(0 if stop.value.code is None else int(stop.value.code), out, err)

    return call


@pytest.fixture(scope="module")
def runs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two finished runs: a task and text, a few steps each, evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "notes.txt").write_text("Encode once, think as long as asked, decode once. é " * 60)
    text = (
        f"data.source={folder / 'notes.txt'}",
        "data.seq_len=24",
        "model.vocab_size=259",
        "eval.levels=[]",
    )
    for name, more in (("task", ()), ("text", text)):
        with pytest.raises(SystemExit) as stop:
            cli.main(
                [
                    "train",
                    str(root / "configs/smoke.toml"),
                    *more,
                    "--out",
                    str(folder / name),
                    "-q",
                    "--eval",
                ]
            )
        assert not stop.value.code
    return {"task": folder / "task", "text": folder / "text"}


def test_version_and_help(mythos):  # type: ignore[no-untyped-def]
    assert mythos("--version") == Result(0, f"mythos {__version__}\n", "")
    shown = mythos("--help")
    assert shown.code == 0
    assert all(command in shown.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_that_name_the_command(mythos, command: str):  # type: ignore[no-untyped-def]
    shown = mythos(command, "--help")
    assert shown.code == 0
    assert re.search(rf"Examples:\n    mythos {command}\b", shown.out)


def test_no_command_shows_the_help_and_is_bad_usage(mythos):  # type: ignore[no-untyped-def]
    result = mythos()
    assert result.code == 2
    assert "Usage: mythos" in result.out + result.err


def test_a_run_directory_holds_what_readers_expect(runs: dict[str, Path]):
    for run in runs.values():
        record = json.loads((run / "run.json").read_text())
        assert {"config", "seed", "versions", "seconds", "loops", "parameters", "finished"} <= set(record)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 4, 6]
        for row in rows:
            assert set(row) >= {
                "step", "loss", "n_loops", "lr", "grad_norm", "rho", "tokens_per_s", "expert_share", "seconds",
                "skipped", "memory", "grad_norms", "alarms",
            }  # fmt: skip
            assert sum(row["expert_share"]) == pytest.approx(1, abs=1e-4)
            assert 0 < row["rho"] < 1
        assert (run / "model" / "config.json").is_file()
        assert (run / "checkpoints" / "step-000000006" / "state.json").is_file()


def test_eval_json_says_quality_against_loops(runs: dict[str, Path]):
    task = json.loads((runs["task"] / "eval.json").read_text())
    assert (task["task"], task["metric"], task["loops"]) == ("parity", "accuracy", [1, 2, 4])
    assert set(task["splits"]) == {"test", "test@12 bits"}
    assert task["trained_max"] <= 4
    text = json.loads((runs["text"] / "eval.json").read_text())
    assert (text["task"], text["metric"], set(text["splits"])) == ("notes.txt", "bits_per_byte", {"test"})
    for result in (task, text):
        for split in result["splits"].values():
            assert len(split["values"]) == len(split["loops"]) == 3
            assert all(0 <= value <= (1 if result is task else 12) for value in split["values"])


def test_eval_with_other_loops(mythos, runs: dict[str, Path]):  # type: ignore[no-untyped-def]
    before = json.loads((runs["task"] / "eval.json").read_text())
    result = mythos("eval", runs["task"], "--loops", "8,1,4")
    assert result.code == 0, result.err
    assert re.search(r"split +1 +4 +8", result.out)
    after = json.loads((runs["task"] / "eval.json").read_text())
    assert after["loops"] == [1, 4, 8]
    for name, split in after["splits"].items():
        assert split["values"][:2] == [before["splits"][name]["values"][i] for i in (0, 2)]


def test_train_prints_lines_and_resumes(mythos, root: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    args = ("train", root / "configs/smoke.toml", "--out", tmp_path / "run")
    first = mythos(*args, "--stop-at", 2)
    assert (first.code, first.out) == (0, f"{tmp_path / 'run'}\n")
    device, *lines = first.err.splitlines()
    assert re.fullmatch(r"device: .*; 27,370 of 27,370 parameters are trained \(100.00%\)", device)
    assert lines
    assert all(
        re.match(r"step \d(/6  loss [\d.]+ .* tokens/s .*|: out of range: .*)", line) for line in lines
    )
    again = mythos(*args)
    assert again.code == 2
    assert "already holds a run" in again.err
    assert mythos(*args, "--resume", "--quiet") == Result(0, f"{tmp_path / 'run'}\n", "")
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]


def test_adapt_trains_the_lora_of_a_saved_model(mythos, runs: dict[str, Path], root: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    args = ("train", root / "configs/smoke.toml", "--from", runs["task"] / "model", "--adapt", "lora")
    result = mythos(*args, "--device", "cpu", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    # down (32 × 2), B (2 × 32) and a scale of 2 for each of 4 loops.
    assert result.err.splitlines()[0].endswith("136 of 27,370 parameters are trained (0.50%)")
    assert result.err.startswith("device: CPU, ")
    assert (tmp_path / "run/adapter/adapter.safetensors").is_file()
    alone = mythos("train", root / "configs/smoke.toml", "--adapt", "lora", "--out", tmp_path / "other")
    assert (alone.code, alone.out) == (2, "")
    assert "adapt.start is missing" in alone.err


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*.toml")), ids=lambda p: p.stem
)
def test_every_config_trains_and_evaluates(mythos, tmp_path: Path, path: Path):  # type: ignore[no-untyped-def]
    changes = [*FEW, *SMALL.get(path.stem, ())]
    if path.stem in SMALL:
        rows = [f"Page {i}: encode once, think as long as asked, decode once. " * 5 for i in range(60)]
        pq.write_table(pa.table({"text": rows, "id": [*map(str, range(60))]}), tmp_path / "rows.parquet")
        changes.append(f"data.source={tmp_path / 'rows.parquet'}")
    result = mythos("train", path, *changes, "--out", tmp_path, "--eval", "-q")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 2
    assert json.loads((tmp_path / "eval.json").read_text())["loops"] == [1, 2]


def test_prepare_says_what_is_in_the_text_and_what_was_left_out(mythos, root: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    lines = [json.dumps({"text": f"line {i} of text"}) for i in range(200)] + ["{", "", "3"]
    (tmp_path / "notes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = (root / "configs/demo-lm.toml", f"data.source={tmp_path / 'notes.jsonl'}", "data.seq_len=16")
    result = mythos("prepare", *config)
    assert result.code == 0, result.err
    for words in (
        r"train +1\d\d ",
        "blocks of 16",
        r"not JSON +1 +notes.jsonl:201",
        r"missing field +1 +notes.jsonl:203",
    ):
        assert re.search(words, result.out), words
    folder = Path(result.out.splitlines()[-1])
    assert len(json.loads((folder / "data_report.json").read_text())["located"]) == 3
    assert mythos("prepare", *config) == result
    strict = mythos("prepare", *config, "data.on_bad=error")
    assert strict.code == 2
    assert "notes.jsonl:201: not JSON" in strict.err
    task = mythos("prepare", root / "configs/smoke.toml")
    assert (task.code, "a task makes its data as it goes" in task.err) == (2, True)


def test_generate_streams_text_and_a_seed_fixes_it(mythos, runs: dict[str, Path]):  # type: ignore[no-untyped-def]
    args = ("generate", runs["text"], "--prompt", "Enc", "--loops", 2, "--max-new-tokens", 12, "--seed", 1)
    first, second = mythos(*args), mythos(*args)
    assert first.code == 0, first.err
    assert first.out == second.out
    assert first.out.startswith("Enc")
    assert len(first.out) > len("Enc\n")
    model = mythos("generate", runs["text"] / "model", *args[2:])
    assert model.out == first.out


def test_a_run_with_another_tokenizer_is_generated_from_and_reported(mythos, root: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    text = "Encode once, think as long as asked, decode once. é " * 60
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(tmp_path / "bpe.json"))
    (tmp_path / "notes.txt").write_text(text * 10, encoding="utf-8")
    data = (
        f"data.source={tmp_path / 'notes.txt'}",
        f"data.tokenizer={tmp_path / 'bpe.json'}",
        "data.seq_len=24",
    )
    run = tmp_path / "run"
    result = mythos("train", root / "configs/demo-lm.toml", *data, *FEW, "--out", run, "--eval", "-q")
    assert result.code == 0, result.err
    args = ("generate", run, "--prompt", "think", "--loops", 2, "--max-new-tokens", 12, "--seed", 1)
    first = mythos(*args)
    assert first.code == 0, first.err
    assert first.out.startswith("think")
    assert mythos(*args) == first
    alone = mythos("generate", run / "model", *args[2:])
    assert (alone.code, "reads no bytes" in alone.err) == (2, True)
    report = mythos("report", run, "--out", tmp_path / "report.html")
    assert report.code == 0, report.err
    assert json.loads((run / "records/samples.json").read_text())["texts"]


def test_export_takes_a_checkpoint_of_a_run_that_is_not_finished(mythos, root: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    run, text = tmp_path / "run", tmp_path / "notes.txt"
    text.write_text("Encode once, think as long as asked, decode once. " * 60)
    data = (f"data.source={text}", "data.seq_len=16", "model.vocab_size=259", "eval.levels=[]")
    args = ("train", root / "configs/smoke.toml", *data, "--out", run, "-q")
    assert mythos(*args, "--stop-at", 4).code == 0
    shutil.rmtree(run / "model")
    refused = mythos("generate", run, "--prompt", "x")
    assert (refused.code, f"mythos export {run}" in refused.err) == (2, True)
    assert mythos("export", run) == Result(0, f"step 4: {run / 'model'}\n", "")
    assert mythos("generate", run, "--prompt", "x", "--max-new-tokens", 2).code == 0
    other = mythos("export", run, "--step", 3, "--out", tmp_path / "three")
    assert other == Result(0, f"step 3: {tmp_path / 'three'}\n", "")
    assert (tmp_path / "three" / "config.json").is_file()
    missing = mythos("export", run, "--step", 5)
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert "step-000000005" in missing.err


def test_inspect_counts_and_proposes(mythos, root: Path, runs: dict[str, Path]):  # type: ignore[no-untyped-def]
    variant = mythos("inspect", "mythos_1b", "--loops", "1,32", "--context", 4096)
    assert variant.code == 0
    for word in ("routed_experts", "active", "32", "every-loop", "last-loop", "mla (this config)", "4096"):
        assert word in variant.out
    assert "ρ" not in variant.out
    run = mythos("inspect", runs["task"])
    assert re.search(r"ρ\(A\) = 0\.\d+, stable below 1\nCPU kernels are (on|off)", run.out)
    assert mythos("inspect", runs["task"] / "model").out == run.out
    config = mythos("inspect", root / "configs/smoke.toml")
    assert config.out == run.out[: run.out.index("spectral")]
    proposed = mythos("inspect", "mythos_nano", "--budget", "200k")
    assert "expert_dim: 64 ->" in proposed.out
    assert int(re.search(r"all +([\d,]+)", proposed.out)[1].replace(",", "")) <= 200_000  # type: ignore[index]
    assert "fit as they are" in mythos("inspect", "mythos_nano", "--budget", "1M").out


def test_inspect_of_a_variant_loads_no_torch():
    code = (
        "import sys; from open_mythos.cli import main\n"
        "try: main(['inspect', 'mythos_1t'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_report_is_one_page(mythos, runs: dict[str, Path], tmp_path: Path):  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib")
    page = tmp_path / "deep" / "report.html"
    result = mythos("report", runs["task"], "--out", page)
    assert result == Result(0, f"{page}\n", result.err)
    assert "<html" in page.read_text()


@pytest.mark.slow
def test_demo_trains_sweeps_and_asks_for_a_report(  # type: ignore[no-untyped-def]
    mythos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The page itself is tested above; drawing it takes longer than everything here."""

    def command(jobs: list[demo._Job], report: Path) -> list[str]:
        asked.append(([job.out for job in jobs], report))
        return ["--version"]

    asked: list[tuple[list[Path], Path]] = []
    monkeypatch.setattr(demo, "_report_command", command)
    result = mythos("demo", "--out", tmp_path / "demo", *FEW, "data.seq_len=32")
    assert result.code != 0  # the parity task has no seq_len, and is told so before anything runs
    assert "data: " in result.err
    assert not (tmp_path / "demo/lm/run.json").exists()
    result = mythos("demo", "--out", tmp_path / "demo", *FEW)
    assert result.code == 0, result.err
    assert result.out == f"{tmp_path / 'demo/report.html'}\n"
    folders = [tmp_path / "demo" / name for name in ("parity", "lm")]
    assert asked[-1] == (folders, tmp_path / "demo/report.html")
    for name in ("parity", "lm"):
        assert json.loads((tmp_path / f"demo/{name}/eval.json").read_text())["loops"] == [1, 2]


def test_demo_tells_which_run_failed(mythos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def job(name: str, out: Path, _: object) -> demo._Job:
        return demo._Job(name, out, 1, ["train", "nowhere.toml"], out / f"{name}.log")

    monkeypatch.setattr(demo, "_job", job)
    result = mythos("demo", "--out", tmp_path)
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert re.fullmatch(r"mythos: error: (parity|lm) failed: config 'nowhere.toml' is not there: .*", last)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "{root}/configs/smoke.toml", "--outt", "x"], "No such option"),
        (["train", "nowhere.toml"], "config 'nowhere.toml' is not there"),
        (["train", "{root}/configs/smoke.toml", "optim.rl=1"], "optim.rl is not allowed"),
        (["train", "{root}/configs/smoke.toml", "--stop-at", "0"], "--stop-at"),
        (["train", "{root}/configs/smoke.toml", "--out", "{tmp}/none", "--resume"], "holds no checkpoint"),
        (["train", "{root}/configs/smoke.toml", "data.source=nowhere.txt", "model.vocab_size=259",
          "eval.levels=[]", "data.seq_len=8", "--out", "{tmp}/none"], "'nowhere.txt' is not allowed: it must be"),
        (["generate", "{tmp}", "--prompt", "x"], "is not a run directory or a saved model"),
        (["generate", "{text}"], "Missing option"),
        (["generate", "{text}", "--prompt", ""], "prompt = '' is not allowed"),
        (["generate", "{task}", "--prompt", "x"], "it reads no bytes"),
        (["generate", "{text}", "--prompt", "x", "--loops", "0"], "--loops"),
        (["generate", "{text}", "--prompt", "x", "--temperature", "-1"], "temperature = -1.0 is not allowed"),
        (["generate", "{text}", "--prompt", "x", "--max-new-tokens", "9999"], "max_new_tokens = 9999 is not"),
        (["generate", "{text}", "--prompt", "x", "--exit", "sleepy"], "exit = 'sleepy' is not allowed"),
        (["generate", "{text}", "--prompt", "x", "--exit", "state:much"], "exit = 'state:much' is not allowed"),
        (["generate", "{text}", "--prompt", "x", "--exit", "state:-1"], "tolerance = -1.0 is not allowed"),
        (["generate", "{text}", "--prompt", "x", "--exit", "state,often=1"], "'state,often=1' is not allowed"),
        (["generate", "{text}", "--prompt", "x", "--speculate", "4"], "speculate = '4' is not allowed"),
        (["generate", "{text}", "--prompt", "x", "--weights", "int4"], "weights = 'int4' is not allowed"),
        (["generate", "{text}", "--prompt", "x", "--cache", "int4"], "cache = 'int4' is not allowed"),
        (["bench", "mythos_nano", "--batch", "0"], "batch = '0' is not allowed"),
        (["generate", "{text}", "--prompt", "x", "--dtype", "int4"], "dtype = 'int4' is not allowed"),
        (["generate", "{text}", "--prompt", "x", "--device", "gpu"], "device = 'gpu' is not allowed: it must be 'cpu'"),
        (["bench", "mythos_nano", "--device", "gpu"], "device = 'gpu' is not allowed: it must be 'cpu'"),
        (["bench", "mythos_nano", "--weights", "int4"], "weights = 'int4' is not allowed"),
        (["bench", "mythos_nano", "--cache", "int4"], "cache = 'int4' is not allowed"),
        (["bench", "mythos_nano", "--dtype", "int4"], "dtype = 'int4' is not allowed"),
        (["bench", "mythos_nano", "--new-tokens", "1"], "--new-tokens"),
        (["bench", "{text}", "--prompt-tokens", "9999"], "prompt = 9999 and new = 32 are not allowed together"),
        (["eval", "{tmp}"], "is not a run directory"),
        (["eval", "{task}", "--loops", "1,two"], "loops = '1,two' is not allowed"),
        (["eval", "{task}", "--loops", "0"], "loops = '0' is not allowed"),
        (["inspect", "mythos_1x"], "did you mean 'mythos_1"),
        (["inspect", "mythos_nano", "--budget", "lots"], "'lots' is not a parameter count"),
        (["inspect", "mythos_nano", "--budget", "10"], "budget = 10 parameters is not allowed"),
        (["report", "{tmp}"], "is not a run directory"),
        (["report", "{tmp}", "--out", "{tmp}"], "is a directory: it must be the HTML file to write"),
        (["demo", "train.stesp=1", "--out", "{tmp}/demo"], "did you mean 'steps'"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_and_code_2(
    mythos, root: Path, runs: dict[str, Path], tmp_path: Path, args: list[str], message: str
):  # type: ignore[no-untyped-def]
    filled = [arg.format(root=root, tmp=tmp_path, **runs) for arg in args]
    result = mythos(*filled)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("mythos: error: ")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_a_failed_run_is_code_1(mythos, root: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    few = ("train.max_skips=2", "--out", tmp_path / "run", "-q")
    args = ("optim.lr=1e30", "optim.warmup=0", "optim.clip=0", *few)
    result = mythos("train", root / "configs/smoke.toml", *args)
    assert result.code == 1
    assert re.fullmatch(
        r"mythos: error: the loss or a gradient was not finite in 3 steps .*lower optim\.lr.*\n", result.err
    )


def test_an_unexpected_error_is_one_line_and_debug_shows_where(  # type: ignore[no-untyped-def]
    mythos, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object, **__: object) -> None:
        raise OSError("no space\nleft")

    monkeypatch.setattr("open_mythos.training.trainer.train", broken)
    args = ["train", str(root / "configs/smoke.toml"), "--out", str(tmp_path / "run")]
    assert mythos(*args) == Result(1, "", "mythos: error: OSError: no space left (--debug shows where)\n")
    with pytest.raises(OSError, match="no space"):
        cli.main([*args, "--debug"])


def test_an_interrupt_is_code_130(mythos, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("open_mythos.training.trainer.train", stopped)
    result = mythos("train", root / "configs/smoke.toml", "--out", tmp_path / "run")
    assert result == Result(130, "", "mythos: error: interrupted\n")


def test_a_killed_demo_leaves_no_training_behind(tmp_path: Path):
    out = tmp_path / "demo"
    started = subprocess.Popen(
        [sys.executable, "-m", "open_mythos.cli", "demo", "--out", str(out), *FEW, "train.steps=100000"],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300  # for a machine that is slow; most take seconds
        while len(list(out.glob("*/run.json"))) < 2 and time.monotonic() < deadline:
            assert started.poll() is None
            time.sleep(0.05)
        started.terminate()
        assert started.wait(300) == 143
        with pytest.raises(ProcessLookupError):  # the group is empty, the two trainings included
            os.killpg(started.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
