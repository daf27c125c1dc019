"""Probes agree with the model they watch, leave it as it was, and give records that are plain JSON."""

from __future__ import annotations

import json

import pytest
import torch

from open_mythos import MythosConfig, OpenMythos
from open_mythos.analysis.probes import kv_footprint, latent_path, trace

SIZES = {
    "vocab_size": 31, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "max_loop_iters": 6,
    "prelude_layers": 1, "coda_layers": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_experts": 4, "n_experts_per_tok": 2, "n_shared_experts": 1,
    "expert_dim": 16, "lora_rank": 2,
}  # fmt: skip


def _model(**changes) -> OpenMythos:
    torch.manual_seed(1)
    return OpenMythos(MythosConfig(**{**SIZES, **changes}))


def _ids(rows: int = 2, width: int = 9) -> torch.Tensor:
    return torch.randint(0, 31, (rows, width), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
@pytest.mark.parametrize("halting", ["select", "average", "off"])
def test_decoding_the_traced_states_gives_the_forward_pass(attn_type: str, halting: str):
    model = _model(attn_type=attn_type, halting=halting, halt_bias_init=-0.5, act_threshold=0.9).eval()
    torch.nn.init.normal_(model.recurrent.act.halt.weight, std=0.5)
    ids = _ids()
    found = trace(model, ids, 6, keep_states=True)
    read = (found.weights.unsqueeze(-1) * found.states).sum(0)
    with torch.no_grad():
        torch.testing.assert_close(model.coda(read), model(ids, n_loops=6), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.weights.sum(0), torch.ones(2, 9))
    torch.testing.assert_close(found.norms, found.states.norm(dim=-1))
    assert (found.halting is None) == (halting == "off")
    if halting == "select":
        assert len(found.selected.unique()) > 1, (
            "tokens must halt at different loops for this to show anything"
        )


def test_expert_loads_are_those_the_model_counts_while_training():
    model = _model(router_bias_rate=0.0)
    ids = _ids()
    found = trace(model, ids, 5)
    assert found.expert_loads.shape == (5, 4)
    assert found.expert_loads.sum(1).tolist() == [2 * 9 * 2] * 5
    model.train()
    model(ids, n_loops=5)
    assert found.expert_loads.sum(0).tolist() == model.recurrent.block.ffn.expert_load.tolist()


def test_expert_loads_follow_the_balancing_bias():
    model = _model()
    model.recurrent.block.ffn.router_bias += torch.tensor([100.0, 100.0, 0.0, 0.0])
    assert trace(model, _ids(), 2).expert_loads.tolist() == [[18, 18, 0, 0]] * 2


def test_relative_change_is_the_distance_between_consecutive_states():
    found = trace(_model(), _ids(), 4, keep_states=True)
    states = found.states
    expected = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)
    torch.testing.assert_close(found.change[1:], expected)
    torch.testing.assert_close(found.change[0], torch.ones(2, 9))  # The state before the first loop is zero.


def test_padding_changes_nothing_that_is_recorded():
    model, ids = _model(), _ids(1, 7)
    alone = trace(model, ids, 3).to_record()
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), ids), 1)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    record = trace(model, padded, 3, attention_mask=mask).to_record()
    assert record["tokens"] == 7
    assert record["labels"] == alone["labels"]
    assert record["expert_loads"] == alone["expert_loads"]
    assert record["norms"]["median"] == pytest.approx(alone["norms"]["median"], rel=1e-4)


def test_entropy_of_the_last_loop_is_that_of_the_prediction():
    model, ids = _model(halting="off"), _ids()
    found = trace(model, ids, 3, entropy=True)
    with torch.no_grad():
        expected = torch.distributions.Categorical(logits=model.eval()(ids, n_loops=3)).entropy()
    torch.testing.assert_close(found.entropy[-1] * 0.6931471805599453, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool):
    model = _model(dropout=0.1)
    model.train(training)
    model.coda_layers.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, _ids(), 2)
    assert [module.training for module in model.modules()] == modes
    assert not model.recurrent.block.ffn.router._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_hook_goes_also_when_the_run_fails():
    model = _model()
    with pytest.raises(ValueError, match="max_seq_len"):
        trace(model, _ids(1, 65), 2)
    assert not model.recurrent.block.ffn.router._forward_hooks


