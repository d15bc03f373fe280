"""What the explorer shows of models, as JSON: routing step by step, the pixels that voted, and reconstructions."""

import base64
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped
from numpy.typing import ArrayLike
from PIL import Image

from capsnet_jax.compilation import compiler_options
from capsnet_jax.errors import UsageError
from capsnet_jax.interchange.weights import take_weights, to_torch
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.routing import ROUTINGS, get_routing
from capsnet_jax.train.inspection import Trace, input_grid, num_iterations, trace

MOST_STEPS = 10  # iterations that are shown; each is compiled, and more do not fit the page
EXAMPLES = 20  # test images that the page offers
DIGITS = 6  # decimals of the numbers in answers

Request = Mapping[str, Any]
Answer = dict[str, Any]
Images = Shaped[np.ndarray, "images height width channels"]
Labels = Int[np.ndarray, "images *k"]


class Network:
    """A model, compiled for one image.

    Args:
        model: the model, in evaluation mode.

    Attributes:
        config: its config.
        iterations: the numbers of routing iterations of the steps; a routing that does not iterate has one step.
        grid: height and width, in positions, of the capsules that vote for the classes.
        groups: number of these capsules at each position.
    """

    def __init__(self, model: CapsNet):
        self.config = model.config
        number = num_iterations(model) or 1
        self.iterations = [*range(1, min(number, MOST_STEPS)), number]
        self.grid = input_grid(model)
        graph, self._state = nnx.split(model)
        compiled = partial(jax.jit, compiler_options=compiler_options())

        def of_image(state: nnx.State, image: Float[Array, "height width channels"]) -> Trace:
            return jax.tree.map(lambda array: array[0], trace(nnx.merge(graph, state), image[None], self.iterations))

        def voters(
            state: nnx.State, image: Float[Array, "height width channels"], step: Array, label: Array
        ) -> Float[Array, "height width"]:
            def sent(image: Float[Array, "height width channels"]) -> Float[Array, ""]:
                _, sources, steps = of_image(state, image)
                return jax.lax.stop_gradient(steps.couplings[step, :, label]) @ sources

            return jnp.abs(jax.grad(sent)(image) * image).sum(axis=-1)

        def decode(state: nnx.State, pose: Float[Array, " h"], label: Array) -> Float[Array, "height width channels"]:
            poses = jnp.zeros((1, self.config.num_classes, len(pose))).at[0, label].set(pose)
            return nnx.merge(graph, state).decode(poses, label[None])[0]

        blank = jax.ShapeDtypeStruct(self.config.image_shape, np.float32)
        self.groups = jax.eval_shape(of_image, self._state, blank).inputs.size // prod(self.grid)
        self._trace, self._voters, self._decode = compiled(of_image), compiled(voters), compiled(decode)

    def trace(self, image: Float[np.ndarray, "height width channels"]) -> Trace:
        """Compute the forward pass of an image with pixels in [0, 1]."""
        return self._trace(self._state, image)

    def voters(
        self, image: Float[np.ndarray, "height width channels"], step: int, label: int
    ) -> Float[np.ndarray, "height width"]:
        """Compute how much each pixel contributes to what a class receives.

        A class receives the sum over capsules of coupling times activation. Its gradient, with the couplings as
        constants, times the pixel is the contribution of the pixel; absolute values are added over the channels.
        """
        return np.asarray(self._voters(self._state, image, np.int32(step), np.int32(label)))

    def decode(self, pose: Float[np.ndarray, " h"], label: int) -> Float[np.ndarray, "height width channels"]:
        """Reconstruct the image of a class capsule."""
        return np.asarray(self._decode(self._state, pose, np.int32(label)))


def with_routing(model: CapsNet, routing: str) -> CapsNet:
    """Create a model with another routing and the same weights; weights of the routing itself start anew.

    Raises:
        UsageError: the routing is unknown, or fails.
    """
    other = CapsNet.from_config(replace(model.config, routing=routing), rngs=nnx.Rngs(0))
    take_weights(other, to_torch(model))
    return other


