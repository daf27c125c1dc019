"""Loop counts drawn for the batch and for each sequence, against the probabilities that their formulas give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from open_mythos.config import ConfigError
from open_mythos.training.loops import (
    Fixed,
    LogNormalPoisson,
    LoopDistribution,
    LoopPlan,
    Progressive,
    Uniform,
)

DRAWS = 6000


def uniform(low: int, high: int) -> dict[int, float]:
    return dict.fromkeys(range(low, high + 1), 1 / (high - low + 1))


def progressive(free: int, grad: int) -> dict[int, float]:
    chances: Counter[int] = Counter()
    for n in range(free + 1):
        for k in range(1, grad + 1):
            chances[n + k] += 1 / ((free + 1) * grad)  # type: ignore[assignment]
    return dict(chances)


def lognormal_poisson(rate: float, sigma: float) -> dict[int, float]:
    """P(n) = ∫ Poisson(n − 1; τ) dLogNormal(τ), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    taus = np.exp(math.log(rate) - sigma**2 / 2 + sigma * nodes)
    weights = weights / weights.sum()
    return {
        n + 1: float((weights * np.exp(-taus + n * np.log(taus) - math.lgamma(n + 1))).sum())
        for n in range(150)
    }


def assert_follows(draws: Iterable[int], chances: dict[int, float]) -> None:
    """χ² of the draws at the one-in-a-million level, rare counts joined to one."""
    seen = Counter(draws)
    total = sum(seen.values())
    assert set(seen) <= set(chances)
    common = [n for n, chance in chances.items() if chance * total >= 8]
    cells = [(seen[n], chances[n] * total) for n in common]
    rest = total - sum(expected for _, expected in cells)
    if rest > 1:
        cells.append((total - sum(got for got, _ in cells), rest))
    statistic = sum((got - expected) ** 2 / expected for got, expected in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the quantile; 4.75 standard deviations.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, (statistic, limit)


CASES = [
    (Uniform(3, 9, backprop=4), uniform(3, 9)),
    (LogNormalPoisson(6.0, 0.5, 4), lognormal_poisson(6.0, 0.5)),
    (LogNormalPoisson(32.0, 0.25), lognormal_poisson(32.0, 0.25)),
    (Progressive(5, 3), progressive(5, 3)),
]


@pytest.mark.parametrize(("distribution", "chances"), CASES, ids=[repr(c[0]) for c in CASES])
def test_counts_of_batches_and_of_sequences_follow_the_formula(
    distribution: LoopDistribution, chances: dict[int, float]
):
    assert math.fsum(chances.values()) == pytest.approx(1, abs=1e-6)
    mean = sum(n * chance for n, chance in chances.items())
    assert distribution.mean == pytest.approx(mean, rel=1e-6)
    generator = torch.Generator().manual_seed(11)
    assert_follows((distribution.sample(generator).total for _ in range(DRAWS)), chances)
    # One sequence a plan: sequences of a progressive batch share their n_grad, so they are not independent.
    assert_follows((distribution.sample_each(generator, 1).total for _ in range(DRAWS)), chances)
    if not isinstance(distribution, Progressive):
        plan = distribution.sample_each(generator, DRAWS)
        assert plan.starts is not None
        assert_follows((plan.total - start for start in plan.starts), chances)


def test_the_check_can_fail():
    generator = torch.Generator().manual_seed(11)
    plan = LogNormalPoisson(6.0, 0.5, 4).sample_each(generator, DRAWS)
    assert plan.starts is not None
    draws = [plan.total - start for start in plan.starts]
    for wrong in (lognormal_poisson(6.4, 0.5), lognormal_poisson(6.0, 0.4)):
        with pytest.raises(AssertionError):
            assert_follows(draws, wrong)


def test_progressive_sequences_share_what_is_backpropagated():
    generator = torch.Generator().manual_seed(2)
    plans = [Progressive(4, 3).sample_each(generator, 5) for _ in range(DRAWS // 4)]
    assert_follows((plan.n_grad for plan in plans), uniform(1, 3))
    assert_follows(
        (plan.total - plan.n_grad - start for plan in plans for start in plan.starts or ()), uniform(0, 4)
    )
    for plan in plans:
        assert min(plan.starts or ()) == 0  # the longest sequence sets the loops that run
        assert max(plan.starts or ()) <= plan.n_free


@pytest.mark.parametrize("backprop", [None, 3])
def test_every_sequence_backpropagates_through_its_own_last_loops(backprop: int | None):
    plan = Uniform(1, 6, backprop).sample_each(torch.Generator().manual_seed(0), 64)
    assert plan.starts is not None
    assert plan.total == 6  # 64 draws reach it
    assert plan.n_grad == (6 if backprop is None else backprop)
    assert plan.mean == pytest.approx(sum(6 - start for start in plan.starts) / 64)
    assert Fixed(5, backprop).sample_each(torch.Generator(), 2).starts == (0, 0)


def test_indices_count_from_each_sequences_start():
    plan = LoopPlan(1, 2, (0, 2, 1))
    assert plan.indices().tolist() == [[0, -2, -1], [1, -1, 0], [2, 0, 1]]
    assert LoopPlan(1, 2).indices().tolist() == [0, 1, 2]
    assert LoopPlan(1, 2, (0, 2, 1, 1)).rows(1, 2) == LoopPlan(1, 2, (1, 1))
    assert LoopPlan(1, 2).rows(1, 2) == LoopPlan(1, 2)


def test_every_rank_draws_the_same_plan():
    plans = [LogNormalPoisson(8).sample_each(torch.Generator().manual_seed(5), 12) for _ in range(2)]
    assert plans[0] == plans[1]
    parts = [plans[0].rows(rank, 3) for rank in range(3)]
    assert sum((part.starts or () for part in parts), ()) == plans[0].starts
    assert {part.total for part in parts} == {plans[0].total}


@pytest.mark.parametrize("starts", [(0, 3), (-1,), (0.5,), (True,)])
def test_starts_lie_within_the_loops(starts: tuple[int, ...]):
    with pytest.raises(ConfigError, match=r"starts = .* is not allowed: it must be"):
        LoopPlan(1, 2, starts)
