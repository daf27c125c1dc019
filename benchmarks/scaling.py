"""The arithmetic of docs/scaling.md: memory of a GPU, and communication against compute, without any GPU.

Everything follows from a config (open_mythos/accounting.py) and the assumptions of :class:`Machine`. The tables
between the marks in docs/scaling.md are this script's; a test keeps them equal.

    python benchmarks/scaling.py                          # print the tables
    python benchmarks/scaling.py --write docs/scaling.md  # put them into the page
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from open_mythos import MythosConfig
from open_mythos.accounting import flops_per_token, format_count, parameters
from open_mythos.variants import VARIANTS

BEGIN, END = "<!-- {}: written by benchmarks/scaling.py -->", "<!-- end -->"
GB = 1e9


@dataclass(frozen=True)
class Machine:
    """What is assumed of the hardware.

    Attributes:
        memory: bytes of one GPU that a run may fill.
        flops: operations a second that training reaches: 45 % of the 783 TFLOP/s that matrix products reach.
        node: GPUs that NVLink joins.
        nvlink: bytes a second that a collective moves in and out of each GPU within a node.
        network: bytes a second in and out of a whole node, 8 adapters of 400 Gb/s at a little over half.
    """

    memory: float = 75e9
    flops: float = 0.45 * 783e12
    node: int = 8
    nvlink: float = 300e9
    network: float = 220e9


@dataclass(frozen=True)
class Plan:
    """How a config is spread.

    Attributes:
        config: the model.
        gpus: all of them.
        tokens: of one GPU in one step.
        loops: T.
        experts: ranks that share out the routed experts; 1 gathers them like all other parameters.
        recompute: keep each loop's state only, and run the loop again in the backward.
        copies: whole copies of the sharded state (HSDP), one for each gpus / copies GPUs.
    """

    config: MythosConfig
    gpus: int
    tokens: int
    loops: int
    experts: int = 1
    recompute: bool = True
    copies: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        state: its share of parameters, gradients (float32) and AdamW's two moments: 16 bytes a parameter.
        gathered: the core's matrices and their gradients in bfloat16 while the loops run; or, when its gradient
            is reduced, gradients in bfloat16 and their float32 copy, if that is more than what activations
            and matrices take before.
        ends: prelude, coda and head in bfloat16, and the head's gradient in float32.
        activations: what the backward needs.
    """

    state: float
    gathered: float
    ends: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.gathered + self.ends + self.activations


def loop_elements(config: MythosConfig) -> int:
    """Numbers that one loop keeps for one token when nothing is recomputed.

    The input of each matrix product, norm and gate: state, normed inputs and outputs, queries, keys, values and
    attention's output, k expert rows in and (gate, up, product) out, and the same of the shared experts. Autograd
    keeps up to 9 % more and 5 % less in the tests' models; a compiler keeps what it likes, but not more.
    """
    D, H = config.dim, config.n_heads
    if config.attn_type == "mla":
        key = config.qk_rope_head_dim + config.qk_nope_head_dim
        attention = config.q_lora_rank + config.kv_lora_rank + H * (2 * key + 2 * config.v_head_dim)
    else:
        attention = 2 * (H + config.n_kv_heads) * config.head_dim
    k, F = config.n_experts_per_tok, config.expert_dim
    return 7 * D + attention + k * (D + 3 * F) + 3 * config.shared_dim + config.n_experts


def layer_elements(config: MythosConfig) -> int:
    """The same of one layer of prelude or coda."""
    loop = loop_elements(config)
    experts = config.n_experts_per_tok * (config.dim + 3 * config.expert_dim)
    return loop - experts - 3 * config.shared_dim - config.n_experts + 3 * config.dense_dim


def gathered_parameters(plan: Plan) -> tuple[float, float]:
    """Parameters of the core that one GPU gathers, and of the two ends with the token table."""
    count = parameters(plan.config)
    routed = count.parts["recurrent.routed_experts"]
    return count.recurrent - routed + routed / plan.experts, float(count.total - count.recurrent)


