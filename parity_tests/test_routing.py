"""Every routing against its twin, values and gradients; dynamic, EM and variational routing against the oracle, too."""

import inspect

import numpy as np
import pytest
import torch

from capsnet_jax.routing import ROUTINGS, get_routing
from capsnet_torch import ops as torch_ops
from capsnet_torch.routing import ROUTINGS as TORCH_ROUTINGS
from capsnet_verify.checks import AGREES
from capsnet_verify.routings import check, every_case, in_jax, in_torch, make_inputs
from parity_tests import oracle
from parity_tests.compare import assert_close

NEVER_ROUTE = {"uniform"}
ORACLES = {"dynamic", "em", "variational"}


@pytest.mark.parametrize("case", every_case(), ids=str)
def test_values_and_gradients_agree(case, dtype):
    actual, expected = in_jax(case, dtype), in_torch(case, dtype)
    assert actual.keys() == expected.keys()
    for name in expected:
        found = check(case, name, actual[name], expected[name])
        assert found.verdict == AGREES, found


@pytest.mark.parametrize("case", every_case(), ids=str)
def test_routing_matters_for_these_inputs(case):
    """What the check above rests on: a routing that does nothing, or whose capsules are all on or off, is far off."""
    expected = in_torch(case, "float64")
    couplings, activations = expected["couplings"], expected["activations"]
    uneven = np.abs(couplings / couplings.mean() - 1).max()
    if case.name in NEVER_ROUTE:
        assert uneven < 1e-12
    elif case.num_iterations > 1 or not case.routing.takes("num_iterations"):
        assert uneven > 0.2
    assert 0.1 < activations.mean() < 0.9
    assert np.ptp(activations) > 0.1


@pytest.mark.parametrize(
    "case", [case for case in every_case() if case.name in ORACLES and not case.positions], ids=str
)
def test_agrees_with_the_oracle(case, float64):
    inputs, options = make_inputs(case, float64), dict(case.routing.options)
    examples = [inputs.pop("votes")[0], inputs.pop("activations")[0]]
    options = {name: value for name, value in options.items() if name != "detach"} | inputs
    if case.name == "dynamic":
        poses, couplings = oracle.dynamic(examples[0], **options)
        activations = np.array([oracle.norm(pose) for pose in poses])
    else:
        poses, activations, couplings = getattr(oracle, case.name)(*examples, **options)
    actual = in_jax(case, float64)
    for name, expected in {"couplings": couplings, "poses": poses, "activations": activations}.items():
        assert_close(name, actual[name][0], expected, tolerance=1e-12)


def test_both_sides_have_the_same_routings_with_the_same_arguments_and_defaults():
    assert list(ROUTINGS) == list(TORCH_ROUTINGS)
    for name in ROUTINGS:
        ours, theirs = (inspect.signature(registry[name]).parameters for registry in (ROUTINGS, TORCH_ROUTINGS))
        assert [*ours] == [*theirs], name
        for argument in set(ours) - {"softmax"}:
            assert ours[argument].default == theirs[argument].default, f"{name}: {argument}"
        declared, declared_by_twin = (
            getattr(registry[name], "learned_axes", {}) for registry in (ROUTINGS, TORCH_ROUTINGS)
        )
        assert declared == declared_by_twin, name


@pytest.mark.parametrize("name", [name for name in ROUTINGS if get_routing(name).takes("num_iterations")])
def test_no_iteration_is_an_error_of_the_twin(name):
    with pytest.raises(ValueError, match="num_iterations is 0, and must be at least 1"):
        TORCH_ROUTINGS[name](torch.zeros(1, 2, 3, 4), torch.zeros(1, 2), num_iterations=0)


@pytest.mark.parametrize("name", ["direction", "exponential_squash"])
def test_a_pose_of_zero_has_no_direction_and_no_gradient_in_the_twin(name):
    poses = torch.zeros(2, 3, requires_grad=True)
    result = getattr(torch_ops, name)(poses)
    (gradient,) = torch.autograd.grad(result.sum(), poses)
    assert not result.any()
    assert not gradient.any()
