"""Dynamic routing without votes, by itself, and the twin's, which has votes: values and gradients of both sides."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from capsnet_torch.routing import dynamic as torch_dynamic
from capsnet_verify.routings import (
    BATCH,
    INPUT_SIZE,
    INPUTS,
    OUTPUTS,
    SIZE,
    Case,
    in_order,
    make_coefficients,
)
from capsnet_verify.values import QUICKLY_COMPILED


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
        return jnp.stack([(coefficients[name] * routed[name]).sum() for name in coefficients]).sum(), routed

    with in_chunks(function, 4 * 4 * INPUT_SIZE * OUTPUTS * (BATCH + SIZE)):
        results = jax.jit(jax.grad(weighted_sum, has_aux=True), compiler_options=QUICKLY_COMPILED)(inputs)
    return in_order(*reversed(results))


@functools.cache
def in_torch(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """The same by the twin, of votes."""
    inputs = {name: torch.tensor(value, requires_grad=True) for name, value in make_inputs(case, dtype).items()}
    weights = {name: value for name, value in inputs.items() if name not in ("poses", "weight")}
    votes = torch.einsum("bid,idoh->bioh", inputs["poses"], inputs["weight"])
    routed = torch_dynamic(votes, votes[..., 0, 0], **dict(case.routing.options) | weights)._asdict()
    coefficients = make_coefficients(case, dtype)
    total = torch.stack([(torch.tensor(coefficients[name]) * routed[name]).sum() for name in coefficients]).sum()
    gradients = dict(zip(inputs, torch.autograd.grad(total, tuple(inputs.values())), strict=True))
    return in_order(*({name: array.numpy(force=True) for name, array in of.items()} for of in (routed, gradients)))


@contextmanager
def in_chunks(function: Callable[..., Any], num_bytes: int) -> Iterator[None]:
    """As many bytes at once are in use while this function, or a mutant of it, is traced."""
    chunks = dict.fromkeys(("CHUNK_ON_CPU", "CHUNK_ELSEWHERE"), num_bytes)
    with mock.patch.dict(inspect.unwrap(function).__globals__, chunks):
        yield
