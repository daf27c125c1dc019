"""The arithmetic of docs/scaling.md against real models, and its tables against the page."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos
from open_mythos.accounting import parameters
from open_mythos.training.acceleration import accelerate
from open_mythos.training.loops import LoopPlan
from open_mythos.training.objective import Objective

FIELDS: dict[str, Any] = {
    "vocab_size": 64, "dim": 128, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "max_loop_iters": 4,
    "prelude_layers": 1, "coda_layers": 1, "n_experts": 8, "n_experts_per_tok": 2, "n_shared_experts": 1,
    "expert_dim": 96, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 32, "lora_rank": 4,
}  # fmt: skip
ROWS, LENGTH = 2, 64


@pytest.fixture(scope="module")
def scaling(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("scaling", root / "benchmarks" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_that_the_script_writes(scaling: Any, root: Path) -> None:
    page = (root / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.written(page) == page
    with pytest.raises(ValueError, match="the page must have one line '<!-- memory"):
        scaling.written(page.replace("<!-- memory", "<!-- "))


def kept(config: MythosConfig, loops: int, recompute: str) -> float:
    """Numbers that autograd keeps for one token, parameters left out."""
    torch.manual_seed(0)
    objective = Objective(OpenMythos(config)).train()
    accelerate(objective, recompute=recompute)
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and tensor.is_floating_point():
            seen[place] = tensor
        return tensor

    ids = torch.randint(0, 64, (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective({"ids": ids, "targets": ids}, LoopPlan(0, loops))
    assert loss.requires_grad
    numbers = sum(t.untyped_storage().nbytes() // t.element_size() for t in seen.values())
    return numbers / (ROWS * LENGTH)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_activations_are_what_autograd_keeps(scaling: Any, attn_type: str) -> None:
    config = MythosConfig(**FIELDS, attn_type=attn_type)
    loop = kept(config, 4, "none") - kept(config, 3, "none")
    assert scaling.loop_elements(config) == pytest.approx(loop, rel=0.1)
    layer = kept(config.replace(prelude_layers=2), 2, "none") - kept(config, 2, "none")
    assert scaling.layer_elements(config) == pytest.approx(layer, rel=0.2)
    state = kept(config, 4, "loop") - kept(config, 3, "loop")
    assert state == pytest.approx(config.dim, rel=0.05), "recomputed, a loop keeps its state"


def test_a_gpus_core_and_ends_are_the_models(scaling: Any) -> None:
    config = MythosConfig(**FIELDS)
    model = OpenMythos(config)
    core, ends = scaling.gathered_parameters(scaling.Plan(config, 8, 64, 4))
    assert core == sum(p.numel() for p in model.recurrent.parameters())
    assert core + ends == sum(p.numel() for p in model.parameters())
    fewer, _ = scaling.gathered_parameters(scaling.Plan(config, 8, 64, 4, experts=4))
    experts = model.recurrent.block.ffn.w_in.numel() + model.recurrent.block.ffn.w_out.numel()
    assert core - fewer == experts * 3 / 4


def test_memory_of_a_gpu(scaling: Any) -> None:
    config = MythosConfig(**FIELDS)
    plan = scaling.Plan(config, 8, 64, 4)
    one = scaling.memory(plan)
    assert 8 * one.state == 16 * parameters(config).total
    assert one.total == one.state + one.gathered + one.ends + one.activations
    assert scaling.memory(replace(plan, copies=4)).state == 4 * one.state
    whole, loop = replace(plan, recompute=False), scaling.loop_elements(config)
    layers = 2 * scaling.layer_elements(config)
    assert one.activations == 2 * 64 * (4 * config.dim + loop + layers)
    assert scaling.memory(whole).activations == 2 * 64 * (4 * loop + layers)
    core = scaling.gathered_parameters(plan)[0]
    assert one.gathered == max(4 * core, 6 * core - one.activations)


def test_traffic_of_a_step(scaling: Any) -> None:
    """Two GPUs: half of all parameters in and half of all gradients; tests/numerics/test_parallel.py counts them."""
    config = MythosConfig(**FIELDS)
    total = parameters(config).total
    two = scaling.Plan(config, 2, 64, 4)
    assert scaling.traffic(two) == {"gather": total, "reduce": 2 * total, "copies": 0, "tokens": 0}
    assert scaling.traffic(replace(two, loops=64)) == scaling.traffic(two)
    # One copy a GPU: nothing is gathered, and a ring adds gradients and hands them out again.
    assert scaling.traffic(replace(two, copies=2)) == {
        "gather": 0,
        "reduce": 0,
        "copies": 4 * total,
        "tokens": 0,
    }
    spread = scaling.Plan(config, 8, 64, 4, experts=8)
    experts = parameters(config).parts["recurrent.routed_experts"]
    assert scaling.traffic(spread)["gather"] == 2 * (total - experts) * 7 / 8
    assert scaling.traffic(spread)["tokens"] == 6 * 64 * 4 * (2 * 128 * 2) * 7 / 8


def test_time_of_a_step(scaling: Any) -> None:
    config, machine = MythosConfig(**FIELDS), scaling.Machine()
    plan = scaling.Plan(config, 8, 64, 4, recompute=False)
    compute, moved = scaling.seconds(plan, machine)
    assert compute == scaling.flops(plan) / machine.flops
    assert moved == sum(scaling.traffic(plan).values()) / machine.nvlink
    # Recomputing costs a forward of the loops: a third of what they cost, and nothing of the ends.
    again = scaling.flops(replace(plan, recompute=True)) - scaling.flops(plan)
    ends = scaling.flops(plan) - 3 * again
    assert ends == pytest.approx(scaling.flops(replace(plan, loops=8)) - 6 * again)
    far = replace(plan, gpus=64)
    assert scaling.seconds(far, machine)[1] == sum(scaling.traffic(far).values()) / machine.network
    # A copy on each machine: parameters over NVLink alone, the sum of its gradients over the network.
    moved = scaling.traffic(replace(far, copies=8))
    inside, across = moved["gather"] + moved["reduce"], machine.node * moved["copies"]
    seconds = scaling.seconds(replace(far, copies=8), machine)[1]
    assert seconds == pytest.approx(inside / machine.nvlink + across / machine.network)


def test_the_plan_that_fits_with_the_fewest_ranks_is_chosen(scaling: Any) -> None:
    machine = scaling.Machine()
    assert scaling.choose("mythos_1b", 8, machine).experts == 1
    chosen = scaling.choose("mythos_10b", 8, machine)
    assert chosen.experts == 8
    assert scaling.memory(chosen).total <= machine.memory
    assert scaling.memory(replace(chosen, experts=1)).total > machine.memory


def test_the_pages_word_on_copies(scaling: Any, root: Path) -> None:
    machine = scaling.Machine()
    plan = scaling.choose("mythos_1b", 1024, machine)
    flat, copied = (scaling.seconds(replace(plan, copies=copies), machine)[1] for copies in (1, 128))
    page = " ".join((root / "docs" / "scaling.md").read_text(encoding="utf-8").split())
    assert f"{copied:.3f} s instead of {flat:.3f} for mythos_1b" in page
