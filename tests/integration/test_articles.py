"""The code of the public articles, run as printed; only lost line breaks and indentation are restored.

What an article leaves out (its device, its batches) is defined beside it, as the full tutorial does.
"""

from __future__ import annotations

import builtins
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos.main import ACTHalting, MoEFFN, MythosConfig, OpenMythos
from open_mythos.reproduce.articles import PARITY_MODELS

FOOTPRINT = """
import torch, torch.nn as nn
from open_mythos.main import OpenMythos, MythosConfig
cfg = MythosConfig(
    vocab_size=256, dim=128, n_heads=4,
    max_seq_len=128, max_loop_iters=8,
    n_experts=4, n_experts_per_tok=2,
    attn_type="mla", kv_lora_rank=32
)
model = OpenMythos(cfg).to("cuda")
# Memory footprint comparison
x = torch.randint(0, 256, (1, 64), device="cuda")
cache = {}
with torch.no_grad():
    logits = model(x, n_loops=4, kv_cache=cache)
def get_cache_size(kv):
    return sum(t.element_size() * t.numel() for entry in kv.values() for t in entry.values()) / 1024
print(f"MLA Cache size: {get_cache_size(cache):.2f} KB")
"""

PARITY = """
T_TRAIN = 3
opt = torch.optim.AdamW(model.parameters(), lr=3e-4)
for step in range(600):
    x, y = make_batch(64) # Cumulative parity task
    logits = model(x, n_loops=T_TRAIN)
    loss = torch.nn.functional.cross_entropy(logits.view(-1, 256), y.view(-1))
    opt.zero_grad()
    loss.backward()
    opt.step()
# Inference with Depth Extrapolation
with torch.no_grad():
    logits_extrapolated = model(x, n_loops=16)
    acc = (logits_extrapolated.argmax(-1) == y).float().mean()
"""

SETUP = """
import subprocess, sys
def pip(*args):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *args], check=False)
try:
    import open_mythos # noqa: F401
except Exception:
    pip("open-mythos")
    try:
        import open_mythos # noqa: F401
    except Exception:
        pip("git+https://github.com/kyegomez/OpenMythos.git")
import math, random, time
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, DataLoader
import matplotlib.pyplot as plt
from open_mythos.main import OpenMythos, MythosConfig
SEED = 42
random.seed(SEED); np.random.seed(SEED); torch.manual_seed(SEED)
print(f"Device: {device} | Torch: {torch.__version__}")
"""

MODELS = '''
def build_model(attn_type: str = "mla", max_loop_iters: int = 8) -> tuple:
    """Build a small OpenMythos model. Two attention variants supported.
    MLA — Multi-Latent Attention (compressed KV cache, DeepSeek-V2 style)
    GQA — Grouped-Query Attention (fewer KV heads than Q heads)
    """
    base = dict(
        vocab_size = 64,
        dim = 128,
        n_heads = 4,
        max_seq_len = 32,
        max_loop_iters = max_loop_iters,
        prelude_layers = 1,
        coda_layers = 1,
        n_experts = 4,
        n_shared_experts = 1,
        n_experts_per_tok= 2,
        expert_dim = 64,
        lora_rank = 8,
        attn_type = attn_type,
    )
    if attn_type == "gqa":
        cfg = MythosConfig(**base, n_kv_heads=2)
    else:
        cfg = MythosConfig(
            **base, n_kv_heads=4,
            kv_lora_rank=32, q_lora_rank=32,
            qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        )
    model = OpenMythos(cfg).to(device)
    return model, cfg
model_mla, cfg_mla = build_model("mla")
model_gqa, cfg_gqa = build_model("gqa")
def n_params(m):
    return sum(p.numel() for p in m.parameters())
print(f"\\n[MLA] params: {n_params(model_mla):>10,}")
print(f"[GQA] params: {n_params(model_gqa):>10,}")
def spectral_radius(model):
    A = model.recurrent.injection.get_A().detach().cpu()
    if A.dim() == 1:
        rho = A.abs().max().item()
    else:
        rho = torch.linalg.eigvals(A.float()).abs().max().item()
    return rho
print(f"\\nρ(A) MLA: {spectral_radius(model_mla):.4f} (must be < 1)")
print(f"ρ(A) GQA: {spectral_radius(model_gqa):.4f} (must be < 1)")
ids = torch.randint(0, cfg_mla.vocab_size, (2, 16), device=device)
with torch.no_grad():
    logits = model_mla(ids, n_loops=4)
    gen = model_mla.generate(ids, max_new_tokens=4, n_loops=8)
print(f"\\nForward logits shape: {tuple(logits.shape)}")
print(f"Generation shape: {tuple(gen.shape)}")
'''

