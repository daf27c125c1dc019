"""The mixture of experts: every token against a plain loop, and balancing wherever a user may train."""

from __future__ import annotations

import datetime
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from open_mythos import MoEFFN, MythosConfig, OpenMythos

D = 16


def config(**changes: Any) -> MythosConfig:
    sizes = {
        "vocab_size": 31, "dim": D, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 32, "max_loop_iters": 3,
        "prelude_layers": 1, "coda_layers": 1, "attn_type": "gqa", "n_experts": 6, "n_shared_experts": 1,
        "n_experts_per_tok": 2, "expert_dim": 8, "lora_rank": 2,
    }  # fmt: skip
    return MythosConfig(**{**sizes, **changes})


def build(seed: int = 0, **changes: Any) -> OpenMythos:
    torch.manual_seed(seed)
    return OpenMythos(config(**changes))


def moe_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, MoEFFN))


def naive(moe: Any, x: Tensor) -> Tensor:
    """One token after the other; softmax over all experts, renormalised over the chosen ones."""
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = moe.router.weight @ token
        chosen = sorted(range(moe.n_experts), key=lambda e: -float(logits[e].detach() + moe.router_bias[e]))[
            : moe.topk
        ]
        scores = logits.softmax(0)
        total = sum(scores[e] for e in chosen)
        y = torch.zeros_like(token)
        for e in chosen:
            gate, up = (token @ moe.w_in[e]).chunk(2)
            y = y + scores[e] / total * ((gate * torch.sigmoid(gate) * up) @ moe.w_out[e])
        if moe.shared is not None:
            gate, up = (moe.shared.gate_up.weight @ token).chunk(2)
            y = y + moe.shared.down.weight @ (gate * torch.sigmoid(gate) * up)
        out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(
    ("experts", "active", "shared"),
    [
        (4, 1, 0),
        (4, 4, 1),
        (8, 2, 2),
        (16, 16, 0),
        (5, 3, 1),
        (64, 8, 1),
        (512, 1, 1),
        (512, 16, 0),
        (1, 1, 1),
    ],
)
def test_every_token_equals_a_plain_loop(experts: int, active: int, shared: int) -> None:
    moe = moe_of(build(n_experts=experts, n_experts_per_tok=active, n_shared_experts=shared)).double()
    moe.router_bias.normal_(std=0.3)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = moe(mine), naive(moe, theirs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(out)
    for grad, slow in zip(
        torch.autograd.grad(out, [mine, *moe.parameters()], weights),
        torch.autograd.grad(expected, [theirs, *moe.parameters()], weights),
        strict=True,
    ):
        torch.testing.assert_close(grad, slow, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("experts", "active", "shared"), [(6, 2, 1), (5, 5, 0), (1, 1, 1), (512, 16, 2)])
@torch.no_grad()
def test_one_token_without_gradients_equals_a_plain_loop(experts: int, active: int, shared: int) -> None:
    """The shape of every decoded token at batch one."""
    moe = moe_of(build(n_experts=experts, n_experts_per_tok=active, n_shared_experts=shared)).double()
    moe.router_bias.normal_(std=0.3)
    for _ in range(5):
        x = torch.randn(1, 1, D, dtype=torch.float64)
        torch.testing.assert_close(moe(x), naive(moe, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_near_the_plain_loop(dtype: torch.dtype) -> None:
    """All experts active, because a choice may fall either way at low precision."""
    moe = moe_of(build(n_experts=8, n_experts_per_tok=8)).to(dtype)
    x = torch.randn(3, 7, D, dtype=dtype)
    with torch.no_grad():
        out = torch.stack([moe(token.view(1, 1, D)).view(D) for token in x.flatten(0, 1)]).view_as(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, moe(x).detach(), rtol=0.02, atol=0.05)
    out = moe(x)
    assert out.dtype == dtype
    reference = moe_of(build(n_experts=8, n_experts_per_tok=8)).double()
    atol = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    torch.testing.assert_close(out.double(), naive(reference, x.double()), rtol=0, atol=atol)


def test_weights_sum_to_one_even_where_a_softmax_over_all_would_underflow() -> None:
    moe = moe_of(build(n_experts=4)).bfloat16()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0] = 100.0
        moe.router_bias.copy_(torch.tensor([-1e6, 0.0, 0.0, -1.0]))
    experts, weights = moe.route(torch.ones(3, D, dtype=torch.bfloat16))
    assert sorted(experts[0].tolist()) == [1, 2]
    assert torch.equal(weights.sum(-1), torch.ones(3))


# Balancing.


def skew(moe: Any) -> None:
    """A router that sends nearly everything to experts 0 and 1."""
    with torch.no_grad():
        moe.router.weight.mul_(0.1)
        moe.router_bias.copy_(torch.tensor([0.6, 0.5] + [0.0] * (moe.n_experts - 2)))


def shares(model: nn.Module, ids: Tensor) -> Tensor:
    """Share of the slots that each expert takes over three loops, read from the router itself."""
    seen: list[Tensor] = []
    moe = moe_of(model)
    handle = moe.register_forward_pre_hook(lambda m, args: seen.append(m.route(args[0].flatten(0, -2))[0]))
    with torch.no_grad():
        model(ids, n_loops=3)
    handle.remove()
    counts = torch.bincount(torch.cat(seen).flatten(), minlength=moe.n_experts)
    return counts / counts.sum()


def test_balancing_works_in_a_plain_training_loop() -> None:
    model = build(router_bias_rate=0.02)
    skew(moe_of(model))
    ids = torch.randint(0, 31, (8, 16))
    start = shares(model, ids)
    assert start.max() > 0.4
    assert start.min() < 0.01
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(120):
        logits = model(ids, n_loops=3)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 31), ids[:, 1:].reshape(-1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    end = shares(model, ids)
    assert end.min() > 0.1
    assert end.max() < 0.25


def error(load: Tensor) -> Tensor:
    """What the documented step multiplies by the rate."""
    share = (load.double() / load.double().mean() + 0.05).log()
    return share.mean() - share


def test_a_step_is_greater_the_less_an_expert_got_and_bounded() -> None:
    moe = moe_of(build(router_bias_rate=0.1))
    moe.expert_load.copy_(torch.tensor([0, 1, 5, 10, 10, 34]))
    moe.update_bias()
    bias = moe.router_bias
    assert (bias.diff() <= 0).all()
    assert bias[3] == bias[4]
    assert abs(float(bias.sum())) < 1e-6, "what all have in common chooses nobody, and would only grow"
    gains = bias - bias[3]
    assert float(gains[0]) == pytest.approx(0.1 * math.log(1.05 / 0.05), abs=1e-6)
    assert float(gains[2]) == pytest.approx(0.1 * math.log(1.05 / 0.55), abs=1e-6)
    moe.update_bias()
    assert torch.equal(moe.router_bias, bias), "no counts, no step"
    moe.expert_load.copy_(torch.tensor([0, 1, 5, 10, 10, 34]))
    moe.update_bias(forget=False)
    assert moe.expert_load.tolist() == [0, 1, 5, 10, 10, 34]


def test_one_update_is_the_documented_step() -> None:
    """With the last forward's loads over its loops."""
    model = build(router_bias_rate=0.25)
    moe, ids = moe_of(model), torch.randint(0, 31, (4, 16))
    model(ids, n_loops=3)
    assert not moe.router_bias.any()
    load = moe.expert_load.clone()
    assert load.sum() == 4 * 16 * 2 * 3
    model(ids, n_loops=1)
    torch.testing.assert_close(moe.router_bias.double(), 0.25 * error(load), rtol=0, atol=1e-6)
    assert moe.expert_load.sum() == 4 * 16 * 2


def test_the_bias_chooses_and_never_weighs() -> None:
    moe = moe_of(build())
    flat = torch.randn(20, D)
    before = moe.route(flat)
    moe.router_bias += 7.0
    after = moe.route(flat)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not moe.router_bias.requires_grad
    assert "router_bias" not in dict(moe.named_parameters())


@pytest.mark.parametrize("case", ["eval", "inference_mode", "rate zero"])
def test_where_the_bias_must_not_move(case: str) -> None:
    model = build(router_bias_rate=0.0 if case == "rate zero" else 0.5)
    moe, ids = moe_of(model), torch.randint(0, 31, (4, 8))
    model(ids)  # loads wait to be used
    before = moe.router_bias.clone(), moe.expert_load.clone()
    if case == "eval":
        model.eval()
        model(ids).sum().backward()
        model.generate(ids, max_new_tokens=2)
    elif case == "rate zero":
        model(ids)
        assert torch.equal(moe.router_bias, before[0])
        return
    else:
        with torch.inference_mode():
            model(ids)
    assert torch.equal(moe.router_bias, before[0])
    assert torch.equal(moe.expert_load, before[1])


def test_a_forward_without_gradients_uses_waiting_loads_once_and_counts_nothing() -> None:
    """Reentrant recompute runs its first forward so, and both must choose by the same bias."""
    model = build(router_bias_rate=0.5)
    moe, ids = moe_of(model), torch.randint(0, 31, (4, 8))
    model(ids)
    with torch.no_grad():
        model(ids)
        moved = moe.router_bias.clone()
        model(ids)
    assert moved.abs().max() > 0
    assert torch.equal(moe.router_bias, moved)
    assert not moe.expert_load.any()


def test_generation_in_training_mode_leaves_the_loads_alone() -> None:
    model = build()
    ids = torch.randint(0, 31, (2, 4))
    model(ids)
    load = moe_of(model).expert_load.clone()
    model.generate(ids, max_new_tokens=3)
    assert torch.equal(moe_of(model).expert_load, load)


@pytest.mark.parametrize("part", ["block", "step", "model"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_balancing_under_activation_recompute(
    monkeypatch: pytest.MonkeyPatch, use_reentrant: bool, part: str
) -> None:
    """Same losses, gradients and bias as without, step after step."""
    results = []
    for recompute in (False, True):
        model = build(router_bias_rate=0.3)
        ids = torch.randint(0, 31, (4, 12), generator=torch.Generator().manual_seed(5))
        if recompute:
            owner: Any = model.recurrent.block if part == "block" else model
            name = "step" if part == "step" else "forward"
            original = getattr(owner, name)

            def again(*args: Any, original: Any = original, **options: Any) -> Any:
                # Reentrant recompute wants an input with a gradient; ids have none.
                anchor = torch.zeros((), requires_grad=True)

                def run(_: Any, *inner: Any) -> Any:
                    return original(*inner, **options)

                return checkpoint(run, anchor, *args, use_reentrant=use_reentrant)

            monkeypatch.setattr(owner, name, again)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        history: list[Any] = []
        for _ in range(4):
            optimiser.zero_grad()
            loss = model(ids, n_loops=3).square().mean()
            loss.backward()
            optimiser.step()
            history += [loss.detach(), moe_of(model).router_bias.clone()]
        results.append(history + [p.detach().clone() for p in model.parameters()])
    assert results[0][-1].isfinite().all()
    assert moe_of(build()).router_bias.shape == results[0][7].shape
    assert results[0][7].abs().max() > 0.2, "the bias should have moved"
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", ["bfloat16", "half", "float", "double", "to", "twice"])
def test_the_bias_stays_wide(change: str) -> None:
    model = build()
    moe = moe_of(model)
    moe.router_bias.fill_(1.0 + 2**-20)
    if change == "to":
        model.to(torch.bfloat16)
    elif change == "twice":
        model.half().bfloat16()
    else:
        getattr(model, change)()
    assert moe.router_bias.dtype == (torch.float64 if change == "double" else torch.float32)
    assert moe.router_bias.max() == 1.0 + 2**-20
    assert moe.expert_load.dtype == torch.int64
    assert dict(model.named_buffers())["recurrent.block.ffn.router_bias"] is moe.router_bias


def test_the_bias_survives_a_narrow_model_training() -> None:
    """In bfloat16 a step of 1e-3 on a bias of 1 would vanish."""
    model = build(router_bias_rate=1e-3).bfloat16()
    moe = moe_of(model)
    moe.router_bias.fill_(1.0)
    for _ in range(3):
        model(torch.randint(0, 31, (4, 8))).float().sum().backward()
    assert moe.router_bias.unique().numel() > 1


# Several processes.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def data(rank: int) -> list[Tensor]:
    """Each rank's batches; rank 1 sees few different tokens, so that loads differ."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(0, 31 if rank == 0 else 3, (4, 8), generator=generator) for _ in range(4)]


KINDS = ("ddp", "ddp-off", "fsdp2")


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        results = {kind: train(rank, kind) for kind in KINDS}
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def train(rank: int, kind: str) -> dict[str, Any]:
    """Four plain AdamW steps; the bias and the loads after each, and the final weights."""
    model = build(router_bias_rate=0.1, halting="off" if kind == "ddp-off" else "select")
    wrapped: nn.Module = model
    if kind.startswith("ddp"):
        wrapped = DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in (*model.prelude_layers, model.recurrent.block, *model.coda_layers):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    moe, history = moe_of(model), []
    for ids in data(rank):
        optimiser.zero_grad()
        wrapped(ids, n_loops=3).square().mean().backward()
        optimiser.step()
        history.append({"bias": moe.router_bias.clone(), "load": moe.expert_load.clone()})
    weights = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        weights[name] = whole.detach().clone()
    return {"history": history, "weights": weights}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes on this machine got; they talk over the loopback device only."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(worker, args=(free_port(), str(folder)), nprocs=2, join=False)
    deadline = time.monotonic() + 180
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the two processes did not finish within 180 s")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_share_one_bias_that_follows_the_summed_loads(
    two_processes: list[dict[str, Any]], kind: str
) -> None:
    ranks = [results[kind] for results in two_processes]
    bias = torch.zeros(6)
    for step in range(4):
        states = [rank["history"][step] for rank in ranks]
        assert torch.equal(states[0]["bias"], states[1]["bias"])
        torch.testing.assert_close(states[0]["bias"], bias, rtol=0, atol=1e-6)
        assert not torch.equal(states[0]["load"], states[1]["load"]), "each rank counts its own tokens"
        bias = bias + 0.1 * error(states[0]["load"] + states[1]["load"]).float()
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name
    check_against_one_process(ranks[0]["weights"], kind)


def check_against_one_process(weights: dict[str, Tensor], kind: str) -> None:
    """The mean gradient of both ranks' batches in one process gives the same weights after four steps."""
    model = build(router_bias_rate=0.0, halting="off" if kind == "ddp-off" else "select")
    moe, optimiser = moe_of(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    load = torch.zeros(6)
    for both in zip(data(0), data(1), strict=True):
        if load.any():
            moe.router_bias += 0.1 * error(load).float()
        moe.expert_load.zero_()
        optimiser.zero_grad()
        for ids in both:
            out = model(ids, n_loops=3).square().mean()
            out.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        optimiser.step()
        load = moe.expert_load.float()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=2e-5, msg=name)
