"""The C kernels against PyTorch: values, what turns them off, and how they are built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from open_mythos import KVCache, MythosConfig, OpenMythos, kernels, ops
from open_mythos.model.layers import Expert, RMSNorm

needs_kernels = pytest.mark.skipif("are on" not in kernels.status(), reason=kernels.status())

SMALL: dict[str, object] = {
    "vocab_size": 61,
    "dim": 72,
    "n_heads": 3,
    "max_seq_len": 400,
    "max_loop_iters": 3,
    "attn_type": "mla",
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


def model_of(**changes: object) -> OpenMythos:
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**{**SMALL, **changes})).eval()


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN from here on, so that a place left unwritten shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: _nan(make(*a, **k)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: _nan(new_empty(self, *a, **k)))


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)


def moe_reference(x, w_in, w_out, experts, weights, gate_up=None, down=None):
    """In float64, one token and expert after the other."""
    x, w_in, w_out, weights = (t.double() for t in (x, w_in, w_out, weights))
    out = torch.zeros_like(x)
    for n in range(len(x)):
        for expert, weight in zip(experts[n].tolist(), weights[n], strict=True):
            gate, up = (x[n] @ w_in[expert]).chunk(2)
            out[n] += weight * (F.silu(gate) * up @ w_out[expert])
    if gate_up is not None:
        gate, up = (x @ gate_up.double().t()).chunk(2, -1)
        out += F.silu(gate) * up @ down.double().t()
    return out


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest error relative to the largest value."""
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert float(error) <= tolerance


