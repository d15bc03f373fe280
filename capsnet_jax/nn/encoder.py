"""The encoder of images to capsules, and what decides how large its layers are."""

import math
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from capsnet_jax.capsules import Capsules
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.conv_capsules import ConvCapsules
from capsnet_jax.nn.fast.convolution import positions_after
from capsnet_jax.nn.layers import CapsuleLayer, PrimaryCapsules
from capsnet_jax.nn.stem import Stem


class Encoder(nnx.Module):
    """Images to capsules: convolutions, primary capsules, then any number of capsule layers.

    Args:
        stem: the convolutions.
        primary_capsules: capsules of the features of the stem.
        capsule_layers: layers that route to each other, in order.
    """

    def __init__(
        self, stem: Stem, primary_capsules: PrimaryCapsules, capsule_layers: Sequence[CapsuleLayer | ConvCapsules] = ()
    ):
        self.stem = stem
        self.primary_capsules = primary_capsules
        self.capsule_layers = nnx.List(capsule_layers)

    def __call__(self, images: Float[Array, "b height width channels"]) -> Capsules:
        capsules = self.primary_capsules(self.stem(images))
        for layer in self.capsule_layers:
            capsules = layer(capsules)
        return capsules


def new_capsule_layers(
    grid: tuple[int, int],
    primary: tuple[int, int],
    conv_capsules: Sequence[tuple[int, int, int, int]],
    dense_capsules: Sequence[tuple[int, int]],
    *,
    matrix_poses: bool,
    shared_class_transform: bool,
    implementation: str,
    **options: Any,
) -> list[CapsuleLayer | ConvCapsules]:
    """The layers above the primary capsules, each made for the grid, groups and pose size of the one below."""
    layers: list[CapsuleLayer | ConvCapsules] = []
    groups, dim = primary
    for out_groups, out_dim, kernel, stride in conv_capsules:
        sizes = (grid, groups, dim, out_groups, out_dim)
        layer = ConvCapsules(*sizes, kernel_size=kernel, stride=stride, matrix_poses=matrix_poses, **options)
        layers.append(layer)
        grid, groups, dim = layer.out_grid, out_groups, out_dim
    for number, (out_capsules, out_dim) in enumerate(dense_capsules, 1):
        shared = shared_class_transform and number == len(dense_capsules)
        if shared or matrix_poses:
            # A dense layer is a convolutional one whose kernel covers the grid.
            sizes = (grid, groups, dim, out_capsules, out_dim)
            layers.append(
                ConvCapsules(
                    *sizes,
                    kernel_size=grid,
                    matrix_poses=matrix_poses,
                    shared_transform=shared,
                    coordinate_addition=shared,
                    **options,
                )
            )
        else:
            in_capsules = math.prod(grid) * groups
            dense = CapsuleLayer(in_capsules, dim, out_capsules, out_dim, implementation=implementation, **options)
            layers.append(dense)
        grid, groups, dim = (1, 1), out_capsules, out_dim
    return layers


def grid_of_primary_capsules(
    image_shape: tuple[int, int, int], below: Sequence[tuple[int, int]], above: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Height and width, in positions, of what these kernels and strides make of images of this shape.

    Args:
        image_shape: that of the images.
        below: kernel size and stride of each convolution, up to the primary capsules.
        above: those of layers of convolutional capsules, for which there must be room.
    """
    smallest = 1
    for kernel, stride in reversed([*below, *above]):
        smallest = (smallest - 1) * stride + kernel
    height, width, _ = image_shape
    if min(height, width) < smallest:
        raise UsageError(
            f"Images of {height} x {width} are too small: the convolutions of this model, of kernel sizes "
            f"{', '.join(str(kernel) for kernel, _ in [*below, *above])}, need at least {smallest} x {smallest}."
        )
    grid = (height, width)
    for kernel, stride in below:
        grid = positions_after(grid, (kernel, kernel), stride)
    return grid
