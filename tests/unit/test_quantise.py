"""Fewer bits: coded weights against what they stand for, in PyTorch and in the C kernel; coded cache entries."""

from __future__ import annotations

import pytest
import torch

from open_mythos import KVCache, MythosConfig, OpenMythos, kernels
from open_mythos.inference.quantise import quantise
from open_mythos.model.coded import Coded, CodedExperts, CodedLinear

needs_kernels = pytest.mark.skipif("are on" not in kernels.status(), reason=kernels.status())

KINDS = ("int8", "bfloat16")
# Widths that are no multiple of a vector, so that the ends of rows count.
SMALL: dict[str, object] = {
    "vocab_size": 61,
    "dim": 72,
    "n_heads": 3,
    "n_kv_heads": 3,
    "max_seq_len": 64,
    "max_loop_iters": 3,
    "prelude_layers": 1,
    "coda_layers": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 25,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 11,
    "v_head_dim": 9,
    "n_experts": 6,
    "n_experts_per_tok": 2,
    "expert_dim": 37,
    "n_shared_experts": 1,
    "lora_rank": 4,
}


def model_of(attention: str = "mla", **changes: object) -> OpenMythos:
    model = OpenMythos(MythosConfig(**{**SMALL, "attn_type": attention, **changes})).eval()
    return model.requires_grad_(False)


def plain_twin(coded: OpenMythos) -> OpenMythos:
    """An ordinary model with exactly the weights that the coded one stands for."""
    twin = OpenMythos(coded.cfg).eval().requires_grad_(False)
    twin.to(coded.embed.weight.dtype)
    own = dict(coded.named_modules())
    for name, parameter in twin.named_parameters():
        path, _, last = name.rpartition(".")
        module = own[path]
        if isinstance(module, CodedExperts) and last in ("w_in", "w_out"):
            value = (module.coded_in if last == "w_in" else module.coded_out).value(parameter.dtype)
        else:
            value = getattr(module, last)
        parameter.copy_(value)
    for name, buffer in twin.named_buffers():
        buffer.copy_(coded.get_buffer(name))
    return twin


def cached_logits(model: OpenMythos, ids: torch.Tensor, n_loops: int = 3) -> torch.Tensor:
    """Logits of the last tokens after the first were cached: a prefill and a decode."""
    cache = KVCache()
    with torch.inference_mode():
        return torch.cat([model(part, n_loops, cache) for part in ids.split((9, 5, 1), 1)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_int8_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 7, 33, dtype=dtype)
    weight[1, 2] = 0
    coded = Coded(weight, "int8")
    assert coded.codes.dtype == torch.int8
    assert coded.factor is not None
    assert coded.factor.shape == (4, 7)
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((coded.value(dtype) - weight).abs() <= step * 0.5001).all()
    assert torch.equal(coded.codes.abs().amax(-1) == 127, step.squeeze(-1) > 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_a_coded_model_computes_what_its_weights_stand_for(kind: str, attention: str) -> None:
    model = model_of(attention, dim=72 if attention == "mla" else 66).double()
    coded, ids = quantise(model, kind), torch.randint(0, 61, (2, 15))
    twin = plain_twin(coded)
    assert (cached_logits(coded, ids) - cached_logits(twin, ids)).abs().max() <= 1e-12
    apart = (cached_logits(coded, ids) - cached_logits(model, ids)).abs().max()
    assert 1e-5 < apart < 0.2, "fewer bits change something, but little"


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernel_reads_the_codes(
    kind: str, attention: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = quantise(model_of(attention, dim=72 if attention == "mla" else 66), kind)
    ids, before = torch.randint(0, 61, (2, 15)), torch.get_num_threads()
    with kernels.disabled():
        expected = cached_logits(coded, ids)
    names: list[str] = []
    call = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *a: names.append(name) or call(name, *a))
    torch.set_num_threads(threads)
    try:
        found = cached_logits(coded, ids)
    finally:
        torch.set_num_threads(before)
    assert names.count("om_step") == 3
    assert ((found - expected).abs().max() / expected.abs().max()) <= 1e-5


@needs_kernels
def test_a_changed_code_counts_at_the_next_step() -> None:
    coded, ids = quantise(model_of()), torch.randint(0, 61, (1, 15))
    first = cached_logits(coded, ids)
    coded.recurrent.block.attn.wo.coded.codes = torch.zeros_like(coded.recurrent.block.attn.wo.coded.codes)
    assert (cached_logits(coded, ids) - first).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_coded_and_what_is_not(kind: str) -> None:
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coded = quantise(model, kind)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.weight is model.embed.weight
    linears = {n for n, m in coded.named_modules() if isinstance(m, CodedLinear)}
    block = {"attn.q_down", "attn.q_up", "attn.kv_down", "attn.kv_up", "attn.wo"}
    dense = block | {"ffn.gate_up", "ffn.down"}
    looped = block | {"ffn.shared.gate_up", "ffn.shared.down"}
    expected = {f"{place}.0.{name}" for place in ("prelude_layers", "coda_layers") for name in dense}
    assert linears == expected | {f"recurrent.block.{name}" for name in looped} | {"head"}
    exact = ("router.weight", "lora.down.weight", "act.halt.weight", "log_A", "embed.weight", "router_bias")
    for name, value in coded.state_dict().items():
        if name.endswith(exact) or "norm" in name:
            assert torch.equal(value, before[name]), name
            assert value.data_ptr() != model.state_dict()[name].data_ptr(), f"{name} is shared"
    assert not any(p.requires_grad for p in coded.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_keeps_the_codes(kind: str) -> None:
    coded = quantise(model_of(), kind)
    codes = {name: buffer.clone() for name, buffer in coded.named_buffers() if "coded" in name}
    coded.to(torch.bfloat16)
    assert codes
    assert all(torch.equal(coded.get_buffer(name), value) for name, value in codes.items())
    assert coded.head.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        assert coded(torch.randint(0, 61, (1, 5)), 2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: quantise(m, "int4"), "kind = 'int4' is not allowed: it must be 'int8' or 'bfloat16'"),
        (lambda m: quantise(m.head), "model must be an OpenMythos, got Linear"),
        (lambda m: quantise(quantise(m)), "model is quantised already"),
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(model_of())  # type: ignore[operator]
