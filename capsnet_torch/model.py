"""The reference model: its state_dicts load unchanged, in any dtype."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from einops.layers.torch import EinMix, Rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet_torch.capsules import Capsules, Routed
from capsnet_torch.layers import CapsuleLayer
from capsnet_torch.ops import capsule_norm, mask_by_label


class Encoder(nn.Module):
    """Images to capsules: two convolutions to primary capsules, then capsule layers up to one for each class."""

    def __init__(
        self,
        image2primary_capsules: nn.Sequential,
        primary_scale: float,
        hidden_capsules: Sequence[CapsuleLayer],
        primary2digit_capsules: CapsuleLayer,
    ):
        super().__init__()
        self.image2primary_capsules = image2primary_capsules
        self.primary_scale = primary_scale
        self.hidden_capsules = nn.ModuleList(hidden_capsules)
        self.primary2digit_capsules = primary2digit_capsules

    def forward(self, images: Float[Tensor, "b channels height width"]) -> Capsules:
        capsules = self.primary_capsules(images)
        for layer in (*self.hidden_capsules, self.primary2digit_capsules):
            capsules = layer(capsules)
        return capsules

    def primary_capsules(self, images: Float[Tensor, "b channels height width"]) -> Capsules:
        poses = self.image2primary_capsules(images) * self.primary_scale
        return Capsules(poses, capsule_norm(poses))


class CapsNet(nn.Module):
    """A capsule network on images `[b channels height width]`; arguments as in `capsnet_jax.CapsNet`."""

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        stem_channels: int = 256,
        stem_kernel: int = 9,
        primary_groups: int = 32,
        primary_dim: int = 8,
        primary_kernel: int = 9,
        primary_stride: int = 2,
        primary_scale: float = 0.01,
        hidden_capsules: Sequence[tuple[int, int]] = (),
        class_dim: int = 16,
        decoder_hidden: tuple[int, int] = (512, 1024),
        routing: str | Callable[..., Routed] = "dynamic",
        num_iterations: int = 3,
    ):
        super().__init__()
        height, width, channels = image_shape
        image2primary_capsules = nn.Sequential(
            nn.Conv2d(channels, stem_channels, stem_kernel),
            nn.ReLU(),
            nn.Conv2d(stem_channels, primary_groups * primary_dim, primary_kernel, primary_stride),
            Rearrange("b (groups d) height width -> b (height width groups) d", d=primary_dim),
        )
        with torch.no_grad():
            sizes = [image2primary_capsules(torch.zeros(1, channels, height, width)).shape[1:]]
        sizes += [*hidden_capsules, (num_classes, class_dim)]
        *hidden, last = [
            CapsuleLayer(*below, *above, routing=routing, num_iterations=num_iterations)
            for below, above in pairwise(sizes)
        ]
        self.encoder = Encoder(image2primary_capsules, primary_scale, hidden, last)
        first, second = decoder_hidden
        self.decoder = nn.Sequential(
            EinMix("b o h -> b f", weight_shape="o h f", o=num_classes, h=class_dim, f=first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            EinMix(
                "b f -> b channels height width",
                weight_shape="f channels height width",
                f=second,
                channels=channels,
                height=height,
                width=width,
            ),
            nn.Sigmoid(),
        )

    def encode(self, images: Float[Tensor, "b channels height width"]) -> Capsules:
        """The class capsules of images in [0, 1]; the predicted class is the one of the largest activation."""
        return self.encoder(images)

    def decode(
        self, poses: Float[Tensor, "b o h"], labels: Int[Tensor, " b"]
    ) -> Float[Tensor, "b channels height width"]:
        """The images that the capsules of the labels stand for, with pixels in (0, 1)."""
        return self.decoder(mask_by_label(poses, labels))
