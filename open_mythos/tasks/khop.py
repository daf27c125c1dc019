"""k-hop pointer chasing: follow arrows that are listed, in random order, in the context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.tasks.base import IGNORE_INDEX, PAD, Batch, Level, Task, check_integer, split_of

EDGE, QUERY, HOP = 1, 2, 3
NODE_BASE = 4


@dataclass(frozen=True)
class KHop(Task):
    """``(EDGE from to) × nodes, QUERY start, HOP × hops``; the target at the i-th HOP is the node i arrows
    on.

    The arrows form one cycle through all nodes, so all nodes on the way are different and no shorter way
    gives the answer. Each HOP asks one arrow more than the one before it; the answers are not in the input,
    so the i-th needs i lookups one after another. Number of hops is written in unary, so that more hops than
    trained on need no token that training has not seen.

    Every HOP has the same task: look up the node that the HOP before it found (the first: the start). So what was
    learnt for a few hops serves for any number, and the i-th answer needs the (i - 1)-th first. The splits divide
    arrows with start, whatever the number of hops: an answer asked in testing was not asked in training.

    Attributes:
        hops: arrows to follow, from 1 to ``nodes - 1``, or an inclusive range.
        nodes: nodes and arrows in the context, at least 2.
        queries: in training each context is asked so many times, 1 to ``nodes``, from different starts and one after
            another: the answers of one query say little, and a context is long. Starts of held-out rows get no
            target, and held-out rows have one query.
    """

    hops: Level = 4
    nodes: int = 12
    queries: int = 1
    difficulty = "hops"

    def __post_init__(self) -> None:
        check_integer("nodes", self.nodes, 2)
        check_integer("queries", self.queries, 1, self.nodes)
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """V: 1 + the greatest token."""
        return NODE_BASE + self.nodes

    @property
    def bounds(self) -> tuple[int, int | None]:
        """Smallest and largest ``hops``."""
        return 1, self.nodes - 1

    def width(self, level: int) -> int:
        """S of a batch whose greatest ``hops`` is ``level``."""
        return 3 * self.nodes + 2 + level

    def train_width(self, level: int) -> int:
        """S of a training batch: the arrows, and so many queries."""
        return 3 * self.nodes + self.queries * (2 + level)

    def identity(self, ids: Tensor) -> Tensor:
        """The arrows and the start, (B, 3 * nodes + 2)."""
        return ids[:, : self.width(0)]

    def sample(
        self, batch_size: int, *, generator: torch.Generator, split: str = "train", **difficulty: Level
    ) -> Batch:
        """As every task; see :meth:`Task.sample`."""
        batch = super().sample(batch_size, generator=generator, split=split, **difficulty)
        if self.queries == 1 or split != "train":
            return batch
        return self._with_queries(batch.ids, generator)

    def _with_queries(self, ids: Tensor, generator: torch.Generator) -> Batch:
        """The same rows with queries from other starts after their own, those to train on with targets."""
        arrows = ids[:, : 3 * self.nodes].view(-1, self.nodes, 3)
        after = torch.zeros(len(ids), self.vocab_size, dtype=torch.long, device=ids.device)
        after.scatter_(1, arrows[:, :, 1], arrows[:, :, 2])
        ring = [ids[:, self.width(0) - 1 : self.width(0)]]
        while len(ring) < self.nodes:
            ring.append(after.gather(1, ring[-1]))
        cycle = torch.cat(ring, dim=1)
        others = _permutations(len(ids), self.nodes - 1, generator)[:, : self.queries - 1] + 1
        starts = torch.nn.functional.pad(others, (1, 0))

        hops = ids[:, self.width(0) :]
        period = 2 + (hops == HOP).sum(dim=1, keepdim=True)
        place = torch.arange(self.queries * (2 + hops.shape[1]), device=ids.device)
        query, step = place // period, place % period
        past = query >= self.queries
        query = query.clamp(max=self.queries - 1)
        node = cycle.gather(1, (starts.gather(1, query) + step - 1) % self.nodes)
        asked = torch.where(step == 0, QUERY, torch.where(step == 1, node, HOP)).masked_fill(past, PAD)
        edges = ids[:, : 3 * self.nodes]
        rows = [
            torch.cat([edges, torch.full_like(s, QUERY), s], 1) for s in cycle.gather(1, starts).split(1, 1)
        ]
        own = torch.stack([split_of(row) == 0 for row in rows], dim=1)
        scored = (step > 1) & ~past & own.gather(1, query)
        targets = node.masked_fill(~scored, IGNORE_INDEX)
        return Batch(
            torch.cat([edges, asked], dim=1),
            torch.cat([torch.full_like(edges, IGNORE_INDEX), targets], dim=1),
        )

    def _draw(self, levels: Tensor, width: int, generator: torch.Generator) -> Batch:
        rows, device = len(levels), levels.device
        cycle = _permutations(rows, self.nodes, generator) + NODE_BASE
        order = _permutations(rows, self.nodes, generator)
        sources = cycle.gather(1, order)
        destinations = cycle.roll(-1, dims=1).gather(1, order)
        edges = torch.stack([torch.full_like(sources, EDGE), sources, destinations], dim=2).flatten(1)

        most = width - self.width(0)
        beyond = torch.arange(most, device=device) >= levels[:, None]
        hops = torch.full((rows, most), HOP, device=device).masked_fill(beyond, PAD)
        ids = torch.cat([edges, torch.full((rows, 1), QUERY, device=device), cycle[:, :1], hops], dim=1)
        targets = torch.full_like(ids, IGNORE_INDEX)
        targets[:, -most:] = cycle[:, 1 : most + 1].masked_fill(beyond, IGNORE_INDEX)
        return Batch(ids, targets)


def _permutations(rows: int, n: int, generator: torch.Generator) -> Tensor:
    """(rows, n) long: a uniform permutation of 0 … n-1 in each row."""
    return torch.rand(rows, n, generator=generator, device=generator.device, dtype=torch.float64).argsort(
        dim=1
    )
