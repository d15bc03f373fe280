"""Every wrong model must be caught, and by the first check that can see what is wrong with it."""

import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax.routing import dynamic, get_routing
from capsnet_verify import self_test
from capsnet_verify.mutants import models
from capsnet_verify.mutants.models import (
    IN_ONE_IMPLEMENTATION,
    MUTANTS,
    NORMALISED,
    PLAIN,
    SPECTRAL,
    TWO_LABELS,
    ModelMutant,
)
from capsnet_verify.verification import Settings, verify
from parity_tests.compare import assert_close
from parity_tests.pairs import make_pair


@pytest.mark.parametrize("subject", [PLAIN, TWO_LABELS, NORMALISED, SPECTRAL], ids=lambda subject: subject.title)
def test_the_right_model_is_not_caught(subject):
    assert self_test.caught_model(ModelMutant("none", "", models.right, subject)) is None


def test_the_base_of_the_mutants_is_right(float64):
    votes = jnp.asarray(np.random.default_rng(7).normal(size=(11, 5, 6)))
    expected = dynamic(votes, jnp.ones(11))
    for name, actual in models.dynamic(votes, jnp.ones(11))._asdict().items():
        assert_close(name, actual, getattr(expected, name), tolerance=1e-12)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_wrong_model_is_caught(mutant):
    assert self_test.caught_model(mutant) == mutant.caught_by


@pytest.mark.parametrize("mutant", IN_ONE_IMPLEMENTATION, ids=str)
def test_a_batch_of_three_does_not_show_a_mistake_in_an_implementation_of_larger_ones(mutant):
    """Why several batches are compared by default, which do show it."""
    verification = verify(mutant.subject, Settings("float32", steps=0, batch_size=3), mutate=mutant.wrong)
    assert verification.status == 0


def test_at_the_reference_scale_a_model_without_routing_would_pass():
    """Why models are made hot: at a primary scale of 0.01 the usual tolerances cannot see whether there is routing."""
    pair = make_pair("float32", primary_scale=0.01)
    right = pair.jax_model.encode(pair.images).poses
    for layer in pair.jax_model.capsule_layers:
        layer.routing = get_routing(lambda votes, activations: models.dynamic(votes, activations, past=jnp.zeros_like))
    np.testing.assert_allclose(pair.jax_model.encode(pair.images).poses, right, atol=1e-5)
