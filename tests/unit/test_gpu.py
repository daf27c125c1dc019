"""The same on a GPU: each test runs on the CPU as well, and there compares the same things."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos import KVCache, MythosConfig, OpenMythos, expert_ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ATTENTION = ("gqa", "mla")
# Relative distance of bfloat16 (8 bits) from float32 through 2 + 4 layers; measured well below half of it.
LOGITS, GRADIENTS = 0.05, 0.15


def build(attn_type: str, **changes: Any) -> OpenMythos:
    """Every expert sees every token unless told otherwise: a choice may fall either way in low precision."""
    sizes = {
        "vocab_size": 96, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "max_loop_iters": 4,
        "prelude_layers": 1, "coda_layers": 1, "attn_type": attn_type, "kv_lora_rank": 32, "q_lora_rank": 48,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_experts": 4,
        "n_shared_experts": 1, "n_experts_per_tok": 4, "expert_dim": 32, "lora_rank": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**{**sizes, **changes}))


def some_ids(device: str) -> Tensor:
    return torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(1)).to(device)


def loss_of(model: OpenMythos, ids: Tensor, n_loops: int = 4) -> Tensor:
    logits = model(ids, n_loops)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def apart(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def gradients(model: OpenMythos) -> Tensor:
    return torch.cat([p.grad.double().cpu().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_training_is_near_float32_on_the_cpu(device: str, attn_type: str, autocast: bool) -> None:
    reference = build(attn_type)
    exact = loss_of(reference, some_ids("cpu"))
    exact.backward()
    model = build(attn_type).to(device) if autocast else build(attn_type).to(device, torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        loss = loss_of(model, some_ids(device))
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.05
    assert apart(gradients(model), gradients(reference)) < GRADIENTS
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        logits = model.eval()(some_ids(device), 4)
    with torch.no_grad():
        assert apart(logits, reference.eval()(some_ids("cpu"), 4)) < LOGITS


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("device", DEVICES)
def test_float32_forward_and_gradients_equal_those_of_the_cpu(device: str, attn_type: str) -> None:
    """With a choice of experts, and within float32's own error."""
    reference = build(attn_type, n_experts_per_tok=2)
    loss_of(reference, some_ids("cpu")).backward()
    model = build(attn_type, n_experts_per_tok=2).to(device)
    loss_of(model, some_ids(device)).backward()
    assert apart(gradients(model), gradients(reference)) < 1e-4
    load = model.recurrent.block.ffn.expert_load
    assert torch.equal(load.cpu(), reference.recurrent.block.ffn.expert_load)  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_chunked_decode_equals_the_full_forward(device: str, attn_type: str, kind: str) -> None:
    """In float64, where every kernel must agree to 1e-10, and in bfloat16 within its tolerance."""
    ids = some_ids(device)
    marks: dict[str, Tensor] = {}
    if kind == "left":
        marks["attention_mask"] = torch.arange(24, device=device) >= torch.tensor(
            [[0], [3], [9], [0]], device=device
        )
    if kind == "packed":
        marks["document_ids"] = (torch.arange(24, device=device) // 7).expand(4, -1)
    real = marks.get("attention_mask", torch.ones_like(ids)) != 0
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.bfloat16, LOGITS)):
        model = build(attn_type).to(device, dtype).eval()
        full, cache, parts = model(ids, 4, **marks), KVCache(), []
        for start, stop in ((0, 10), (10, 15), (15, 16), (16, 24)):
            part = {name: mark[:, start:stop] for name, mark in marks.items()}
            parts.append(model(ids[:, start:stop], 4, cache, **part))
        assert apart(torch.cat(parts, 1)[real], full[real]) < tolerance


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_generation_equals_that_of_the_cpu(device: str, attn_type: str) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
    expected = build(attn_type).double().generate(prompts, max_new_tokens=12, temperature=0)
    got = build(attn_type).double().to(device).generate(prompts, max_new_tokens=12, temperature=0)
    assert got.device.type == device
    assert torch.equal(got.cpu(), expected)
    low = build(attn_type).to(device, torch.bfloat16)
    a, b = (low.generate(prompts, max_new_tokens=12, seed=3) for _ in range(2))
    assert torch.equal(a, b)


class _NoHostReads(TorchDispatchMode):
    """Refuses every operator whose result the host must wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise RuntimeError(f"{func} reads the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    if device == "cpu":
        with _NoHostReads():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("device", DEVICES)
def test_training_forward_and_backward_never_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, attn_type: str, kind: str
) -> None:
    """On the CPU ids are read to check them; nothing after that may be."""
    model = build(attn_type, n_experts_per_tok=2, router_bias_rate=0.1).to(device)
    ids, marks = some_ids(device), {}
    if kind == "masked":
        marks["attention_mask"] = torch.ones_like(ids)
    if kind == "packed":
        marks["document_ids"] = torch.zeros_like(ids)
    if device == "cpu":
        monkeypatch.setattr("open_mythos.model.transformer.check_ids", lambda *_: None)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for step in range(3):  # the first may set libraries up
        with no_synchronisation(device) if step else nullcontext():
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(ids, 4, **marks).float().square().mean()
            loss.backward()
    assert model.recurrent.block.ffn.router_bias.abs().max() > 0  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_the_grouped_product_is_taken(monkeypatch: pytest.MonkeyPatch, device: str, autocast: bool) -> None:
    """Twice a loop: into the experts and out of them."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this build of torch has no F.grouped_mm")
    seen: list[torch.dtype] = []
    original = F.grouped_mm

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(x.dtype)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(F, "grouped_mm", counted)
    model = build("gqa", n_experts_per_tok=2).to(device)
    model = model if autocast else model.bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        model(some_ids(device), 3).float().sum().backward()
    assert seen == [torch.bfloat16] * 6
    gradient = model.recurrent.block.ffn.w_in.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("device", DEVICES)
def test_moving_the_model_keeps_the_bias_wide_and_the_head_tied(device: str) -> None:
    model = build("mla").to(device, torch.bfloat16)
    ffn: Any = model.recurrent.block.ffn
    assert ffn.router_bias.dtype == torch.float32
    assert ffn.router_bias.device.type == ffn.expert_load.device.type == device
    assert model.head.weight is model.embed.weight
    ids = some_ids(device)
    with torch.device(device):
        assert OpenMythos(model.cfg)(ids, 1).device.type == device


@pytest.mark.parametrize("counts", [[24, 24, 24, 24], [1, 13, 77, 5], [0, 96, 0, 0], [3, 0, 0, 93]], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_grouped_linear_in_bfloat16_equals_its_reference(device: str, counts: list[int]) -> None:
    """Groups of any size, empty ones included; outputs and both gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 64, generator=generator)
    weight = torch.randn(4, 64, 32, generator=generator) / 8
    grad = torch.randn(96, 32, generator=generator)
    results = []
    for where, dtype, function in (
        (device, torch.bfloat16, expert_ops.grouped_linear),
        ("cpu", torch.float64, expert_ops.grouped_linear_reference),
    ):
        leaves = [t.bfloat16().to(where, dtype).requires_grad_() for t in (x, weight)]
        out = function(*leaves, torch.tensor(counts, device=where))
        results.append((out, *torch.autograd.grad(out, leaves, grad.bfloat16().to(where, dtype))))
    for mine, exact in zip(*results, strict=True):
        assert apart(mine, exact) < 0.01
    for e, count in enumerate(counts):
        assert count or not results[0][2][e].any(), "an expert without tokens has a gradient of exactly zero"
