"""One optimiser step, the same on one process and on many.

The host never waits for the device here. Whether the loss and the gradients are finite is found out, and heeded,
on the device; the host hears of it when a record is read.

Shape letters: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from open_mythos.model.moe import MoEFFN
from open_mythos.tasks.base import IGNORE_INDEX
from open_mythos.training import optim
from open_mythos.training.config import RunConfig
from open_mythos.training.gradients import Gradients
from open_mythos.training.loops import LoopPlan, loop_distribution
from open_mythos.training.monitor import Monitor, gradient_norms
from open_mythos.training.objective import Objective
from open_mythos.training.parallel import World, last_of_step
from open_mythos.training.state import TrainState

__all__ = ["Step", "TrainingError"]


# Balancing: batches that fit the bias, and then judge it; and the smallest share that is even enough.
_ROUND, _EVEN = 10, 0.7


class TrainingError(RuntimeError):
    """A run that cannot go on. The message says at which step, and what may help."""


class Step:
    """Descends the mean gradient of ``train.accumulate`` batches, each with its own loop count.

    The gradient is that of all processes' rows together, each target with the same weight, however the rows
    are spread. A step whose loss or gradient is not finite on any process is left out on all of them:
    parameters, moments, router biases and expert counts stay as they were, and only the data and the random
    numbers move on.

    Args:
        config: the run.
        state: what is trained; its counters are kept up to date, those of skipped steps at :meth:`check`.
        objective: the model in it, already spread over the world.
        world: the processes.
        monitor: what watches.
    """

    def __init__(
        self, config: RunConfig, state: TrainState, objective: Objective, world: World, monitor: Monitor
    ) -> None:
        self.config, self.state, self.objective = config, state, objective
        self.world, self.monitor = world, monitor
        self.plans = loop_distribution(config.loops.kind, **config.loops.options)
        self.schedule = optim.Schedule(config.optim, config.train.steps)
        self.trained = [p for p in state.model.parameters() if p.requires_grad]
        # Under sharding the parameters are cast when they are gathered.
        narrow = config.parallel.precision == "bf16" and world.size == 1
        self.gradients = Gradients(
            objective,
            torch.bfloat16 if narrow else None,
            capture=config.parallel.graphs,
            sharded=world.size > 1,
        )
        # A tensor, which a captured step reads anew.
        self.pace = torch.ones((), device=world.device)
        for moe in self._moes():
            moe.pace = self.pace
        # In all, in a row up to now, and the longest row since the last look.
        self.skips = torch.tensor([state.skips, state.skips_in_row, 0], device=world.device)

    def __call__(self, read: bool) -> dict[str, Any] | None:
        """Do one step.

        Args:
            read: make a record of it.

        Returns:
            The record, the same on every process, or None.
        """
        state, lr = self.state, self.schedule(self.state.step)
        routing = [(buffer, buffer.clone()) for buffer in self._routing()]
        self.pace.fill_(optim.router_pace(state.step, self.config.train.steps))
        state.balanced = 0
        state.optimizer.zero_grad(set_to_none=True)
        self.monitor.begin(state.step + 1, read)
        accumulate = self.config.train.accumulate
        losses = []
        for i in range(accumulate):
            last_of_step(self.objective, i == accumulate - 1)
            losses.append(self._descend(next(state.data)))
        if accumulate > 1:
            # After the fact, not on each loss: the halting head's own loss has weight one in every backward.
            torch._foreach_div_([p.grad for p in self.trained if p.grad is not None], accumulate)
        norms = gradient_norms(state.model, self.world)
        norm = norms.norm()
        optim.clip_gradients(self.trained, self.config.optim.clip, norm)
        # Summed, it is not finite where any term is not, and it is the same on every process.
        bad = ~(self.world.sum(torch.stack(losses).sum()) + norm).isfinite()
        optim.skip_when(state.optimizer, bad)
        optim.set_lr(state.optimizer, lr)
        state.optimizer.step()
        for buffer, before in routing:
            buffer.copy_(torch.where(bad, before, buffer))
        total, row, longest = self.skips.unbind()
        row = (row + 1) * bad
        self.skips = torch.stack((total + bad, row, torch.maximum(longest, row)))
        state.step += 1
        return self.monitor.end(lr, norms, skipped=bad)

    @torch.no_grad()
    def balance(self) -> None:
        """Fit the routers' bias, and nothing else, to the loads at the depth of use, on ``train.balance`` batches.

        In rounds: some batches to fit it, in ever smaller steps, each of which follows the loads of the round so far,
        since one batch, whose tokens are much alike, is too noisy for a hundred experts; then as many on which it
        stands still and is judged by the smallest share that an expert takes. Where many tokens are alike the bias
        never comes to rest, for they all change experts together. So the best round's is taken; the first that is
        good enough ends it.
        """
        state, model, moes = self.state, self.state.model, self._moes()
        rounds = self.config.train.balance // (2 * _ROUND)
        best: tuple[float, list[Tensor]] = (-1.0, [])
        model.eval()
        for moe in moes:
            moe.counting = True
        try:
            for number in range(rounds):
                self._forget()
                for batch in range(_ROUND):
                    self.pace.fill_(optim.balance_pace(number * _ROUND + batch, rounds * _ROUND))
                    self._look()
                    model.update_router_bias(forget=False)
                self._forget()
                for _ in range(_ROUND):
                    self._look()
                least = min(float(moe.least_share()) for moe in moes)
                if least > best[0]:
                    best = least, [moe.router_bias.clone() for moe in moes]
                if least >= _EVEN:
                    break
        finally:
            for moe in moes:
                moe.counting = False
            model.train()
        self._forget()
        for moe, bias in zip(moes, best[1], strict=True):
            moe.router_bias.copy_(bias)
        state.balanced = self.config.train.balance

    def _forget(self) -> None:
        for moe in self._moes():
            moe.expert_load.zero_()

    def _look(self) -> None:
        """Count the loads of the next batch."""
        batch = next(self.state.data)
        batch = {key: value.to(self.world.device, non_blocking=True) for key, value in batch.items()}
        self.gradients.forward(batch, LoopPlan(0, self.state.model.cfg.max_loop_iters))

    def check(self) -> None:
        """Bring the counts of skipped steps to the host, which waits for the device.

        Raises:
            TrainingError: more than ``train.max_skips`` steps in a row were left out.
        """
        state, limit = self.state, self.config.train.max_skips
        state.skips, state.skips_in_row, longest = self.skips.tolist()
        self.skips[2] = self.skips[1]
        if longest > limit:
            account = self.monitor.account()
            raise TrainingError(
                f"the loss or a gradient was not finite in {longest} steps in a row, up to step "
                f"{state.step}, and train.max_skips is {limit}{f' ({account})' if account else ''}: lower "
                "optim.lr, raise optim.warmup or lower optim.clip, and go on from the last checkpoint or start again"
            )

    def _routing(self) -> list[Tensor]:
        return [buffer for moe in self._moes() for buffer in (moe.router_bias, moe.expert_load)]

    def _moes(self) -> list[MoEFFN]:
        return [module for module in self.state.model.modules() if isinstance(module, MoEFFN)]

    def _descend(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Add the gradient of this process's rows; returns their loss, of which the processes' mean is the batch's."""
        state, world, rows = self.state, self.world, self.config.train.batch_size
        each = self.config.loops.per == "sequence"
        plan = self.plans.sample_each(state.loops, rows) if each else self.plans.sample(state.loops)
        targets = None
        if world.size > 1:
            own = (batch["targets"] != IGNORE_INDEX).sum().to(world.device, non_blocking=True)
            targets = world.sum(own) / world.size
        batch = {key: value.to(world.device, non_blocking=True) for key, value in batch.items()}
        with self.monitor.watching() as looked_at:
            share = plan.rows(world.rank, world.size)
            loss = self.gradients(batch, share, targets, capture=not looked_at)
        self._count(batch["ids"], loss, plan)
        return loss

    def _count(self, ids: Tensor, loss: Tensor, plan: LoopPlan) -> None:
        state, tokens = self.state, ids.numel() * self.world.size
        state.tokens += tokens
        state.forwards += 1
        state.loops_sum += plan.mean
        state.loops_max = max(state.loops_max, plan.total)
        self.monitor.passed(loss, plan, tokens, ids.shape[1])