class Explorer:
    """Models that share images and classes, and answers to the requests of the page.

    A request is a JSON object. Those about a network have its name in the field "model", by default the first one.

    Args:
        models: one or two models to show, by name.
        class_names: names of their classes.
        labels_per_image: number of classes that each image shows.
        examples: reads test images and their labels; called when the page asks for them.

    Raises:
        UsageError: the models are for images of different shapes, or with different numbers of classes.
    """

    def __init__(
        self,
        models: Mapping[str, CapsNet],
        class_names: Sequence[str],
        *,
        labels_per_image: int = 1,
        examples: Callable[[], tuple[Images, Labels]],
    ):
        self._models, self._class_names, self._labels_per_image = dict(models), list(class_names), labels_per_image
        self._examples = examples
        first = next(iter(models.values()))
        self._image_shape = first.config.image_shape
        for name, model in models.items():
            sizes = model.config.image_shape, model.config.num_classes
            if sizes != (self._image_shape, len(class_names)):
                raise UsageError(
                    f"{name} is for images of {sizes[0]} and {sizes[1]} classes; expected {self._image_shape} and "
                    f"{len(class_names)}, to be shown beside {next(iter(models))}."
                )
        used = first.config.routing if len(models) == 1 else None
        self._names = [*models, *(name for name in ROUTINGS if name not in models and name != used)]
        self._networks: dict[str, Network] = {}
        self._lock = threading.Lock()  # requests come from several threads; one network uses all cores

    def describe(self, request: Request) -> Answer:
        """Describe images, classes, the networks that are shown, and the names of those that can be."""
        return {
            "image_shape": self._image_shape,
            "classes": self._class_names,
            "labels_per_image": self._labels_per_image,
            "names": self._names,
            "networks": [self._description({"model": name}) for name in self._models],
        }

    def describe_network(self, request: Request) -> Answer:
        """Describe the network of a request, and compile it, so that its first answers take no longer than others.

        Raises:
            UsageError: there is none, or its routing fails.
        """
        network = self._network(request)
        blank, pose = (np.zeros(shape, np.float32) for shape in (self._image_shape, network.config.class_dim))
        calls: list[Callable[[], Any]] = [partial(network.trace, blank), partial(network.voters, blank, 0, 0)]
        if network.config.decoder_hidden is not None:
            calls.insert(1, partial(network.decode, pose, 0))
        for call in calls:
            with self._lock:  # released in between, so that a drawing does not wait for all of them
                call()
        return self._description(request)

    def _description(self, request: Request) -> Answer:
        network = self._network(request)
        config = network.config
        return {
            "name": request.get("model", self._names[0]),
            "routing": get_routing(config.routing).name,
            "iterations": network.iterations,
            "decoder": config.decoder_hidden is not None,
            "pose_size": config.class_dim,
            "primary": {"grid": config.primary_grid, "groups": config.primary_groups},
            "sources": {"grid": network.grid, "groups": network.groups},
            "layers": len(config.conv_capsules) + len(config.hidden_capsules) + 1,
        }

    def images(self, request: Request) -> Answer:
        """Return test images with the names of their classes, or a message why there are none."""
        try:
            images, labels = self._examples()
        except UsageError as error:
            return {"images": [], "message": str(error)}
        labels = labels.reshape(len(images), -1)
        return {
            "images": [
                {"pixels": _base64(images[index]), "label": " ".join(self._class_names[each] for each in labels[index])}
                for index in choose_examples(labels[:, 0], EXAMPLES)
            ]
        }

    def route(self, request: Request) -> Answer:
        """Route the image of a request.

        What a class receives from a capsule is its coupling times its activation. It is added up by group and by
        position of the capsules.

        Raises:
            UsageError: the image is wrong, there is no such network, or its values are not finite.
        """
        image = self._image(request)
        network = self._network(request)
        with self._lock:
            primary, sources, (poses, activations, couplings) = jax.device_get(network.trace(image))
            label = int(activations[-1].argmax())
            decoded = network.config.decoder_hidden is not None
            picture = network.decode(poses[-1, label], label) if decoded else None
        received = rearrange(sources[:, None] * couplings, "t (p groups) o -> t p groups o", groups=network.groups)
        values = {
            "activations": activations,
            "poses": poses,
            "by_group": reduce(received, "t p groups o -> t groups o", "sum"),
            "by_position": reduce(received, "t p groups o -> t p o", "sum"),
        }
        if not all(np.isfinite(array).all() for array in values.values()):
            raise UsageError(f"The routing {network.config.routing} gives values that are not finite for this image.")
        return {
            "primary": _numbers(primary),
            "sources": _numbers(sources),
            "steps": [
                {name: _numbers(array[step]) for name, array in values.items()}
                for step in range(len(network.iterations))
            ],
            "reconstruction": None if picture is None else _base64(picture),
        }

    def voters(self, request: Request) -> Answer:
        """Return how much each pixel of an image contributes to a class, relative to the largest contribution.

        Raises:
            UsageError: image, class or step is wrong, or there is no such network.
        """
        image, label = self._image(request), self._index(request, "class", len(self._class_names))
        network = self._network(request)
        step = self._index(request, "step", len(network.iterations))
        with self._lock:
            contributions = network.voters(image, step, label)
        largest = contributions.max()
        return {"pixels": _base64(contributions / largest if 0 < largest < np.inf else np.zeros_like(contributions))}

    def decode(self, request: Request) -> Answer:
        """Reconstruct the image of a class from a pose.

        Raises:
            UsageError: class or pose is wrong, or there is no such network, or it has no decoder.
        """
        label = self._index(request, "class", len(self._class_names))
        network = self._network(request)
        if network.config.decoder_hidden is None:
            raise UsageError("The model has no decoder, so there are no reconstructions.")
        size = network.config.class_dim
        pose = _array(request.get("pose"), "pose")
        if pose.shape != (size,) or not np.isfinite(pose).all():
            raise UsageError(f"pose is not a list of {size} finite numbers.")
        with self._lock:
            return {"reconstruction": _base64(network.decode(pose, label))}

    def _network(self, request: Request) -> Network:
        name = request.get("model", self._names[0])
        if name not in self._names:
            raise UsageError(f"model is {name!r}; expected {', '.join(self._names)}.")
        if name not in self._networks:
            first = next(iter(self._models.values()))
            network = Network(self._models[name] if name in self._models else with_routing(first, name))
            return self._networks.setdefault(name, network)  # the first one, if two pages ask at once
        return self._networks[name]

    def _image(self, request: Request) -> Float[np.ndarray, "height width channels"]:
        given = request.get("image", "")
        if isinstance(given, str):
            try:
                pixels = np.frombuffer(base64.b64decode(given, validate=True), np.uint8) / np.float32(255)
            except ValueError as error:
                raise UsageError("image is not in base64; expected a byte for each pixel.") from error
        else:
            pixels = _array(given, "image")
            if not ((pixels >= 0) & (pixels <= 1)).all():
                raise UsageError("image has pixels out of range; expected numbers in [0, 1].")
        if pixels.size != prod(self._image_shape):
            raise UsageError(f"image has {pixels.size} values; expected {self._image_shape}, height, width, channels.")
        return pixels.reshape(self._image_shape)

    @staticmethod
    def _index(request: Request, field: str, number: int) -> int:
        index = request.get(field)
        if type(index) is not int or not 0 <= index < number:
            raise UsageError(f"{field} is {index!r}; expected a whole number from 0 to {number - 1}.")
        return index


def choose_examples(labels: Int[np.ndarray, " images"], number: int) -> Int[np.ndarray, " chosen"]:
    """Return the indices of the first images of each class in turn: one of every class, then a second one, ..."""
    order = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), int)
    rank[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return np.lexsort((labels, rank))[:number]


def mnist_examples() -> tuple[Images, Labels]:
    """Read the test images of MNIST that come with the page: the first two of each class, side by side in one file."""
    with Image.open(Path(__file__).with_name("mnist.png")) as file:
        strip = np.asarray(file)
    return rearrange(strip, "height (images width) -> images height width 1", height=28, width=28), np.arange(20) % 10


def _array(given: Any, name: str) -> Float[np.ndarray, "..."]:
    try:
        return np.asarray(given, np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{name} is not an array of numbers.") from error


def _numbers(array: ArrayLike) -> Any:
    return np.asarray(array, np.float64).round(DIGITS).tolist()


def _base64(image: Shaped[np.ndarray, "..."]) -> str:
    """Encode pixels in [0, 1], or in uint8, as bytes in base64."""
    pixels = image if image.dtype == np.uint8 else np.rint(255 * image).astype(np.uint8)
    return base64.b64encode(pixels.tobytes()).decode()
