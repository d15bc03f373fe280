"""Compare a routing algorithm alone in JAX and PyTorch: results and gradients for the same inputs."""

import functools
import sys
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from capsnet_jax.nn.fast import fused_dynamic
from capsnet_jax.routing import Routing, get_routing
from capsnet_torch.routing import ROUTINGS as TORCH_ROUTINGS
from capsnet_verify.checks import DIFFERS, VALUES, Check, compare
from capsnet_verify.values import QUICKLY_COMPILED

BATCH, POSITIONS, INPUTS, OUTPUTS, INPUT_SIZE, SIZE = 3, 2, 11, 5, 4, 6
CHUNK = 4 * 4 * INPUT_SIZE * OUTPUTS * (BATCH + SIZE)  # bytes: fused routing takes 4, 4 and 3 input capsules at a time

IGNORE_ACTIVATIONS = {"dynamic", "self_attention", "inverted_attention", "kmeans", "uniform", "random"}


class Case(NamedTuple):
    """A routing with its options, and the way it is called.

    Attributes:
        spec: name and options, as for `get_routing`.
        num_iterations: number of iterations, for routings that iterate.
        kind: "votes"; "positions", if an input capsule has parents at several positions; or "fused", for dynamic
            routing computed from poses and weight without votes.
    """

    spec: str
    num_iterations: int = 3
    kind: str = "votes"

    @property
    def name(self) -> str:
        """The name of the algorithm, without options."""
        return self.spec.split(",")[0]

    @property
    def routing(self) -> Routing:
        """The routing as a layer calls it."""
        return get_routing(self.spec, num_iterations=self.num_iterations)

    def __str__(self) -> str:
        return f"{self.spec}, {self.num_iterations}" + (f", {self.kind}" if self.kind != "votes" else "")


def make_inputs(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Draw seeded arrays for every differentiable argument; learned weights get noise, as zeros would hide mistakes."""
    rng = np.random.default_rng(5)
    capsules = (BATCH, POSITIONS, INPUTS) if case.kind == "positions" else (BATCH, INPUTS)
    if case.kind == "fused":
        values = {
            "poses": rng.normal(size=(*capsules, INPUT_SIZE)),
            "weight": 0.6 / INPUT_SIZE**0.5 * rng.normal(size=(INPUTS, INPUT_SIZE, OUTPUTS, SIZE)),
        }
    else:
        values = {
            "votes": 0.6 * rng.normal(size=(*capsules, OUTPUTS, SIZE)),
            "activations": rng.uniform(0.1, 0.9, capsules),
        }
        if case.routing.takes("poses"):
            values["poses"] = rng.normal(size=(*capsules, INPUT_SIZE))
    sizes = {"i": INPUTS, "o": OUTPUTS, "d": INPUT_SIZE, "h": SIZE}
    for name, weight in case.routing.weights.items():
        values[name] = weight.initial + 0.5 * rng.normal(size=[sizes[axis] for axis in weight.axes])
    return {name: np.asarray(value, dtype) for name, value in values.items()}


def in_jax(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Compute couplings, poses, activations, and the gradients of a weighted sum of them, in JAX."""
    inputs, coefficients = make_inputs(case, dtype), _coefficients(case, dtype)
    right = case.routing.function
    # Looked up again, because a mutant may have replaced it in its module.
    routing = replace(case.routing, function=getattr(sys.modules[right.__module__], right.__name__))

    def route(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if case.kind == "fused":
            return fused_dynamic.fused_dynamic(**dict(routing.options) | inputs)._asdict()
        given: dict[str, Any] = {}
        if case.kind == "positions":
            given["softmax"] = lambda logits: jax.nn.softmax(logits, axis=(0, 2))
        axes = {name: 0 if name in ("votes", "activations", "poses") else None for name in inputs}
        return jax.vmap(lambda inputs: routing(**inputs, **given), in_axes=(axes,))(inputs)._asdict()

    def weighted_sum(inputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        routed = route(inputs)
        return jnp.stack([jnp.sum(coefficients[name] * routed[name]) for name in coefficients]).sum(), routed

    compiled = jax.jit(jax.grad(weighted_sum, has_aux=True), compiler_options=QUICKLY_COMPILED)
    chunks = mock.patch.multiple(fused_dynamic, CHUNK_ON_CPU=CHUNK, CHUNK_ELSEWHERE=CHUNK)
    with jax.default_matmul_precision("highest"), chunks:
        gradients, routed = compiled(inputs)
    return _in_order(routed, gradients)


@functools.cache
def in_torch(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Compute the same arrays in PyTorch, always from votes."""
    inputs = {name: torch.tensor(value, requires_grad=True) for name, value in make_inputs(case, dtype).items()}
    arguments = dict(case.routing.options) | inputs
    if case.kind == "fused":
        votes = torch.einsum("bid,idoh->bioh", arguments.pop("poses"), arguments.pop("weight"))
        arguments |= {"votes": votes, "activations": votes[..., 0, 0]}
    if case.kind == "positions":
        arguments["softmax"] = lambda logits: torch.exp(logits - torch.logsumexp(logits, dim=(1, 3), keepdim=True))
    routed = TORCH_ROUTINGS[case.name](**arguments)._asdict()
    coefficients = _coefficients(case, dtype)
    total = torch.stack([(torch.tensor(coefficients[name]) * routed[name]).sum() for name in coefficients]).sum()
    gradients = torch.autograd.grad(total, tuple(inputs.values()), materialize_grads=True)
    return _in_order(routed, dict(zip(inputs, gradients, strict=True)))


def check(case: Case, name: str, actual: np.ndarray, expected: np.ndarray) -> Check:
    """Compare an array of JAX and PyTorch; gradients of activations that a routing ignores must be exactly zero."""
    if name == "gradient of activations" and case.name in IGNORE_ACTIVATIONS:
        return compare(name, actual, expected, tolerance=0.0, floor=-1.0)
    return compare(name, actual, expected, tolerance=VALUES[str(expected.dtype)], floor=1e-4)


def first_divergence(case: Case, dtype: str) -> str | None:
    """Return the name of the first array that differs between JAX and PyTorch, in the order of the computation."""
    actual, expected = in_jax(case, dtype), in_torch(case, dtype)
    checks = (check(case, name, actual[name], expected[name]) for name in expected)
    return next((found.name for found in checks if found.verdict == DIFFERS), None)


def _coefficients(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Draw the weights of the sum over all results whose gradients are compared."""
    rng = np.random.default_rng(6)
    capsules = (BATCH, POSITIONS) if case.kind == "positions" else (BATCH,)
    shapes = {"couplings": (INPUTS, OUTPUTS), "poses": (OUTPUTS, SIZE), "activations": (OUTPUTS,)}
    return {name: rng.normal(size=(*capsules, *shape)).astype(dtype) for name, shape in shapes.items()}


def _in_order(routed: dict[str, Any], gradients: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays = {name: routed[name] for name in ("couplings", "poses", "activations")}
    arrays |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    return {
        name: array.numpy(force=True) if isinstance(array, torch.Tensor) else np.asarray(array)
        for name, array in arrays.items()
    }
