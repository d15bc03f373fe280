"""Likely causes of a difference, from the numbers or from the place, and the comparison of two arrays."""

import numpy as np
import pytest

from capsnet_verify.causes import cause, cause_of_weight, usual_cause
from capsnet_verify.checks import AGREES, DIFFERS, NO_POWER, compare

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(3, 4, 4, 5))
COUPLINGS = RNG.dirichlet(np.ones(5), size=(3, 11))
OVER_INPUTS = COUPLINGS / COUPLINGS.sum(1, keepdims=True)
OVER_MANY_INPUTS = (1 + 0.01 * RNG.random((2, 1200, 5))) / 1206


@pytest.mark.parametrize(
    ("name", "actual", "expected", "words"),
    [
        ("stem 0", VALUES[:2], VALUES, "another order of axes, or other sizes"),
        ("stem 0", np.where(VALUES > 2, np.nan, VALUES), VALUES, "at zero, or an overflow"),
        ("stem 0", VALUES.swapaxes(1, 2), VALUES, "transposed: JAX has the axes of PyTorch in the order 0, 2, 1, 3"),
        (
            "primary poses",
            VALUES.reshape(3, 5, 4, 4).transpose(0, 2, 3, 1),
            VALUES,
            "the same numbers, in another order",
        ),
        ("votes 0", -0.25 * VALUES, VALUES, "JAX has -0.25 times the values of PyTorch"),
        ("poses 0", np.broadcast_to(VALUES[:1], VALUES.shape), VALUES, "averaged over the batch in JAX"),
        ("couplings 0", np.full((3, 11, 5), 0.2), COUPLINGS, "routing that does nothing in JAX"),
        ("couplings 0", OVER_INPUTS, COUPLINGS, "couplings of JAX sum to one over input"),
        # As after one iteration, and of so many input capsules that differences are small.
        ("couplings 0", np.full((3, 11, 5), 1 / 11), COUPLINGS, "couplings of JAX sum to one over input"),
        ("couplings 0", COUPLINGS, np.full((3, 11, 5), 1 / 11), "couplings of PyTorch sum to one over input"),
        (
            "couplings 0",
            RNG.dirichlet(np.ones(5), size=(2, 1200)),
            OVER_MANY_INPUTS / OVER_MANY_INPUTS.sum(1, keepdims=True),
            "couplings of PyTorch sum to one over input",
        ),
        ("poses 0", VALUES * (1 + 1e-6 * RNG.normal(size=VALUES.shape)), VALUES, "an epsilon, or less precision"),
        ("poses 0", VALUES + RNG.normal(size=VALUES.shape), VALUES, "the squash or its axis"),
        ("gradient decoder.2.bias", VALUES**2, VALUES, "a stop-gradient or detach"),
    ],
)
def test_causes(name, actual, expected, words):
    assert words in cause(name, np.array(actual), expected)


def test_usual_causes_depend_on_the_first_check_that_differs():
    assert "epsilon, betas" in usual_cause("step 7")
    assert "running means" in usual_cause("poses with running means")
    assert "margins" in usual_cause("margin loss")


def test_mixed_up_entries_are_named():
    others = {"a": VALUES, "b": 2 * VALUES, "c": 0 * VALUES}
    assert cause_of_weight("a", VALUES, 2 * VALUES, others) == "entries mixed up: a of PyTorch is b of JAX"
    assert cause_of_weight("a", VALUES, 3 * VALUES, others).startswith("a factor: ")
    assert cause_of_weight("b", 2 * VALUES, 2 * VALUES, others).startswith("weights of another training step")
    assert "mixed up" not in cause_of_weight("a", VALUES, 0 * VALUES, others)  # zeros have many sources


@pytest.mark.parametrize(
    ("actual", "expected", "verdict", "reason"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-9], AGREES, ""),
        ([1.0, 2.0], [1.0, 2.0 + 1e-5], DIFFERS, "scale-relative error 5.0e-06, tolerated 1.5e-06"),
        ([1.0, 2.0], [1.0, 2.0 + 4e-6], DIFFERS, "scale-relative error 2.0e-06, tolerated 1.5e-06"),
        ([1e-9, 2e-9], [1e-9, 2e-9], NO_POWER, "too small, the largest value is 2.0e-09"),
        ([1e-3, 2e-9], [1e-9, 2e-9], DIFFERS, "scale-relative error"),
        ([0.0, 0.0], [0.0, 0.0], NO_POWER, "too small"),
        ([1.0, 0.0], [0.0, 0.0], DIFFERS, "scale-relative error inf"),
        ([1.0, np.nan], [1.0, 2.0], DIFFERS, "not finite"),
        ([1.0, np.nan], [1.0, np.nan], DIFFERS, "what is expected is not finite"),
        ([1.0], [1.0, 2.0], DIFFERS, "shape (1,), expected (2,)"),
        (np.ones(2, np.float32), [1.0, 1.0], DIFFERS, "dtype float32, expected float64"),
    ],
)
def test_a_comparison(actual, expected, verdict, reason):
    check = compare("it", np.array(actual), np.array(expected), tolerance=1.5e-6)
    assert check.verdict == verdict
    assert reason in check.reason
    assert bool(check.reason) == (verdict != AGREES)


def test_a_single_wrong_number_counts_less_in_the_euclidean_norm():
    expected = RNG.normal(size=1000)
    actual = expected.copy()
    actual[3] += 0.1 * np.abs(expected).max()
    assert compare("it", actual, expected, tolerance=0.05).error == pytest.approx(0.1)
    euclidean = compare("it", actual, expected, tolerance=0.05, euclidean=True)
    assert euclidean.error == pytest.approx(0.1 * np.abs(expected).max() / np.linalg.norm(expected))


def test_a_histogram_counts_the_finite_values_of_both_sides():
    check = compare("it", np.array([0.0, 1.0, 4.0]), np.array([2.0, np.inf]), tolerance=1e-6)
    low, high, actual, expected = check.with_histogram([0.0, 1.0, 4.0], [2.0, np.inf]).histogram
    assert (low, high, sum(actual), sum(expected)) == (0, 4, 3, 1)
    assert actual[0] == actual[-1] == expected[len(expected) // 2] == 1
    assert check.with_histogram([np.nan], [np.inf]).histogram is None
    assert check.with_histogram([3.0], [3.0]).histogram.actual[0] == 1
    assert check.with_histogram([0.0], [0.0]).histogram.expected[0] == 1


def test_rounding_errors_do_not_show_in_a_histogram():
    for value in (-0.6, 0.6):
        histogram = compare("it", value, value, tolerance=1e-6).with_histogram(value, value * (1 + 1e-7)).histogram
        assert histogram.actual == histogram.expected
