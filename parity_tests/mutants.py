"""Wrong models, each with a mistake found in public code; every one of them trains, and parity must catch it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest
from einops import rearrange

from capsnet_jax import CapsNet
from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.layers import CapsuleLayer, PrimaryCapsules
from capsnet_jax.ops import capsule_norm, mask_by_label, multi_hot, squash


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


def softmax_over_inputs(votes, activations, *, num_iterations):
    return dynamic(votes, activations, num_iterations=num_iterations, softmax_axis=0)


def no_gradient_through_agreement(votes, activations, *, num_iterations):
    return dynamic(votes, activations, num_iterations=num_iterations, past=jax.lax.stop_gradient)


def one_iteration_fewer(votes, activations, *, num_iterations):
    return dynamic(votes, activations, num_iterations=num_iterations - 1)


def squash_over_capsules(votes, activations, *, num_iterations):
    return dynamic(votes, activations, num_iterations=num_iterations, squash=lambda poses: squash(poses.T).T)


def no_routing(votes, activations, *, num_iterations):
    return dynamic(votes, activations, num_iterations=num_iterations, past=jnp.zeros_like)


@contextmanager
def logits_averaged_over_batch() -> Iterator[None]:
    def routing(votes, activations):
        return dynamic(votes, activations, batched_logits=lambda logits: jax.lax.pmean(logits, "batch"))

    def route(self, capsules):
        return jax.vmap(routing, axis_name="batch")(self.votes(capsules.poses), capsules.activations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CapsuleLayer, "route", route)
        yield


@contextmanager
def _primary_pattern(pattern: str) -> Iterator[None]:
    def call(self, features):
        poses = self.scale * rearrange(self.convolution(features), pattern, d=self.dim)
        return Capsules(poses, capsule_norm(poses))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrimaryCapsules, "__call__", call)
        yield


def groups_before_positions():
    return _primary_pattern("b height width (groups d) -> b (groups height width) d")


def capsules_strided_over_channels():
    return _primary_pattern("b height width (d groups) -> b (height width groups) d")


def capsules_of_neighbouring_pixels():
    """The reshape of channels-first features that many PyTorch models do."""

    @contextmanager
    def patched() -> Iterator[None]:
        def call(self, features):
            features = rearrange(self.convolution(features), "b height width channels -> b (channels height width)")
            poses = self.scale * rearrange(features, "b (capsules d) -> b capsules d", d=self.dim)
            return Capsules(poses, capsule_norm(poses))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PrimaryCapsules, "__call__", call)
            yield

    return patched()


@contextmanager
def masked_by_the_wrong_label() -> Iterator[None]:
    def decode(self, poses, labels):
        return self.decoder(mask_by_label(poses, (labels + 1) % poses.shape[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CapsNet, "decode", decode)
        yield


@contextmanager
def _in_place_of(place: str, function: Callable[..., jax.Array]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, function)
        yield


def only_the_first_label_is_kept():
    return _in_place_of("capsnet_jax.ops.multi_hot", lambda labels, *rest: multi_hot(labels[:, 0], *rest))


def only_the_first_label_is_wanted():
    return _in_place_of("capsnet_jax.losses.multi_hot", lambda labels, *rest: multi_hot(labels[:, 0], *rest))


def targets_sum_to_one():
    """As those of a softmax do."""
    return _in_place_of("capsnet_jax.losses.multi_hot", lambda labels, *rest: multi_hot(labels, *rest) / 2)


def images_standardized_together():
    return _in_place_of("capsnet_jax.stem.standardize_images", lambda images: (images - images.mean()) / images.std())


def channels_standardized_apart():
    def standardize(images):
        mean, deviation = images.mean(axis=(1, 2), keepdims=True), images.std(axis=(1, 2), keepdims=True)
        return (images - mean) / deviation

    return _in_place_of("capsnet_jax.stem.standardize_images", standardize)


# The routing of each mutant, and the first check that must catch it.
ROUTING_MUTANTS = {
    softmax_over_inputs: "couplings 0",
    one_iteration_fewer: "couplings 0",
    squash_over_capsules: "couplings 0",
    no_routing: "couplings 0",
    no_gradient_through_agreement: "gradient encoder.primary2digit_capsules.input_caps2U.weight",
}
# A context in which the model is wrong, and the first check that must catch it.
MODEL_MUTANTS = {
    logits_averaged_over_batch: "couplings 0",
    groups_before_positions: "primary poses",
    capsules_strided_over_channels: "primary poses",
    capsules_of_neighbouring_pixels: "primary poses",
    masked_by_the_wrong_label: "reconstructions",
}
# The same for a model of standardized images of two classes each.
MULTI_LABEL_MUTANTS = {
    images_standardized_together: "stem",
    channels_standardized_apart: "stem",
    only_the_first_label_is_kept: "reconstructions",
    only_the_first_label_is_wanted: "margin loss",
    targets_sum_to_one: "margin loss",
}
