"""What a training step shows, gathered on the device and read at logged steps only. See docs/metrics.md.

Shape letters: B batch, S sequence, D model width, E experts, T loops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from open_mythos.model import MoEFFN, OpenMythos
from open_mythos.model.recurrence import HaltingWeights
from open_mythos.training.config import RunConfig
from open_mythos.training.diagnosis import Diagnosis
from open_mythos.training.loops import LoopPlan
from open_mythos.training.meter import memory, peak_tflops, train_flops
from open_mythos.training.parallel import World, whole

__all__ = ["PARTS", "Monitor", "gradient_norms"]

PARTS = ("prelude", "core", "coda", "injection")
_PREFIXES = (
    ("recurrent.injection.", "injection"),
    ("recurrent.", "core"),
    ("coda_layers.", "coda"),
    ("norm.", "coda"),
    ("head.", "coda"),
)
# Rows of a batch whose states are looked at; their means need no more.
_ROWS = 8


@torch.no_grad()
def gradient_norms(model: OpenMythos, world: World | None = None) -> Tensor:
    """L2 norm of the gradients of each part, (4,) float32 in the order of PARTS, the same on every rank.

    ``gradient_norms(...).norm()`` is the global norm that clipping needs. Gradients may be sharded; then all
    ranks must call this, and they sum four numbers. The host does not wait for the device. The prelude has the
    embedding and with it a tied head; the core is the looped block without its injection.

    Args:
        model: after the backward; parameters without a gradient count as zero.
        world: None for a process alone.
    """
    size = 1 if world is None else world.size
    groups: dict[tuple[str, int], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        local, copies = _share(parameter.grad, size)
        if local.numel():
            part = next((part for prefix, part in _PREFIXES if name.startswith(prefix)), "prelude")
            groups.setdefault((part, copies), []).append(local)
    squares = torch.zeros(len(PARTS), dtype=torch.float64, device=model.embed.weight.device)
    for (part, copies), gradients in groups.items():
        norms = torch.stack(torch._foreach_norm(gradients))
        # Each rank adds its share, so that what several ranks hold is counted once.
        squares[PARTS.index(part)] += norms.double().square().sum() / copies
    return (squares if world is None else world.sum(squares)).sqrt().float()


def _share(gradient: Tensor, size: int) -> tuple[Tensor, int]:
    """What this rank holds of a gradient, and how many ranks hold the same."""
    if not isinstance(gradient, DTensor):
        return gradient, size
    mesh, copies = gradient.device_mesh, size // gradient.device_mesh.size()
    for dimension, placement in enumerate(gradient.placements):
        if isinstance(placement, Replicate):
            copies *= mesh.size(dimension)
    return gradient.to_local(), copies


class _Recorder:
    """Reads the state after each loop of one forward, by standing around ``model.step`` while it is open.

    It only reads, so the forward computes what it would without it: nothing is drawn, no graph is changed (the
    wrapper stays outside of whatever is compiled, recomputed or sharded), and the host never waits.

    Args:
        model: whose forward runs while this is entered.
    """

    def __init__(self, model: OpenMythos) -> None:
        self.model = model
        self.norms: list[Tensor] = []
        self.cosines: list[Tensor] = []
        self.loops: list[Tensor] = []
        self.halting: list[Tensor] = []

    def __enter__(self) -> _Recorder:
        self.own = self.model.__dict__.get("step")
        self.plain = self.model.step
        setattr(self.model, "step", self._step)  # noqa: B010 - a method is replaced for a while
        self.open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False  # a recomputed forward in backward may still hold the wrapper
        if self.own is None:
            del self.model.__dict__["step"]
        else:
            setattr(self.model, "step", self.own)  # noqa: B010

    def _step(self, h: Tensor, e: Tensor, t: int | Tensor, *rest: Any, **named: Any) -> Tensor:
        out = self.plain(h, e, t, *rest, **named)
        if self.open:
            with torch.no_grad():
                self._look(out.detach()[:_ROWS], t)
        return out

    def _look(self, h: Tensor, t: int | Tensor) -> None:
        """Norm and mean cosine of each row, (B,), and halting probabilities, (B, S), of a state (B, S, D)."""
        x = h.float()
        length = x.norm(dim=-1)
        unit = x / length.clamp(min=1e-30).unsqueeze(-1)
        # The mean over pairs of different positions, from the sum over all pairs: no (S, S) matrix.
        pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
        positions = h.shape[1]
        self.norms.append(length.mean(1))
        self.cosines.append(pairs / max(1, positions * (positions - 1)))
        if isinstance(t, Tensor):
            self.loops.append((t[:_ROWS] if t.dim() else t.expand(len(h))).to(h.device))
        else:
            self.loops.append(torch.full((len(h),), t, device=h.device))
        act = self.model.recurrent.act
        if self.model.cfg.halting != "off" and not isinstance(act.halt.weight, DTensor):
            self.halting.append(act(h).float())

    @torch.no_grad()
    def result(self) -> Tensor:
        """By loop, summed over rows: state norm, token correlation and one, (T, 3), flat; then the mean halting
        depth, or -1 when nothing halts: 3T + 1 numbers that may be summed over ranks.
        """
        count = len(self.norms)
        loops = torch.stack(self.loops)
        begun = loops >= 0
        values = torch.stack((torch.stack(self.norms), torch.stack(self.cosines), begun.float()), -1)
        values = torch.where(begun.unsqueeze(-1), values, 0.0)
        sums = values.new_zeros(count, 3)
        sums.index_add_(0, loops.clamp(0, count - 1).flatten(), values.flatten(0, 1))
        return torch.cat((sums.flatten(), self._depth(loops, begun)))

    def _depth(self, loops: Tensor, begun: Tensor) -> Tensor:
        """Loops until halting, from 1, weighted as the coda's input is; mean over rows and positions, (1,)."""
        if not self.halting:
            return torch.full((1,), -1.0, device=loops.device)
        weights = HaltingWeights(self.model.cfg)
        depth = torch.zeros_like(self.halting[0])
        for i, p in enumerate(self.halting):
            weight = weights.next(p * begun[i].unsqueeze(1), last=i == len(self.halting) - 1)
            depth = depth + weight * (loops[i] + 1).unsqueeze(1)
        return depth.mean().view(1)


