"""The capsule network, which loads the state_dicts of the reference model; see `capsnet_jax.nn.model`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet_torch.capsules import Capsules, Routed
from capsnet_torch.conv_capsules import ConvCapsules
from capsnet_torch.layers import CapsuleLayer, PrimaryCapsules, new_decoder
from capsnet_torch.ops import Images, Labels, mask_by_label, standardize_images


class Encoder(nn.Module):
    """Images to class capsules: convolutions, primary capsules, capsule layers."""

    def __init__(
        self,
        image2primary_capsules: nn.Sequential,
        hidden_capsules: Sequence[CapsuleLayer | ConvCapsules],
        primary2digit_capsules: CapsuleLayer | ConvCapsules,
        *,
        standardize: bool = False,
    ):
        super().__init__()
        self.standardize = standardize
        self.image2primary_capsules = image2primary_capsules
        self.hidden_capsules = nn.ModuleList(hidden_capsules)
        self.primary2digit_capsules = primary2digit_capsules

    def forward(self, images: Images) -> Capsules:
        capsules = self.primary_capsules(images)
        for layer in (*self.hidden_capsules, self.primary2digit_capsules):
            capsules = layer(capsules)
        return capsules

    def stem(self, images: Images) -> Float[Tensor, "b features out_height out_width"]:
        return self.features(images)[-1]

    def features(self, images: Images) -> list[Float[Tensor, "b _features _height _width"]]:
        """The output of each convolution of the stem, after ReLU and batch normalization."""
        features = [standardize_images(images) if self.standardize else images]
        for module in self.image2primary_capsules[:-2].children():
            if isinstance(module, nn.Conv2d):
                features.append(module(features[-1]))
            else:
                features[-1] = module(features[-1])
        return features[1:]

    def primary_capsules(self, images: Images) -> Capsules:
        convolution, to_capsules = self.image2primary_capsules[-2], self.image2primary_capsules[-1]
        return to_capsules(self.stem(images), convolution)


ONLY_IN_JAX = ("initial_weights", "routing_implementation")  # options that are ignored here


class CapsNet(nn.Module):
    """A capsule network for images `[b channels height width]`, with the arguments of `capsnet_jax.CapsNet`.

    Initial weights have PyTorch's default distributions.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        stem_below: Sequence[tuple[int, int]] = (),
        stem_channels: int = 256,
        stem_kernel: int = 9,
        stem_stride: int = 1,
        batch_norm: bool = False,
        primary_groups: int = 32,
        primary_dim: int = 8,
        primary_kernel: int = 9,
        primary_stride: int = 2,
        primary_scale: float = 0.01,
        primary_depthwise: bool = False,
        primary_squash: str = "none",
        primary_activation: str = "norm",
        conv_capsules: Sequence[tuple[int, int, int, int]] = (),
        matrix_poses: bool = False,
        hidden_capsules: Sequence[tuple[int, int]] = (),
        class_dim: int = 16,
        shared_class_transform: bool = False,
        decoder_hidden: tuple[int, int] | None = (512, 1024),
        decoder_bias: bool = False,
        routing: str | Callable[..., Routed] = "dynamic",
        num_iterations: int = 3,
        standardize_images: bool = False,
        recompute_routing: bool = False,
    ):
        super().__init__()
        height, width, channels = image_shape
        modules: list[nn.Module] = []
        features = channels
        convolutions = [(out, kernel, 1) for out, kernel in stem_below]
        for out, kernel, stride in [*convolutions, (stem_channels, stem_kernel, stem_stride)]:
            modules += [nn.Conv2d(features, out, kernel, stride), nn.ReLU()]
            if batch_norm:
                modules.append(nn.BatchNorm2d(out, eps=1e-3, momentum=0.01))
            features = out
        primary_channels = primary_groups * (primary_dim + (primary_activation == "sigmoid"))
        seen_apart = stem_channels if primary_depthwise else 1
        modules.append(nn.Conv2d(features, primary_channels, primary_kernel, primary_stride, groups=seen_apart))
        with torch.no_grad():
            grid = nn.Sequential(*modules).eval()(torch.zeros(1, channels, height, width)).shape[2:]
        modules.append(
            PrimaryCapsules(primary_groups, scale=primary_scale, squash=primary_squash, activation=primary_activation)
        )
        options: dict[str, Any] = {"routing": routing, "num_iterations": num_iterations, "recompute": recompute_routing}
        layers: list[CapsuleLayer | ConvCapsules] = []
        groups, dim = primary_groups, primary_dim
        for out, out_dim, kernel, stride in conv_capsules:
            sizes = (grid, groups, dim, out, out_dim)
            layers.append(ConvCapsules(*sizes, kernel_size=kernel, stride=stride, matrix_poses=matrix_poses, **options))
            grid, groups, dim = layers[-1].out_grid, out, out_dim
        for out, out_dim in [*hidden_capsules, (num_classes, class_dim)]:
            shared = shared_class_transform and len(layers) == len(conv_capsules) + len(hidden_capsules)
            if shared or matrix_poses:
                more = {"kernel_size": grid, "matrix_poses": matrix_poses}
                more |= {"shared_transform": shared, "coordinate_addition": shared}
                layers.append(ConvCapsules(grid, groups, dim, out, out_dim, **more, **options))
            else:
                layers.append(CapsuleLayer(math.prod(grid) * groups, dim, out, out_dim, **options))
            grid, groups, dim = (1, 1), out, out_dim
        *hidden, last = layers
        self.encoder = Encoder(nn.Sequential(*modules), hidden, last, standardize=standardize_images)
        self.decoder = (
            None
            if decoder_hidden is None
            else new_decoder(num_classes, class_dim, decoder_hidden, image_shape, outer_bias=decoder_bias)
        )

    @classmethod
    def from_config(cls, model: Mapping[str, Any]) -> "CapsNet":
        """Create a model from the fields of a `ModelConfig`, such as the section `model` of a `config.json`."""
        return cls(**{name: value for name, value in model.items() if name not in ONLY_IN_JAX})

    def encode(self, images: Images) -> Capsules:
        """Compute the class capsules of images in [0, 1]; the predicted class has the largest activation."""
        return self.encoder(images)

    def decode(self, poses: Float[Tensor, "b o h"], labels: Labels) -> Images:
        """Reconstruct images, with pixels in (0, 1), from the capsules of the labels."""
        if self.decoder is None:
            raise ValueError("The model has no decoder; decoder_hidden is None.")
        return self.decoder(mask_by_label(poses, labels))
