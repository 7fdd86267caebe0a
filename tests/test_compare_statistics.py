"""Differences, intervals and epochs against values worked out by hand and by other means."""

import itertools
import math

import numpy as np
import pytest

from autoseg.comparison.arms import parse_arms
from autoseg.comparison.design import Training
from autoseg.comparison.outcomes import Outcome, read_dice
from autoseg.comparison.statistics import (
    COVERAGE,
    Estimate,
    case_scores,
    compare_arms,
    epochs_to,
    estimate,
    median_epochs,
    paired,
    resampled_means,
    verdict,
)

SCRATCH, VOCO = parse_arms("scratch,voco", "3d_fullres")


def outcome(arm, dice, *, seed=0, fold=0, fraction=1.0, curve=(0.5,)) -> Outcome:
    """`dice`: case → Dice of its structures."""
    structures = {case: dict(zip(("a", "b"), values, strict=False)) for case, values in dice.items()}
    return Outcome(Training(arm, fold, fraction, seed), 4, structures, tuple(curve), 1.0)


def table(values: np.ndarray) -> dict:
    """Seeds × cases as the functions take it."""
    return {(s, (0, f"c{c}")): float(v) for (s, c), v in np.ndenumerate(values) if not np.isnan(v)}


def test_a_case_counts_the_structures_it_has():
    scores = case_scores([outcome(VOCO, {"x": (0.2, 0.6), "y": (0.9, None), "z": (None, None)})])
    assert scores == {(0, (0, "x")): pytest.approx(0.4), (0, (0, "y")): 0.9}


def test_differences_are_of_the_same_case_and_seed():
    one = case_scores([outcome(VOCO, {"x": (0.5,), "y": (0.6,)}, seed=1), outcome(VOCO, {"x": (0.9,)}, seed=2)])
    other = case_scores([outcome(SCRATCH, {"x": (0.4,), "y": (0.7,)}, seed=1)])
    assert paired(one, other) == {(1, (0, "x")): pytest.approx(0.1), (1, (0, "y")): pytest.approx(-0.1)}


def test_the_mean_difference_is_the_difference_of_the_means():
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 5)), rng.random((2, 5))
    difference = estimate(paired(table(a), table(b)))
    assert difference.mean == pytest.approx(a.mean() - b.mean())


def test_resampling_is_the_mean_over_the_drawn_seeds_times_the_drawn_cases():
    """Against plain loops, with empty cells."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 5))
    values[1, 2] = values[0, 4] = np.nan
    seeds, cases = rng.integers(3, size=(50, 3)), rng.integers(5, size=(50, 5))
    by_hand = []
    for s, c in zip(seeds, cases, strict=True):
        drawn = [values[i, j] for i in s for j in c if not math.isnan(values[i, j])]
        by_hand.append(sum(drawn) / len(drawn))
    assert resampled_means(values, seeds, cases) == pytest.approx(np.array(by_hand))


def test_a_round_that_draws_empty_cells_only_has_no_mean():
    means = resampled_means(np.array([[np.nan, 1.0]]), np.zeros((2, 1), int), np.array([[0, 0], [0, 1]]))
    assert math.isnan(means[0]) and means[1] == 1.0


def test_the_interval_is_that_of_all_possible_draws():
    """Three cases, one seed: 27 equally likely draws, written out; and two seeds: 4 × 27."""
    for values in (np.array([[0.0, 0.3, 0.9]]), np.array([[0.0, 0.3, 0.9], [0.2, 0.4, 0.5]])):
        seeds = range(len(values))
        every = [
            values[np.ix_(s, c)].mean()
            for s in itertools.product(seeds, repeat=len(values))
            for c in itertools.product(range(3), repeat=3)
        ]
        found = estimate(table(values), rounds=40_000)
        low, high = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
        assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_the_interval_has_the_width_theory_says():
    """Many cases: mean ± 1.96 s/√n, with s of the sample (divided by n)."""
    values = np.random.default_rng(1).normal(0.02, 0.1, size=(1, 400))
    found = estimate(table(values))
    half = 1.96 * values.std() / 20
    assert found.high - found.mean == pytest.approx(half, rel=0.05)
    assert found.mean - found.low == pytest.approx(half, rel=0.05)


def test_seeds_that_disagree_widen_the_interval():
    cases = np.random.default_rng(2).normal(0, 0.01, size=20)
    alike, apart = np.stack([cases] * 4), np.stack([cases + shift for shift in (-0.1, -0.05, 0.05, 0.1)])
    widths = [found.high - found.low for found in (estimate(table(alike)), estimate(table(apart)))]
    assert widths[1] > 5 * widths[0]


def test_equal_results_give_equal_intervals():
    values = table(np.random.default_rng(4).normal(size=(2, 9)))
    assert estimate(values) == estimate(dict(reversed(values.items())))


@pytest.mark.parametrize(("seeds", "share"), [(2, 0.56), (3, 0.73), (10, 0.90)])
def test_few_seeds_promise_too_much_as_documented(seeds, share):
    """Comparisons of equals in which the chance of training dominates; 600 of them: two standard errors are 0.04."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(600):
        values = rng.normal(0, 0.02, (seeds, 1)) + rng.normal(0, 0.005, (seeds, 30))
        means = resampled_means(values, rng.integers(seeds, size=(300, seeds)), rng.integers(30, size=(300, 30)))
        low, high = np.percentile(means, [2.5, 97.5])
        held += low <= 0 <= high
    assert held / 600 == pytest.approx(share, abs=0.05)
    assert COVERAGE.get(seeds, 100 * share) == pytest.approx(100 * share)


