"""Tasks: labels against slow independent computations, splits that never overlap, metrics, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from open_mythos.tasks import (
    IGNORE_INDEX,
    PAD,
    SPLIT_SHARES,
    TASKS,
    Addition,
    Batch,
    DigitChain,
    KHop,
    Parity,
    Task,
    get_task,
    seeded_generator,
    split_of,
)

PINNED = [0, 0, 0, 0, 1, 2, 0, 0, 2, 0]

EVERY_TASK = [
    Parity(length=9),
    Parity(length=(1, 9), bos=False),
    DigitChain(),
    DigitChain(length=5, modulus=3, seq_len=11),
    KHop(hops=(1, 5), nodes=7),
    KHop(hops=1, nodes=5),
    KHop(hops=(1, 3), nodes=4, queries=3),
    Addition(digits=3),
    Addition(digits=(1, 5)),
    Addition(digits=(1, 5), layout="columns"),
    Addition(digits=6, layout="columns", ripple=0.7),
    DigitChain(length=(1, 9), seq_len=0),
    Parity(length=(4, 9), per="batch"),
]


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    return list(zip(batch.ids.tolist(), batch.targets.tolist(), strict=True))


def expected_parity(ids: list[int], task: Parity) -> list[int]:
    wanted, ones = [], 0
    for token in ids:
        if token not in (1, 2):
            wanted.append(IGNORE_INDEX)
            continue
        ones += token - 1
        wanted.append(1 + ones % 2)
    return wanted


def expected_digit_chain(ids: list[int], task: DigitChain) -> list[int]:
    wanted = [IGNORE_INDEX] * len(ids)
    at_eq = ids.index(2)
    wanted[at_eq] = 10 + sum(token - 10 for token in ids[1:at_eq]) % task.modulus
    return wanted


def expected_khop(ids: list[int], task: KHop) -> list[int]:
    arrow = {ids[3 * i + 1]: ids[3 * i + 2] for i in range(task.nodes)}
    edges = ids[: 3 * task.nodes]
    wanted = [IGNORE_INDEX] * len(ids)
    for position in range(3 * task.nodes, len(ids)):
        if ids[position] == 2:
            node = ids[position + 1]
            trained = int(split_of(torch.tensor([[*edges, 2, node]]))) == 0
        elif ids[position] == 3:
            node = arrow[node]
            wanted[position] = node if trained else IGNORE_INDEX
    return wanted


def expected_columns(ids: list[int]) -> list[int]:
    eq = ids.index(2)
    a, b = (int("".join(str(t - 3) for t in reversed(ids[first:eq:2])) or "0") for first in (1, 2))
    digits = [int(digit) + 3 for digit in reversed(str(a + b).zfill(eq // 2 + 1))]
    assert ids[0] == 1
    assert not any(ids[eq + 1 :])
    wanted = [IGNORE_INDEX] * len(ids)
    wanted[2:eq:2], wanted[eq] = digits[:-1], digits[-1]
    return wanted


def expected_addition(ids: list[int], task: Addition) -> list[int]:
    if task.layout == "columns":
        return expected_columns(ids)
    plus, eq = ids.index(1), ids.index(2)
    a = int("".join(str(t - 3) for t in ids[:plus]))
    b = int("".join(str(t - 3) for t in ids[plus + 1 : eq]))
    assert plus == eq - plus - 1
    answer = [int(digit) + 3 for digit in reversed(str(a + b).zfill(plus + 1))]
    wanted = [IGNORE_INDEX] * len(ids)
    wanted[eq : eq + len(answer)] = answer
    # Under teacher forcing each answer digit but the last is the next input.
    assert ids[eq + 1 : eq + len(answer)] == answer[:-1]
    assert not any(ids[eq + len(answer) :])
    return wanted


EXPECTED: dict[type[Task], Any] = {
    Parity: expected_parity,
    DigitChain: expected_digit_chain,
    KHop: expected_khop,
    Addition: expected_addition,
}


@pytest.mark.parametrize("task", EVERY_TASK, ids=repr)
def test_labels_are_those_of_a_slow_computation(task: Task) -> None:
    batch = task.sample(200, generator=seeded_generator(1))
    assert batch.ids.dtype == batch.targets.dtype == torch.long
    for ids, targets in rows(batch):
        assert targets == EXPECTED[type(task)](ids, task)


@pytest.mark.parametrize("task", EVERY_TASK, ids=repr)
def test_tokens_stay_below_vocab_size_and_reach_it(task: Task) -> None:
    batch = task.sample(2000, generator=seeded_generator(2))
    assert int(batch.ids.min()) >= 0
    assert int(max(batch.ids.max(), batch.targets.max())) == task.vocab_size - 1


@pytest.mark.parametrize("task", EVERY_TASK, ids=repr)
def test_padding_is_on_the_right_and_never_scored(task: Task) -> None:
    for ids, targets in rows(task.sample(200, generator=seeded_generator(3))):
        length = len(ids) - next(i for i, token in enumerate(reversed(ids)) if token != PAD)
        assert PAD not in ids[:length]
        assert all(target == IGNORE_INDEX for target in targets[length:])
        assert any(target != IGNORE_INDEX for target in targets)


@pytest.mark.parametrize("task", EVERY_TASK, ids=repr)
def test_the_same_generator_gives_the_same_batch(task: Task) -> None:
    one, two, other = (task.sample(32, generator=seeded_generator("x", i)) for i in (0, 0, 1))
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.ids, other.ids)


SMALL = {
    # As trained, then every difficulty that could be asked of it: spaces so small that a leak would be seen.
    Parity(length=(2, 7)): [*range(2, 10), (1, 8)],
    DigitChain(length=(2, 3), modulus=4, seq_len=0): [1, 2, 3, 4, (1, 4)],
    KHop(hops=(1, 2), nodes=4): [1, 2, 3, (1, 3)],
    Addition(digits=(1, 2), layout="written"): [1, 2, (1, 2)],
    Addition(digits=(1, 2), layout="columns", ripple=0.5): [1, 2, (1, 2)],
}


def instances(task: Task, split: str, level: Any) -> set[tuple[int, ...]]:
    """What one split shows at a difficulty, without padding; nothing if it has too few instances there."""
    found: set[tuple[int, ...]] = set()
    try:
        for seed in range(8):
            chosen = {task.difficulty: level}
            batch = task.sample(150, generator=seeded_generator(seed), split=split, **chosen)
            found |= {tuple(t for t in row if t != PAD) for row in task.identity(batch.ids).tolist()}
    except ValueError as problem:
        assert "too few instances" in str(problem)  # noqa: PT017
    return found


@pytest.mark.parametrize("task", SMALL, ids=repr)
def test_nothing_that_is_tested_at_any_difficulty_was_drawn_in_training(task: Task) -> None:
    """A thousand rows of spaces of hundreds: training in its range, the held-out splits in every other."""
    trained = instances(task, "train", getattr(task, task.difficulty))
    held = {s: set().union(*(instances(task, s, level) for level in SMALL[task])) for s in SPLIT_SHARES}
    assert len(trained) > 50
    assert len(held["test"]) > 5
    assert len(held["validation"]) > 5
    assert not trained & (held["test"] | held["validation"])
    assert not (held["train"] | held["validation"]) & held["test"]


def test_an_answer_of_khop_that_is_tested_was_not_trained_in_a_row_of_other_length() -> None:
    task = KHop(hops=(1, 3), nodes=4)
    rows = {s: task.sample(3000, generator=seeded_generator(5), split=s).ids[:, :14] for s in SPLIT_SHARES}
    graphs = {split: set(map(tuple, ids.tolist())) for split, ids in rows.items()}
    assert not graphs["train"] & (graphs["test"] | graphs["validation"])
    assert sum(map(len, graphs.values())) == 6 * 24 * 4


@pytest.mark.parametrize(
    "task", [Parity(length=8), DigitChain(length=(1, 3)), KHop(hops=2, nodes=4), Addition(digits=1)], ids=repr
)
def test_no_instance_is_in_two_splits_and_none_is_lost(task: Task) -> None:
    """Instance spaces small enough to be seen whole."""
    seen = {
        split: {
            tuple(r) for r in task.sample(20_000, generator=seeded_generator(4), split=split).ids.tolist()
        }
        for split in SPLIT_SHARES
    }
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    sizes = {
        "Parity": 2**8,
        "DigitChain": 7 + 7**2 + 7**3,
        "KHop": 6 * 24 * 4,  # directed 4-cycles × orders × starts
        "Addition": 100,
    }
    assert sum(map(len, seen.values())) == sizes[type(task).__name__]


def test_split_shares_hold_and_do_not_depend_on_the_label() -> None:
    batch = Parity(length=40)._draw(torch.full((60_000,), 40), 41, seeded_generator(5))
    split = split_of(batch.ids)
    for index, share in enumerate(SPLIT_SHARES.values()):
        chosen = split == index
        assert chosen.double().mean().item() == pytest.approx(share / 100, abs=0.01)
        labels = (batch.targets[chosen][:, 1:] - 1).double().mean(dim=0)
        assert labels.sub(0.5).abs().max().item() < 0.035


def test_the_split_of_an_instance_does_not_depend_on_its_padding() -> None:
    ids = DigitChain(seq_len=16).sample(300, generator=seeded_generator(6), split="test").ids
    assert torch.equal(split_of(ids), torch.full((300,), 2))
    assert torch.equal(split_of(torch.nn.functional.pad(ids, (0, 16))), torch.full((300,), 2))


def slow_split(tokens: list[int]) -> int:
    """The hash of `split_of` in integers that cannot overflow."""
    prime = 2**31 - 1
    h = sum(token * pow(48_271, i + 1, prime) for i, token in enumerate(tokens)) % prime
    for multiplier in (1_103_515_245, 1_566_083_941):
        h = (h ^ (h >> 15)) * multiplier % prime
    bucket = (h ^ (h >> 13)) % 100
    return (bucket >= 80) + (bucket >= 90)


def test_the_split_hash_does_not_overflow() -> None:
    ids = torch.randint(0, 50_000, (20, 2048))
    assert split_of(ids).tolist() == [slow_split(row) for row in ids.tolist()]


def test_the_split_of_known_instances_is_pinned() -> None:
    """Published results name a split; a change of the hash would move instances between splits."""
    ids = torch.arange(60).reshape(10, 6) + 1
    assert split_of(ids).tolist() == PINNED


def test_bits_and_parities_are_balanced() -> None:
    batch = Parity(length=16).sample(20_000, generator=seeded_generator(7))
    for values in (batch.ids[:, 1:], batch.targets[:, 1:]):
        assert (values == 2).double().mean(dim=0).sub(0.5).abs().max().item() < 0.02


def test_digit_chain_answers_are_balanced_and_lengths_uniform() -> None:
    batch = DigitChain(length=(2, 5)).sample(40_000, generator=seeded_generator(8))
    answers = batch.targets[batch.targets != IGNORE_INDEX]
    assert (torch.bincount(answers - 10) / 40_000).sub(1 / 7).abs().max().item() < 0.03
    lengths = (batch.ids >= 10).sum(dim=1)
    assert sorted(set(lengths.tolist())) == [2, 3, 4, 5]
    assert (torch.bincount(lengths)[2:] / 40_000).sub(1 / 4).abs().max().item() < 0.04


def test_a_ring_of_khop_is_asked_from_several_starts_in_training_alone() -> None:
    plain, task = (KHop(hops=(1, 3), nodes=4, queries=queries) for queries in (1, 4))
    one, many = (t.sample(300, generator=seeded_generator(3)) for t in (plain, task))
    assert many.ids.shape[1] == task.train_width(3) > task.width(3) == plain.train_width(3)
    for first, row, targets in zip(one.ids.tolist(), many.ids.tolist(), many.targets.tolist(), strict=True):
        assert row[:14] == first[:14]
        hops = first.count(3)
        starts = row[13 :: 2 + hops][:4]
        assert sorted(starts) == [4, 5, 6, 7]
        assert row.count(3) == 4 * hops
        assert targets.count(IGNORE_INDEX) >= len(row) - 4 * hops
    # Starts that the held-out splits ask for are seen and not answered.
    answers = (many.targets != IGNORE_INDEX).sum()
    assert 0.5 < answers / (many.ids == 3).sum() < 0.98
    for split in ("validation", "test"):
        one, many = (t.sample(20, generator=seeded_generator(4), split=split) for t in (plain, task))
        assert torch.equal(one.ids, many.ids)
        assert torch.equal(one.targets, many.targets)


def test_khop_visits_distinct_nodes_in_a_uniform_way() -> None:
    batch = KHop(hops=6, nodes=7).sample(14_000, generator=seeded_generator(9))
    answers = batch.targets[:, -6:]
    assert all(len(set(row)) == 6 for row in answers.tolist())
    for hop in range(6):
        assert (torch.bincount(answers[:, hop] - 4) / 14_000).sub(1 / 7).abs().max().item() < 0.015


def test_addition_meets_carries_longer_than_int64() -> None:
    task = Addition(digits=40)
    for ids, targets in rows(task.sample(50, generator=seeded_generator(10))):
        assert targets == expected_addition(ids, task)


@pytest.mark.parametrize("ripple", [0.0, 0.6, 1.0])
def test_ripple_is_the_share_of_columns_that_pass_a_carry_on(ripple: float) -> None:
    ids = Addition(digits=50, layout="columns", ripple=ripple).sample(100, generator=seeded_generator(10)).ids
    nines = (ids[:, 1:-1:2] + ids[:, 2:-1:2] == 9 + 2 * 3).double().mean().item()
    assert nines == pytest.approx(ripple + (1 - ripple) / 10, abs=0.03)


@pytest.mark.parametrize("per", ["sequence", "batch"])
def test_sums_so_far_are_asked_in_training_where_their_chain_is_one_to_train_on(per: str) -> None:
    plain, task = (DigitChain(seq_len=0, running=r, per=per) for r in (False, True))
    sums = {True: 0, False: 0}
    for seed in range(20):
        batch, bare = (t.sample(40, generator=seeded_generator(seed)) for t in (task, plain))
        assert torch.equal(batch.ids, bare.ids)
        for ids, targets in rows(batch):
            eq = ids.index(2)
            for position, target in enumerate(targets):
                if position < 2 or position > eq:
                    assert target == IGNORE_INDEX
                    continue
                chain = [*ids[: position + 1], 2] if position < eq else ids[: eq + 1]
                trained = slow_split(chain) == 0
                sums[trained] += position < eq
                total = 10 + sum(token - 10 for token in ids[1 : min(position + 1, eq)]) % 7
                assert target == (total if trained else IGNORE_INDEX)
    assert sums[True] > 4 * 0.5 * sums[False] > 0
    for split in ("validation", "test"):
        held, same = (t.sample(50, generator=seeded_generator(1), split=split) for t in (task, plain))
        assert torch.equal(held.targets, same.targets)


def test_a_batch_of_one_difficulty_is_as_wide_as_it_and_only_in_training() -> None:
    task = Parity(length=(4, 12), per="batch")
    widths = []
    for seed in range(60):
        ids = task.sample(8, generator=seeded_generator(seed)).ids
        assert int((ids != PAD).sum()) == ids.numel()
        widths.append(ids.shape[1])
    assert set(widths) == set(range(5, 14))
    held = task.sample(200, generator=seeded_generator(0), split="test").ids
    assert held.shape == (200, 13)
    assert set((held != PAD).sum(1).tolist()) == set(range(5, 14))


def test_a_chain_as_wide_as_needed_is_the_same_task() -> None:
    narrow, padded = (
        DigitChain(length=4, seq_len=s).sample(9, generator=seeded_generator(1)) for s in (0, 6)
    )
    assert torch.equal(narrow.ids, padded.ids)
    assert torch.equal(narrow.targets, padded.targets)
    assert DigitChain(length=(2, 5), seq_len=0).sample(9, generator=seeded_generator(1)).ids.shape == (9, 7)
    assert DigitChain(seq_len=0).sample(9, generator=seeded_generator(1), length=40).ids.shape == (9, 42)


def test_parity_without_bos_is_the_tutorial_task() -> None:
    batch = Parity(length=24, bos=False).sample(64, generator=seeded_generator(11))
    assert batch.ids.shape == batch.targets.shape == (64, 24)
    assert set(batch.ids.unique().tolist()) == {1, 2}
    assert torch.equal(batch.targets, (batch.ids - 1).cumsum(1) % 2 + 1)


def test_parity_with_bos_starts_with_it_and_does_not_score_it() -> None:
    batch = Parity(length=5).sample(8, generator=seeded_generator(12))
    assert batch.ids.shape == (8, 6)
    assert batch.ids[:, 0].tolist() == [3] * 8
    assert batch.targets[:, 0].tolist() == [IGNORE_INDEX] * 8
    assert 3 not in batch.ids[:, 1:]


@pytest.mark.parametrize("level", [6, (6, 6), [6, 6]])
def test_a_difficulty_given_to_sample_replaces_the_field(level: Any) -> None:
    task = DigitChain(length=2)
    lengths = (task.sample(50, generator=seeded_generator(13), length=level).ids >= 10).sum(dim=1)
    assert set(lengths.tolist()) == {6}


def test_accuracy_counts_tokens_sequences_and_last_tokens() -> None:
    task = Parity(length=3, bos=False)
    batch = Batch(
        torch.ones(3, 4, dtype=torch.long), torch.tensor([[1, 2, 1, -100], [2, 2, -100, -100], [1, 1, 1, 1]])
    )
    said = torch.tensor([[1, 2, 1, 2], [2, 1, 1, 1], [2, 1, 1, 1]])
    logits = torch.nn.functional.one_hot(said, 8).float()
    metrics = task.accuracy(logits, batch)
    assert metrics == {
        "token_accuracy": pytest.approx(7 / 9),
        "sequence_accuracy": pytest.approx(1 / 3),
        "last_token_accuracy": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize("task", EVERY_TASK, ids=repr)
def test_accuracy_is_one_for_the_labels_and_zero_for_others(task: Task) -> None:
    batch = task.sample(16, generator=seeded_generator(14))
    right = torch.nn.functional.one_hot(batch.targets.clamp_min(0), task.vocab_size).float()
    assert set(task.accuracy(right, batch).values()) == {1.0}
    assert set(task.accuracy(-right, batch).values()) == {0.0}


@pytest.mark.parametrize("shape", [(4, 10, 3), (4, 9, 4), (3, 10, 4), (10, 4)])
def test_accuracy_refuses_logits_of_another_shape(shape: tuple[int, ...]) -> None:
    task = Parity(length=9)
    batch = task.sample(4, generator=seeded_generator(15))
    with pytest.raises(ValueError, match=r"logits has shape .* allowed is \(4, 10, V\) with V >= 4"):
        task.accuracy(torch.zeros(shape), batch)


def test_accuracy_refuses_rows_with_nothing_scored() -> None:
    batch = Batch(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [-100, -100, -100]]))
    with pytest.raises(ValueError, match="row with nothing scored"):
        Parity().accuracy(torch.zeros(2, 3, 4), batch)


def test_get_task_builds_each_task_by_name() -> None:
    assert {name: type(get_task(name)) for name in TASKS} == TASKS
    assert get_task("parity", length=32, bos=False) == Parity(length=32, bos=False)
    from_json = json.loads('{"length": [2, 4]}')
    assert get_task("digit_chain", **from_json).sample(4, generator=seeded_generator(16)).ids.shape == (4, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_task("sudoku"), r"task='sudoku'; allowed: 'parity', 'digit_chain', 'khop', 'addition'"),
        (lambda: get_task("parity", size=3), r"'parity'='size'; allowed: 'per', 'length', 'bos'"),
        (lambda: Parity(length=0), r"length=0; allowed is an integer >= 1"),
        (lambda: Parity(length=True), r"length=True"),
        (lambda: Parity(length=2.0), r"length=2.0"),  # type: ignore[arg-type]
        (lambda: Parity(length=(5, 2)), r"length=\(5, 2\).*ascending pair"),
        (lambda: Parity(length=(1, 2, 3)), r"length=\(1, 2, 3\)"),  # type: ignore[arg-type]
        (lambda: DigitChain(length=31), r"length=31; allowed is an integer >= 1 and <= 30"),
        (lambda: DigitChain(modulus=1), r"modulus=1; allowed is an integer >= 2"),
        (lambda: DigitChain(seq_len=2), r"seq_len=2; allowed is an integer >= 3"),
        (lambda: KHop(hops=12), r"hops=12; allowed is an integer >= 1 and <= 11"),
        (lambda: KHop(queries=13), r"queries=13; allowed is an integer >= 1 and <= 12"),
        (lambda: KHop(nodes=1), r"nodes=1; allowed is an integer >= 2"),
        (lambda: Addition(digits=-1), r"digits=-1"),
        (lambda: Addition(layout="rows"), r"layout='rows'; allowed: 'written', 'columns'"),
        (lambda: Addition(ripple=1.5), r"ripple=1.5; allowed is a number from 0 to 1"),
        (lambda: DigitChain(running=1), r"running=1; allowed is True or False"),  # type: ignore[arg-type]
        (lambda: Parity(per="row"), r"per='row'; allowed: 'sequence', 'batch'"),
        (lambda: Addition(ripple=True), r"ripple=True; allowed is a number"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0; allowed is an integer >= 1"),
        ({"split": "dev"}, r"split='dev'; allowed: 'train', 'validation', 'test'"),
        ({"digits": 3}, r"difficulty 'digits' is unknown; Parity has 'length'"),
        ({"length": 0}, r"length=0"),
    ],
)
def test_sample_refuses_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parity().sample(**{"batch_size": 2, "generator": seeded_generator(17), **kwargs})


def test_a_split_without_instances_is_refused_and_does_not_hang() -> None:
    """Two instances of length 1 cannot fill three splits."""
    outcomes = set()
    for split in SPLIT_SHARES:
        try:
            Parity(length=1).sample(4, generator=seeded_generator(18), split=split)
        except ValueError as error:
            outcomes.add("too few instances at length=(1, 1)" in str(error))
    assert outcomes == {True}


def test_seeded_generators_differ_where_sums_agree() -> None:
    seeds = {seeded_generator("a", i, j).initial_seed() for i in range(20) for j in range(20)}
    assert len(seeds) == 400
