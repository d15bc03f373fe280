"""Dynamic routing without votes against the twin, which has votes, and the oracle; in several and unequal chunks.

Its mutants, and in the whole model the other implementation, too: `test_model.py` has what is the default here.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from capsnet_jax.nn.fast.fused_dynamic import fused_dynamic
from capsnet_verify.checks import VALUES
from capsnet_verify.fused_routing import in_chunks, in_jax, in_torch, make_inputs
from capsnet_verify.mutants.fused import ALL, MUTANTS
from capsnet_verify.mutants.mistakes import copied
from capsnet_verify.report import sentence
from capsnet_verify.routings import BATCH, INPUT_SIZE, INPUTS, OUTPUTS, SIZE, Case
from capsnet_verify.self_test import caught_fused, first_fused_divergence
from capsnet_verify.subjects import SMALL, of_model
from capsnet_verify.verification import Settings, verify
from parity_tests import oracle
from parity_tests.compare import assert_close

CASES = [
    Case("dynamic", 1),
    Case("dynamic", 3),
    Case("dynamic,leaky=true", 2),
    Case("dynamic,detach=true", 3),
    Case(ALL, 4),
    Case(f"{ALL},detach=true", 3),
]
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "two capsule layers and all options": {"hidden_capsules": ((8, 7),), "primary_scale": 5.0, "routing": ALL},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["fused", "votes"])
def test_every_intermediate_and_gradient_agrees(name, implementation, dtype):
    """Of the whole model, which is hot."""
    model = replace(SMALL, routing_implementation=implementation, **MODELS[name])
    with in_chunks(fused_dynamic, 36_000):  # a few of the 216 primary capsules at once
        verification = verify(of_model(name, model), Settings(dtype, steps=0, batch_size=3))
    assert all(found.hot for found in verification.heats)
    assert verification.status == 0, sentence(verification)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_agree(case, dtype):
    actual, expected = in_jax(case, dtype, fused_dynamic), in_torch(case, dtype)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(name, actual[name], expected[name], tolerance=VALUES[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_routing_matters_for_these_inputs(case):
    expected = in_torch(case, "float64")
    couplings, activations = expected["couplings"], expected["activations"]
    assert np.abs(couplings / couplings.mean() - 1).max() > 0.2 or case.num_iterations == 1
    assert 0.1 < activations.mean() < 0.9
    assert np.ptp(activations) > 0.1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_oracle(case, float64):
    inputs, actual = make_inputs(case, float64), in_jax(case, float64, fused_dynamic)
    options = {name: value for name, value in case.routing.options if name != "detach"}
    poses, weight = inputs.pop("poses"), inputs.pop("weight")
    for example in range(BATCH):
        votes = np.zeros((INPUTS, OUTPUTS, SIZE))
        for i, o, h, d in np.ndindex(INPUTS, OUTPUTS, SIZE, INPUT_SIZE):
            votes[i, o, h] += poses[example, i, d] * weight[i, d, o, h]
        for name, expected in zip(("poses", "couplings"), oracle.dynamic(votes, **options | inputs), strict=True):
            assert_close(name, actual[name][example], expected, tolerance=1e-12)


@pytest.mark.parametrize("spec", dict.fromkeys(mutant.spec for mutant in MUTANTS))
def test_the_right_routing_is_not_caught(spec):
    assert first_fused_divergence(Case(spec, 3), copied(fused_dynamic)) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_wrong_routing_is_caught(mutant):
    assert caught_fused(mutant) == mutant.caught_by