CHAIN = """
PAD, START, EQ = 0, 1, 2
DIGIT_BASE = 10
M = 7
SEQ_LEN = cfg_mla.max_seq_len
MIN_LEN, MAX_LEN = 2, 5
def make_example(chain_len: int):
    digits = [random.randint(0, M-1) for _ in range(chain_len)]
    target = sum(digits) % M
    toks = [START] + [DIGIT_BASE + d for d in digits] + [EQ]
    toks = toks + [PAD] * (SEQ_LEN - len(toks))
    return toks[:SEQ_LEN], DIGIT_BASE + target
class ChainDataset(Dataset):
    def __init__(self, n, lo, hi):
        self.items = [make_example(random.randint(lo, hi)) for _ in range(n)]
    def __len__(self):
        return len(self.items)
    def __getitem__(self, i):
        x, y = self.items[i]
        return torch.tensor(x, dtype=torch.long), torch.tensor(y, dtype=torch.long)
train_loader = DataLoader(ChainDataset(3000, MIN_LEN, MAX_LEN), batch_size=64, shuffle=True)
test_loader = DataLoader(ChainDataset(400, MIN_LEN, MAX_LEN), batch_size=64)
ood_loader = DataLoader(ChainDataset(400, MAX_LEN+1, MAX_LEN+3), batch_size=64)
"""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Execute an article's block; it names "cuda" where a reader without one would write "cpu"."""
    exec(compile(code.replace('"cuda"', repr(DEVICE)), "article", "exec"), names)
    return names


def parity_batches(bits: int) -> Any:
    """The tutorial's task: tokens 1 and 2 for the bits 0 and 1, and their parity so far, plus 1."""

    def make_batch(size: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(0, 2, (size, bits), device=DEVICE)
        return drawn + 1, drawn.cumsum(1) % 2 + 1

    return make_batch


def test_the_footprint_and_parity_blocks_run_on_the_articles_own_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two of the 600 steps: at this size they take minutes on a CPU; the next test takes them all."""
    names = run(FOOTPRINT, {})
    # 64 tokens, 2 + 4 + 2 slots of 32 latent and 64 rope channels, float32.
    assert capsys.readouterr().out == f"MLA Cache size: {64 * 8 * (32 + 64) * 4 / 1024:.2f} KB\n"
    names |= {"make_batch": parity_batches(8), "range": lambda stop: builtins.range(min(stop, 2))}
    run(PARITY, names)
    assert names["step"] == 1
    assert 0 <= float(names["acc"]) <= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_models_and_digit_chain_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the article imports it")
    names = run(SETUP, {"device": DEVICE})
    run(MODELS, names)
    printed = capsys.readouterr().out
    assert "Forward logits shape: (2, 16, 64)" in printed
    assert "Generation shape: (2, 20)" in printed
    assert names["n_params"](names["model_mla"]) < names["n_params"](names["model_gqa"]), (
        "as the article says"
    )
    for model in (names["model_mla"], names["model_gqa"]):
        assert 0 < names["spectral_radius"](model) < 1
    run(CHAIN, names)
    x, y = next(iter(names["train_loader"]))
    logits = names["model_mla"](x.to(DEVICE), n_loops=3)
    loss = torch.nn.functional.cross_entropy(logits[:, -1], y.to(DEVICE))
    loss.backward()
    assert x.shape == (64, 32)
    assert loss.isfinite()
    assert sum(1 for _ in names["ood_loader"]) == 7


@pytest.mark.slow
def test_after_600_steps_experts_are_used_decay_is_stable_and_every_loop_shows() -> None:
    """The parity block to its end on a model of the tutorial's size, then three inspections."""
    torch.manual_seed(0)
    cfg = MythosConfig(**PARITY_MODELS["tutorial"])
    model = OpenMythos(cfg).to(DEVICE)
    names = run(PARITY, {"torch": torch, "model": model, "make_batch": parity_batches(12)})
    assert names["step"] == 599
    x = names["x"]
    shares = expert_shares(model, x)
    assert shares.sum() == pytest.approx(1.0)
    assert shares.min() >= 0.10, shares
    assert halting_matrix(model, x[:1]).shape == (16, 12)
    assert names["loss"].item() < 0.65, "chance is 0.69"
    stress(model, x)


def expert_shares(model: OpenMythos, x: Tensor) -> Tensor:
    """Wrap the mixture's forward as the tutorial does and count what the router says."""
    ffn: Any = model.recurrent.block.ffn
    assert isinstance(ffn, MoEFFN)
    counts, original = torch.zeros(ffn.n_experts), ffn.forward

    def hooked(self: Any, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        logits = self.router(flat) + self.router_bias
        chosen = logits.topk(self.topk, dim=-1).indices
        counts.add_(torch.bincount(chosen.flatten().cpu(), minlength=self.n_experts))
        return original(x)

    ffn.forward = types.MethodType(hooked, ffn)
    with torch.no_grad():
        model(x, n_loops=8)
    ffn.forward = original
    return counts / counts.sum()


def halting_matrix(model: OpenMythos, x: Tensor) -> Tensor:
    """Replace the halting head's forward by one that records, and look at all 16 loops."""
    act, record = model.recurrent.act, []
    assert isinstance(act, ACTHalting)
    original = act.forward

    def recording(self: Any, h: Tensor) -> Tensor:
        p = original(h)
        record.append(p.detach().cpu())
        return p

    act.forward = types.MethodType(recording, act)  # type: ignore[method-assign]
    with torch.no_grad():
        model(x, n_loops=16)
    act.forward = original  # type: ignore[method-assign]
    return torch.stack(record)[:, 0]


def stress(model: OpenMythos, x: Tensor) -> None:
    """The tutorial's stability test: Adam at a learning rate of one."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1.0)
    for _ in range(20):
        logits = model(x[:8], n_loops=3)
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, 256), torch.randint_like(x[:8], 256).reshape(-1)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        A = model.recurrent.injection.get_A()
        assert A.dim() == 1
        assert 0 < float(A.detach().min()) <= float(A.detach().max()) < 1
