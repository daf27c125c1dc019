"""Run configs: what is filled in, what overrides change, what is refused and how."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from open_mythos.config import ConfigError
from open_mythos.tasks import TASKS
from open_mythos.training.config import TASK_NAMES, RunConfig, load_config
from open_mythos.training.sources import evaluation_batches, train_stream
from open_mythos.variants import VARIANTS


@pytest.fixture
def smoke(root: Path) -> Path:
    return root / "configs" / "smoke.toml"


def text_config(folder: Path, model: str = 'variant = "mythos_nano"') -> Path:
    path = folder / "text.toml"
    path.write_text(f'[model]\n{model}\n[data]\nsource = "python"\n[loops]\nkind = "fixed"\nloops = 2\n')
    return path


def test_task_names_are_those_of_the_tasks():
    assert set(TASK_NAMES) == set(TASKS)


def test_reading_a_config_loads_no_torch(root: Path):
    code = (
        "import sys; from open_mythos.training.config import load_config\n"
        "for path in sys.argv[1:]: load_config(path)\n"
        "assert 'torch' not in sys.modules"
    )
    paths = [str(path) for path in sorted((root / "configs").glob("*.toml"))]
    assert paths
    subprocess.run([sys.executable, "-c", code, *paths], check=True)


def test_a_config_survives_json(smoke: Path):
    config = load_config(smoke)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_text_decides_vocabulary_and_special_ids(tmp_path: Path):
    config = load_config(text_config(tmp_path, model="dim = 64\nn_heads = 4"))
    assert (config.model.vocab_size, config.model.eos_token_id) == (259, 257)
    text = {"seq_len": 256, "bos": False, "text_field": "text"}
    assert {key: config.data.options[key] for key in text} == text


@pytest.mark.parametrize("model", ['variant = "mythos_nano"', "dim = 64\nn_heads = 4"])
def test_a_model_has_a_bos_only_when_documents_begin_with_one(tmp_path: Path, model: str):
    path = text_config(tmp_path, model)
    assert load_config(path).model.bos_token_id is None
    assert load_config(path, ["data.bos=true"]).model.bos_token_id == 256


def test_a_task_decides_the_vocabulary_of_a_variant(smoke: Path, tmp_path: Path):
    path = text_config(tmp_path)
    config = load_config(path, ["data.source=parity"])
    assert (config.model.vocab_size, config.model.eos_token_id) == (4, None)
    assert config.model.dim == VARIANTS["mythos_nano"]().dim
    larger = load_config(path, ["data.source=parity", "model.vocab_size=7"])
    assert (larger.model.vocab_size, larger.model.eos_token_id) == (7, None)


def test_overrides_are_toml_values_or_bare_words(smoke: Path):
    config = load_config(
        smoke,
        [
            "optim.lr=3e-3",
            "eval.loops=[8, 2, 2]",
            "optim.schedule=wsd",
            "data.bos=false",
            "data.length=[4, 8]",
        ],
    )
    assert config.optim.lr == 3e-3
    assert config.eval.loops == (2, 8)
    assert config.optim.schedule == "wsd"
    assert config.data.task().bos is False
    assert config.data.task().length == (4, 8)


def test_a_new_kind_empties_its_section(smoke: Path, tmp_path: Path):
    each = load_config(smoke, ["loops.per=sequence", "loops.kind=fixed", "loops.loops=3"])
    assert (each.loops.per, each.loops.options["loops"]) == ("sequence", 3)
    assert RunConfig.from_dict(each.to_dict()) == each
    config = load_config(smoke, ["loops.loops=3", "loops.kind=fixed"])
    assert config.loops.options == {"loops": 3, "backprop": None}
    (tmp_path / "a.txt").write_text("x")
    few = ["model.vocab_size=259", "eval.levels=[]", "data.seq_len=9"]
    assert load_config(smoke, [*few, f"data.source={tmp_path}"]).data.options["seq_len"] == 9
    path = text_config(tmp_path)
    path.write_text(path.read_text().replace('"python"', '"python"\nseq_len = 32'))
    assert load_config(path, ["data.source=other"]).data.options["seq_len"] == 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.learning_rate=1",
            r"optim.learning_rate is not allowed: \[optim\] has no such key; allowed: kind, lr",
        ),
        ("optim.wramup=1", "did you mean 'warmup'"),
        (
            "optm.lr=1",
            r"override 'optm.lr=1' is not allowed: a run config has no such section; did you mean 'optim'",
        ),
        ("optim=1", "must be section.key=value"),
        ("optim.lr", "must be section.key=value"),
        ("optim.lr=0", "optim.lr = 0 is not allowed: it must be a number above 0"),
        ("optim.lr=nan", "optim.lr = nan is not allowed"),
        ("optim.lr=fast", "optim.lr = 'fast' is not allowed"),
        (
            "optim.beta1=1.0",
            "optim.beta1 = 1.0 is not allowed: it must be a number of at least 0 and below 1",
        ),
        (
            "optim.schedule=linear",
            "optim.schedule = 'linear' is not allowed: it must be 'cosine' or 'wsd' or 'constant'",
        ),
        ("optim.warmup=-1", "optim.warmup = -1 is not allowed: it must be a whole number of at least 0"),
        ("train.steps=0", "train.steps = 0 is not allowed: it must be a whole number of at least 1"),
        ("train.steps=1.5", "train.steps = 1.5 is not allowed"),
        ("train.batch_size=true", "train.batch_size = True is not allowed"),
        ("eval.loops=[]", "eval.loops = .* with at least one"),
        ("eval.loops=4", "eval.loops = 4 is not allowed: it must be a list"),
        ("eval.loops=[0]", "eval.loops = 0 is not allowed"),
        ("loops.kind=progresive", "loops.kind = 'progresive' is not allowed: it must be 'fixed' or"),
        ("loops.kind=fixed", "loops.loops is missing: kind 'fixed' needs it"),
        ("loops.rate=4", "loops.rate is not allowed: kind 'progressive' has no such key"),
        ("loops.free=-1", "loops.free = -1 is not allowed: it must be a whole number of at least 0"),
        ("loops.grad=0", "loops.grad = 0 is not allowed: it must be a whole number of at least 1"),
        ("model.dmi=8", "model.dmi = 8 is not allowed: .*did you mean 'dim'"),
        ("model.dim=30", "model.n_heads = 2 is not allowed: .*even"),
        (
            "model.variant=mythos_nona",
            "there is no such variant|has no such variant; did you mean 'mythos_nano'",
        ),
        ("loops.per=row", "loops.per = 'row' is not allowed: it must be 'batch' or 'sequence'"),
        ("optim.kind=sgd", "optim.kind = 'sgd' is not allowed: it must be 'adamw' or 'muon'"),
        ("optim.muon_lr=0", "optim.muon_lr = 0 is not allowed: it must be a number above 0"),
        ("train.balance=-1", "train.balance = -1 is not allowed"),
        ("train.balance=19", "train.balance = 19 is not allowed: it must be 0 or at least 20"),
        ("train.max_skips=-1", "train.max_skips = -1 is not allowed"),
        (
            "parallel.device=tpu",
            "parallel.device = 'tpu' is not allowed: it must be 'auto' or 'cpu' or 'cuda'",
        ),
        (
            "parallel.precision=fp16",
            "parallel.precision = 'fp16' is not allowed: it must be 'fp32' or 'bf16'",
        ),
        ("parallel.compile=1", "parallel.compile = 1 is not allowed: it must be True or False"),
        ("parallel.recompute=all", "parallel.recompute = 'all' is not allowed"),
        ("parallel.replicas=0", "parallel.replicas = 0 is not allowed"),
        ("checkpoint.keep=0", "checkpoint.keep = 0 is not allowed"),
        ("log.trackers=wandb", "log.trackers = 'wandb' is not allowed: it must be a list"),
        ("log.trackers=['mlflow']", "log.trackers = 'mlflow' is not allowed: it must be 'trackio'"),
        ("data.source=1", "data.source = 1 is not allowed"),
        ("data.source=python", "model.vocab_size = 4 is not allowed: it must be at least 259 for text"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(smoke: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(smoke, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "is not valid TOML"),
        ("[data]\nsource='parity'", "loops.kind is missing"),
        ("[loops]\nkind='fixed'\nloops=1", "data.source is missing"),
        ("[trian]\nsteps=1", r"\[trian\] is not allowed: .*did you mean 'train'"),
        ("model=3", r"\[model\] = 3 is not allowed: it must be a section"),
        ("[data]\nsource='python'\nsec_len=3\n[loops]\nkind='fixed'\nloops=1", "did you mean 'seq_len'"),
        (
            "[data]\nsource='python'\nseq_len=9999\n[loops]\nkind='fixed'\nloops=1",
            "data.seq_len = 9999 .* at most model",
        ),
        (
            "[data]\nsource='python'\n[model]\nvocab_size=99\n[loops]\nkind='fixed'\nloops=1",
            "at least 259 for text",
        ),
        ("[data]\nsource='parity'\nlenght=3\n[loops]\nkind='fixed'\nloops=1", "data: .*lenght"),
        ("[data]\nsource='parity'\nlength=0\n[loops]\nkind='fixed'\nloops=1", "data: length=0"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    for path in (tmp_path / "no.toml", tmp_path):
        with pytest.raises(ConfigError, match="is not there: it must be a TOML file"):
            load_config(path)


def test_a_vocabulary_too_small_for_its_task_is_refused_before_training(smoke: Path):
    config = load_config(smoke, ["model.vocab_size=3"])
    with pytest.raises(ConfigError, match=r"model.vocab_size = 3 .* at least 4 for the task"):
        train_stream(config)


def test_levels_belong_to_tasks(smoke: Path):
    with pytest.raises(ConfigError, match=r"eval.levels = .12. is not allowed: it must be empty for text"):
        load_config(smoke, ["data.source=python", "model.vocab_size=259"])


def test_few_documents_are_cut_so_that_every_split_has_some(smoke: Path, tmp_path: Path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"{i:05d}\n" for i in range(2000)))
    config = load_config(
        smoke, [f"data.source={path}", "data.seq_len=60", "model.vocab_size=259", "eval.levels=[]"]
    )
    stream, report = train_stream(config)
    assert "cut" in report["split"]
    seen = {name: bytes_of(evaluation_batches(config, name)) for name in ("validation", "test")}
    train = bytes_of([next(stream) for _ in range(40)])
    assert seen["validation"] and seen["test"] and train  # noqa: PT018
    numbers = {
        name: {int(n) for n in text.split() if len(n) == 5} for name, text in {**seen, "train": train}.items()
    }
    assert max(numbers["train"]) < 1800 <= min(numbers["validation"])
    assert max(numbers["validation"]) < 1900 <= min(numbers["test"])


def bytes_of(batches: Iterable[dict[str, Tensor]]) -> str:
    return "\n".join(
        bytes(i for i in row.tolist() if i < 256).decode() for batch in batches for row in batch["ids"]
    )


def test_evaluation_rows_are_the_same_every_time_and_as_many_as_asked(smoke: Path):
    config = load_config(smoke, ["eval.examples=19"])
    first = torch.cat([batch["ids"] for batch in evaluation_batches(config, "test", 12)])
    again = torch.cat([batch["ids"] for batch in evaluation_batches(config, "test", 12)])
    assert first.shape == (19, 13)
    assert torch.equal(first, again)
    assert len({tuple(row.tolist()) for row in first}) > 15


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.length=64"], r"^data.length = 64 is not allowed: .* 65 tokens, more than model.max_seq_len \(64\)"),
        (["data.length=[2, 64]"], r"^data.length = 64 is not allowed"),
        (["eval.levels=[8, 64]"], r"^eval.levels = 64 is not allowed: .* more than model.max_seq_len"),
        (["data.source=digit_chain", "eval.levels=[31]", "model.vocab_size=17"], r"^eval.levels = 31 .* 1 to 30$"),
    ],
)  # fmt: skip
def test_sequences_too_long_for_the_sweep_are_refused_before_training(
    smoke: Path, overrides: list[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        train_stream(load_config(smoke, overrides))
    train_stream(load_config(smoke, ["data.length=63", "eval.levels=[63]"]))
