"""Couplings of each routing iteration, and reconstructions of single and of changed capsules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import ROUTINGS, CapsNet
from capsnet_jax.ops import to_unit_range
from capsnet_jax.train.evaluation import coupling_entropy, right_and_wrong
from capsnet_jax.train.inspection import (
    input_grid,
    measure_convergence,
    num_iterations,
    perturb,
    reconstruct_each,
    route_by_iteration,
    trace,
)
from tests.conftest import IMAGE_SHAPE, SMALL

LAYERS = {
    "dense": {},
    "several": {"hidden_capsules": ((7, 6),)},
    "convolutional": {"conv_capsules": ((3, 6, 2, 1),)},
    "shared": {"conv_capsules": ((3, 6, 2, 1),), "shared_class_transform": True},
}
GRIDS = {"dense": (3, 4), "several": (1, 1), "convolutional": (2, 3), "shared": (2, 3)}
GROUPS = {"dense": 2, "several": 7, "convolutional": 3, "shared": 3}


@pytest.fixture
def hot_model(small_model) -> CapsNet:
    """A model whose couplings are far from even."""
    weight = small_model.capsule_layers[-1].weight
    weight[...] = 30 * weight[...]
    return small_model


def test_a_model_keeps_its_routing_when_one_with_fewer_iterations_fails(small_model):
    last = small_model.capsule_layers[-1]
    before = last.routing
    with pytest.raises(ValueError, match="num_iterations"):
        trace(small_model, jnp.zeros((2, *IMAGE_SHAPE)), [1, 0])
    assert last.routing is before


def test_each_iteration_is_the_routing_with_that_many_iterations(hot_model, small_dataset):
    images = small_dataset.test_images[:3]
    before = hot_model.capsule_layers[-1].routing
    iterations = route_by_iteration(hot_model, images)
    assert hot_model.capsule_layers[-1].routing == before

    @nnx.jit
    def by_hand(model, images):
        capsules = model.primary_capsules(model.stem(to_unit_range(images)))
        votes = model.capsule_layers[-1].votes(capsules.poses)
        routings = [partial(ROUTINGS["dynamic"], num_iterations=number) for number in (1, 2, 3)]
        return [jax.vmap(routing)(votes, capsules.activations) for routing in routings]

    entropies = []
    for number, expected in enumerate(by_hand(hot_model, jnp.asarray(images))):
        for actual, values in zip(iterations, expected, strict=True):
            np.testing.assert_allclose(actual[:, number].reshape(values.shape), values, rtol=1e-4, atol=1e-6)
        entropies.append(float(coupling_entropy(expected.couplings).mean()))
    np.testing.assert_allclose(iterations.couplings[:, 0], 0.1, rtol=1e-6)
    assert 1 > entropies[1] + 0.01 > entropies[2] + 0.02  # routing converges
    labels = small_dataset.test_labels[:3]
    convergence = measure_convergence(hot_model, images, labels)
    assert convergence.entropies.shape == (3, 3)
    np.testing.assert_allclose(convergence.entropies.mean(axis=1), entropies, rtol=1e-4)
    for image, label in enumerate(labels):
        activations = iterations.activations[image]
        np.testing.assert_array_equal(convergence.right[:, image], activations[:, label])
        np.testing.assert_array_equal(convergence.wrong[:, image], np.delete(activations, label, axis=1).max(axis=1))


@pytest.mark.parametrize("layers", LAYERS)
def test_the_last_iteration_is_that_of_the_model_for_all_kinds_of_layers(layers, small_dataset):
    """Couplings are in the order of positions and groups of the input capsules."""
    model = CapsNet(IMAGE_SHAPE, 10, **SMALL, **LAYERS[layers], routing="dynamic", num_iterations=2, rngs=nnx.Rngs(0))
    images = small_dataset.test_images[:2]
    iterations = route_by_iteration(model, images)
    routed = nnx.jit(lambda model, images: model.route(images)[-1])(model, to_unit_range(jnp.asarray(images)))
    assert iterations.couplings.shape == (2, 2, *GRIDS[layers], GROUPS[layers], 10)
    for actual, expected in zip(iterations, routed, strict=True):
        np.testing.assert_allclose(actual[:, -1].ravel(), expected.ravel(), rtol=1e-4, atol=1e-7)
    assert input_grid(model) == GRIDS[layers]
    assert num_iterations(model) == 2


def test_a_routing_without_iterations_is_called_once(small_dataset):
    model = CapsNet(IMAGE_SHAPE, 10, **SMALL, routing="uniform", rngs=nnx.Rngs(0))
    assert num_iterations(model) is None
    assert route_by_iteration(model, small_dataset.test_images[:2]).couplings.shape[:2] == (2, 1)


def test_a_changed_dimension_changes_its_own_row_only(small_model):
    """The decoder does not depend on dimension 3 of class 4, and so only its row stays the same."""
    weight = small_model.decoder.from_capsules
    weight[...] = weight[...].at[4, 3].set(0)
    poses = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)
    changes = np.array([-0.5, 0, 0.25])
    drawn = perturb(small_model, poses, 4, changes)
    assert drawn.shape == (5, 3, *IMAGE_SHAPE)
    base = np.asarray(small_model.decode(jnp.asarray(poses[None]), jnp.array([4])))[0]
    for dimension in range(5):
        differs = [np.abs(image - base).max() > 1e-4 for image in drawn[dimension]]
        assert differs == ([False] * 3 if dimension == 3 else [True, False, True])
    changed = poses.copy()
    changed[4, 2] += 0.25
    expected = small_model.decode(jnp.asarray(changed[None]), jnp.array([4]))[0]
    np.testing.assert_allclose(drawn[2, 2], expected, rtol=1e-5)


def test_each_of_the_most_active_capsules_is_reconstructed_alone(hot_model, small_dataset):
    images = small_dataset.test_images[:3]
    classes, reconstructions = reconstruct_each(hot_model, images, 2)
    poses, activations = hot_model.encode(to_unit_range(jnp.asarray(images)))
    np.testing.assert_array_equal(classes, np.argsort(-activations, axis=1)[:, :2])
    for rank in (0, 1):
        expected = hot_model.decode(poses, jnp.asarray(classes[:, rank]))
        np.testing.assert_allclose(reconstructions[:, rank], expected, rtol=1e-4)
    assert np.abs(reconstructions[:, 0] - reconstructions[:, 1]).max() > 1e-3


def test_right_and_wrong_activations_are_those_of_the_labels_and_the_largest_other():
    activations = np.array([[0.1, 0.9, 0.3], [0.8, 0.2, 0.7]], np.float32)
    right, wrong = right_and_wrong(activations, np.array([[1], [2]]))
    assert (right.tolist(), wrong.tolist()) == (
        activations[[0, 1], [1, 2]][:, None].tolist(),
        activations[[0, 1], [2, 0]].tolist(),
    )
    right, wrong = right_and_wrong(activations, np.array([[2, 1, 0], [0, 1, 2]]))
    assert wrong.size == 0
    np.testing.assert_array_equal(right, [activations[0][::-1], activations[1]])
