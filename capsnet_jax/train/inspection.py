"""What a model does with images: couplings and activations of each iteration, reconstructions of single capsules."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.train.evaluation import Images, Labels, coupling_entropy, in_batches, most_active, right_and_wrong

PERTURBATIONS = np.linspace(-0.25, 0.25, 11)  # Sabour et al. (2017), section 5.1


class Iterations(NamedTuple):
    """Class capsules after each routing iteration, and the couplings that produced them.

    Attributes:
        poses: poses of the class capsules.
        activations: activations of the class capsules.
        couplings: weight of each vote, by position and group of the input capsule.
    """

    poses: Float[np.ndarray, "images iterations o h"]
    activations: Float[np.ndarray, "images iterations o"]
    couplings: Float[np.ndarray, "images iterations height width groups o"]


class Convergence(NamedTuple):
    """How routing converges on images with labels.

    Attributes:
        entropies: normalized entropy of the couplings, mean over the input capsules; see `coupling_entropy`.
        right: mean activation of the capsules of the labels.
        wrong: the largest activation among the other capsules; none if there are no others.
    """

    entropies: Float[np.ndarray, "iterations images"]
    right: Float[np.ndarray, "iterations images"]
    wrong: Float[np.ndarray, "iterations others"]


class Trace(NamedTuple):
    """A forward pass with several numbers of routing iterations in the last layer.

    Attributes:
        primary: activations of the primary capsules.
        inputs: activations of the input capsules of the last layer: the primary capsules, if there is one layer.
        steps: class capsules for each number of iterations, and the couplings that produced them.
    """

    primary: Float[Array, "b primary"]
    inputs: Float[Array, "b i"]
    steps: Routed


def num_iterations(model: CapsNet) -> int | None:
    """Return the number of routing iterations of the class capsules; None if their routing has no such option."""
    return dict(model.capsule_layers[-1].routing.options).get("num_iterations")


def route_by_iteration(model: CapsNet, images: Images) -> Iterations:
    """Route images to the class capsules with 1, 2 ... iterations, up to the number that the model uses.

    Lower layers always use all of their iterations. A routing without the option num_iterations is called once.

    Args:
        model: the model.
        images: uint8, or floats in [0, 1].

    Raises:
        UsageError: the images do not have the shape that the model was made for.
    """
    poses, activations, couplings = in_batches(_route_by_iteration, model, (images,))
    height, width = input_grid(model)
    by_position = rearrange(couplings, "b t (h w groups) o -> b t h w groups o", h=height, w=width)
    return Iterations(poses, activations, by_position)


def trace(model: CapsNet, images: Float[Array, "b height width channels"], iterations: Sequence[int]) -> Trace:
    """Compute the forward pass with each of these numbers of iterations in the last layer; can be traced by JAX.

    Lower layers always use all of their iterations. A routing without the option num_iterations ignores the numbers.

    Args:
        model: the model.
        images: pixels in [0, 1].
        iterations: numbers of routing iterations, the steps.

    Raises:
        UsageError: the images do not have the shape that the model was made for.
    """
    routed_layers = model.route(images)
    primary = model.primary_capsules(model.stem(images))  # computed once, as XLA merges equal operations
    *below, last = model.capsule_layers
    inputs = below[-1].capsules_of(routed_layers[-2]) if below else primary
    full, steps = last.routing, []
    try:
        for number in iterations:
            if full.takes("num_iterations"):
                last.routing = replace(full, options=tuple((dict(full.options) | {"num_iterations": number}).items()))
            routed = last.route(inputs)
            couplings = routed.couplings.reshape(len(images), -1, model.config.num_classes)  # without the only position
            steps.append(Routed(*last.capsules_of(routed), couplings))
    finally:
        last.routing = full
    stacked = Routed(*(jnp.stack(each, axis=1) for each in zip(*steps, strict=True)))
    return Trace(primary.activations, inputs.activations, stacked)


def input_grid(model: CapsNet) -> tuple[int, int]:
    """Return height and width of the grid of the input capsules of the last layer, in the order `(height width i)`."""
    grids = [model.config.primary_grid, *(getattr(layer, "out_grid", (1, 1)) for layer in model.capsule_layers)]
    return grids[-2]


def measure_convergence(model: CapsNet, images: Images, labels: Labels) -> Convergence:
    """Measure entropy of the couplings and activations of right and wrong classes after each routing iteration.

    Args:
        model: the model.
        images: uint8, or floats in [0, 1].
        labels: class indices `[images]`, or `[images k]` for k classes in each image.

    Raises:
        UsageError: the images do not have the shape that the model was made for.
    """
    _, activations, couplings = route_by_iteration(model, images)
    entropies = coupling_entropy(jnp.asarray(couplings)).mean(axis=(2, 3, 4)).T
    labels = rearrange(labels, "images ... -> images (...)")
    pairs = (right_and_wrong(each, labels) for each in activations.swapaxes(0, 1))
    right, wrong = (np.stack(each) for each in zip(*pairs, strict=True))
    return Convergence(np.asarray(entropies), right.mean(axis=2), wrong)


def reconstruct_each(
    model: CapsNet, images: Images, k: int = 1
) -> tuple[Int[np.ndarray, "images k"], Float[np.ndarray, "images k height width channels"]]:
    """Reconstruct images from each of their k most active class capsules alone.

    Args:
        model: a model with a decoder.
        images: uint8, or floats in [0, 1].
        k: number of capsules.

    Returns:
        The classes of these capsules, the most active first, and the reconstructions.
    """
    poses, activations = in_batches(_encode, model, (images,))
    classes = most_active(activations, k)
    alone = _decode(model, jnp.repeat(poses, k, axis=0), jnp.asarray(classes.ravel()))
    return classes, rearrange(np.asarray(alone), "(b k) ... -> b k ...", k=k)


def perturb(
    model: CapsNet, poses: Float[np.ndarray, "o h"], label: int, changes: Float[np.ndarray, " changes"] = PERTURBATIONS
) -> Float[np.ndarray, "h changes height width channels"]:
    """Reconstruct an image from a class capsule while one dimension of its pose after the other is changed.

    Args:
        model: a model with a decoder.
        poses: class capsules of the image.
        label: the class of the capsule.
        changes: numbers that are added to the dimension, one at a time.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), section 5.1.
    """
    size = poses.shape[1]
    changed = np.tile(poses, (size, len(changes), 1, 1))
    changed[:, :, label] += rearrange(np.eye(size), "h g -> h 1 g") * rearrange(changes, "n -> n 1")
    flat = jnp.asarray(rearrange(changed, "h n o g -> (h n) o g"))
    reconstructions = _decode(model, flat, jnp.full(len(flat), label))
    return rearrange(np.asarray(reconstructions), "(h n) ... -> h n ...", h=size)


def _route_by_iteration(model: CapsNet, images: Float[Array, "b height width channels"]) -> Routed:
    return trace(model, images, range(1, (num_iterations(model) or 1) + 1)).steps


def _encode(model: CapsNet, images: Float[Array, "b height width channels"]) -> Capsules:
    return model.encode(images)


@nnx.jit
def _decode(
    model: CapsNet, poses: Float[Array, "b o h"], labels: Int[Array, " b"]
) -> Float[Array, "b height width channels"]:
    return model.decode(poses, labels)
