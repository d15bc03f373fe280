"""Routings by themselves, on both sides: the same votes, and couplings, poses, activations and gradients of them."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from capsnet_jax.routing import ROUTINGS, Routing, get_routing
from capsnet_torch.routing import ROUTINGS as TORCH_ROUTINGS
from capsnet_verify.checks import VALUES, Check, compare
from capsnet_verify.values import QUICKLY_COMPILED

BATCH, POSITIONS, INPUTS, OUTPUTS, INPUT_SIZE, SIZE = 3, 2, 11, 5, 4, 6
ITERATIONS, ITERATIONS_OF_OPTIONS = [1, 2, 3, 5], [1, 3]
PER_EXAMPLE = ("votes", "activations", "poses")  # all other arguments are weights, which a batch shares

# Options where the defaults prove little: with little variance allowed, Gaussians of EM collapse onto few votes; with a
# strong prior, variational activations are small differences of large entropies, which float32 knows to 4e-5.
HOT = {"em": "em,inverse_temperature=4,annealing=0.5,min_variance=0.4", "variational": "variational,psi0=1"}
OPTIONS = [
    "dynamic,leaky=true",
    "dynamic,detach=true",
    "dynamic,prior_logits=0,capsule_bias=0.1",
    "dynamic,leaky=true,detach=true,prior_logits=0,capsule_bias=0.1",
    "variational,alpha0=0.7,kappa0=0.4,psi0=1.5",
    "self_routing,epsilon=0.2",
    "random,seed=3",
]
IGNORE_ACTIVATIONS = {"dynamic", "self_attention", "inverted_attention", "kmeans", "uniform", "random"}


class Case(NamedTuple):
    """A routing with its options, and whether an input capsule has parents at several positions."""

    spec: str
    num_iterations: int
    positions: bool = False

    @property
    def name(self) -> str:
        return self.spec.split(",")[0]

    @property
    def routing(self) -> Routing:
        return get_routing(self.spec, num_iterations=self.num_iterations)

    def __str__(self) -> str:
        return f"{self.spec}{' over positions' if self.positions else ''}, {self.num_iterations}"


def every_case() -> list[Case]:
    """Of each routing, at each number of iterations if it has one; options act alike in all but the first."""
    cases = [
        Case(HOT.get(name, name), num_iterations)
        for name in ROUTINGS
        for num_iterations in (ITERATIONS if get_routing(name).takes("num_iterations") else [1])
    ]
    for spec in OPTIONS:
        iterative = get_routing(spec).takes("num_iterations")
        cases += [Case(spec, num_iterations) for num_iterations in (ITERATIONS_OF_OPTIONS if iterative else [1])]
    return cases + [Case(HOT["em"], num_iterations, positions=True) for num_iterations in ITERATIONS_OF_OPTIONS]


def make_inputs(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Seeded arrays for each argument that has a gradient; weights, too, as those that start from zero do nothing."""
    rng = np.random.default_rng(5)
    capsules = (BATCH, POSITIONS, INPUTS) if case.positions else (BATCH, INPUTS)
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


def make_coefficients(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Those of the sum over all results whose gradients are compared."""
    rng = np.random.default_rng(6)
    capsules = (BATCH, POSITIONS) if case.positions else (BATCH,)
    shapes = {"couplings": (INPUTS, OUTPUTS), "poses": (OUTPUTS, SIZE), "activations": (OUTPUTS,)}
    return {name: rng.normal(size=(*capsules, *shape)).astype(dtype) for name, shape in shapes.items()}


@functools.cache
def in_jax(case: Case, dtype: str, function: Callable[..., Any] | None = None) -> dict[str, np.ndarray]:
    """Couplings, poses, activations and gradients, by the routing or by another function in its place."""
    routing = case.routing if function is None else replace(case.routing, function=function)
    inputs, coefficients = make_inputs(case, dtype), make_coefficients(case, dtype)
    given: dict[str, Any] = {"softmax": lambda logits: jax.nn.softmax(logits, axis=(0, 2))} if case.positions else {}

    def weighted_sum(inputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        axes = {name: 0 if name in PER_EXAMPLE else None for name in inputs}
        routed = jax.vmap(lambda inputs: routing(**inputs, **given), in_axes=(axes,))(inputs)._asdict()
        return jnp.stack([jnp.sum(coefficients[name] * routed[name]) for name in coefficients]).sum(), routed

    gradients, routed = jax.jit(jax.grad(weighted_sum, has_aux=True), compiler_options=QUICKLY_COMPILED)(inputs)
    return in_order(routed, gradients)


@functools.cache
def in_torch(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """The same by the twin."""
    inputs = {name: torch.tensor(value, requires_grad=True) for name, value in make_inputs(case, dtype).items()}
    options = dict(case.routing.options) | inputs
    if case.positions:
        options["softmax"] = lambda logits: torch.exp(logits - torch.logsumexp(logits, dim=(1, 3), keepdim=True))
    routed = TORCH_ROUTINGS[case.name](**options)._asdict()
    coefficients = make_coefficients(case, dtype)
    total = torch.stack([(torch.tensor(coefficients[name]) * routed[name]).sum() for name in coefficients]).sum()
    gradients = torch.autograd.grad(total, tuple(inputs.values()), materialize_grads=True)
    routed = {name: array.numpy(force=True) for name, array in routed.items()}  # from a GPU, too
    return in_order(routed, {name: array.numpy(force=True) for name, array in zip(inputs, gradients, strict=True)})


def in_order(routed: dict[str, Any], gradients: dict[str, Any]) -> dict[str, np.ndarray]:
    """In the order in which they depend on each other, so that the first to differ says most about what is wrong."""
    named = {name: routed[name] for name in ("couplings", "poses", "activations")}
    named |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    return {name: np.asarray(array) for name, array in named.items()}


def check(case: Case, name: str, actual: np.ndarray, expected: np.ndarray) -> Check:
    """Whether they are close; those that have to be zero must be so to the last bit."""
    if name == "gradient of activations" and case.name in IGNORE_ACTIVATIONS:
        return compare(name, actual, expected, tolerance=0.0, floor=-1.0)
    return compare(name, actual, expected, tolerance=VALUES[str(expected.dtype)], floor=1e-4)
