"""What the tests over samples promise."""

import itertools

import pytest
import torch
from torch import Tensor

from qkov_lightning import bootstrap_standard_error, head_interference, permutation_test, sample_pairs

DAMPING = 1e-3


def by_hand(gradients: Tensor, is_a: list[bool]) -> float:
    """Pair by pair, with the Fisher of this labelling."""
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    squares = unit.square()
    own = torch.tensor(is_a)
    fisher = (squares[own].mean(dim=0) + squares[~own].mean(dim=0)) / 2
    inverse = 1 / (fisher + DAMPING * fisher.mean())
    groups: dict[str, list[float]] = {"across": [], "A": [], "B": []}
    for i, j in itertools.permutations(range(len(is_a)), 2):
        group = "across" if is_a[i] != is_a[j] else "A" if is_a[i] else "B"
        groups[group].append(float((squares[i] * inverse * unit[j].abs()).sum()))
    mean = {name: sum(values) / len(values) for name, values in groups.items()}
    return mean["across"] - (mean["A"] + mean["B"]) / 2


def draw(num_a: int, num_b: int, cells: int, seed: int = 0, weights: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_a + num_b, cells, weights, generator=generator, dtype=torch.float64)
    return x * (1 + torch.arange(weights)), torch.arange(num_a + num_b) < num_a


def test_the_difference_is_that_of_all_pairs_taken_one_by_one() -> None:
    gradients, _ = draw(4, 5, cells=3)
    is_a = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    result = permutation_test(gradients, is_a, num_permutations=10)
    expected = [by_hand(gradients[:, cell], is_a.tolist()) for cell in range(3)]
    torch.testing.assert_close(result.difference, torch.tensor(expected, dtype=torch.float64))


def test_the_p_value_is_the_share_of_all_labellings() -> None:
    gradients, is_a = draw(3, 4, cells=1, seed=3)
    observed = by_hand(gradients[:, 0], is_a.tolist())
    labellings = [[i in chosen for i in range(7)] for chosen in itertools.combinations(range(7), 3)]
    exact = sum(abs(by_hand(gradients[:, 0], one)) >= abs(observed) - 1e-9 for one in labellings) / len(
        labellings
    )
    result = permutation_test(gradients, is_a, num_permutations=20000)
    assert float(result.p_value) == pytest.approx(exact, abs=0.015)  # 4 standard errors of 20000 draws


@pytest.mark.parametrize("sizes", [(10, 10), (5, 20), (4, 40)])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_labels_that_do_not_matter_give_uniform_p_values(sizes: tuple[int, int], scale: float) -> None:
    """At unequal sizes, and with losses of another scale."""
    gradients, is_a = draw(*sizes, cells=400)
    gradients[~is_a] *= scale
    p_values = permutation_test(gradients, is_a, num_permutations=199).p_value
    # The cells share their labellings, not their gradients: 400 draws of a uniform number.
    assert 0.45 < float(p_values.mean()) < 0.55
    assert 0.02 < float((p_values <= 0.05).double().mean()) < 0.09


def test_tasks_that_train_different_weights_are_found() -> None:
    gradients, is_a = draw(10, 10, cells=5)
    gradients[is_a, :, :6] *= 0.2
    gradients[~is_a, :, 6:] *= 0.2
    result = permutation_test(gradients, is_a, num_permutations=999)
    assert bool((result.adjusted_p_value < 0.01).all())
    assert bool((result.difference < 0).all())


def test_a_p_value_is_never_zero_and_repeats_with_its_seed() -> None:
    gradients, is_a = draw(10, 10, cells=2)
    gradients[is_a, :, :6] *= 0.01
    first = permutation_test(gradients, is_a, num_permutations=99)
    assert float(first.p_value.min()) >= 0.01
    assert torch.equal(first.p_value, permutation_test(gradients, is_a, num_permutations=99).p_value)


def test_gradients_in_float32_give_the_p_values_of_float64() -> None:
    """With as many samples of A as of B, swapping them all is a tie, which rounding must not break."""
    gradients, is_a = draw(4, 4, cells=20)
    gradients = gradients.float()
    expected = permutation_test(gradients.double(), is_a, num_permutations=2000)
    result = permutation_test(gradients, is_a, num_permutations=2000)
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


def test_what_cannot_be_tested_is_refused() -> None:
    gradients, is_a = draw(3, 3, cells=2)
    pairs = torch.rand(2, 6, 6)
    for test, values in ((permutation_test, gradients), (bootstrap_standard_error, pairs)):
        with pytest.raises(ValueError, match="1 samples of task A and 5 of task B"):
            test(values, torch.arange(6) < 1)
        values[0, 1, 1] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            test(values, is_a)
    gradients[0, 1] = 0
    with pytest.raises(ValueError, match="zero in a whole cell"):
        permutation_test(gradients.nan_to_num(), is_a)
