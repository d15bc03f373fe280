"""Deviations that are tried to explain a difference change what they name, and explain it only as far as they do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from capsnet_jax.interchange.weights import to_torch
from capsnet_torch.routing import ROUTINGS
from capsnet_verify.checks import compare
from capsnet_verify.deviations import deviations, explanation
from capsnet_verify.pair import new_pair
from capsnet_verify.subjects import EVERY_TERM, Settings, of_model
from capsnet_verify.values import in_torch
from parity_tests.foreign_models import MODEL


@pytest.mark.parametrize("name", [name for name in ROUTINGS if name not in ("uniform", "random")])
def test_every_deviation_changes_the_values_that_it_names(name, float64):
    model = replace(MODEL, routing=EVERY_TERM[name] if name in ("em", "variational") else name)
    pair = new_pair(of_model(name, model), Settings())
    weights = {name: torch.tensor(array) for name, array in to_torch(pair.jax_model).items()}
    right = in_torch(pair)
    # What all routings have in common is tested with one of them.
    tried = [each for each in deviations(model) if name == "dynamic" or not each.words.startswith(("primary", "a squ"))]
    assert tried[0].words == "a softmax over input capsules, not over output capsules"
    for deviation in tried:
        values = deviation.values(pair, weights)
        first = next(name for name in right if compare(name, values[name], right[name], tolerance=1e-6).reason)
        assert first.startswith(deviation.changes), deviation
        if deviation is tried[0] and name != "self_attention":  # whose couplings have a prior added
            np.testing.assert_allclose(values["couplings 0"].sum(axis=1), 1)
    np.testing.assert_array_equal(in_torch(pair)["activations 0"], right["activations 0"])


def test_iterations_that_the_routing_itself_sets_are_not_tried():
    model = replace(MODEL, routing="dynamic,num_iterations=2")
    assert not [each.words for each in deviations(model) if "iteration" in each.words]


def test_the_change_that_explains_most_is_named():
    expected = np.array([1.0, 2.0])
    check = compare("it", expected + 0.5, expected, tolerance=1e-12)

    def found(*errors):
        return explanation(check, ((error, expected + error, expected) for error in errors))

    assert found(0.1, 0.01) is None
    assert found(1e-4, 1e-8, 1e-6) == (1e-8, "they differ by 5.0e-09 only")
    assert found(1e-4, 0.0, 1e-15) == (0.0, "both agree")
    assert explanation(check._replace(error=1e-6), [(None, expected, expected)]) is None
    assert explanation(check._replace(error=np.inf), [(None, expected, expected)]) is None
