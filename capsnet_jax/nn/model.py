"""The capsule network: images to class capsules (the encoder), and class capsules to images (the decoder)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.config import ModelConfig
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.conv_capsules import ConvCapsules
from capsnet_jax.nn.fast.choice import Choice
from capsnet_jax.nn.initializers import SCHEMES
from capsnet_jax.nn.layers import CapsuleLayer, Decoder, PrimaryCapsules, Stem
from capsnet_jax.ops import Unchecked, check_labels, mask_by_label
from capsnet_jax.presets import get_preset
from capsnet_jax.routing import get_routing


class Output(NamedTuple):
    """The result of a forward pass.

    Attributes:
        poses: poses of the class capsules.
        activations: how present each class is, in [0, 1]. The predicted class has the largest activation.
        reconstructions: images with pixels in (0, 1), or None if the model has no decoder.

    Examples:
        >>> import jax.numpy as jnp
        >>> from capsnet_jax import Output
        >>> output = Output(jnp.ones((2, 3, 16)), jnp.array([[0.1, 0.9, 0.2], [0.7, 0.1, 0.3]]), reconstructions=None)
        >>> output.activations.argmax(axis=1).tolist()  # predicted classes
        [1, 0]
    """

    poses: Float[Array, "b o h"]
    activations: Float[Array, "b o"]
    reconstructions: Float[Array, "b height width channels"] | None


class CapsNet(nnx.Module):
    """A capsule network: stem, primary capsules, capsule layers and an optional decoder.

    The defaults are the reference model, a dynamic-routing network of 8.2 million parameters on MNIST. A new model is
    in evaluation mode; `model.train()` and `model.eval()` matter for batch normalization only.

    Args:
        sizes: `image_shape` and `num_classes`, if given by position.
        fields: fields of `ModelConfig`, by name. `routing` may also be a function; see `get_routing`.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters.

    Attributes:
        config: the `ModelConfig`.

    Raises:
        UsageError: a field is unknown or has a wrong value, the images are too small for the convolutions, or the
            routing is unknown, raises an error or returns wrong shapes.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), section 4, as implemented in
        https://github.com/arogozhnikov/readable_capsnet

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from capsnet_jax import CapsNet
        >>> model = CapsNet(image_shape=(12, 12, 3), num_classes=5, stem_kernel=3, primary_kernel=3, rngs=nnx.Rngs(0))
        >>> images = jnp.ones((2, 12, 12, 3))  # pixels in [0, 1]
        >>> poses, activations, reconstructions = nnx.jit(model)(images)
        >>> poses.shape, activations.shape, reconstructions.shape
        ((2, 5, 16), (2, 5), (2, 12, 12, 3))
    """

    def __init__(self, *sizes: Any, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32, **fields: Any):
        config = self.config = ModelConfig.of(*sizes, **fields)
        common: dict[str, Any] = {"scheme": SCHEMES[config.initial_weights], "param_dtype": param_dtype, "rngs": rngs}
        self.stem = Stem(
            config.image_shape[-1],
            config.stem_convolutions,
            batch_norm=config.batch_norm,
            standardize=config.standardize_images,
            **common,
        )
        self.primary_capsules = PrimaryCapsules(
            config.stem_channels,
            config.primary_groups,
            config.primary_dim,
            kernel_size=config.primary_kernel,
            stride=config.primary_stride,
            scale=config.primary_scale,
            depthwise=config.primary_depthwise,
            squash=config.primary_squash,
            activation=config.primary_activation,
            **common,
        )
        self.capsule_layers = nnx.List(_new_capsule_layers(config, **common))
        classes, hidden = (config.num_classes, config.class_dim), config.decoder_hidden
        common["outer_bias"] = config.decoder_bias
        self.decoder = None if hidden is None else Decoder(*classes, hidden, config.image_shape, **common)
        self.eval()
        # An abstract evaluation, so that a routing that fails or returns wrong shapes is reported here.
        jax.eval_shape(self.encode, jax.ShapeDtypeStruct((1, *config.image_shape), param_dtype))

    @classmethod
    def from_config(cls, config: ModelConfig, **options: Any) -> "CapsNet":
        """Create the network of a config; `options` are `rngs` and `param_dtype`."""
        return cls(**vars(config), **options)

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> "CapsNet":
        """Create a published network by its name in `PRESETS`.

        Args:
            name: name of the preset.
            options: `rngs`, `param_dtype`, and fields of `ModelConfig` that replace values of the preset.

        Raises:
            UsageError: there is no such preset, or the constructor raises it.
        """
        return cls(**vars(get_preset(name).model) | options)

    def __call__(self, images: Unchecked, labels: Unchecked | None = None) -> Output:
        """Classify and reconstruct images.

        Args:
            images: pixels in [0, 1]; height, width and channels as in `config.image_shape`.
            labels: classes to reconstruct each image from, one or several per image; by default the predicted class.

        Raises:
            UsageError: images or labels have a wrong shape, or (outside `jax.jit`) labels are out of range.
        """
        capsules = self.encode(images)
        if self.decoder is None:
            return Output(*capsules, None)
        labels = capsules.activations.argmax(axis=1) if labels is None else labels
        return Output(*capsules, self.decode(capsules.poses, labels))

    def encode(self, images: Unchecked) -> Capsules:
        """Compute the class capsules of images with pixels in [0, 1].

        Raises:
            UsageError: the images are not floats, or do not have the shape that the model was made for.
        """
        capsules = self._primary(images)
        for layer in self.capsule_layers:
            capsules = layer(capsules)
        return capsules

    def route(self, images: Unchecked) -> list[Routed]:
        """Compute the output capsules and couplings of each capsule layer; the last item has the class capsules."""
        capsules, routed = self._primary(images), []
        for layer in self.capsule_layers:
            routed.append(layer.route(capsules))
            capsules = layer.capsules_of(routed[-1])
        return routed

    def decode(self, poses: Float[Array, "b o h"], labels: Unchecked) -> Float[Array, "b height width channels"]:
        """Reconstruct images with pixels in (0, 1) from class capsules.

        Args:
            poses: poses of the class capsules.
            labels: classes to reconstruct from, one or several per image; all other capsules are masked.

        Raises:
            UsageError: the model has no decoder, or labels have a wrong shape or (outside `jax.jit`) are out of range.
        """
        if self.decoder is None:
            raise UsageError("The model has no decoder; decoder_hidden is None.")
        check_labels(labels, poses.shape[0], self.config.num_classes)
        return self.decoder(mask_by_label(poses, jnp.asarray(labels)))

    def implementations(self, batch_size: int) -> dict[str, Choice]:
        """Return how each layer is computed for this batch size on this machine, and why; see `nn/fast/choice.py`."""
        choices, shape = {}, (batch_size, *self.config.image_shape)
        convolutions = {f"stem {number}": each for number, each in enumerate(self.stem.convolutions)}
        for name, convolution in (convolutions | {"primary capsules": self.primary_capsules.convolution}).items():
            choices[name], shape = convolution.choice(shape), convolution.out_shape(shape)
        for number, layer in enumerate(self.capsule_layers):
            choices[f"routing {number}"] = layer.choice(batch_size)
        return choices

    def _primary(self, images: Unchecked) -> Capsules:
        if images.shape[1:] != self.config.image_shape:
            raise UsageError(
                f"Images are of shape {images.shape[1:]}, and the model was made for {self.config.image_shape}."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UsageError(f"Images are {images.dtype}; expected floats in [0, 1], such as images / 255.")
        return self.primary_capsules(self.stem(jnp.asarray(images)))


def _new_capsule_layers(config: ModelConfig, **common: Any) -> list[CapsuleLayer | ConvCapsules]:
    """Create the layers above the primary capsules; each takes its input sizes from the layer below."""
    common["routing"] = get_routing(config.routing, num_iterations=config.num_iterations)
    common["recompute"] = config.recompute_routing
    matrix, implementation = config.matrix_poses, config.routing_implementation
    layers: list[CapsuleLayer | ConvCapsules] = []
    below = config.primary_grid, config.primary_groups, config.primary_dim
    for groups, dim, kernel, stride in config.conv_capsules:
        layer = ConvCapsules(*below, groups, dim, kernel_size=kernel, stride=stride, matrix_poses=matrix, **common)
        layers.append(layer)
        below = layer.out_grid, groups, dim
    dense = (*config.hidden_capsules, (config.num_classes, config.class_dim))
    for number, (capsules, dim) in enumerate(dense, 1):
        grid, groups, in_dim = below
        shared = config.shared_class_transform and number == len(dense)
        if shared or matrix:  # a dense layer as a convolutional one whose kernel covers the grid
            options: dict[str, Any] = {"shared_transform": shared, "coordinate_addition": shared}
            options |= common | {"kernel_size": grid, "matrix_poses": matrix}
            layers.append(ConvCapsules(*below, capsules, dim, **options))
        else:
            sizes = math.prod(grid) * groups, in_dim, capsules, dim
            layers.append(CapsuleLayer(*sizes, implementation=implementation, **common))
        below = (1, 1), capsules, dim
    return layers
