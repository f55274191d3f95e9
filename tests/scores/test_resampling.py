"""What the tests over samples promise."""

import itertools

import pytest
import torch

from qkov_lightning import head_interference
from qkov_lightning.scores.resampling import bootstrap_standard_error, permutation_test
from qkov_lightning.scores.scores import sample_pairs


def make_pairs(count: int, split: float, cells: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples that interfere more across the tasks by ``split``."""
    generator = torch.Generator().manual_seed(seed)
    is_a = torch.arange(2 * count) < count
    pairs = torch.rand(cells, 2 * count, 2 * count, generator=generator, dtype=torch.float64)
    return pairs + split * (is_a[:, None] != is_a), is_a


def by_hand(cell: torch.Tensor, is_a: list[bool]) -> float:
    """Pair by pair."""
    groups: dict[str, list[float]] = {"across": [], "A": [], "B": []}
    for i, j in itertools.permutations(range(len(is_a)), 2):
        group = "across" if is_a[i] != is_a[j] else "A" if is_a[i] else "B"
        groups[group].append(float(cell[i, j]))
    mean = {name: sum(values) / len(values) for name, values in groups.items()}
    return mean["across"] - (mean["A"] + mean["B"]) / 2


def test_the_difference_is_that_of_all_pairs_taken_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.rand(3, 9, 9, generator=generator, dtype=torch.float64)
    is_a = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    result = permutation_test(pairs, is_a, num_permutations=10)
    expected = [by_hand(cell, is_a.tolist()) for cell in pairs]
    torch.testing.assert_close(result.difference, torch.tensor(expected, dtype=torch.float64))


def test_the_p_value_is_the_share_of_all_labellings() -> None:
    pairs, is_a = make_pairs(4, split=0.15)
    observed = by_hand(pairs[0], is_a.tolist())
    labellings = [[i in chosen for i in range(8)] for chosen in itertools.combinations(range(8), 4)]
    exact = sum(by_hand(pairs[0], one) >= observed - 1e-9 for one in labellings) / len(labellings)
    result = permutation_test(pairs, is_a, num_permutations=20000)
    assert float(result.p_value) == pytest.approx(exact, abs=0.015)  # 4 standard errors of 20000 draws


def test_labels_that_do_not_matter_give_uniform_p_values_and_labels_that_do_give_small_ones() -> None:
    """The prototype permuted rows, which cannot change a mean."""
    null, is_a = make_pairs(10, split=0.0, cells=200)
    p_values = permutation_test(null, is_a, num_permutations=199).p_value
    assert len(p_values.unique()) > 50
    assert 0.4 < float(p_values.mean()) < 0.6
    assert float((p_values <= 0.05).double().mean()) < 0.1
    planted, _ = make_pairs(10, split=0.3, cells=5)
    result = permutation_test(planted, is_a, num_permutations=999)
    assert bool((result.adjusted_p_value < 0.01).all())


def test_a_p_value_is_never_zero_and_repeats_with_its_seed() -> None:
    pairs, is_a = make_pairs(10, split=5.0)
    first = permutation_test(pairs, is_a, num_permutations=99)
    assert float(first.p_value) >= 0.01
    assert torch.equal(first.p_value, permutation_test(pairs, is_a, num_permutations=99).p_value)


def test_pairs_in_float32_give_the_p_values_of_float64() -> None:
    """With as many samples of A as of B, swapping them all is a tie, which rounding must not break."""
    pairs, is_a = make_pairs(4, split=0.2, cells=20)
    pairs = 1000 + pairs.float()
    expected = permutation_test(pairs.double(), is_a, num_permutations=2000)
    result = permutation_test(pairs, is_a, num_permutations=2000)
    torch.testing.assert_close(result.p_value, expected.p_value, rtol=0, atol=0)


def test_the_bootstrap_agrees_with_the_standard_errors_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(120, 3, 20, generator=generator, dtype=torch.float64)
    fisher = torch.rand(3, 20, generator=generator, dtype=torch.float64) + 0.5
    is_a = torch.arange(120) < 50
    tasks = ["a" if one else "b" for one in is_a.tolist()]
    pairs = torch.stack([sample_pairs(gradients[:, h], gradients[:, h], fisher[h]) for h in range(3)])
    stated = head_interference(gradients, tasks, fisher)["a", "b"]["interference_standard_error"]
    found = bootstrap_standard_error(pairs, is_a, num_resamples=2000)
    # 2000 resamples know a standard deviation to 1.6%; that of 50 samples is known to 10%.
    torch.testing.assert_close(found, stated, rtol=0.1, atol=0)


@pytest.mark.parametrize("test", [permutation_test, bootstrap_standard_error])
def test_what_cannot_be_tested_is_refused(test: object) -> None:
    pairs, is_a = make_pairs(3, split=0.0)
    with pytest.raises(ValueError, match="1 samples of task A and 5 of task B"):
        test(pairs, torch.arange(6) < 1)
    pairs[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        test(pairs, is_a)