def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels called from here on."""
    names: list[str] = []
    call = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *a: names.append(name) or call(name, *a))
    return names


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


MOE_SHAPES = [
    # N, D, E, F, k, Fs
    (1, 512, 16, 256, 4, 256),
    (8, 64, 16, 32, 4, 48),
    (1, 7, 4, 5, 1, 3),
    (3, 33, 4, 17, 4, 0),
    (16, 40, 512, 21, 16, 9),
    (5, 100, 9, 130, 3, 1),
    (16, 16, 4, 16, 1, 16),
]


@needs_kernels
@pytest.mark.parametrize("shape", MOE_SHAPES, ids=str)
def test_moe(shape, threads, monkeypatch):
    N, D, E, width, k, side = shape
    torch.manual_seed(N * D)
    x, w_in, w_out = torch.randn(N, D), torch.randn(E, D, 2 * width), torch.randn(E, width, D)
    experts = torch.stack([torch.randperm(E)[:k] for _ in range(N)])
    weights = torch.rand(N, k)
    dense = (torch.randn(2 * side, D), torch.randn(D, side)) if side else ()
    expected = moe_reference(x, w_in, w_out, experts, weights, *dense)
    with torch.no_grad():
        poison(monkeypatch)
        first = kernels.moe(x, w_in, w_out, experts, weights, *dense)
        close(first, expected)
        assert torch.equal(first, kernels.moe(x, w_in, w_out, experts, weights, *dense))


@needs_kernels
def test_moe_with_one_expert_twice_in_a_token():
    x, w_in, w_out = torch.randn(2, 8), torch.randn(3, 8, 10), torch.randn(3, 5, 8)
    experts, weights = torch.tensor([[1, 1], [2, 1]]), torch.rand(2, 2)
    close(kernels.moe(x, w_in, w_out, experts, weights), moe_reference(x, w_in, w_out, experts, weights))


@needs_kernels
@pytest.mark.parametrize("expert", [-1, 3])
def test_moe_refuses_an_expert_that_is_not_there(expert):
    x, w_in, w_out = torch.randn(1, 8), torch.randn(3, 8, 10), torch.randn(3, 5, 8)
    with pytest.raises(IndexError, match="each must be 0 to 2"):
        kernels.moe(x, w_in, w_out, torch.tensor([[0, expert]]), torch.rand(1, 2))


@needs_kernels
@pytest.mark.parametrize(("n", "dim", "width"), [(1, 512, 1376), (4, 31, 18), (16, 5, 1)])
def test_swiglu(n, dim, width, threads, monkeypatch):
    torch.manual_seed(n)
    x, layer = torch.randn(n, dim), Expert(dim, width)
    with torch.no_grad():
        expected = ops.swiglu_reference(x.double(), *layer.double().children())
        layer.float()
        names = called(monkeypatch)
        poison(monkeypatch)
        close(layer(x), expected)
    assert names == ["om_moe"]


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 512), (3, 7), (2, 5, 33), (16, 1)], ids=str)
def test_rms_norm(shape):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    with torch.no_grad():
        close(
            kernels.rms_norm(x, weight, 1e-6), ops.rms_norm_reference(x.double(), weight.double(), 1e-6), 1e-6
        )


@needs_kernels
def test_silu_keeps_nan_and_far_values():
    gate = torch.tensor([torch.nan, torch.inf, 200.0, 80.0, 0.0, -80.0, -95.0, -300.0])
    layer_up = torch.cat((gate, torch.ones(8))).unsqueeze(1)
    down, x = torch.eye(1, 8), torch.ones(1, 1)
    for i in range(8):
        down = torch.eye(8)[i : i + 1].clone()
        clean = torch.where(torch.arange(16) % 8 == i, layer_up[:, 0], 1.0).unsqueeze(1)
        torch.testing.assert_close(
            kernels.swiglu(x, clean, down)[0, 0], F.silu(gate[i]), rtol=1e-6, atol=1e-30, equal_nan=True
        )


def decode(model: OpenMythos, batch: int, past: int, new: int, mask: torch.Tensor | None) -> torch.Tensor:
    torch.manual_seed(past)
    ids = torch.randint(0, model.cfg.vocab_size, (batch, past + new))
    cache = KVCache()
    with torch.inference_mode():
        with kernels.disabled():
            model(ids[:, :past], 2, cache, attention_mask=None if mask is None else mask[:, :past])
        return model(ids[:, past:], 2, cache, attention_mask=None if mask is None else mask[:, past:])


@needs_kernels
@pytest.mark.parametrize(
    ("batch", "past", "new", "padded"),
    [
        (1, 1, 1, False),
        (1, 300, 1, False),
        (5, 17, 1, True),
        (16, 40, 1, False),
        (2, 33, 3, True),
        (3, 9, 2, False),
    ],
)
def test_a_decode_step_is_that_of_float64(batch, past, new, padded, threads, monkeypatch):
    model = model_of()
    mask = None
    if padded:
        mask = torch.ones(batch, past + new, dtype=torch.int64)
        for row in range(batch):
            mask[row, : row * 2] = 0
    with kernels.disabled():
        expected = decode(model.double(), batch, past, new, mask)
    model.float()
    names = called(monkeypatch)
    poison(monkeypatch)
    actual = decode(model, batch, past, new, mask)
    close(actual, expected, 2e-5)
    assert {"om_room", "om_step"} == set(names)
    assert torch.equal(actual, decode(model, batch, past, new, mask))


@needs_kernels
def test_a_row_that_sees_nothing_gives_what_pytorch_gives():
    H, R, P, V = 2, 5, 2, 3
    queries, latent = torch.randn(1, 1, H, R + P), torch.randn(1, 4, R + P)
    kv_up, wo = torch.randn(H * (3 + V), R), torch.randn(6, H * V)
    out = kernels.latent_outputs(queries, latent, torch.zeros(1, 1, 1, 4, dtype=torch.bool), 1.0, kv_up, wo)
    assert torch.equal(out, torch.zeros(1, 1, 6))


@needs_kernels
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_generation_is_the_same_with_and_without(attention):
    model = model_of(attn_type=attention, n_kv_heads=2)
    ids = torch.randint(0, 61, (3, 9))
    fused = model.generate(ids, 20, 3, temperature=0)
    with kernels.disabled():
        assert torch.equal(fused, model.generate(ids, 20, 3, temperature=0))


@needs_kernels
def test_shapes_that_do_not_fit_are_refused():
    x = torch.randn(1, 8)
    with pytest.raises(ValueError, match="rms_norm: the shapes do not fit"):
        kernels.rms_norm(x, torch.ones(9), 1e-6)
    with pytest.raises(ValueError, match="swiglu: the shapes do not fit"):
        kernels.swiglu(x, torch.ones(6, 9), torch.ones(8, 3))
    with pytest.raises(ValueError, match="moe: the shapes do not fit"):
        kernels.moe(x, torch.ones(2, 9, 6), torch.ones(2, 3, 8), torch.zeros(1, 1).long(), torch.ones(1, 1))


# What keeps the kernels out.


def _autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return kernels.serves(1, x)


def _watched(x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return kernels.serves(1, x)


def _dual(x):
    with torch.autograd.forward_ad.dual_level():
        return kernels.serves(1, x)


def _mapped(x):
    seen = []
    torch.func.vmap(lambda row: seen.append(kernels.serves(1, row)) or row)(x)
    return seen[0]


class _Subclass(torch.Tensor):
    pass


@needs_kernels
@pytest.mark.parametrize(
    "ask",
    [
        lambda x: kernels.serves(1, x.double()),
        lambda x: kernels.serves(1, x.bfloat16()),
        lambda x: kernels.serves(1, x, x.t()),
        lambda x: kernels.serves(1, x.to("meta")),
        lambda x: kernels.serves(1, x.as_subclass(_Subclass)),
        lambda x: kernels.serves(kernels.MAX_TOKENS + 1, x),
        lambda x: kernels.serves(0, x),
        torch.enable_grad()(lambda x: kernels.serves(1, x)),
        _autocast,
        _watched,
        _dual,
        _mapped,
    ],
)
def test_kernels_do_not_serve(ask):
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert kernels.serves(1, x)
        assert not ask(x)
        with kernels.disabled():
            assert not kernels.serves(1, x)


@needs_kernels
@pytest.mark.parametrize("part", ["q_down", "q_norm", "q_up", "kv_down", "kv_norm", "wo"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_a_hook_inside_attention_is_called(part, how):
    model = model_of()
    target, calls = getattr(model.recurrent.block.attn, part), []
    if how == "hook":
        target.register_forward_hook(lambda *a: calls.append(1))
    elif how == "pre-hook":
        target.register_forward_pre_hook(lambda *a: calls.append(1))
    else:
        forward = target.forward
        target.forward = lambda *a: calls.append(1) or forward(*a)
    model.generate(torch.zeros(1, 2, dtype=torch.int64), 3, 2)
    assert len(calls) == 6  # three steps of two loops


@needs_kernels
@pytest.mark.parametrize("part", ["", "router", "shared", "shared.gate_up", "shared.down"])
def test_a_hook_inside_the_experts_is_called(part):
    model = model_of()
    calls: list[int] = []
    model.recurrent.block.ffn.get_submodule(part).register_forward_hook(lambda *a: calls.append(1))
    model.generate(torch.zeros(1, 2, dtype=torch.int64), 3, 2)
    assert len(calls) == 6


@needs_kernels
def test_a_changed_or_parametrised_projection_counts():
    model = model_of()
    ids = torch.randint(0, 61, (1, 4))
    before = decode(model, 1, 4, 1, None)
    torch.nn.utils.parametrizations.weight_norm(model.recurrent.block.attn.wo)
    model.recurrent.block.attn.wo.parametrizations.weight.original0.data.mul_(3)
    after = decode(model, 1, 4, 1, None)
    assert not torch.allclose(before, after)
    assert not ops.bare(model.recurrent.block.attn.wo, torch.nn.Linear)
    assert not ops.bare(torch.nn.Linear(2, 2), torch.nn.Linear)  # it has a bias
    assert ops.bare(RMSNorm(3), RMSNorm)
    assert ids.shape == (1, 4)


# Building.

SAY = "from open_mythos import kernels; print(kernels.status())"


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"OPEN_MYTHOS_KERNELS": "0"}, "OPEN_MYTHOS_KERNELS=0 is set"),
        ({"CC": "no-such-compiler"}, "there is no C compiler ('no-such-compiler' was not found)"),
        ({"CC": "false"}, "the C compiler 'false' failed"),
    ],
)
def test_without_a_compiler_pytorch_does_the_work(env, reason, tmp_path):
    code = (
        "import torch, open_mythos as m; torch.manual_seed(0); from open_mythos import kernels;"
        f"model = m.OpenMythos(m.MythosConfig(**{SMALL!r}));"
        "print(tuple(model.generate(torch.zeros(1, 3, dtype=torch.int64), 2, 2).shape), kernels.status())"
    )
    said = python(code, XDG_CACHE_HOME=str(tmp_path), **env)
    assert said.startswith("(1, 5) CPU kernels are off, because ")
    assert reason in said


@needs_kernels
def test_a_cache_folder_that_cannot_be_written_is_a_reason(tmp_path):
    (tmp_path / "open_mythos").write_text("a file where the folder should be")
    assert "cannot be kept in the cache folder" in python(SAY, XDG_CACHE_HOME=str(tmp_path))


@needs_kernels
def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "open_mythos.kernels"]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert ["are on" in process.communicate(timeout=120)[0] for process in running] == [True, True]
    assert len(list((tmp_path / "open_mythos").iterdir())) == 1  # nothing half made is left


@needs_kernels
def test_one_openmp_library_serves_torch_and_the_kernels():
    kernels.status()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line}) == 1
