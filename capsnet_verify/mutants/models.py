"""Wrong models and optimizers; every one of them trains, and parity must catch it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from einops import rearrange, reduce

from capsnet_jax import CapsNet
from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.nn.fast import fourier, fused_dynamic
from capsnet_jax.nn.layers import CapsuleLayer, PrimaryCapsules
from capsnet_jax.ops import capsule_norm, convolution, mask_by_label, multi_hot, squash
from capsnet_jax.routing import get_routing
from capsnet_verify.pair import Pair
from capsnet_verify.subjects import SMALL, Subject, of_model, of_preset

PLAIN = of_model("small", SMALL)
TWO_LABELS = of_model("standardized images of two classes", replace(SMALL, standardize_images=True), labels_per_image=2)
NORMALISED = of_model("batch normalisation", replace(SMALL, batch_norm=True))
SPECTRAL = of_preset("digits")  # small enough, and from 26 images on a convolution of it multiplies spectra
CLASS_WEIGHT = "encoder.primary2digit_capsules.input_caps2U.weight"


class ModelMutant(NamedTuple):
    """A mistake, and the first check that must catch it.

    Attributes:
        mistake: in words.
        caught_by: name of the check.
        wrong: makes the JAX side of a pair wrong for as long as the context lasts.
        subject: the model in which the mistake shows.
        optimizer: of JAX, given the learning rate.
    """

    mistake: str
    caught_by: str
    wrong: Callable[[Pair], AbstractContextManager[None]]
    subject: Subject = PLAIN
    optimizer: Callable[[float], optax.GradientTransformation] = optax.adam

    def __str__(self) -> str:
        return self.mistake.replace(" ", "_")


def dynamic(
    votes: jax.Array,
    activations: jax.Array,
    *,
    num_iterations: int = 3,
    softmax_axis: int = 1,
    squash: Callable[[jax.Array], jax.Array] = squash,
    past: Callable[[jax.Array], jax.Array] = lambda poses: poses,
    batched_logits: Callable[[jax.Array], jax.Array] = lambda logits: logits,
) -> Routed:
    """Dynamic routing with places where it can go wrong; right by default, as a test of the tests asserts."""
    logits = jnp.zeros(votes.shape[:2], votes.dtype)
    for _ in range(num_iterations):
        couplings = jax.nn.softmax(logits, axis=softmax_axis)
        poses = squash(jnp.einsum("io,ioh->oh", couplings, votes))
        logits = batched_logits(logits + jnp.einsum("ioh,oh->io", votes, past(poses)))
    return Routed(poses, capsule_norm(poses), couplings)


def routed_by(**mistake: Any) -> Callable[[Pair], AbstractContextManager[None]]:
    """Dynamic routing with this mistake in all layers."""

    @contextmanager
    def wrong(pair: Pair) -> Iterator[None]:
        for layer in pair.jax_model.capsule_layers:
            layer.routing = get_routing(partial(dynamic, **mistake))
        yield

    return wrong


def with_function(place: str, function: Callable[..., Any]) -> Callable[[Pair], AbstractContextManager[None]]:
    """Another function in the place of the one of this name."""

    @contextmanager
    def wrong(pair: Pair) -> Iterator[None]:
        with mock.patch(place, function):
            yield

    return wrong


def with_method(kind: type, name: str, method: Callable[..., Any]) -> Callable[[Pair], AbstractContextManager[None]]:
    """Another method in the place of this one."""

    @contextmanager
    def wrong(pair: Pair) -> Iterator[None]:
        with mock.patch.object(kind, name, method):
            yield

    return wrong


def capsules_by(pattern: str) -> Callable[[Pair], AbstractContextManager[None]]:
    """Primary capsules that are made of their channels by another pattern."""

    def call(self: PrimaryCapsules, features: jax.Array) -> Capsules:
        poses = self.scale * rearrange(self.convolution(features), pattern, d=self.dim)
        return Capsules(poses, capsule_norm(poses))

    return with_method(PrimaryCapsules, "__call__", call)


def _of_neighbouring_pixels(self: PrimaryCapsules, features: jax.Array) -> Capsules:
    features = rearrange(self.convolution(features), "b height width channels -> b (channels height width)")
    poses = self.scale * rearrange(features, "b (capsules d) -> b capsules d", d=self.dim)
    return Capsules(poses, capsule_norm(poses))


def _with_averaged_logits(self: CapsuleLayer, capsules: Capsules) -> Routed:
    average = partial(jax.lax.pmean, axis_name="batch")
    route = jax.vmap(partial(dynamic, batched_logits=average), axis_name="batch")
    routed: Routed = route(self.votes(capsules.poses), capsules.activations)
    return routed


def _of_the_next_label(self: CapsNet, poses: jax.Array, labels: jax.Array) -> jax.Array:
    assert self.decoder is not None
    return self.decoder(mask_by_label(poses, (labels + 1) % poses.shape[1]))


def _all_images_together(images: jax.Array) -> jax.Array:
    return (images - images.mean()) / images.std()


def _each_channel_apart(images: jax.Array) -> jax.Array:
    mean, deviation = images.mean(axis=(1, 2), keepdims=True), images.std(axis=(1, 2), keepdims=True)
    return (images - mean) / deviation


def _of_first_label(labels: jax.Array, *rest: Any) -> jax.Array:
    return multi_hot(labels[:, 0], *rest)


def _sum_to_one(labels: jax.Array, *rest: Any) -> jax.Array:
    return multi_hot(labels, *rest) / 2


def _fused_over_inputs(leaky: bool, detach: bool, operands: fused_dynamic.Operands, projected: jax.Array) -> jax.Array:
    return jax.nn.softmax(reduce(projected * operands.poses, "o i d b -> o i b", "sum"), axis=1)


def _fused_without_agreement(*arguments: Any, right: Any = fused_dynamic._coupled_sum_backward) -> Any:
    gradients, of_agreed = right(*arguments)
    return gradients, jnp.zeros_like(of_agreed)


def _fourier_mirrored(images: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return fourier.fourier(images, kernel[::-1, ::-1], **options)


def _fourier_without_images(*arguments: Any, right: Any = fourier._backward) -> Any:
    of_images, of_kernel = right(*arguments)
    return jnp.zeros_like(of_images), of_kernel


def _xla_mirrored(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return convolution(images, kernel[::-1, ::-1], stride)


@contextmanager
def _another_epsilon(pair: Pair) -> Iterator[None]:
    for norm in pair.jax_model.stem.norms:
        norm.epsilon = 1e-5  # PyTorch's default
    yield


@contextmanager
def _another_momentum(pair: Pair) -> Iterator[None]:
    for norm in pair.jax_model.stem.norms:
        norm.momentum = 0.01  # as PyTorch counts it
    yield


def right(pair: Pair) -> AbstractContextManager[None]:
    """No mistake."""
    return nullcontext()


# What a batch of 3 on a CPU does not show: it has votes, and products of patches.
IN_ONE_IMPLEMENTATION = [
    ModelMutant(
        "softmax over input capsules, without votes",
        "couplings 0, batch of 16",
        with_function("capsnet_jax.nn.fast.fused_dynamic._couplings", _fused_over_inputs),
    ),
    ModelMutant(
        "no gradient through the agreement, without votes",
        f"gradient {CLASS_WEIGHT}, batch of 16",
        with_function("capsnet_jax.nn.fast.fused_dynamic._coupled_sum_backward", _fused_without_agreement),
    ),
    ModelMutant(
        "kernel mirrored in products of spectra",
        "primary poses, batch of 26",
        with_function("capsnet_jax.nn.fast.convolution.fourier", _fourier_mirrored),
        SPECTRAL,
    ),
    ModelMutant(
        "no gradient of what is multiplied as spectra",
        "gradient encoder.image2primary_capsules.0.bias, batch of 26",
        with_function("capsnet_jax.nn.fast.fourier._backward", _fourier_without_images),
        SPECTRAL,
    ),
    ModelMutant(
        "kernel mirrored on other platforms",
        "stem 0, batch of 3 as on GPU",
        with_function("capsnet_jax.nn.fast.convolution.convolution", _xla_mirrored),
    ),
]
MUTANTS = [
    ModelMutant("softmax over input capsules", "couplings 0", routed_by(softmax_axis=0)),
    ModelMutant("one iteration fewer", "couplings 0", routed_by(num_iterations=2)),
    ModelMutant(
        "squash along the capsules, not the pose",
        "couplings 0",
        routed_by(squash=lambda poses: squash(poses.T).T),
    ),
    ModelMutant("no agreement update at all", "couplings 0", routed_by(past=jnp.zeros_like)),
    ModelMutant("no gradient through the agreement", f"gradient {CLASS_WEIGHT}", routed_by(past=jax.lax.stop_gradient)),
    ModelMutant(
        "logits averaged over the batch", "couplings 0", with_method(CapsuleLayer, "route", _with_averaged_logits)
    ),
    ModelMutant(
        "groups before positions",
        "primary poses",
        capsules_by("b height width (groups d) -> b (groups height width) d"),
    ),
    ModelMutant(
        "a capsule's channels strided over groups",
        "primary poses",
        capsules_by("b height width (d groups) -> b (height width groups) d"),
    ),
    ModelMutant(
        "capsules of neighbouring pixels",
        "primary poses",
        with_method(PrimaryCapsules, "__call__", _of_neighbouring_pixels),
    ),
    ModelMutant(
        "decoder masked by the wrong label", "reconstructions", with_method(CapsNet, "decode", _of_the_next_label)
    ),
    ModelMutant(
        "images standardised together",
        "stem 0",
        with_function("capsnet_jax.nn.layers.standardize_images", _all_images_together),
        TWO_LABELS,
    ),
    ModelMutant(
        "channels of an image standardised apart",
        "stem 0",
        with_function("capsnet_jax.nn.layers.standardize_images", _each_channel_apart),
        TWO_LABELS,
    ),
    ModelMutant(
        "only the first of two labels kept",
        "decoder 0",
        with_function("capsnet_jax.ops.multi_hot", _of_first_label),
        TWO_LABELS,
    ),
    ModelMutant(
        "only the first of two labels wanted",
        "margin loss",
        with_function("capsnet_jax.nn.losses.multi_hot", _of_first_label),
        TWO_LABELS,
    ),
    ModelMutant(
        "targets of two labels that sum to 1",
        "margin loss",
        with_function("capsnet_jax.nn.losses.multi_hot", _sum_to_one),
        TWO_LABELS,
    ),
    ModelMutant(
        "softmax over input capsules, above batch normalisation", "couplings 0", routed_by(softmax_axis=0), NORMALISED
    ),
    ModelMutant(
        "means of the batch in evaluation, too",
        "poses with running means",
        with_method(CapsNet, "eval", lambda self: None),
        NORMALISED,
    ),
    ModelMutant("another epsilon of batch normalisation", "stem 0", _another_epsilon, NORMALISED),
    ModelMutant("another momentum of batch normalisation", "step 1", _another_momentum, NORMALISED),
    *IN_ONE_IMPLEMENTATION,
    ModelMutant(
        "Adam with its epsilon in the root", "step 1", right, optimizer=partial(optax.adam, eps=0, eps_root=1e-8)
    ),
    ModelMutant("Adam with Nesterov momentum", "step 1", right, optimizer=optax.nadam),
    ModelMutant("Adam with another second moment", "step 2", right, optimizer=partial(optax.adam, b2=0.99)),
    ModelMutant("Adam with decayed weights", "step 1", right, optimizer=partial(optax.adamw, weight_decay=1e-2)),
]
