"""Layers with the weight names of the reference model's state_dict; see `capsnet_jax.nn.layers`."""

from collections.abc import Callable

import torch
from einops import rearrange
from einops.layers.torch import EinMix
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from capsnet_torch.capsules import Capsules, Routed
from capsnet_torch.ops import capsule_norm, exponential_squash, squash
from capsnet_torch.routing.registry import Routing

SQUASHES = {"none": lambda poses: poses, "squash": squash, "exponential": exponential_squash}


class PrimaryCapsules(nn.Module):
    """The first capsules: the output channels of a convolution, split into groups.

    The convolution is an argument of `forward`, so that its weights have the names of the reference model.
    """

    def __init__(self, groups: int, *, scale: float, squash: str, activation: str):
        super().__init__()
        self.groups = groups
        self.scale = scale
        self.squash = squash
        self.activation = activation

    def forward(self, features: Float[Tensor, "b channels height width"], convolution: nn.Conv2d) -> Capsules:
        poses = self.scale * convolution(features)
        if self.squash != "none" and convolution.bias is not None:  # the bias comes after the scale
            poses = poses + (1 - self.scale) * convolution.bias.view(-1, 1, 1)
        poses = rearrange(
            poses, "b (groups channels) height width -> b (height width groups) channels", groups=self.groups
        )
        if self.activation == "norm":
            poses = SQUASHES[self.squash](poses)
            return Capsules(poses, capsule_norm(poses))
        logits = poses[:, :, -1]
        return Capsules(SQUASHES[self.squash](poses[:, :, :-1]), torch.sigmoid(logits))


class CapsuleLayer(nn.Module):
    """A dense layer of capsules: input capsules vote for output capsules, and a routing combines the votes."""

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        routing: str | Callable[..., Routed] = "dynamic",
        num_iterations: int = 3,
        recompute: bool = False,
    ):
        super().__init__()
        self.routing = Routing(routing, num_iterations=num_iterations)
        self.recompute = recompute
        self.input_caps2U = EinMix(
            "b i d -> b i o h", weight_shape="i d o h", i=in_capsules, d=in_dim, o=out_capsules, h=out_dim
        )
        self.routing_weights = self.routing.new_weights(i=in_capsules, d=in_dim, o=out_capsules, h=out_dim)

    def forward(self, capsules: Capsules) -> Capsules:
        return self.capsules_of(self.route(capsules))

    def capsules_of(self, routed: Routed) -> Capsules:
        """Drop the couplings of a routing result."""
        return Capsules(routed.poses, routed.activations)

    def route(self, capsules: Capsules) -> Routed:
        """Compute the output capsules and the couplings."""
        return checkpoint(self._route, capsules, use_reentrant=False) if self.recompute else self._route(capsules)

    def _route(self, capsules: Capsules) -> Routed:
        poses, activations = capsules
        return self.routing(self.votes(poses), activations, poses=poses, **self.routing_weights)

    def votes(self, poses: Float[Tensor, "b i d"]) -> Float[Tensor, "b i o h"]:
        """Predict the pose of each output capsule from each input capsule."""
        return self.input_caps2U(poses)


def new_decoder(
    num_classes: int, class_dim: int, hidden: tuple[int, int], image_shape: tuple[int, int, int], *, outer_bias: bool
) -> nn.Sequential:
    """Create the decoder, from class capsules `[b o h]`, masked by the labels, to images in (0, 1)."""
    (first, second), (height, width, channels) = hidden, image_shape
    bias, pixel_bias = ("f", "channels height width") if outer_bias else (None, None)
    to_pixels, pixels = "b f -> b channels height width", {"channels": channels, "height": height, "width": width}
    return nn.Sequential(
        EinMix("b o h -> b f", weight_shape="o h f", bias_shape=bias, o=num_classes, h=class_dim, f=first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        EinMix(to_pixels, weight_shape="f channels height width", bias_shape=pixel_bias, f=second, **pixels),
        nn.Sigmoid(),
    )
