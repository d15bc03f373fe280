"""The capsule network: from images to class capsules, and back to images."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.config import ModelConfig
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.conv_capsules import ConvCapsules
from capsnet_jax.nn.fast.choice import Choice
from capsnet_jax.nn.initializers import SCHEMES
from capsnet_jax.nn.layers import CapsuleLayer, Decoder, PrimaryCapsules, Stem
from capsnet_jax.ops import check_labels, mask_by_label
from capsnet_jax.presets import get_preset
from capsnet_jax.routing import get_routing

Images = Float[Array | np.ndarray, "b height width channels"]
Indices = Shaped[Array | np.ndarray, "..."]  # of any shape and dtype here, as `check_labels` words what is wrong


class Output(NamedTuple):
    """The result of a forward pass.

    Attributes:
        poses: of the class capsules.
        activations: how present each class is, in [0, 1]; the predicted class has the largest.
        reconstructions: images with pixels in (0, 1), or None for a model without a decoder.
    """

    poses: Float[Array, "b o h"]
    activations: Float[Array, "b o"]
    reconstructions: Float[Array, "b height width channels"] | None


class CapsNet(nnx.Module):
    """A capsule network; the defaults are the reference model, 8.2 million weights on MNIST.

        model = CapsNet(image_shape=(28, 28, 1), num_classes=10, rngs=nnx.Rngs(0))
        poses, activations, reconstructions = model(images)

    A new model is in evaluation mode; `model.train()` lets batch normalisation, where there is any, see the batch.

    Args:
        sizes: `image_shape` and `num_classes`, if they are given by position.
        fields: those of `ModelConfig`, by name. `routing` may also be a function, as `get_routing` takes it.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Attributes:
        config: the `ModelConfig`.

    Raises:
        UsageError: a field is unknown or has a wrong value, the images are smaller than what the convolutions need, or
            the routing is unknown, raises an error, or returns what it should not.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), section 4; in the variant of
        https://github.com/arogozhnikov/readable_capsnet
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
        self.decoder = (
            None
            if config.decoder_hidden is None
            else Decoder(
                config.num_classes,
                config.class_dim,
                config.decoder_hidden,
                config.image_shape,
                outer_bias=config.decoder_bias,
                **common,
            )
        )
        self.eval()
        # Traced once, so that a routing that fails or returns wrong shapes is found here, not in the first step.
        jax.eval_shape(self.encode, jax.ShapeDtypeStruct((1, *config.image_shape), param_dtype))

    @classmethod
    def from_config(cls, config: ModelConfig, **options: Any) -> "CapsNet":
        """Creates the network of a config; `options` are `rngs` and `param_dtype`."""
        return cls(**vars(config), **options)

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> "CapsNet":
        """Creates a published network, by its name in `PRESETS`; `options` are as for the constructor, and go first.

        Raises:
            UsageError: there is no such preset, or as for the constructor.
        """
        return cls(**vars(get_preset(name).model) | options)

    def __call__(self, images: Images, labels: Indices | None = None) -> Output:
        """Classifies and reconstructs images with pixels in [0, 1].

        Args:
            images: of the shape that the model was made for.
            labels: classes whose capsules the images are reconstructed from, one or several for each image; by default
                the predicted class.

        Raises:
            UsageError: images or labels are of a wrong shape or, outside `jax.jit`, labels are out of range.
        """
        capsules = self.encode(images)
        if self.decoder is None:
            return Output(*capsules, None)
        labels = capsules.activations.argmax(axis=1) if labels is None else labels
        return Output(*capsules, self.decode(capsules.poses, labels))

    def encode(self, images: Images) -> Capsules:
        """The class capsules of images with pixels in [0, 1].

        Raises:
            UsageError: the images are not of the shape that the model was made for.
        """
        capsules = self._primary(images)
        for layer in self.capsule_layers:
            capsules = layer(capsules)
        return capsules

    def route(self, images: Images) -> list[Routed]:
        """The output capsules and couplings of each capsule layer; the class capsules are the last."""
        capsules, routed = self._primary(images), []
        for layer in self.capsule_layers:
            routed.append(layer.route(capsules))
            capsules = layer.capsules_of(routed[-1])
        return routed

    def decode(self, poses: Float[Array, "b o h"], labels: Indices) -> Float[Array, "b height width channels"]:
        """The images that the capsules of the labels stand for, with pixels in (0, 1).

        Args:
            poses: those of the class capsules.
            labels: class indices, one or several for each image.

        Raises:
            UsageError: the model has no decoder, or labels are of a wrong shape or, outside `jax.jit`, out of range.
        """
        if self.decoder is None:
            raise UsageError("The model has no decoder; decoder_hidden is None.")
        check_labels(labels, poses.shape[0], self.config.num_classes)
        return self.decoder(mask_by_label(poses, jnp.asarray(labels)))

    def implementations(self, batch_size: int) -> dict[str, Choice]:
        """How each layer is computed for batches of this size on this machine, and why; see `nn.fast.choice`."""
        choices, shape = {}, (batch_size, *self.config.image_shape)
        convolutions = {f"stem {number}": each for number, each in enumerate(self.stem.convolutions)}
        for name, convolution in (convolutions | {"primary capsules": self.primary_capsules.convolution}).items():
            choices[name], shape = convolution.choice(shape), convolution.out_shape(shape)
        for number, layer in enumerate(self.capsule_layers):
            choices[f"routing {number}"] = layer.choice(batch_size)
        return choices

    def _primary(self, images: Images) -> Capsules:
        if images.shape[1:] != self.config.image_shape:
            raise UsageError(
                f"Images are of shape {images.shape[1:]}, and the model was made for {self.config.image_shape}."
            )
        return self.primary_capsules(self.stem(jnp.asarray(images)))


def _new_capsule_layers(config: ModelConfig, **common: Any) -> list[CapsuleLayer | ConvCapsules]:
    """The layers above the primary capsules, each made for the grid, groups and pose size of the one below."""
    common["routing"] = get_routing(config.routing, num_iterations=config.num_iterations)
    common["recompute"] = config.recompute_routing
    layers: list[CapsuleLayer | ConvCapsules] = []
    grid, groups, dim = config.primary_grid, config.primary_groups, config.primary_dim
    for out_groups, out_dim, kernel, stride in config.conv_capsules:
        options: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "matrix_poses": config.matrix_poses}
        layer = ConvCapsules(grid, groups, dim, out_groups, out_dim, **options, **common)
        layers.append(layer)
        grid, groups, dim = layer.out_grid, out_groups, out_dim
    dense = [*config.hidden_capsules, (config.num_classes, config.class_dim)]
    for number, (out_capsules, out_dim) in enumerate(dense, 1):
        shared = config.shared_class_transform and number == len(dense)
        if shared or config.matrix_poses:  # a dense layer is a convolutional one whose kernel covers the grid
            options = {"matrix_poses": config.matrix_poses, "shared_transform": shared, "coordinate_addition": shared}
            layers.append(ConvCapsules(grid, groups, dim, out_capsules, out_dim, kernel_size=grid, **options, **common))
        else:
            in_capsules, implementation = math.prod(grid) * groups, config.routing_implementation
            layers.append(
                CapsuleLayer(in_capsules, dim, out_capsules, out_dim, implementation=implementation, **common)
            )
        grid, groups, dim = (1, 1), out_capsules, out_dim
    return layers
