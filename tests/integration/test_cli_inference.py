"""``mythos generate`` and ``mythos bench`` run the engine, and give what the simple path gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from open_mythos import ByteTokenizer, MythosConfig, OpenMythos, cli, from_pretrained, save_pretrained
from open_mythos.cli.inference import _engine_options, _place, exit_rule
from open_mythos.config import ConfigError
from open_mythos.inference import exits
from open_mythos.inference.engine import Engine, Request
from open_mythos.inference.generate import generate

LOOPS = 4


@pytest.fixture(autouse=True)
def without_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simple path, with which texts are compared, computes on the CPU."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    cfg = MythosConfig(
        vocab_size=259, dim=32, n_heads=2, n_kv_heads=1, attn_type="gqa", max_seq_len=64, max_loop_iters=LOOPS,
        prelude_layers=1, coda_layers=1, n_experts=4, n_experts_per_tok=2, n_shared_experts=1, expert_dim=16,
        lora_rank=2, eos_token_id=257,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(OpenMythos(cfg), folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    found = capsys.readouterr()
    assert not stop.value.code, found.err
    return found.out, found.err


def continued(folder: Path, prompt: str, **settings: object) -> str:
    """What the simple path gives."""
    tokenizer = ByteTokenizer()
    ids = torch.tensor([tokenizer.encode(prompt)])
    return prompt + tokenizer.decode(
        generate(from_pretrained(folder), ids, **settings)[0, ids.shape[1] :].tolist()
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ((), {}),
        (("--loops", 7), {"n_loops": 7}),
        (("--exit", "state:0.6,min=2"), {"exit": exits.StateChange(0.6, min_loops=2)}),
        (("--exit", "same"), {"exit": exits.SamePrediction()}),
        (("--speculate", "2,3"), {}),
    ],
)
def test_greedy_text_is_that_of_the_simple_path(
    saved: Path, flags: tuple[object, ...], settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--max-new-tokens", 12, "--temperature", 0)
    out, _ = run(capsys, "generate", saved, "--prompt", "Once", *args, *flags)
    assert out == continued(saved, "Once", max_new_tokens=12, temperature=0, **settings) + "\n"


def test_several_prompts_share_a_batch(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", saved, "--max-new-tokens", 6, "--seed", 3, "--prompt", "Once", "--prompt", "or more")
    out, err = run(capsys, *args, "--report")
    texts = [
        continued(saved, prompt, max_new_tokens=6, temperature=0.8, seed=3 + i)
        for i, prompt in enumerate(("Once", "or more"))
    ]
    assert out == "\n\n".join(texts) + "\n"
    assert err.splitlines() == [f"6 tokens, {LOOPS}.00 of {LOOPS} loops each"] * 2


def test_a_report_tells_the_loops_of_an_exit_rule(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", saved, "--prompt", "Once", "--max-new-tokens", 6, "--exit", "state:100", "--report")
    _, err = run(capsys, *args)
    assert err == f"6 tokens, 1.00 of {LOOPS} loops each\n"
    _, err = run(capsys, *args[:-3], "--exit", "fixed:3", "--report")
    assert err == f"6 tokens, 3.00 of {LOOPS} loops each\n"
    _, err = run(capsys, *args[:4], "--max-new-tokens", 1, "--report")
    assert err == f"1 tokens, {LOOPS}.00 of {LOOPS} loops each\n"


def test_any_number_of_prompts_may_wait(saved: Path) -> None:
    network, requests = from_pretrained(saved), [Request([1], 2)] * 1100
    with Engine(network, **_engine_options(network, requests, None)) as engine:
        assert len([engine.submit(request) for request in requests]) == 1100


def test_fewer_bits_are_asked_for_by_name(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", saved, "--prompt", "Once", "--max-new-tokens", 6, "--temperature", 0)
    for flags in (("--weights", "int8"), ("--weights", "bfloat16"), ("--cache", "int8")):
        out, _ = run(capsys, *args, *flags)
        assert out.startswith("Once")


def test_device_and_dtype_are_asked_for_by_name(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", saved, "--prompt", "Once", "--max-new-tokens", 12, "--temperature", 0)
    same, _ = run(capsys, *args, "--device", "cpu", "--dtype", "float32")
    assert same == run(capsys, *args)[0]
    ids = torch.tensor([ByteTokenizer().encode("Once")])
    network = from_pretrained(saved, dtype=torch.bfloat16)
    other, _ = run(capsys, *args, "--dtype", "bfloat16")
    added = generate(network, ids, 12, temperature=0)[0, ids.shape[1] :]
    assert other == "Once" + ByteTokenizer().decode(added.tolist()) + "\n"


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_a_gpu_is_taken_where_there_is_one(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cpu, half = torch.device("cpu"), torch.bfloat16
    assert _place(None, None) == ((torch.device("cuda"), half) if gpus else (cpu, None))
    assert _place("cpu", None) == (cpu, None)
    assert _place("cpu", "bfloat16") == (cpu, half)
    capability = (7, 5)  # which has no products of bfloat16
    assert _place(None, None) == ((torch.device("cuda"), torch.float32) if gpus else (cpu, None))
    names = ["cpu", "cuda", "cuda:0", "cuda:1"][: gpus + 1 + (gpus > 0)]
    assert [_place(name, "float32") for name in names] == [
        (torch.device(name), torch.float32) for name in names
    ]
    for name in ("gpu", "", "mps", "cuda:", f"cuda:{gpus}", *["cuda"] * (not gpus)):
        why = "" if gpus else ", since torch sees no GPU"
        allowed = f"it must be {' or '.join(map(repr, names))}{why}"
        with pytest.raises(
            ConfigError, match=f"^{re.escape(f'device = {name!r} is not allowed: {allowed}')}$"
        ):
            _place(name, None)


def test_weights_that_are_bfloat16_already_are_refused(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--weights", "bfloat16", "--dtype", "bfloat16")
    for command in (("generate", saved, "--prompt", "Once"), ("bench", saved)):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(arg) for arg in (*command, *args)])
        assert stop.value.code == 2
        assert "weights = 'bfloat16' is not allowed with dtype = 'bfloat16'" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    "weights", [(), ("--weights", "int8"), ("--weights", "bfloat16", "--dtype", "float32")]
)
def test_text_and_figures_of_a_gpu(
    saved: Path, weights: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, "generate", saved, "--prompt", "Once", "--max-new-tokens", 6, *weights)
    assert out.startswith("Once")
    sizes = ("--batch", "1", "--prompt-tokens", 5, "--new-tokens", 3, "--rounds", 1)
    out, _ = run(capsys, "bench", saved, *sizes, *weights)
    assert "computed by GraphRunner" in out
    assert ("by the modules" in out) == bool(weights)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("fixed:3", exits.Fixed(3)),
        ("act:0.9", exits.ACT(0.9)),
        ("state", exits.StateChange()),
        ("state:0.1,min=2,max=8", exits.StateChange(0.1, min_loops=2, max_loops=8)),
        ("kl:1e-2,every=2,reads=head", exits.PredictionChange(1e-2, every=2, reads="head")),
        ("same:2", exits.SamePrediction(2)),
        ("top:0.8", exits.Confidence(0.8)),
        ("margin:0.5", exits.Confidence(0.5, "margin")),
        ("entropy:1.5", exits.Confidence(1.5, "entropy")),
    ],
)
def test_rules_have_names(text: str, rule: exits.Rule) -> None:
    assert exit_rule(text) == rule


def test_bench_shows_and_writes_its_figures(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--batch", "1,2", "--prompt-tokens", 5, "--new-tokens", 3, "--rounds", 1)
    out, _ = run(capsys, "bench", saved, *sizes, "--json", tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    works = [figure["work"] for figure in found["figures"]]
    assert works == [
        "prefill, batch 1", "decode, batch 1", "prefill, batch 2", "decode, batch 2",
        f"4 requests of 2 to {LOOPS} loops on 2 rows", f"the same, all at {LOOPS} loops",
    ]  # fmt: skip
    assert all(work in out for work in works)
    assert all(figure["tokens_per_s"] > 0 < figure["seconds"] for figure in found["figures"])
    assert "computed by KernelRunner" in out
    assert found["runner"].startswith("KernelRunner")
    assert (found["loops"], found["weights"], found["cache"]) == (LOOPS, None, None)


def test_bench_takes_a_variant_and_fewer_bits(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--batch", "1", "--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 1, "--loops", 2)
    out, _ = run(capsys, "bench", "mythos_nano", *sizes, "--weights", "int8", "--cache", "int8")
    assert "decode, batch 1" in out
    assert "computed by KernelRunner, by the modules, since keys and values are kept in another form\n" in out
