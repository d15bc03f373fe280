"""Layers that own weights, under the names they have in the reference model's state_dict."""

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
    """Features to the first capsules, through a given convolution; see `capsnet_jax.nn.layers.PrimaryCapsules`.

    It has no weights of its own, so that those of the convolution keep their names in the reference model.
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
    """Capsules whose poses are what the capsules below them agree on; see `capsnet_jax.nn.layers.CapsuleLayer`."""

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
        routed = self.route(capsules)
        return Capsules(routed.poses, routed.activations)

    def route(self, capsules: Capsules) -> Routed:
        """The output capsules together with the couplings of every vote."""
        return checkpoint(self._route, capsules, use_reentrant=False) if self.recompute else self._route(capsules)

    def _route(self, capsules: Capsules) -> Routed:
        poses, activations = capsules
        return self.routing(self.votes(poses), activations, poses=poses, **self.routing_weights)

    def votes(self, poses: Float[Tensor, "b i d"]) -> Float[Tensor, "b i o h"]:
        """What each input capsule predicts for each output capsule."""
        return self.input_caps2U(poses)