def memory(plan: Plan) -> Memory:
    """What one GPU holds at the worst moment of a step."""
    config, layers = plan.config, plan.config.prelude_layers + plan.config.coda_layers
    core, ends = gathered_parameters(plan)
    loops = (
        plan.loops * config.dim + loop_elements(config)
        if plan.recompute
        else plan.loops * loop_elements(config)
    )
    activations = 2.0 * plan.tokens * (loops + layers * layer_elements(config))
    state = 16.0 * parameters(config).total * plan.copies / plan.gpus
    # While the loops run: matrices and gradients. At the reduction: gradients and their float32 copy, but no
    # matrices, and the loops' activations are gone.
    gathered = max(4.0 * core, 6.0 * core - activations)
    return Memory(state, gathered, 2.0 * ends + 4.0 * config.vocab_size * config.dim, activations)


def flops(plan: Plan) -> float:
    """Operations of one GPU in one step: a backward costs two forwards, recomputing the loops a third."""
    context = (min(plan.config.max_seq_len, plan.tokens) + 1) // 2
    forward = flops_per_token(plan.config, plan.loops, context=context)
    once = flops_per_token(plan.config, 1, context=context)
    loops = (forward - once) * plan.loops / max(1, plan.loops - 1) if plan.loops > 1 else once
    return float(plan.tokens * (3 * forward + (loops if plan.recompute else 0.0)))


def traffic(plan: Plan) -> dict[str, float]:
    """Bytes that each GPU takes in during one step, by what they are.

    ``gather``: matrices in bfloat16, once. ``reduce``: gradients in float32, once. ``copies``: the sum over the
    whole copies of what each GPU then has of them. ``tokens``: what expert parallelism sends, each token's k rows
    there and back, in the forward, in the backward, and again where the loops are recomputed.
    """
    config, count, shard = plan.config, parameters(plan.config), plan.gpus / plan.copies
    routed = count.parts["recurrent.routed_experts"]
    # What comes from the other ranks: of all parameters but the routed experts from all ranks that shard them,
    # of this GPU's own routed experts from the ranks that have the same ones.
    own = routed / plan.experts * max(0.0, 1 - plan.experts / shard)
    held = (count.total - routed) * (1 - 1 / shard) + own
    passes = 6 if plan.recompute else 4
    row = config.n_experts_per_tok * config.dim * 2.0
    return {
        "gather": 2.0 * held,
        "reduce": 4.0 * held,
        "copies": 8.0 * count.total / shard * (1 - 1 / plan.copies),
        "tokens": passes * plan.tokens * plan.loops * row * (1 - 1 / plan.experts),
    }


def seconds(plan: Plan, machine: Machine) -> tuple[float, float]:
    """Compute, and communication if none of it were hidden.

    A collective over several nodes takes every byte into a node once, which its GPUs share; so it is bound by the
    slower of a GPU's NVLink and the node's network. Tokens cross the network only where the expert ranks do.
    """
    across = (
        min(machine.nvlink, machine.network) if plan.gpus / plan.copies > machine.node else machine.nvlink
    )
    moved = traffic(plan)
    ranks_cross = plan.experts > machine.node
    token_rate = machine.network / machine.node if ranks_cross else machine.nvlink
    spread = (moved["gather"] + moved["reduce"]) / across + moved["tokens"] / token_rate
    copies_cross = plan.gpus > machine.node
    copies = moved["copies"] * (machine.node / machine.network if copies_cross else 1 / machine.nvlink)
    return flops(plan) / machine.flops, spread + copies


NAMES = ("mythos_1b", "mythos_3b", "mythos_10b", "mythos_50b", "mythos_100b")
GPUS = (8, 64, 1024)
# Tokens of one GPU in one step, most first: on 1024 GPUs few, or the batch grows past what training gains from.
TOKENS = {8: (16384, 8192, 4096, 2048), 64: (16384, 8192, 4096, 2048), 1024: (4096, 2048)}


