"""Saving and loading: the same model back, and one clear refusal for everything that is not a saved model."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from open_mythos import MythosConfig, OpenMythos
from open_mythos.weights import (
    WeightsError,
    from_pretrained,
    load_upstream,
    save_pretrained,
    to_upstream_state_dict,
)

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "dim": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 16,
    "max_loop_iters": 3,
    "prelude_layers": 1,
    "coda_layers": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "n_experts": 4,
    "n_shared_experts": 2,
    "n_experts_per_tok": 2,
    "expert_dim": 16,
    "lora_rank": 3,
}
IDS = torch.arange(12).view(2, 6)


def model_of(**fields: Any) -> OpenMythos:
    """A small model whose every tensor has values of its own."""
    model = OpenMythos(MythosConfig(**{**SIZES, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.recurrent.block.ffn.router_bias.normal_(std=0.1)
        model.recurrent.block.ffn.expert_load.copy_(torch.arange(model.cfg.n_experts))
    return model.eval()


def assert_same(a: OpenMythos, b: OpenMythos) -> None:
    assert a.cfg == b.cfg
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("limit", [5 * 2**30, 9000, 1])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attn_type": "gqa", "n_kv_heads": 3},
        {"tie_embeddings": False, "state_norm": True},
        {"lora_rank": 0, "n_shared_experts": 0, "prelude_layers": 0, "coda_layers": 0},
    ],
)
def test_round_trip(tmp_path: Path, fields: dict[str, Any], limit: int):
    model = model_of(**fields)
    save_pretrained(model, tmp_path / "deep" / "model", limit)
    again = from_pretrained(tmp_path / "deep" / "model")
    assert_same(model, again)
    assert not again.training
    assert torch.equal(model(IDS, 2), again(IDS, 2))
    assert all(p.requires_grad for p in again.parameters())
    assert len(list(again.parameters())) == len(list(model.parameters()))
    assert (again.head.weight is again.embed.weight) == model.cfg.tie_embeddings


def test_layout_of_one_file(tmp_path: Path):
    save_pretrained(model_of(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "embed.weight" in names
    assert "head.weight" not in names
    assert MythosConfig.from_json((tmp_path / "config.json").read_text()) == model_of().cfg


def test_layout_of_shards(tmp_path: Path):
    model = model_of()
    save_pretrained(model, tmp_path, 9000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    stored = {name: load_file(tmp_path / name) for name in shards}
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for shard in stored.values() for t in shard.values()
    )
    for shard in stored.values():
        assert sum(tensor.nbytes for tensor in shard.values()) <= 9000 or len(shard) == 1
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("first", "second"), [(9000, 2**30), (2**30, 9000), (9000, 4000), (9000, 9000)])
def test_saving_over_an_older_model_leaves_only_the_new_and_what_is_not_ours(
    tmp_path: Path, first: int, second: int
):
    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(model_of(), tmp_path, first)
    new = model_of(coda_layers=1, rope_theta=10000.0)
    save_pretrained(new, tmp_path, second)
    assert_same(new, from_pretrained(tmp_path))
    clean = tmp_path / "clean"
    save_pretrained(new, clean, second)
    names = {path.name for path in tmp_path.iterdir()} - {"clean", "tokenizer.json"}
    assert names == {path.name for path in clean.iterdir()}
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("theta", [500000.0, 10000.0])
@pytest.mark.parametrize(
    ("first", "second"), [(2**30, 2**30), (3 * 10**4, 3 * 10**4), (2**30, 3 * 10**4), (3 * 10**4, 2**30)]
)
def test_a_crash_while_saving_never_mixes_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int, theta: float
):
    old, new = model_of(), model_of(rope_theta=theta)
    replace, outcomes, steps = os.replace, set(), 0
    crashed = True
    while crashed:
        folder = tmp_path / str(steps)
        save_pretrained(old, folder, first)
        left = steps

        def fail_later(source: Any, target: Any) -> None:
            nonlocal left
            if left == 0:
                raise OSError("the power is gone")
            left -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail_later)
        try:
            save_pretrained(new, folder, second)
            crashed = False
        except OSError:
            pass
        monkeypatch.setattr(os, "replace", replace)
        assert not list(folder.glob("*.tmp"))
        outcomes.add(found(folder, old, new))
        steps += 1
    assert outcomes <= {"old", "new", "refused"}
    assert "new" in outcomes
    assert steps > 1


def found(folder: Path, old: OpenMythos, new: OpenMythos) -> str:
    try:
        model = from_pretrained(folder)
    except WeightsError:
        return "refused"
    for name, candidate in (("old", old), ("new", new)):
        state = candidate.state_dict()
        equal = all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        if equal and model.cfg == candidate.cfg:
            return name
    return "mixed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(tmp_path: Path, dtype: torch.dtype):
    model = model_of()
    save_pretrained(model, tmp_path / "a")
    cast = from_pretrained(tmp_path / "a", dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert cast.embed.weight.dtype == cast.recurrent.block.ffn.w_in.dtype == dtype
    assert cast.recurrent.block.ffn.router_bias.dtype == wide
    assert cast.recurrent.block.ffn.expert_load.dtype == torch.int64
    assert torch.equal(cast.embed.weight, model.embed.weight.to(dtype))
    save_pretrained(cast, tmp_path / "b")
    assert_same(cast, from_pretrained(tmp_path / "b"))
    assert_same(cast, model.to(dtype))


def test_device(tmp_path: Path):
    save_pretrained(model_of(), tmp_path)
    assert all(p.device.type == "meta" for p in from_pretrained(tmp_path, device="meta").parameters())


def test_loading_draws_no_random_numbers_and_survives_a_later_save(tmp_path: Path):
    old, new = model_of(), model_of()
    save_pretrained(old, tmp_path)
    before = torch.random.get_rng_state()
    loaded = from_pretrained(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    save_pretrained(new, tmp_path)
    assert_same(old, loaded)


class Compiled(torch.nn.Module):
    """The shape of what torch.compile makes of a module, without the seconds that importing it takes."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_a_compiled_model_saves_under_plain_names(tmp_path: Path):
    model = model_of()
    expected = model.state_dict()
    model.prelude_layers[0] = Compiled(model.prelude_layers[0])
    save_pretrained(Compiled(model), tmp_path)  # type: ignore[arg-type]
    assert from_pretrained(tmp_path).state_dict().keys() == expected.keys()


