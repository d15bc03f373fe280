"""Dynamic routing without votes against the twin, which has votes, and the oracle; in several and unequal chunks.

Its mutants, and in the whole model the other implementation, too: `test_model.py` has what is the default here.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.routing import fused_dynamic
from capsnet_torch.routing import dynamic as torch_dynamic
from parity_tests import oracle
from parity_tests.compare import TOLERANCE, assert_close
from parity_tests.fused_mutants import ALL, MUTANTS, rewrite
from parity_tests.pair import HOT, IMAGE_SHAPE, NUM_CLASSES, divergences, make_pair
from parity_tests.test_routing import (
    BATCH,
    INPUT_SIZE,
    INPUTS,
    OUTPUTS,
    QUICKLY_COMPILED,
    SIZE,
    Case,
    make_coefficients,
)

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
    pair = make_pair(dtype, **MODELS[name])
    options = HOT | MODELS[name] | {"routing_implementation": implementation, "param_dtype": dtype}
    model = nnx.eval_shape(lambda: CapsNet(IMAGE_SHAPE, NUM_CLASSES, **options, rngs=nnx.Rngs(0)))
    nnx.update(model, nnx.state(pair.jax_model))
    assert {layer.implementation for layer in model.encoder.capsule_layers} == {implementation}
    assert 0.1 < pair.torch_model.encode(pair.torch_batch[0]).activations.mean() < 0.9
    with in_chunks(fused_dynamic, 36_000):  # a few of the 216 primary capsules at once
        for what, actual, expected in divergences(pair._replace(jax_model=model)):
            assert_close(what, actual, expected, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_agree(case, dtype):
    actual, expected = in_jax(case, dtype, fused_dynamic), in_torch(case, dtype)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(name, actual[name], expected[name], tolerance=TOLERANCE[dtype])


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
    assert first_divergence(Case(spec, 3), rewrite()) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_wrong_routing_is_caught(mutant):
    """In float32, whose tolerance is the looser: what is caught there is caught in float64."""
    assert first_divergence(Case(mutant.spec, 3), mutant.function) == mutant.caught_by


def first_divergence(case: Case, function: Callable[..., Any]) -> str | None:
    actual, expected = in_jax(case, "float32", function), in_torch(case, "float32")
    for name in expected:
        try:
            assert_close(name, actual[name], expected[name], tolerance=TOLERANCE["float32"])
        except AssertionError:
            return name
    return None


def make_inputs(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Seeded arrays for each argument that has a gradient; votes are as large as in `test_routing.py`."""
    rng = np.random.default_rng(5)
    values = {
        "poses": rng.normal(size=(BATCH, INPUTS, INPUT_SIZE)),
        "weight": 0.6 / INPUT_SIZE**0.5 * rng.normal(size=(INPUTS, INPUT_SIZE, OUTPUTS, SIZE)),
    }
    sizes = {"i": INPUTS, "o": OUTPUTS, "h": SIZE}
    for name, weight in case.routing.weights.items():
        values[name] = weight.initial + 0.5 * rng.normal(size=[sizes[axis] for axis in weight.axes])
    return {name: np.asarray(value, dtype) for name, value in values.items()}


@functools.cache
def in_jax(case: Case, dtype: str, function: Callable[..., Any]) -> dict[str, np.ndarray]:
    """Couplings, poses, activations and gradients; in chunks of 4, 4 and 3 input capsules."""
    inputs, coefficients = make_inputs(case, dtype), make_coefficients(case, dtype)

    def weighted_sum(inputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        routed = function(**dict(case.routing.options) | inputs)._asdict()
        return sum((coefficients[name] * routed[name]).sum() for name in coefficients), routed

    with in_chunks(function, 4 * 4 * INPUT_SIZE * OUTPUTS * (BATCH + SIZE)):
        results = jax.jit(jax.grad(weighted_sum, has_aux=True), compiler_options=QUICKLY_COMPILED)(inputs)
    return named(*reversed(results))


@functools.cache
def in_torch(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """The same by the twin, of votes."""
    inputs = {name: torch.tensor(value, requires_grad=True) for name, value in make_inputs(case, dtype).items()}
    weights = {name: value for name, value in inputs.items() if name not in ("poses", "weight")}
    votes = torch.einsum("bid,idoh->bioh", inputs["poses"], inputs["weight"])
    routed = torch_dynamic(votes, votes[..., 0, 0], **dict(case.routing.options) | weights)._asdict()
    coefficients = make_coefficients(case, dtype)
    total = sum(torch.sum(torch.tensor(coefficients[name]) * routed[name]) for name in coefficients)
    gradients = dict(zip(inputs, torch.autograd.grad(total, tuple(inputs.values())), strict=True))
    return named(*({name: array.numpy(force=True) for name, array in of.items()} for of in (routed, gradients)))


def named(routed: dict[str, Any], gradients: dict[str, Any]) -> dict[str, np.ndarray]:
    """In the order in which they depend on each other, so that the first to differ says most about what is wrong."""
    ordered = {name: routed[name] for name in ("couplings", "poses", "activations")}
    ordered |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    return {name: np.asarray(array) for name, array in ordered.items()}


@contextmanager
def in_chunks(function: Callable[..., Any], num_bytes: int) -> Iterator[None]:
    """As many bytes at once are in use while this function, or a mutant of it, is traced."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHUNK_ON_CPU", "CHUNK_ELSEWHERE"):
            patch.setitem(inspect.unwrap(function).__globals__, name, num_bytes)
        yield