def choose(name: str, gpus: int, machine: Machine, recompute: bool = True) -> Plan:
    """The plan that fits with the fewest expert ranks, and then the most tokens; else the smallest one."""
    config = VARIANTS[name]()
    plans = [
        Plan(config, gpus, tokens, config.max_loop_iters, experts, recompute)
        for experts in (1, 8, 16, 32, 64)
        for tokens in TOKENS[gpus]
        if experts <= gpus
    ]
    return next((plan for plan in plans if memory(plan).total <= machine.memory), plans[-1])


def memory_table(machine: Machine) -> str:
    """Gigabytes of one GPU."""
    head = ["model", "GPUs", "experts over", "tokens a GPU", "state", "core", "ends", "activations", "all"]
    rows = []
    for name in NAMES:
        for gpus in GPUS:
            plan = choose(name, gpus, machine)
            m = memory(plan)
            kept = memory(replace(plan, recompute=False)).activations
            cells = [f"{part / GB:.1f}" for part in (m.state, m.gathered, m.ends, m.activations)]
            fits = "" if m.total <= machine.memory else ", too much"
            sizes = [str(gpus), str(plan.experts), str(plan.tokens)]
            rows.append([name, *sizes, *cells, f"{m.total / GB:.0f}{fits}", f"{kept / GB:.0f}"])
    return _table([*head, "activations, none recomputed"], rows)


def time_table(machine: Machine) -> str:
    """Seconds and bytes of one step."""
    head = [
        "model",
        "GPUs",
        "tokens a step",
        "compute s",
        "gather GB",
        "reduce GB",
        "tokens GB",
        "moved s",
        "share",
    ]
    rows = []
    for name in NAMES:
        for gpus in GPUS:
            plan = choose(name, gpus, machine)
            if memory(plan).total > machine.memory:
                continue
            compute, moved = seconds(plan, machine)
            bytes_of = traffic(plan)
            sizes = [f"{bytes_of[what] / GB:.1f}" for what in ("gather", "reduce", "tokens")]
            times = [f"{compute:.2f}", *sizes, f"{moved:.2f}", f"{100 * moved / compute:.1f} %"]
            rows.append([name, str(gpus), format_count(plan.tokens * gpus), *times])
    return _table(head, rows)


def loops_table(machine: Machine) -> str:
    """How the loops dilute communication: mythos_1b on 64 GPUs; and what one unit for each loop would cost."""
    rows = []
    for loops in (1, 4, 16, 64):
        plan = Plan(VARIANTS["mythos_1b"](), 64, TOKENS[64][0], loops)
        compute, moved = seconds(plan, machine)
        core, ends = gathered_parameters(plan)
        # FSDP2 around the looped block itself: gathered in its forward and backward, reduced after it, each loop.
        each = (6.0 * ends + 8.0 * core * loops) * (1 - 1 / plan.gpus) / min(machine.nvlink, machine.network)
        shares = [f"{100 * t / compute:.1f} %" for t in (moved, each)]
        rows.append([str(loops), f"{compute:.2f}", f"{moved:.3f}", f"{each:.3f}", *shares])
    return _table(
        ["loops", "compute s", "moved s", "each loop its own: s", "share", "each its own: share"], rows
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def tables() -> dict[str, str]:
    """Every table of the page, by its mark."""
    machine = Machine()
    return {"memory": memory_table(machine), "time": time_table(machine), "loops": loops_table(machine)}


def written(text: str) -> str:
    """The page with its tables as they should be.

    Raises:
        ValueError: a mark is missing.
    """
    for name, table in tables().items():
        begin = BEGIN.format(name)
        if text.count(begin) != 1:
            raise ValueError(f"the page must have one line {begin!r}")
        before, rest = text.split(begin)
        _, after = rest.split(END, 1)
        text = f"{before}{begin}\n{table}\n{END}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="the page whose tables are to be written again")
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(written(arguments.write.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
