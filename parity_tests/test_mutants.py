"""Every wrong model must be caught, and by the first check that can see what is wrong with it.

In float32, whose tolerance is the looser: what is caught there is caught in float64.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax.routing import dynamic, get_routing
from parity_tests import mutants
from parity_tests.compare import TOLERANCE, assert_close
from parity_tests.mutants import MODEL_MUTANTS, MULTI_LABEL_MUTANTS, ROUTING_MUTANTS
from parity_tests.pair import Pair, divergences, make_pair


def first_divergence(pair: Pair) -> str | None:
    for name, actual, expected in divergences(pair):
        try:
            assert_close(name, actual, expected, tolerance=TOLERANCE["float32"])
        except AssertionError:
            return name
    return None


def test_the_right_model_is_not_caught():
    assert first_divergence(make_pair("float32")) is None


def test_the_base_of_the_mutants_is_right(float64):
    votes = jnp.asarray(np.random.default_rng(7).normal(size=(11, 5, 6)))
    expected = dynamic(votes, jnp.ones(11))
    for name, actual in mutants.dynamic(votes, jnp.ones(11))._asdict().items():
        assert_close(name, actual, getattr(expected, name), tolerance=1e-12)


@pytest.mark.parametrize(
    ("mutant", "caught_by"), ROUTING_MUTANTS.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_wrong_routing_is_caught(mutant, caught_by):
    pair = make_pair("float32")
    for layer in pair.jax_model.encoder.capsule_layers:
        layer.routing = get_routing(partial(mutant, num_iterations=3))
    assert first_divergence(pair) == caught_by


@pytest.mark.parametrize(
    ("mutant", "caught_by"), MODEL_MUTANTS.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_wrong_model_is_caught(mutant, caught_by):
    pair = make_pair("float32")
    with mutant():
        assert first_divergence(pair) == caught_by


@pytest.mark.parametrize(
    ("mutant", "caught_by"), MULTI_LABEL_MUTANTS.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_wrong_standardization_and_labels_are_caught(mutant, caught_by):
    """The right one is among the options of `test_model.py`."""
    pair = make_pair("float32", standardize_images=True, num_labels=2)
    with mutant():
        assert first_divergence(pair) == caught_by


def test_at_the_reference_scale_a_model_without_routing_would_pass():
    """Why the fixtures are hot: at a primary scale of 0.01 the usual tolerances cannot see whether there is routing."""
    pair = make_pair("float32", primary_scale=0.01)
    right = pair.jax_model.encode(pair.images).poses
    for layer in pair.jax_model.encoder.capsule_layers:
        layer.routing = get_routing(mutants.no_routing)
    np.testing.assert_allclose(pair.jax_model.encode(pair.images).poses, right, atol=1e-5)
