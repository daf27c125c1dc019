"""The C kernels against PyTorch: values, what turns them off, and how they are built."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from open_mythos import KVCache, LastLoop, MythosConfig, OpenMythos, kernels, stream
from open_mythos.model import ACTHalting, MoEFFN, RMSNorm
from open_mythos.model.decode import Decoder
from tiny_models import ODD

needs_kernels = pytest.mark.skipif("are on" not in kernels.status(), reason=kernels.status())

SIZES = ODD | {"max_seq_len": 400, "attn_type": "mla"}


def model_of(**changes: object) -> OpenMythos:
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**{**SIZES, **changes})).eval()


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN from here on, so that a place left unwritten shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: _nan(make(*a, **k)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: _nan(new_empty(self, *a, **k)))


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest error relative to the largest value."""
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert float(error) <= tolerance


def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels called from here on."""
    names: list[str] = []
    call = kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *a: names.append(name) or call(name, *a))
    return names


def decode(
    model: OpenMythos, batch: int, past: int, new: int, mask: torch.Tensor | None, policy: object = None
) -> tuple[torch.Tensor, KVCache]:
    """Logits of the new tokens after cached ones that PyTorch's operators computed; and the cache."""
    torch.manual_seed(past)
    ids = torch.randint(0, model.cfg.vocab_size, (batch, past + new))
    cache = KVCache(policy)
    with torch.inference_mode():
        if past:
            with kernels.disabled():
                model(ids[:, :past], 2, cache, attention_mask=None if mask is None else mask[:, :past])
        logits = model(ids[:, past:], 2, cache, attention_mask=None if mask is None else mask[:, past:])
    return logits, cache


def padding(batch: int, length: int) -> torch.Tensor:
    """Row r begins with 2r columns of padding."""
    return (torch.arange(length) >= 2 * torch.arange(batch).unsqueeze(1)).long()


def check_step(
    model: OpenMythos,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    past: int,
    new: int,
    padded: bool = False,
    policy: object = None,
) -> None:
    """Logits and cache after a step are those of float64, the kernel ran, and a second run gives the same bits."""
    mask = padding(batch, past + new) if padded else None
    with kernels.disabled():
        expected, expected_cache = decode(model.double(), batch, past, new, mask, policy)
    model.float()
    names = called(monkeypatch)
    poison(monkeypatch)
    actual, cache = decode(model, batch, past, new, mask, policy)
    assert names == ["om_room", "om_step"]
    close(actual, expected, 2e-5)
    assert cache.entries.keys() == expected_cache.entries.keys()
    for slot, entry in expected_cache.entries.items():
        for name, tensor in entry.items():
            assert cache.entries[slot][name].shape == tensor.shape
            close(cache.entries[slot][name], tensor, 2e-5)
    assert torch.equal(actual, decode(model, batch, past, new, mask, policy)[0])


GQA = {"attn_type": "gqa", "n_heads": 6, "n_kv_heads": 4}


