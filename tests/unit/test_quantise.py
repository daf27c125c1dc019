"""Fewer bits: coded weights against what they stand for, in PyTorch and in the C kernel; coded cache entries."""

from __future__ import annotations

import pytest
import torch

from open_mythos import Engine, KVCache, LastLoop, MythosConfig, OpenMythos, kernels
from open_mythos.inference.exits import StateChange
from open_mythos.inference.quantise import Int8Cache, Int8Codec, quantise
from open_mythos.model import CacheError
from open_mythos.model.coded import Coded, CodedExperts, CodedLinear
from open_mythos.model.decode import Decoder
from tiny_models import ODD

needs_kernels = pytest.mark.skipif("are on" not in kernels.status(), reason=kernels.status())

KINDS = ("int8", "bfloat16")


def model_of(attention: str = "mla", **changes: object) -> OpenMythos:
    model = OpenMythos(MythosConfig(**{**ODD, "attn_type": attention, **changes})).eval()
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
    call = kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *a: names.append(name) or call(name, *a))
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


# Cache entries.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "group"), [(64, 32), (20, 8), (7, 32), (9, 1)])
def test_entries_are_off_by_half_a_step_and_coding_them_again_changes_nothing(
    width: int, group: int, dtype: torch.dtype
) -> None:
    # Sizes over twenty powers of two, zeros, and a group whose largest is just at the end of the codes.
    x = torch.randn(2, 50, 3, width, dtype=dtype) * torch.randn(2, 50, 3, 1).mul(10).exp2().to(dtype)
    x[0, 0] = 0
    x[0, 1] = 127 * 2.0**-9
    x[0, 2] = 63.5
    codec = Int8Codec(group)
    stored = codec.encode({"k": x})
    assert {name: tensor.dtype for name, tensor in stored.items()} == dict.fromkeys(
        ("k", "k.exponent"), torch.int8
    )
    assert stored["k"].shape == x.shape
    assert stored["k.exponent"].shape == (2, 50, 3, -(-width // group))
    back = codec.decode(stored, dtype)["k"]
    for part, kept in zip(x.split(group, -1), back.split(group, -1), strict=True):
        step = part.abs().amax(-1, keepdim=True).double() / 127
        assert ((kept.double() - part.double()).abs() <= step * 1.0001).all(), "a step is at most doubled"
    again = codec.encode({"k": back})
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    assert torch.equal(codec.decode(again, dtype)["k"], back)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible_in_entries(value: float) -> None:
    x = torch.ones(1, 2, 64)
    x[0, 1, 40] = value
    codec = Int8Codec()
    back = codec.decode(codec.encode({"latent": x}), x.dtype)["latent"]
    assert back[0, 1, 32:].isnan().all()
    assert torch.equal(back[0, 0], x[0, 0])
    assert torch.equal(back[0, 1, :32], x[0, 1, :32])


@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("policy", [None, LastLoop()])
def test_chunks_see_tokens_as_one_call_does(attention: str, policy: LastLoop | None) -> None:
    model = model_of(attention, dim=72 if attention == "mla" else 66).double()
    ids = torch.randint(0, 61, (2, 14))
    with torch.inference_mode():
        one = Int8Cache(policy, codec=Int8Codec(8))
        whole = model(ids, 3, one)
        exact = model(ids, 3)
        cache = Int8Cache(policy, codec=Int8Codec(8))
        parts = torch.cat([model(part, 3, cache) for part in ids.split((6, 5, 1, 1, 1), 1)], 1)
    if policy is None:  # one slot for all loops is an approximation of its own
        assert (whole - parts).abs().max() <= 1e-12
        assert one.entries.keys() == cache.entries.keys()
    assert 1e-4 < (whole - exact).abs().max() < 0.2
    with torch.inference_mode():
        floats = KVCache(policy)
        model(ids.clone(), 3, floats)
    assert one.nbytes < 0.2 * floats.nbytes, "8 bits and an exponent for each 8 channels, against 64 bits"


@needs_kernels
def test_a_coded_cache_keeps_the_kernel_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(), torch.randint(0, 61, (1, 9))
    names: list[str] = []
    call = kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *a: names.append(name) or call(name, *a))
    cache = Int8Cache()
    with torch.inference_mode():
        model(ids, 2, cache)
        model(ids[:, :1], 2, cache)
        assert Decoder.begin(model, cache, 2, 3) is None
        assert "om_step" not in names
        model(ids, 2, KVCache())
    assert "om_step" in names


def test_gradients_are_refused() -> None:
    model = model_of()
    model.requires_grad_(True)
    with pytest.raises(CacheError, match="Int8Cache is for inference"):
        model(torch.randint(0, 61, (1, 4)), 1, Int8Cache())


@pytest.mark.parametrize("group", [0, -1, True, 2.0])
def test_a_bad_group_is_refused(group: object) -> None:
    with pytest.raises(
        ValueError, match=r"group = .* is not allowed: it must be a whole number of at least 1"
    ):
        Int8Codec(group)  # type: ignore[arg-type]


# In the engine.


@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("rule", [None, StateChange(0.3)])
def test_the_engine_keeps_entries_as_the_cache_does(attention: str, rule: StateChange | None) -> None:
    model = model_of(attention, dim=72 if attention == "mla" else 66).double()
    codec = Int8Codec(8)
    prompts = [torch.randint(0, 61, (n,)).tolist() for n in (9, 3, 6, 9)]
    with Engine(model, max_rows=3, page_size=4, prefill_chunk=4, codec=codec) as engine:
        results = engine.generate(prompts, 6, 3, temperature=0, exit=rule)
        least = sum(tensor[0, 0].numel() for tensor in engine.pool.tensors.values())
        assert {tensor.dtype for tensor in engine.pool.tensors.values()} == {torch.int8}
        assert engine.pool.nbytes == (engine.pool.capacity + 1) * 4 * least
    with Engine(model, max_rows=1, page_size=16, prefill_chunk=16, codec=codec) as engine:
        alone = [engine.generate([prompt], 6, 3, temperature=0, exit=rule)[0] for prompt in prompts]
    assert [result.tokens for result in results] == [result.tokens for result in alone]
    if rule is not None:
        assert [result.loops for result in results] == [result.loops for result in alone]
        return
    for prompt, result in zip(prompts, results, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + result.tokens]), 3, Int8Cache(codec=codec))
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == result.tokens


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_takes_coded_weights_to_the_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coded = quantise(model_of(), kind)
    names: list[str] = []
    call = kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *a: names.append(name) or call(name, *a))
    with Engine(coded, max_rows=2) as engine:
        results = engine.generate([[1, 2, 3], [4, 5]], 8, [3, 2], temperature=0)
    assert len(names) > 8
    for prompt, depth, result in zip(([1, 2, 3], [4, 5]), (3, 2), results, strict=True):
        with kernels.disabled(), torch.inference_mode():
            logits = coded(torch.tensor([prompt + result.tokens]), depth)
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == result.tokens
