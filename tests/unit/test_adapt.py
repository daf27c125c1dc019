"""Adapting trains the per-loop LoRA and nothing else, resumes, and leaves an adapter that fits back on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from open_mythos.config import ConfigError
from open_mythos.training import adapt
from open_mythos.training.config import RunConfig, load_config
from open_mythos.training.trainer import train
from open_mythos.weights import WeightsError, from_pretrained


def config(root: Path, *overrides: str) -> RunConfig:
    few = ("train.save_every=0", "train.log_every=1")
    return load_config(root / "configs" / "smoke.toml", [*few, *overrides])


@pytest.fixture(scope="module", params=[0, 2], ids=["without LoRA", "with LoRA"])
def base(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run whose model has a LoRA of this rank."""
    cfg = config(root, f"model.lora_rank={request.param}", "train.steps=3")
    return train(cfg, tmp_path_factory.mktemp("base") / "run") / "model"


def adapting(root: Path, base: Path, *overrides: str) -> RunConfig:
    return config(root, f"adapt.start={base}", "adapt.kind=lora", *overrides)


def test_only_the_lora_changes(root: Path, base: Path, tmp_path: Path):
    told: list[str] = []
    out = train(adapting(root, base), tmp_path / "run", tell=told.append)
    before, after = from_pretrained(base), from_pretrained(out / "model")
    rank = before.cfg.lora_rank or 8
    dim, loops = before.cfg.dim, before.cfg.max_loop_iters
    assert after.cfg == dataclasses.replace(before.cfg, lora_rank=rank)
    trained, every = 2 * dim * rank + loops * rank, sum(p.numel() for p in after.parameters())
    assert f"{trained:,} of {every:,} parameters are trained ({trained / every:.2%})" in told[0]
    assert json.loads((out / "run.json").read_text())["trained_parameters"] == trained
    old = before.state_dict()
    for name, value in after.state_dict().items():
        if name.endswith("expert_load"):
            assert not value.any()
        elif not name.startswith("recurrent.lora."):
            assert torch.equal(value, old[name]), name  # the router's bias too
    assert after.recurrent.lora is not None
    assert after.recurrent.lora.B.any()


def test_an_added_lora_changes_nothing_at_first(root: Path, base: Path):
    cfg = adapt.resolve(adapting(root, base, "adapt.rank=2"))
    ids = torch.randint(0, 4, (2, 9), generator=torch.Generator().manual_seed(0))
    start, model = from_pretrained(base), adapt.first_model(cfg).eval()
    assert model.recurrent.lora is not None
    if start.recurrent.lora is None:
        assert not model.recurrent.lora.B.any()
    assert torch.equal(model(ids, n_loops=3), start(ids, n_loops=3))


def test_adapting_resumes_bit_for_bit_without_the_start(root: Path, base: Path, tmp_path: Path):
    mine = tmp_path / "start"
    mine.mkdir()
    for path in base.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    cfg = adapting(root, mine)
    whole = train(cfg, tmp_path / "whole")
    half = train(cfg, tmp_path / "half", stop_at=3)
    for path in mine.iterdir():
        path.unlink()  # not needed any more
    train(cfg, half, resume=True)
    one, other = (load_file(out / "adapter" / "adapter.safetensors") for out in (whole, half))
    assert set(one) == {"down.weight", "B", "scale.weight"}
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not (half / "adapter" / "adapter.safetensors.part").exists()


def test_the_adapter_fits_back_on_the_model_it_was_made_for(root: Path, base: Path, tmp_path: Path):
    out = train(adapting(root, base), tmp_path / "run")
    start, adapted = from_pretrained(base), from_pretrained(out / "model")
    ids = torch.randint(0, 4, (2, 9), generator=torch.Generator().manual_seed(0))
    again = adapt.load_adapter(start, out / "adapter")
    assert torch.equal(again(ids, n_loops=3), adapted(ids, n_loops=3))
    assert not torch.equal(start(ids, n_loops=3), adapted(ids, n_loops=3))


def test_starting_without_adapting_trains_everything(root: Path, base: Path, tmp_path: Path):
    cfg = config(root, f"adapt.start={base}", "train.steps=1")
    out = train(cfg, tmp_path / "run")
    before, after = from_pretrained(base), from_pretrained(out / "model")
    assert after.cfg == before.cfg
    moved = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert "embed.weight" in moved
    assert not (out / "adapter").exists()


def test_what_does_not_fit_is_refused_in_one_line(root: Path, base: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"adapt.start is missing"):
        config(root, "adapt.kind=lora")
    with pytest.raises(ConfigError, match=r"adapt.kind = 'dora' is not allowed"):
        config(root, "adapt.kind=dora")
    with pytest.raises(ConfigError, match=r"adapt.start = .*nowhere' is not allowed: it must be a directory"):
        train(adapting(root, tmp_path / "nowhere"), tmp_path / "run")
    text = ("data.source=python", "model.vocab_size=259", "eval.levels=[]", "data.seq_len=9")
    with pytest.raises(ConfigError, match=r"data: its vocab_size is 259, but the model in adapt.start has 4"):
        train(adapting(root, base, *text), tmp_path / "run")
    if from_pretrained(base).cfg.lora_rank:
        with pytest.raises(
            ConfigError, match=r"adapt.rank = 3 is not allowed: the model has a LoRA of rank 2"
        ):
            train(adapting(root, base, "adapt.rank=3"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_or_foreign_adapter_is_refused(root: Path, base: Path, tmp_path: Path):
    start = from_pretrained(base)
    with pytest.raises(WeightsError, match=r"adapter.json is missing or damaged"):
        adapt.load_adapter(start, tmp_path)
    if start.recurrent.lora is None:
        with pytest.raises(WeightsError, match="lora_rank = 0"):
            adapt.save_adapter(start, tmp_path)
        return
    adapt.save_adapter(start, tmp_path)
    adapt.load_adapter(start, tmp_path)
    facts = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps({**facts, "rank": 3}))
    with pytest.raises(WeightsError, match=r"does not fit the model: \S+ is \(.*\), not \(.*\)"):
        adapt.load_adapter(start, tmp_path)
    (tmp_path / "adapter.json").write_text(json.dumps({**facts, "rank": -1}))
    with pytest.raises(WeightsError, match="rank = -1 must be a whole number"):
        adapt.load_adapter(start, tmp_path)
    (tmp_path / "adapter.json").write_text(json.dumps(facts))
    (tmp_path / "adapter.safetensors").write_bytes(b"\x00" * 99)
    with pytest.raises(WeightsError, match="is not a readable safetensors file"):
        adapt.load_adapter(start, tmp_path)