def test_a_frozen_tie_that_was_cut_is_refused(tmp_path: Path):
    model = model_of()
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(WeightsError, match=r"head\.weight is not embed\.weight"):
        save_pretrained(model, tmp_path)


def test_bad_arguments_of_save(tmp_path: Path):
    model = model_of()
    with pytest.raises(ValueError, match="max_shard_bytes = 0 is not allowed"):
        save_pretrained(model, tmp_path, 0)
    with pytest.raises(WeightsError, match="takes an OpenMythos, got Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = OpenMythos(model.cfg)
    with pytest.raises(WeightsError, match="no values yet, it is on the meta device"):
        save_pretrained(empty, tmp_path)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(WeightsError, match=r"other tensors than its config says: extra\.bias, extra\.weight"):
        save_pretrained(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="file is a file"):
        save_pretrained(model_of(), tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


CONFIG, SINGLE = "config.json", "model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / CONFIG).unlink(), r"config\.json is missing"),
    "no weights": (lambda d: (d / SINGLE).unlink(), r"model\.safetensors is missing, and so is"),
    "config not JSON": (lambda d: (d / CONFIG).write_text("{"), r"config\.json: config is not valid JSON"),
    "config a list": (
        lambda d: (d / CONFIG).write_text("[]"),
        r"config\.json: a config must be a JSON object",
    ),
    "config not text": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\xfa"), r"config\.json: .*decode"),
    "config nested": (lambda d: (d / CONFIG).write_text("[" * 10**5), r"config\.json"),
    "unknown field": (
        lambda d: edit(d / CONFIG, lambda c: c.update(dims=3)),
        r"config\.json: dims = 3 is not",
    ),
    "field out of range": (
        lambda d: edit(d / CONFIG, lambda c: c.update(dim=0)),
        r"config\.json: dim = 0 is",
    ),
    "endless digits": (
        lambda d: (d / CONFIG).write_text('{"dim": ' + "9" * 5000 + "}"),
        r"config\.json: config is not valid JSON",
    ),
    "sizes beyond any tensor": (
        lambda d: edit(d / CONFIG, lambda c: c.update(dim=10**12)),
        r"config\.json asks for tensors larger than any can be$",
    ),
    "sizes beyond 64 bits": (
        lambda d: edit(d / CONFIG, lambda c: c.update(vocab_size=10**30)),
        r"config\.json asks for tensors larger than any can be$",
    ),
    "endless layers": (
        lambda d: edit(d / CONFIG, lambda c: c.update(prelude_layers=10**9)),
        r"config\.json has 1000000002 layers",
    ),
    "missing tensor": (
        lambda d: tensors(d, lambda s: s.pop("norm.weight")),
        r"model\.safetensors lacks norm\.weight",
    ),
    "unexpected tensor": (
        lambda d: tensors(d, lambda s: s.update(extra=torch.ones(2))),
        r"model\.safetensors holds extra, which",
    ),
    "wrong shape": (
        lambda d: tensors(d, lambda s: s.update({"norm.weight": torch.ones(31)})),
        r"model\.safetensors: norm\.weight has shape \(31,\), but config\.json says \(32,\)",
    ),
    "other config": (
        lambda d: edit(d / CONFIG, lambda c: c.update(expert_dim=8)),
        r"model\.safetensors: recurrent\.block\.ffn\.\S+ has shape",
    ),
    "wrong dtype": (
        lambda d: tensors(d, lambda s: s.update({"norm.weight": torch.ones(32, dtype=torch.int32)})),
        r"norm\.weight has dtype I32: it must be F64 or F32 or F16 or BF16",
    ),
    "low bias": (
        lambda d: tensors(d, lambda s: s.update({"recurrent.block.ffn.router_bias": torch.ones(4).half()})),
        r"router_bias has dtype F16: it must be F64 or F32",
    ),
    "float load": (
        lambda d: tensors(d, lambda s: s.update({"recurrent.block.ffn.expert_load": torch.ones(4)})),
        r"expert_load has dtype F32: it must be I64",
    ),
    "cut short": (lambda d: cut(d / SINGLE, 5000), r"model\.safetensors is not a readable safetensors file"),
    "cut in the header": (
        lambda d: cut(d / SINGLE, 100),
        r"model\.safetensors is not a readable safetensors",
    ),
    "empty": (lambda d: cut(d / SINGLE, 0), r"model\.safetensors is not a readable safetensors file"),
    "pickle": (
        lambda d: torch.save({}, d / SINGLE),
        r"model\.safetensors is not a readable safetensors file",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_directory_is_refused(tmp_path: Path, case: str):
    save_pretrained(model_of(), tmp_path)
    damage, message = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(WeightsError, match=message) as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00005.safetensors"


def place(d: Path, name: object) -> None:
    edit(d / INDEX, lambda c: c["weight_map"].update({"norm.weight": name}))


def other_save(d: Path) -> None:
    names = list(load_file(d / SHARD))
    save_file({n: torch.zeros_like(load_file(d / SHARD)[n]) for n in names}, d / SHARD, {"save_id": "0"})


INDEX_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not JSON": (lambda d: (d / INDEX).write_text("}"), r"index\.json is not valid JSON"),
    "no map": (lambda d: (d / INDEX).write_text("[]"), r"index\.json has no weight_map"),
    "empty map": (
        lambda d: edit(d / INDEX, lambda c: c.update(weight_map={})),
        r"index\.json has no weight_map",
    ),
    "shard missing": (lambda d: (d / SHARD).unlink(), r"model-00002-of-00005\.safetensors is missing"),
    "shard of another save": (other_save, r"model-00002-of-00005\.safetensors comes from another save"),
    "unlisted tensor": (
        lambda d: edit(d / INDEX, lambda c: c["weight_map"].pop("norm.weight")),
        r"model-\d+-of-00005\.safetensors and .*index\.json disagree about norm\.weight",
    ),
    "traversal": (lambda d: place(d, "../x.safetensors"), r"places norm\.weight in '\.\./x\.safetensors'"),
    "absolute": (lambda d: place(d, "/etc/x.safetensors"), r"places norm\.weight in '/etc/x\.safetensors'"),
    "subfolder": (lambda d: place(d, "a/x.safetensors"), r"places norm\.weight in 'a/x\.safetensors'"),
    "backslash": (lambda d: place(d, "..\\x.safetensors"), r"places norm\.weight in"),
    "newline": (lambda d: place(d, "x.safetensors\n"), r"places norm\.weight in"),
    "pickle": (lambda d: place(d, "x.bin"), r"places norm\.weight in 'x\.bin'"),
    "number": (lambda d: place(d, 3), r"places norm\.weight in 3"),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    model = model_of()
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    limit = next(n for n in range(total // 5, total, 64) if shards_of(model, n, folder / "probe") == 5)
    save_pretrained(model, folder / "model", limit)
    return folder / "model"


def shards_of(model: OpenMythos, limit: int, folder: Path) -> int:
    from open_mythos.weights import pretrained

    return len(pretrained._split(pretrained._state_to_save(model), limit))


@pytest.mark.parametrize("case", INDEX_DAMAGE)
def test_a_damaged_index_is_refused(tmp_path: Path, sharded: Path, case: str):
    for path in sharded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    from_pretrained(tmp_path)
    damage, message = INDEX_DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(WeightsError, match=message) as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_arguments_of_load(tmp_path: Path):
    with pytest.raises(WeightsError, match="nowhere is not a directory"):
        from_pretrained(tmp_path / "nowhere")
    save_pretrained(model_of(), tmp_path)
    for dtype in (torch.int64, "bf16"):
        with pytest.raises(ValueError, match=r"dtype = .* is not allowed: it must be a floating torch dtype"):
            from_pretrained(tmp_path, dtype=dtype)  # type: ignore[arg-type]


# Upstream's layout. That the numbers are upstream's own is tests/numerics/test_upstream.py.

FIELDS = {"act_threshold": 0.7}


def upstream_model(**fields: Any) -> OpenMythos:
    cfg = MythosConfig.upstream(**{**SIZES, **FIELDS, "max_seq_len": 16, **fields})
    model = OpenMythos(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.recurrent.block.ffn.router_bias.normal_(std=0.1)
    return model.eval()


def upstream_pair(**fields: Any) -> tuple[OpenMythos, dict[str, torch.Tensor]]:
    model = upstream_model(**fields)
    return model, to_upstream_state_dict(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_type": "mla"},
        {"attn_type": "gqa"},
        {"attn_type": "gqa", "n_kv_heads": 4, "rope_theta": 1e6, "n_shared_experts": 1},
        {"attn_type": "mla", "rope_theta": 12345.678, "prelude_layers": 0, "coda_layers": 0},
    ],
)
def test_upstream_round_trip_infers_every_size(fields: dict[str, Any]):
    model, state = upstream_pair(**fields)
    again = load_upstream(state, FIELDS)
    unused = {"rope_theta", "n_kv_heads"}
    if model.cfg.attn_type == "gqa":
        unused = {"rope_theta", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim"}
    found, expected = again.cfg.to_dict(), model.cfg.to_dict()
    assert {name for name in expected if expected[name] != found[name]} <= unused
    assert again.cfg.rope_theta == pytest.approx(model.cfg.rope_theta, rel=1e-5)
    assert_same(with_cfg(again, model), model)
    assert not again.training


def with_cfg(again: OpenMythos, model: OpenMythos) -> OpenMythos:
    """The same tensors; fields that the attention at hand does not use may differ."""
    again.cfg = model.cfg
    return again


def holders() -> dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]]:
    return {
        "bare": lambda state, cfg: state,
        "model": lambda state, cfg: {"model": state, "cfg": cfg, "step": 7},
        "model_state_dict": lambda state, cfg: {"model_state_dict": state, "config": cfg, "loss": 1.5},
        "data parallel": lambda state, cfg: {"module." + name: tensor for name, tensor in state.items()},
        "compiled": lambda state, cfg: {"_orig_mod." + name: tensor for name, tensor in state.items()},
    }


FILES = [(holder, ending) for holder in holders() for ending in ("pt", "bin")]
FILES += [(holder, "safetensors") for holder in ("bare", "data parallel", "compiled")]


@pytest.mark.parametrize(("holder", "ending"), FILES)
def test_upstream_files(tmp_path: Path, holder: str, ending: str):
    model, state = upstream_pair(attn_type="gqa")
    content = holders()[holder](state, {**SIZES, **FIELDS, "attn_type": "gqa"})
    path = tmp_path / f"checkpoint.{ending}"
    if ending == "safetensors":
        save_file({name: tensor.clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    fields = None if "cfg" in content or "config" in content else FIELDS
    assert_same(with_cfg(load_upstream(path, fields), model), model)


def test_upstream_without_tables_needs_what_they_told():
    _, state = upstream_pair(attn_type="gqa", n_shared_experts=0)
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("freqs_cis")}
    with pytest.raises(
        WeightsError, match="not tell act_threshold, rope_theta, n_heads, n_experts_per_tok: pass"
    ):
        load_upstream(bare)
    fields = {**FIELDS, "rope_theta": 500000.0, "n_heads": 4, "n_experts_per_tok": 2}
    cfg = load_upstream(bare, fields).cfg
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.max_seq_len) == (4, 2, 4096)
    for heads in (5, 0, "4", True):
        with pytest.raises(WeightsError, match=r"n_heads = .* is not allowed: it must be a divisor of dim"):
            load_upstream(bare, {**fields, "n_heads": heads})


UPSTREAM_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda s: s.pop("prelude.0.attn.wo.weight"), r"lacks prelude\.0\.attn\.wo\.weight"),
    "missing expert": (lambda s: s.pop("recurrent.block.ffn.routed_experts.3.up.weight"), "lacks recurrent"),
    "missing router": (
        lambda s: s.pop("recurrent.block.ffn.router.weight"),
        "no upstream state dict: it lacks",
    ),
    "unexpected": (lambda s: s.update(other=torch.ones(1)), "holds other, which the config's model has not"),
    "shape": (lambda s: s.update({"norm.weight": torch.ones(3)}), r"norm\.weight has shape \(3,\), but"),
    "untied": (lambda s: s.update({"head.weight": torch.ones(40, 32)}), r"head\.weight differs from embed"),
    "no tensors": (lambda s: s.update(step=3), "it holds step, which are no tensors"),
    "no embedding": (lambda s: s.pop("embed.weight"), r"it has no embed\.weight"),
    "whole numbers": (
        lambda s: s.update({"norm.weight": torch.ones(32, dtype=torch.int64)}),
        r"norm\.weight has dtype torch\.int64: it must be a floating dtype$",
    ),
    "no values": (
        lambda s: s.update({"embed.weight": s["embed.weight"].to("meta")}),
        r"embed\.weight has no values: it is on the meta device$",
    ),
}


@pytest.mark.parametrize("case", UPSTREAM_DAMAGE)
def test_a_damaged_upstream_state_is_refused(case: str):
    _, state = upstream_pair(attn_type="mla")
    damage, message = UPSTREAM_DAMAGE[case]
    damage(state)
    with pytest.raises(WeightsError, match=message):
        load_upstream(state, FIELDS)


@pytest.mark.parametrize(("name", "value"), [("dim", 64), ("n_heads", 2), ("rope_theta", 10000.0)])
def test_fields_that_contradict_the_tensors_are_refused(name: str, value: float):
    _, state = upstream_pair(attn_type="mla")
    with pytest.raises(
        WeightsError, match=rf"{name} = {value!r} is not allowed: the checkpoint's tensors say"
    ):
        load_upstream(state, {**FIELDS, name: value})


@pytest.mark.parametrize("strict", [True, False])
def test_an_upstream_state_is_not_loaded_in_part(strict: bool):
    _, state = upstream_pair(attn_type="mla")
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"^this is a state dict of the public .* open_mythos\.load_upstream$"
    ):
        model.load_state_dict(state, strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bad_arguments_of_load_upstream():
    model, state = upstream_pair(attn_type="mla")
    for source in (model, None, 3):
        with pytest.raises(WeightsError, match=rf"^source must be .* got {type(source).__name__}$"):
            load_upstream(source)  # type: ignore[arg-type]
    for fields in (model.cfg, [1]):
        with pytest.raises(WeightsError, match=rf"^fields must be a dict .* got {type(fields).__name__}$"):
            load_upstream(state, fields)  # type: ignore[arg-type]


class Trap:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["TRAP"],))


