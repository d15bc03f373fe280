"""Layers that own weights, under the names they have in the reference model's state_dict."""

from collections.abc import Callable

from einops.layers.torch import EinMix
from jaxtyping import Float
from torch import Tensor, nn

from capsnet_torch.capsules import Capsules, Routed
from capsnet_torch.routing import ROUTINGS


class CapsuleLayer(nn.Module):
    """Capsules whose poses are what the capsules below them agree on; see `capsnet_jax.layers.CapsuleLayer`."""

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        routing: str | Callable[..., Routed] = "dynamic",
        num_iterations: int = 3,
    ):
        super().__init__()
        self.routing = ROUTINGS[routing] if isinstance(routing, str) else routing
        self.num_iterations = num_iterations
        self.input_caps2U = EinMix(
            "b i d -> b i o h", weight_shape="i d o h", i=in_capsules, d=in_dim, o=out_capsules, h=out_dim
        )

    def forward(self, capsules: Capsules) -> Capsules:
        routed = self.route(capsules)
        return Capsules(routed.poses, routed.activations)

    def route(self, capsules: Capsules) -> Routed:
        """The output capsules together with the couplings of every vote."""
        return self.routing(self.votes(capsules.poses), capsules.activations, num_iterations=self.num_iterations)

    def votes(self, poses: Float[Tensor, "b i d"]) -> Float[Tensor, "b i o h"]:
        """What each input capsule predicts for each output capsule."""
        return self.input_caps2U(poses)