@needs_kernels
@pytest.mark.parametrize("sizes", [{}, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize(
    ("batch", "past", "new", "padded"),
    [
        (1, 1, 1, False),
        (1, 300, 1, False),
        (5, 17, 1, True),
        (16, 40, 1, False),
        (2, 33, 3, True),
        (3, 9, 2, False),
        (4, 0, 1, False),
        (2, 0, 31, False),
        (3, 0, 21, True),
    ],
)
def test_a_step_is_that_of_float64(sizes, batch, past, new, padded, threads, monkeypatch):
    check_step(model_of(**sizes), monkeypatch, batch, past, new, padded)


@needs_kernels
@pytest.mark.parametrize(
    "choice",
    [
        {"n_shared_experts": 0},
        {"lora_rank": 0},
        {"halting": "off"},
        {"act_threshold": 0.3, "halt_bias_init": 0.0},
        {"loop_embedding": True, "dim": 77, "n_heads": 7},
        {"state_norm": True, "block_output": "state"},
        {"update_norm": True},
        {"initial_state": "prelude", "input_norm": False},
        {"initial_state": "random"},
        {"init": "upstream", "tie_embeddings": False},
        {"prelude_layers": 0, "coda_layers": 0},
        {"n_experts_per_tok": 6, "expert_dim": 1},
        {"attn_type": "gqa", "n_kv_heads": 1, "qk_norm": False},
    ],
    ids=str,
)
def test_every_choice_of_the_config_is_that_of_float64(choice, monkeypatch):
    check_step(shaken(model_of(**choice)), monkeypatch, 3, 5, 1)


@needs_kernels
def test_loops_may_share_a_slot(monkeypatch):
    check_step(model_of(), monkeypatch, 2, 5, 1, policy=LastLoop())


def shaken(model: OpenMythos) -> OpenMythos:
    """Every parameter away from its initial value, so that none is left out unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.recurrent.block.ffn.router_bias += torch.randn(model.cfg.n_experts)
    return model


@needs_kernels
def test_more_loops_than_trained_and_the_ends_of_the_decay():
    model = shaken(model_of())
    with torch.no_grad():
        model.recurrent.injection.log_A[:4] = torch.tensor([-40.0, -15.0, 4.4, 40.0])
    ids = torch.randint(0, 61, (2, 1))
    with torch.inference_mode():
        fused = model(ids, 7, KVCache())
        with kernels.disabled():
            close(fused, model(ids, 7, KVCache()), 2e-5)


@needs_kernels
@pytest.mark.parametrize(
    "part", ["recurrent.block.ffn.router.weight", "recurrent.block.ffn.w_in", "head.weight"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(part, value):
    model = model_of(tie_embeddings=False)
    with torch.inference_mode():
        model.get_parameter(part).fill_(value)
        assert not torch.isfinite(model(torch.zeros(1, 1).long(), 2, KVCache())).all()


@needs_kernels
@pytest.mark.parametrize("sizes", [{}, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("prompt", [1, 9, 80])
def test_generation_is_the_same_with_and_without(sizes, prompt):
    model = model_of(**sizes)
    ids = torch.randint(0, 61, (3, prompt))
    for mask in (None, padding(3, prompt) if prompt > 1 else None):
        fused = model.generate(ids, 20, 3, temperature=0, attention_mask=mask)
        with kernels.disabled():
            assert torch.equal(fused, model.generate(ids, 20, 3, temperature=0, attention_mask=mask))


@needs_kernels
@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_hands_over_the_cache_that_the_model_would_leave(padded):
    model, ids = model_of(), torch.randint(0, 61, (2, 12))
    ours, plain = KVCache(), KVCache()
    with torch.inference_mode():
        for cache in (ours, plain):
            model(ids[:, :6], 2, cache, attention_mask=padding(2, 6) if padded else None)
        decoder = Decoder.begin(model, ours, 2, 5)
        steps = [decoder.step(ids[:, i : i + 1]) for i in (6, 7, 8)]
        decoder.close()
        with kernels.disabled():
            close(torch.cat(steps, 1), model(ids[:, 6:9], 2, plain), 2e-5)
            assert len(ours) == len(plain) == 9
            assert (ours.segments is None) == (plain.segments is None) == (not padded)
            for slot, entry in plain.entries.items():
                close(ours.entries[slot]["latent"], entry["latent"], 2e-5)
            close(model(ids[:, 9:], 2, ours), model(ids[:, 9:], 2, plain), 2e-5)


@needs_kernels
def test_structures_have_the_fields_of_the_c_source():
    source = "".join(path.read_text(encoding="utf-8") for path in (kernels.SOURCE, kernels.PARTS[0]))
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    for kind in (kernels.Matrix, kernels.Layer, kernels.Slot, kernels.Step):
        body = re.search(rf"typedef struct {{([^}}]*)}} {kind.__name__};", source).group(1)
        found = []
        for base, names in re.findall(
            r"(char|float|i64|int32_t|unsigned char|Matrix|Layer|Slot)\b([^;]*);", body
        ):
            number = {"i64": kernels._N, "Matrix": kernels.Matrix}.get(base, kernels._F)
            found += [(n.strip(" *"), kernels._P if "*" in n else number) for n in names.split(",")]
        assert kind._fields_ == found


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


def steps_of(model: OpenMythos, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernel steps of one generation of three tokens."""
    with monkeypatch.context() as patch:
        names = called(patch)
        model.generate(torch.zeros(1, 2, dtype=torch.int64), 3, 2)
    return names.count("om_step")


@needs_kernels
@pytest.mark.parametrize("sizes", [{}, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_every_module_is_called_by_whoever_listens(sizes, how, monkeypatch):
    assert steps_of(model_of(**sizes), monkeypatch) == 3
    for name, _ in model_of(**sizes).named_modules():
        model = model_of(**sizes)
        target, calls = model.get_submodule(name), []
        if how == "hook":
            handle = target.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        elif how == "pre-hook":
            handle = target.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        else:
            forward = target.forward

            def listen(*args, forward=forward, calls=calls, **named):
                calls.append(1)
                return forward(*args, **named)

            target.forward = listen
        steps = steps_of(model, monkeypatch)
        heard = len(calls)
        with kernels.disabled():
            model.generate(torch.zeros(1, 2, dtype=torch.int64), 3, 2)
        assert len(calls) == 2 * heard, name
        assert not steps or not heard, name
        if how != "forward":
            handle.remove()
            assert steps_of(model, monkeypatch) == 3


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "name"),
    [(ACTHalting, "forward"), (MoEFFN, "route"), (OpenMythos, "coda"), (torch.nn.Linear, "forward")],
)
def test_a_method_replaced_on_its_class_is_called(kind, name, monkeypatch):
    model, calls, own = model_of(), [], getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *a, **k: calls.append(1) or own(*a, **k))
    assert steps_of(model, monkeypatch) == 0
    assert calls


class _Around(torch.nn.Module):
    """Another module in a module's place, without any of its attributes."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **named):
        return self.inner(*args, **named)


@needs_kernels
@pytest.mark.parametrize("sizes", [{}, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("name", ["ffn", "attn", "ffn_norm"])
def test_a_module_of_another_class_is_called(name, sizes, monkeypatch):
    model, own = model_of(**sizes), greedy(model_of(**sizes))
    setattr(model.recurrent.block, name, _Around(getattr(model.recurrent.block, name)))
    assert steps_of(model, monkeypatch) == 0
    assert greedy(model) == own


@needs_kernels
def test_more_experts_a_token_than_there_are_is_refused_by_pytorch():
    """The kernel would read and write beyond its arrays."""
    model = model_of()
    model.recurrent.block.ffn.topk = 7
    with pytest.raises(RuntimeError, match="out of range"):
        greedy(model)


@needs_kernels
def test_another_default_device_does_not_reach_the_kernel():
    model = model_of()
    prompt, own = torch.zeros(1, 2, dtype=torch.int64), greedy(model)
    with torch.device("meta"):
        assert model.generate(prompt, 4, 2, temperature=0)[0].tolist() == own


CHANGES = {
    "in place": lambda m: m.recurrent.block.attn.wo.weight.mul_(3),
    "data": lambda m: setattr(m.recurrent.block.ffn.w_in, "data", m.recurrent.block.ffn.w_in * 2),
    "transposed": lambda m: setattr(
        m.recurrent.block.attn.wo.weight, "data", m.recurrent.block.attn.wo.weight.t()
    ),
    "parameter": lambda m: setattr(m.head, "weight", torch.nn.Parameter(m.head.weight * 2)),
    "module": lambda m: setattr(m.recurrent.block, "ffn_norm", RMSNorm(72, 0.7)),
    "attribute": lambda m: setattr(m.recurrent.block.ffn, "topk", 1),
    "epsilon": lambda m: setattr(m.recurrent.norm, "eps", 0.5),
    "parametrised": lambda m: torch.nn.utils.parametrize.register_parametrization(
        m.recurrent.block.attn.wo, "weight", torch.nn.Softplus(), unsafe=True
    ),
}


@needs_kernels
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_change_counts_at_the_next_step(change):
    """The wo of this config is square, so that its transpose fits."""
    model = shaken(model_of(n_heads=8, v_head_dim=9))
    ids = torch.randint(0, 61, (1, 6))

    def logits(change_model):
        changed, cache = copy.deepcopy(model), KVCache()
        with torch.no_grad():
            changed(ids[:, :3], 2, cache)
            decoder = Decoder.begin(changed, cache, 2, 3)
            change_model(changed)
            if decoder is not None:
                assert decoder.holds() == (change_model is CHANGES["in place"])
            return changed(ids[:, 3:4], 2, cache)

    fused = logits(CHANGES[change])
    with kernels.disabled():
        close(fused, logits(CHANGES[change]), 2e-5)
        assert not torch.allclose(fused, logits(lambda _: None), rtol=1e-3)


@needs_kernels
def test_a_stream_hears_a_hook_set_between_two_tokens():
    model, calls = model_of(), []
    steps = stream(model, torch.zeros(2, 3).long(), 6, 2, temperature=0)
    tokens = [next(steps), next(steps)]
    handle = model.recurrent.act.register_forward_hook(lambda *a: calls.append(1))
    tokens += [next(steps), next(steps)]
    handle.remove()
    tokens += list(steps)
    assert len(calls) == 4  # two steps of two loops
    assert torch.equal(
        torch.stack(tokens, 1), model.generate(torch.zeros(2, 3).long(), 6, 2, temperature=0)[:, 3:]
    )


@needs_kernels
def test_a_plan_neither_keeps_the_model_alive_nor_travels_with_it():
    model = model_of()
    model.generate(torch.zeros(1, 2, dtype=torch.int64), 2, 2)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301 (our own bytes)
    assert greedy(again) == greedy(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def greedy(model: OpenMythos) -> list[int]:
    return model.generate(torch.zeros(1, 2, dtype=torch.int64), 4, 2, temperature=0)[0].tolist()


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
        f"model = m.OpenMythos(m.MythosConfig(**{SIZES!r}));"
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