def test_record_is_plain_json_and_keeps_only_the_first_tokens():
    labels = [f"<{i}>" for i in range(9)]
    record = trace(_model(), _ids(), 4, entropy=True).to_record(row=1, max_tokens=5, labels=labels)
    assert json.loads(json.dumps(record)) == record
    assert record["labels"] == labels[:5]
    assert [len(row) for row in record["halting"]] == [5] * 4
    assert record["selected"] == [4] * 5
    assert record["tokens"] == 18
    assert all(len(record["norms"][key]) == 4 for key in ("p10", "median", "p90"))
    assert record["norms"]["p10"][0] <= record["norms"]["median"][0] <= record["norms"]["p90"][0]


def test_latent_path_keeps_the_geometry_of_a_plane():
    """States that live in a plane keep their distances; the axes' signs do not depend on the library."""
    found = trace(_model(), _ids(1, 3), 5, keep_states=True)
    flat = torch.randn(15, 2, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(1)).double()).Q
    object.__setattr__(found, "states", (flat @ basis.T).view(5, 1, 3, 32))
    path = latent_path(found, [0, 1, 2])
    points = torch.tensor(path["points"], dtype=torch.float64).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(flat, flat), atol=1e-3, rtol=1e-3)
    assert sum(path["explained"]) == pytest.approx(1.0, abs=1e-3)
    object.__setattr__(found, "states", found.states.flip(2))
    mirrored = latent_path(found, [2, 1, 0])
    assert mirrored["points"] == path["points"]


def test_latent_path_follows_tokens_spread_over_the_row():
    path = latent_path(trace(_model(), _ids(1, 40), 2, keep_states=True))
    assert len(path["tokens"]) == 8
    assert path["tokens"][0] == 0
    assert path["tokens"][-1] == 39
    assert json.loads(json.dumps(path)) == path


def test_footprint_of_the_tutorial_sizes():
    cfg = MythosConfig(**{**SIZES, "dim": 128, "kv_lora_rank": 32, "qk_rope_head_dim": 16})
    record = kv_footprint(cfg, tokens=64, loops=4)
    sizes = {(bar["attention"], bar["policy"]): bar["bytes"] for bar in record["bars"]}
    assert sizes == {
        ("mla", "EveryLoop"): 73_728,
        ("mla", "LastLoop"): 36_864,
        ("gqa", "EveryLoop"): 196_608,
        ("gqa", "LastLoop"): 98_304,
    }


def _plain() -> object:
    return trace(_model(), _ids(), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trace(_model(), _ids(), 0), "n_loops = 0 is not allowed"),
        (lambda: trace(_model(), _ids() + 31, 2), "input_ids contains"),
        (lambda: trace(_model(), _ids().float(), 2), "input_ids must be"),
        (lambda: latent_path(_plain()), "keep_states=True"),
        (lambda: latent_path(trace(_model(), _ids(), 2, keep_states=True), [9]), "token = 9 is not allowed"),
        (lambda: latent_path(trace(_model(), _ids(), 2, keep_states=True), row=2), "row = 2 is not allowed"),
        (lambda: _plain().to_record(row=-1), "row = -1 is not allowed: it must be 0 to 1"),
        (lambda: _plain().to_record(max_tokens=0), "max_tokens = 0 is not allowed"),
        (lambda: _plain().to_record(labels=["a"]), "labels has 1 entries"),
        (lambda: kv_footprint(MythosConfig(**SIZES), 0, 4), "tokens = 0 is not allowed"),
        (lambda: kv_footprint(MythosConfig(**SIZES), 8, True), "loops = True is not allowed"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
