"""Every routing against PyTorch, values and gradients; dynamic, EM and variational routing against the oracle.

Three iterations in float64 are ordinary tests; other numbers, options and float32 are exhaustive ones.
"""

import functools
import inspect

import numpy as np
import pytest
import torch

from capsnet_jax.routing import ROUTINGS, get_routing
from capsnet_torch import ops as torch_ops
from capsnet_torch.routing import ROUTINGS as TORCH_ROUTINGS
from capsnet_verify.checks import AGREES
from capsnet_verify.routings import (
    BATCH,
    INPUT_SIZE,
    INPUTS,
    OUTPUTS,
    SIZE,
    Case,
    check,
    in_jax,
    in_torch,
    make_inputs,
)
from capsnet_verify.subjects import EVERY_TERM
from parity_tests import oracle
from parity_tests.compare import assert_close

ITERATIONS, ITERATIONS_OF_OPTIONS = [1, 2, 3, 5], [1, 3]
OPTIONS = [
    "dynamic,leaky=true",
    "dynamic,detach=true",
    "dynamic,prior_logits=0,capsule_bias=0.1",
    f"{EVERY_TERM['dynamic']},detach=true",
    "variational,alpha0=0.7,kappa0=0.4,psi0=1.5",
    "self_routing,epsilon=0.2",
    "random,seed=3",
]
ALL = EVERY_TERM["dynamic"]
FUSED = [
    Case("dynamic", 1, "fused"),
    Case("dynamic", 3, "fused"),
    Case("dynamic,leaky=true", 2, "fused"),
    Case("dynamic,detach=true", 3, "fused"),
    Case(ALL, 4, "fused"),
    Case(f"{ALL},detach=true", 3, "fused"),
]
ORDINARY_FUSED = [FUSED[4], FUSED[5]]
ORACLES = {"dynamic", "em", "variational"}
compiled = functools.cache(in_jax)


def every_case() -> list[Case]:
    """List cases of every routing: with all of its terms, several numbers of iterations, and other options."""

    def of(spec: str, iterations: list[int], kind: str = "votes") -> list[Case]:
        iterative = get_routing(spec).takes("num_iterations")
        return [Case(spec, number, kind) for number in (iterations if iterative else [1])]

    specs = ["dynamic", *(EVERY_TERM.get(name, name) for name in ROUTINGS)]
    return [
        *(case for spec in specs for case in of(spec, ITERATIONS)),
        *(case for spec in OPTIONS for case in of(spec, ITERATIONS_OF_OPTIONS)),
        *(case for name in ("em", "variational") for case in of(EVERY_TERM[name], ITERATIONS_OF_OPTIONS, "positions")),
    ]


def is_ordinary(case: Case) -> bool:
    iterative = case.routing.takes("num_iterations")
    plain = case.spec in (ALL, f"{ALL},detach=true", *(EVERY_TERM.get(name, name) for name in ROUTINGS))
    if case.kind == "fused":
        return case in ORDINARY_FUSED
    return plain and (case.num_iterations == 3 or not iterative)


def cases(*, of: object = None) -> list[object]:
    """Every case, those that are not ordinary marked as exhaustive."""
    return [
        pytest.param(case, id=str(case), marks=() if is_ordinary(case) else (pytest.mark.exhaustive,))
        for case in [*every_case(), *FUSED]
        if of is None or case.name in of
    ]


def assert_both_sides_agree(case: Case, dtype: str) -> None:
    actual, expected = compiled(case, dtype), in_torch(case, dtype)
    assert actual.keys() == expected.keys()
    for name in expected:
        found = check(case, name, actual[name], expected[name])
        assert found.verdict == AGREES, found


@pytest.mark.parametrize("case", cases())
def test_values_and_gradients_agree(case, float64):
    assert_both_sides_agree(case, float64)


def test_values_and_gradients_agree_in_float32():
    assert_both_sides_agree(Case(ALL, 3), "float32")


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [*every_case(), *FUSED], ids=str)
def test_values_and_gradients_of_every_case_agree_in_float32(case):
    assert_both_sides_agree(case, "float32")


@pytest.mark.parametrize("case", [*every_case(), *FUSED], ids=str)
def test_inputs_make_routing_matter(case):
    """Otherwise the comparisons above would prove little: couplings are uneven, and capsules neither all on nor off."""
    expected = in_torch(case, "float64")
    couplings, activations = expected["couplings"], expected["activations"]
    uneven = np.abs(couplings / couplings.mean() - 1).max()
    if case.name == "uniform":
        assert uneven < 1e-12
    elif case.num_iterations > 1 or not case.routing.takes("num_iterations"):
        assert uneven > 0.2
    assert 0.1 < activations.mean() < 0.9
    assert np.ptp(activations) > 0.1


@pytest.mark.parametrize("case", cases(of=ORACLES))
def test_agrees_with_the_oracle(case, float64):
    inputs, actual = make_inputs(case, float64), compiled(case, float64)
    options = {name: value for name, value in case.routing.options if name != "detach"}
    if case.kind == "fused":
        poses, weight = inputs.pop("poses")[0], inputs.pop("weight")
        votes = np.zeros((INPUTS, OUTPUTS, SIZE))
        for i, o, h, d in np.ndindex(INPUTS, OUTPUTS, SIZE, INPUT_SIZE):
            votes[i, o, h] += poses[i, d] * weight[i, d, o, h]
    else:
        votes, activations = inputs.pop("votes")[0], inputs.pop("activations")[0]
    if case.name == "dynamic":
        poses, couplings = oracle.dynamic(votes, **options | inputs)
        activations = np.array([oracle.norm(pose) for pose in poses])
    else:
        poses, activations, couplings = getattr(oracle, case.name)(votes, activations, **options | inputs)
    for name, expected in {"couplings": couplings, "poses": poses, "activations": activations}.items():
        assert len(actual[name]) == BATCH
        assert_close(name, actual[name][0], expected, tolerance=1e-12)


def test_both_sides_have_the_same_routings_with_the_same_arguments_and_defaults():
    assert list(ROUTINGS) == list(TORCH_ROUTINGS)
    for name in ROUTINGS:
        in_jax, in_torch = (inspect.signature(registry[name]).parameters for registry in (ROUTINGS, TORCH_ROUTINGS))
        assert [*in_jax] == [*in_torch], name
        for argument in set(in_jax) - {"softmax"}:
            assert in_jax[argument].default == in_torch[argument].default, f"{name}: {argument}"
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