@pytest.mark.parametrize("torch_format", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_format: bool
):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    path = tmp_path / "evil.pt"
    if torch_format:
        torch.save({"model": Trap()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Trap()}))
    with pytest.raises(WeightsError, match=r"evil\.pt is refused: it is damaged, or holds more than tensors"):
        load_upstream(path)
    assert not (tmp_path / "sprung").exists()


def test_other_upstream_files_are_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"none\.pt is missing"):
        load_upstream(tmp_path / "none.pt")
    (tmp_path / "a.ckpt").write_text("")
    with pytest.raises(WeightsError, match=r"a\.ckpt is not allowed: it must end in"):
        load_upstream(tmp_path / "a.ckpt")
    with pytest.raises(
        WeightsError, match=r"is a directory: load_upstream takes a file; .* from_pretrained$"
    ):
        load_upstream(tmp_path)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match=r"list\.pt holds list"):
        load_upstream(tmp_path / "list.pt")
    for content in (b"", b"junk" * 9):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(WeightsError, match=r"bad\.pt is"):
            load_upstream(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (MythosConfig(**SIZES), "upstream cannot compute this model: qk_norm = True"),
        (MythosConfig.upstream(**{**SIZES, "lora_rank": 0}), "lora_rank = 0, but it needs at least 1"),
        (
            MythosConfig.upstream(**{**SIZES, "attn_type": "gqa", "n_kv_heads": 3}),
            "n_kv_heads = 3 does not divide",
        ),
    ],
)
def test_a_model_that_upstream_cannot_compute_is_not_exported(cfg: MythosConfig, message: str):
    with torch.device("meta"):
        model = OpenMythos(cfg)
    with pytest.raises(WeightsError, match=message):
        to_upstream_state_dict(model)


def test_an_import_shares_no_memory_with_its_source():
    _, state = upstream_pair(attn_type="mla")
    model = load_upstream(state, FIELDS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
