"""The explorer: its numbers are those of the model, for any routing and arrangement of capsules."""

import base64
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from capsnet_jax import CapsNet, Routed, UsageError
from capsnet_jax.explore.explorer import Explorer, Network, choose_examples, mnist_examples, with_routing
from capsnet_jax.routing import get_routing
from tests.conftest import IMAGE_SHAPE
from tests.explore.conftest import NAMES, hot_model

PIXELS = np.random.default_rng(2).integers(0, 256, IMAGE_SHAPE, dtype=np.uint8)
IMAGE = PIXELS / np.float32(255)
IN_BASE64 = base64.b64encode(PIXELS.tobytes()).decode()
ROUNDED = 2e-6  # of numbers in answers
GROUPS, POSITIONS = 2, 12


def pixels_of(text: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


ROUTE = nnx.jit(lambda model, image: model.route(image)[-1])


def check_steps(answer: dict, model: CapsNet, groups: int, iterations: list[int]) -> None:
    """Every step of an answer has the values of the model with that number of iterations."""
    assert len(answer["steps"]) == len(iterations)
    for step, number in zip(answer["steps"], iterations, strict=True):
        routed = ROUTE(with_iterations(model, number), jnp.asarray(IMAGE)[None])
        np.testing.assert_allclose(step["activations"], routed.activations.reshape(-1), atol=ROUNDED)
        np.testing.assert_allclose(step["poses"], routed.poses.reshape(len(NAMES), -1), atol=ROUNDED)
        couplings = rearrange(routed.couplings.reshape(-1, len(NAMES)), "(p g) o -> p g o", g=groups)
        received = np.reshape(answer["sources"], (-1, groups, 1)) * couplings
        np.testing.assert_allclose(step["by_group"], received.sum(axis=0), rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(step["by_position"], received.sum(axis=1), rtol=1e-5, atol=2e-5)


def with_iterations(model: CapsNet, number: int) -> CapsNet:
    """The model with another number of iterations in its last layer."""
    other = nnx.clone(model)
    last = other.capsule_layers[-1]
    last.routing = get_routing(model.config.routing, num_iterations=number)
    return other


def test_every_step_has_the_values_of_the_model_with_so_many_iterations(model, explorer):
    answer = explorer.route({"image": IN_BASE64})
    check_steps(answer, model, GROUPS, [1, 2, 3])
    first, _, last = (np.array(step["by_group"]) for step in answer["steps"])
    assert np.abs(first - last).max() > 0.01 * np.abs(last).max()  # the routing has an effect
    primary = model.primary_capsules(model.stem(jnp.asarray(IMAGE)[None]))
    np.testing.assert_allclose(answer["primary"], primary.activations[0], atol=ROUNDED)
    assert answer["sources"] == answer["primary"]
    assert len(answer["primary"]) == GROUPS * POSITIONS
    reconstruction = pixels_of(answer["reconstruction"], IMAGE_SHAPE)
    np.testing.assert_allclose(reconstruction, 255 * model(jnp.asarray(IMAGE)[None]).reconstructions[0], atol=0.51)


def test_an_image_may_be_in_base64_or_a_list(explorer):
    in_base64 = explorer.route({"image": IN_BASE64})
    assert explorer.route({"image": IMAGE.tolist()}) == explorer.route({"image": IMAGE.ravel().tolist()}) == in_base64


def test_decode_reconstructs_a_class_from_a_pose(model, explorer):
    pose = np.random.default_rng(3).normal(size=5).astype(np.float32)
    poses = jnp.zeros((1, len(NAMES), 5)).at[0, 4].set(pose)
    expected = 255 * np.asarray(model.decode(poses, jnp.array([4]))[0])
    answer = explorer.decode({"class": 4, "pose": pose.tolist()})
    np.testing.assert_allclose(pixels_of(answer["reconstruction"], IMAGE_SHAPE), expected, atol=0.51)
    assert explorer.decode({"class": 5, "pose": pose.tolist()}) != answer


def test_voters_are_the_pixels_that_change_what_a_class_receives(model, explorer):
    image = jnp.asarray(IMAGE)[None]
    couplings = ROUTE(with_iterations(model, 2), image).couplings[0, :, 7]

    def received(image):
        return couplings @ model.primary_capsules(model.stem(image)).activations[0]

    contributions = np.abs(np.asarray(jax.grad(received)(image) * image))[0, ..., 0]
    answer = explorer.voters({"image": IN_BASE64, "class": 7, "step": 1})
    found = pixels_of(answer["pixels"], IMAGE_SHAPE[:2])
    np.testing.assert_allclose(found, 255 * contributions / contributions.max(), atol=0.51)
    assert explorer.voters({"image": IN_BASE64, "class": 6, "step": 1}) != answer
    dark = explorer.voters({"image": np.zeros(IMAGE_SHAPE).tolist(), "class": 7, "step": 1})
    assert not pixels_of(dark["pixels"], IMAGE_SHAPE[:2]).any()


def by_mean(votes, activations):
    """A routing of a user, without iterations."""
    couplings = jax.nn.softmax(jnp.einsum("ioh,oh->io", votes, votes.mean(axis=0)), axis=1)
    poses = jnp.tanh(jnp.einsum("io,ioh->oh", couplings, votes))
    return Routed(poses, jax.nn.sigmoid(poses[:, 0]), couplings)


def test_a_routing_of_the_user_without_iterations_has_one_step():
    model = hot_model(routing=by_mean)
    explorer = Explorer({"own": model}, NAMES, examples=mnist_examples)
    assert explorer.describe({})["networks"][0]["routing"] == "by_mean"
    check_steps(explorer.route({"image": IN_BASE64}), model, GROUPS, [1])


@pytest.mark.parametrize(
    ("fields", "grid", "groups"),
    [
        ({"conv_capsules": ((3, 4, 2, 1),), "routing": "em", "num_iterations": 2}, (2, 3), 3),
        ({"hidden_capsules": ((6, 3),), "num_iterations": 2}, (1, 1), 6),
        ({"matrix_poses": True, "class_dim": 4, "shared_class_transform": True, "num_iterations": 2}, (3, 4), 2),
    ],
    ids=["convolutional", "hidden", "matrices"],
)
def test_capsules_of_any_arrangement_vote_for_the_classes(fields, grid, groups):
    model = hot_model(decoder_hidden=None, **fields)
    explorer = Explorer({"deep": model}, NAMES, examples=mnist_examples)
    (described,) = explorer.describe({})["networks"]
    assert described["sources"] == {"grid": grid, "groups": groups}
    assert described["decoder"] is False
    answer = explorer.route({"image": IN_BASE64})
    check_steps(answer, model, groups, [1, 2])
    assert answer["reconstruction"] is None
    assert len(answer["primary"]) == GROUPS * POSITIONS
    with pytest.raises(UsageError, match=r"The model has no decoder, so there are no reconstructions\."):
        explorer.decode({"class": 0, "pose": [0] * model.config.class_dim})


def test_of_many_iterations_the_first_ones_and_the_last_one_are_shown():
    assert Network(hot_model(num_iterations=12)).iterations == [1, 2, 3, 4, 5, 6, 7, 8, 9, 12]
    assert Network(hot_model(num_iterations=1)).iterations == [1]


def test_another_routing_is_shown_with_the_same_weights(model, explorer):
    described = explorer.describe({})
    assert described["names"][:2] == ["small", "em"]
    assert "dynamic" not in described["names"]
    network = explorer.describe_network({"model": "uniform"})
    assert (network["name"], network["iterations"]) == ("uniform", [1])
    answer = explorer.route({"image": IN_BASE64, "model": "uniform"})
    own = explorer.route({"image": IN_BASE64})
    assert answer["primary"] == own["primary"]
    np.testing.assert_allclose(answer["steps"][0]["activations"], own["steps"][0]["activations"], atol=ROUNDED)
    check_steps(answer, with_routing(model, "uniform"), GROUPS, [1])


def test_test_images_have_the_names_of_their_classes(explorer):
    images = explorer.images({})["images"]
    assert [image["label"] for image in images] == ["a", "d", "j", "a", "d", "d", "d"]
    assert pixels_of(images[0]["pixels"], IMAGE_SHAPE).std() > 50


def test_a_message_says_why_there_are_no_test_images(model):
    def unreadable():
        raise UsageError("The folder is gone.")

    explorer = Explorer({"small": model}, NAMES, examples=unreadable)
    assert explorer.images({}) == {"images": [], "message": "The folder is gone."}


def test_examples_take_classes_in_turn():
    np.testing.assert_array_equal(choose_examples(np.array([3, 3, 0, 9, 0, 3, 3]), 5), [2, 0, 3, 4, 1])


def test_examples_of_mnist_come_with_the_page():
    images, labels = mnist_examples()
    assert images.shape == (20, 28, 28, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(labels, [*range(10), *range(10)])
    np.testing.assert_array_equal(images[:, :2].reshape(20, -1).max(axis=1), 0)  # margins, and thus whole digits
    assert (images.reshape(20, -1).max(axis=1) > 250).all()


IMAGE_AND_CLASS = {"image": IN_BASE64, "class": 1, "step": 0}


@pytest.mark.parametrize(
    ("method", "request_", "message"),
    [
        ("route", {}, "image has 0 values; expected (9, 11, 1), height, width, channels"),
        ("route", {"image": "?"}, "image is not in base64; expected a byte for each pixel"),
        ("route", {"image": "ä"}, "image is not in base64"),
        ("route", {"image": IN_BASE64[:8]}, "image has 6 values; expected (9, 11, 1)"),
        ("route", {"image": [0.5] * 98}, "image has 98 values"),
        ("route", {"image": [[1], [1, 2]]}, "image is not an array of numbers"),
        ("route", {"image": [10**400]}, "image is not an array of numbers"),
        ("route", {"image": [1.5] * 99}, "image has pixels out of range; expected numbers in [0, 1]"),
        ("route", {"image": [float("nan")] * 99}, "image has pixels out of range"),
        ("route", {"image": IN_BASE64, "model": "other"}, "model is 'other'; expected small, em, "),
        ("route", {"image": IN_BASE64, "model": ["small"]}, "model is ['small']; expected small"),
        ("describe_network", {"model": "os:system"}, "model is 'os:system'; expected small"),
        ("voters", IMAGE_AND_CLASS | {"class": 10}, "class is 10; expected a whole number from 0 to 9"),
        ("voters", IMAGE_AND_CLASS | {"class": True}, "class is True; expected a whole number"),
        ("voters", IMAGE_AND_CLASS | {"step": 3}, "step is 3; expected a whole number from 0 to 2"),
        ("decode", {"class": -1, "pose": [0] * 5}, "class is -1; expected"),
        ("decode", {"class": 1, "pose": [0] * 4}, "pose is not a list of 5 finite numbers"),
        ("decode", {"class": 1, "pose": [float("inf")] * 5}, "pose is not a list of 5 finite numbers"),
        ("decode", {"class": 1}, "pose is not "),
    ],
)
def test_a_wrong_request_is_explained(method, request_, message, explorer):
    with pytest.raises(UsageError, match=re.escape(message)):
        getattr(explorer, method)(request_)


def test_values_that_are_not_finite_are_an_error():
    def broken(votes, activations):
        return by_mean(votes / 0.0, activations)

    explorer = Explorer({"broken": hot_model(routing=broken)}, NAMES, examples=mnist_examples)
    with pytest.raises(UsageError, match="gives values that are not finite for this image"):
        explorer.route({"image": IN_BASE64})


def test_models_of_other_images_or_classes_are_not_shown_together(model):
    other = hot_model(image_shape=(9, 10, 1))
    with pytest.raises(
        UsageError, match=r"wide is for images of \(9, 10, 1\) and 10 classes; expected \(9, 11, 1\) and"
    ):
        Explorer({"small": model, "wide": other}, NAMES, examples=mnist_examples)