@pytest.mark.parametrize(
    ("low", "high", "cases", "words"),
    [
        (0.01, 0.05, 10, "better than scratch"),
        (-0.05, -0.01, 10, "worse than scratch"),
        (-0.01, 0.05, 10, "no difference shown"),
        (0.0, 0.05, 10, "no difference shown"),
        (0.01, 0.05, 5, "too few cases to tell"),
        (None, None, 1, "too few cases to tell"),
    ],
)
def test_what_is_said_of_a_difference(low, high, cases, words):
    assert verdict(Estimate(0.03, low, high), cases, 5) == words
    assert verdict(None, 0, 0) == ""


def test_few_seeds_are_said():
    assert verdict(Estimate(0.03, 0.01, 0.05), 10, 1) == "higher in one training"
    assert verdict(Estimate(-0.03, -0.05, -0.01), 10, 1) == "lower in one training"
    assert verdict(Estimate(-0.03, -0.05, -0.01), 10, 4) == "worse than scratch (4 seeds)"
    assert verdict(Estimate(0.03, -0.01, 0.05), 10, 1) == "no difference shown"


def test_epochs_to_a_goal():
    assert epochs_to((0.1, 0.5, 0.4, 0.9), 0.4) == 2
    assert epochs_to((0.1, 0.2), 0.4) is None
    assert median_epochs((2, None, 4)) == 4
    assert median_epochs((2, None)) is None and median_epochs(()) is None
    assert median_epochs((2, 3)) == 2.5


def test_epochs_are_counted_against_scratch_of_the_same_fold_seed_and_labels():
    outcomes = [
        outcome(SCRATCH, {"x": (0.5,)}, seed=0, curve=(0.2, 0.7, 0.8)),  # 90 %: 0.72
        outcome(SCRATCH, {"x": (0.5,)}, seed=1, curve=(0.1, 0.2, 0.4)),  # 0.36
        outcome(SCRATCH, {"x": (0.5,)}, seed=2, curve=(0.0, 0.0, 0.0)),  # nothing found: no goal
        outcome(VOCO, {"x": (0.5,)}, seed=0, curve=(0.71, 0.73, 0.9)),
        outcome(VOCO, {"x": (0.5,)}, seed=1, curve=(0.4, 0.4, 0.4)),
        outcome(VOCO, {"x": (0.5,)}, seed=2, curve=(0.4, 0.4, 0.4)),
    ]
    scratch, voco = compare_arms(outcomes, [SCRATCH, VOCO])
    assert scratch.epochs == (3, 3)
    assert voco.epochs == (2, 1)


def test_a_failed_training_leaves_its_pairs_out_and_the_rest_in():
    cases = {f"c{i}": (0.5 + 0.01 * i,) for i in range(8)}
    better = {case: (dice + 0.1,) for case, (dice,) in cases.items()}
    outcomes = [outcome(SCRATCH, cases, seed=0), outcome(VOCO, better, seed=0), outcome(VOCO, cases, seed=1)]
    scratch, voco = compare_arms(outcomes, [SCRATCH, VOCO])
    assert scratch.difference is None and scratch.verdict == ""
    assert (voco.seeds, voco.pair_seeds, voco.pairs) == (2, 1, 8)
    assert (voco.difference.mean, voco.difference.low, voco.difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert voco.verdict == "higher in one training"


def test_the_same_case_in_two_folds_counts_twice():
    outcomes = [outcome(VOCO, {"x": (0.2,)}, fold=0), outcome(VOCO, {"x": (0.4,)}, fold=1)]
    assert compare_arms(outcomes, [SCRATCH, VOCO])[0].cases == 2


def test_dice_is_read_by_structure_whatever_the_order_of_the_keys():
    summary = {
        "metric_per_case": [
            {"prediction_file": "f/x.nii.gz", "metrics": {"(1, 2)": {"Dice": 0.5}, "2": {"Dice": math.nan}}},
            {"prediction_file": "f/y.nii.gz", "metrics": {"(1, 2)": {"Dice": 0.0}, "2": {"Dice": 1.0}}},
        ]
    }
    labels = {"labels": {"background": 0, "core": 2, "whole": [1, 2]}}
    assert read_dice(summary, labels, ".nii.gz") == {
        "x": {"core": None, "whole": 0.5},
        "y": {"core": 1.0, "whole": 0.0},
    }