@dataclass
class _Pending:
    """A step that is done and not read yet.

    Attributes:
        step: its number.
        values: loss, skipped, gradient norm of each part, load of each expert; on the device.
        look: what a :class:`_Recorder` gives, if the states were looked at.
    """

    step: int
    values: Tensor
    look: Tensor | None


class Monitor:
    """The measures of a run, step by step::

        monitor.begin(step, read)                   # read: a record is due when the step is done
        with monitor.watching():
            loss = ...                              # each forward of the step
        loss.backward()
        monitor.passed(loss, plan, tokens, seq_len)
        norms = gradient_norms(model, world)
        ...                                         # clip, optimiser step
        row = monitor.end(lr, norms, skipped)
        if row is not None and (reason := monitor.verdict()): ...

    On ordinary steps the host never waits for the device. All ranks call all of these alike.

    Args:
        config: the run's.
        model: after it was moved, compiled and sharded.
        world: None for a process alone.
        skipped: updates skipped before, when a run is resumed.
    """

    def __init__(
        self, config: RunConfig, model: OpenMythos, world: World | None = None, skipped: int = 0
    ) -> None:
        self.config = config
        self.model = model
        self.world = world
        self.skipped = skipped
        self.device = model.embed.weight.device
        self.peak, self.peak_from = peak_tflops(self.device, config.log.peak_tflops)
        self.diagnosis = Diagnosis(config.log, math.log(model.cfg.vocab_size))
        self.alarms: list[str] = []
        self._pending: list[_Pending] = []
        self._mark: float | None = None
        self._idle = self._flops = 0.0
        self._tokens = 0

    def facts(self) -> dict[str, Any]:
        """For run.json: the device, and the peak that MFU is a share of."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        return {"device": name, "peak_tflops": self.peak, "peak_from": self.peak_from}

    def begin(self, step: int, read: bool) -> None:
        """Step ``step`` (from 1) begins; ``read``: a record is due at its end."""
        if self._mark is None:
            self._mark = time.perf_counter()
        self._step, self._read = step, read
        self._losses: list[Tensor] = []
        self._plans: list[LoopPlan] = []
        self._load: Tensor | None = None
        self._recorder: _Recorder | None = None

    @contextmanager
    def watching(self) -> Iterator[bool]:
        """Around each forward of the step: looks at the states of the first one, if a look is due, and says so."""
        if self._recorder is not None or not self._read or not self._due():
            yield False
            return
        with _Recorder(self.model) as self._recorder:
            yield True

    def _due(self) -> bool:
        """A look is due at the first record after each multiple of ``log.monitor_every``, and at step 1.

        A function of the step alone: a resumed run looks where it would have without the break.
        """
        every, log = self.config.log.monitor_every, self.config.train.log_every
        before = (self._step - 1) // log * log
        return every > 0 and (self._step == 1 or self._step // every > before // every)

    def passed(self, loss: Tensor, plan: LoopPlan, tokens: int, seq_len: int) -> None:
        """One forward and backward of the step is done.

        Args:
            loss: scalar; records show its mean over the step's forwards and over ranks.
            plan: loops that ran.
            tokens: input tokens of this forward, all ranks together.
            seq_len: S.
        """
        self._losses.append(loss.detach())
        self._plans.append(plan)
        self._tokens += tokens
        self._flops += tokens * train_flops(self.model.cfg, plan, seq_len)
        moe = self.model.recurrent.block.ffn
        if isinstance(moe, MoEFFN):
            load = moe.expert_load.float()  # a copy: the counts are whole numbers
            self._load = load if self._load is None else self._load + load
            if moe.bias_rate == 0:
                moe.expert_load.zero_()  # nobody else does when the bias is frozen

    def end(self, lr: float, norms: Tensor, skipped: bool | Tensor = False) -> dict[str, Any] | None:
        """The step is done; its record if one is due, JSON-ready. All ranks take part in making it.

        Args:
            lr: learning rate of the step.
            norms: from :func:`gradient_norms`.
            skipped: the update was left out, because something was not finite; a scalar on the device, or a bool.
        """
        flag = skipped if isinstance(skipped, Tensor) else torch.full((), float(skipped), device=self.device)
        head = [torch.stack(self._losses).float().mean().view(1), flag.float().view(1), norms]
        values = torch.cat(head if self._load is None else [*head, self._load])
        seen = self._recorder is not None and self._recorder.norms
        look = self._recorder.result() if self._recorder is not None and seen else None
        self._pending.append(_Pending(self._step, values, look))
        return self._record(lr) if self._read else None

    def verdict(self) -> str | None:
        """Why the run should stop, after a record: the loss has diverged, and what went before it."""
        return self.diagnosis.verdict()

    def account(self) -> str:
        """What left its range, in order, up to this step; "" when nothing did. All ranks take part."""
        if self._pending:
            self._collect()
        return self.diagnosis.account()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is no training (saves, evaluations): its time does not count in tokens/s."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._idle += time.perf_counter() - began

    def _record(self, lr: float) -> dict[str, Any]:
        measures = self._collect()
        now = time.perf_counter()  # after the read, which waited for the device
        seconds = max(1e-9, now - (self._mark or now) - self._idle)
        tokens, flops = self._tokens, self._flops
        self._mark, self._idle, self._tokens, self._flops = now, 0.0, 0, 0.0
        size = 1 if self.world is None else self.world.size
        used, most = memory(self.device)
        loops = _plain(sum(plan.mean for plan in self._plans) / len(self._plans))
        grad = _plain(sum(plan.n_grad for plan in self._plans) / len(self._plans))
        row = {
            "step": self._step,
            "loss": measures.pop("loss"),
            "n_loops": loops,
            "n_grad": grad,
            "lr": lr,
            **measures,
            "tokens_per_s": tokens / seconds,
            "mfu": None if self.peak is None else flops / seconds / (self.peak * 1e12 * size),
            "memory": used,
            "memory_peak": most,
            "skipped": self.skipped,
            "alarms": self.alarms,
        }
        bad: list[str] = []
        row = {name: _finite(value, name, bad) for name, value in row.items()}
        return {**row, "nonfinite": bad} if bad else row

    def _collect(self) -> dict[str, Any]:
        """Read all that is pending, tell the diagnosis, and return the measures of the last step."""
        pending, self._pending = self._pending, []
        pieces = [part for p in pending for part in (p.values, p.look) if part is not None]
        flat = torch.cat([*pieces, _radius(self.model).view(1)])
        size = 1 if self.world is None else self.world.size
        mean = (flat if self.world is None else self.world.sum(flat) / size).tolist()
        measures: dict[str, Any] = {}
        alarms: dict[str, None] = {}
        at = 0
        for entry in pending:
            values = mean[at : at + len(entry.values)]
            at += len(values)
            look = [] if entry.look is None else mean[at : at + len(entry.look)]
            at += len(look)
            measures = _measures(values, look, self.model.cfg.n_experts_per_tok)
            self.skipped += round(values[1])
            if entry is pending[-1]:
                measures["rho"] = mean[-1]
            alarms |= dict.fromkeys(self.diagnosis.observe(entry.step, _named(measures)))
        self.alarms = list(alarms)
        return measures


def _radius(model: OpenMythos) -> Tensor:
    """ρ(A) as a scalar on the device, also of sharded parameters."""
    injection = model.recurrent.injection
    s = whole(injection.log_A.detach()).float() + whole(injection.log_dt.detach()).float()
    return torch.exp(-torch.exp(s.clamp(injection.LOW, injection.HIGH))).max()


def _measures(values: list[float], look: list[float], topk: int) -> dict[str, Any]:
    """Name the numbers of a step: loss, skipped, norms of the parts, loads; and of a look, if there was one."""
    norms = values[2 : 2 + len(PARTS)]
    out: dict[str, Any] = {
        "loss": values[0],
        "grad_norm": math.sqrt(sum(norm**2 for norm in norms)),
        "grad_norms": dict(zip(PARTS, norms, strict=True)),
        **_balance(values[2 + len(PARTS) :], topk),
    }
    if look:
        rows = look[2:-1:3]
        for i, name in enumerate(("state_norm", "token_correlation")):
            out[name] = [x / n if n else None for x, n in zip(look[i:-1:3], rows, strict=True)]
        if not look[-1] < 0:
            out["halting_depth"] = look[-1]
    return out


def _balance(load: list[float], topk: int) -> dict[str, Any]:
    """Shares of the experts, and how even they are.

    Balance is (exp(H) − k) / (E − k) with H the entropy of the shares in nats: 1 when all experts get the same,
    0 when the same k get all. None when every token uses all experts.
    """
    total = sum(load)
    if not load or not total > 0:
        return {}
    share = [x / total for x in load]
    entropy = -sum(p * math.log(p) for p in share if p > 0)
    spare = len(share) - topk
    return {
        "expert_share": [round(p, 6) for p in share],
        "expert_min": min(share),
        "expert_max": max(share),
        "expert_balance": (math.exp(entropy) - topk) / spare if spare > 0 else None,
        "dead_experts": sum(p == 0 for p in share),
    }


def _named(measures: dict[str, Any]) -> dict[str, float]:
    """The measures of a step under the names that an account uses, causes before effects."""
    named: dict[str, float] = {}
    for name, key in (("state norm", "state_norm"), ("token correlation", "token_correlation")):
        by_loop = measures.get(key, [])
        for loop, value in enumerate(by_loop, 1):
            if value is not None and (loop & (loop - 1) == 0 or loop == len(by_loop)):
                named[f"{name} at loop {loop}"] = value
    for name, key in (
        ("ρ(A)", "rho"),
        ("expert balance", "expert_balance"),
        ("halting depth", "halting_depth"),
    ):
        if measures.get(key) is not None:
            named[name] = measures[key]
    named["loss"] = measures["loss"]
    named["gradient norm"] = measures["grad_norm"]
    return named | {f"gradient norm of the {part}": x for part, x in measures["grad_norms"].items()}


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _finite(value: Any, name: str, bad: list[str]) -> Any:
    """The value with null for what JSON cannot say; the names of such values go to ``bad``."""
    if isinstance(value, dict):
        return {key: _finite(x, f"{name}.{key}", bad) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x, name, bad) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        if name not in bad:
            bad.append(name)
        return None
    return value
