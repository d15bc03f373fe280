"""Convolutional capsules; see `capsnet_jax.nn.conv_capsules`."""

import math
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.utils.checkpoint import checkpoint

from capsnet_torch.capsules import Capsules, Routed
from capsnet_torch.routing.registry import Routing


class ConvCapsules(nn.Module):
    """A convolutional capsule layer: groups of output capsules at each position, from inputs under the kernel."""

    def __init__(
        self,
        grid: tuple[int, int],
        in_groups: int,
        in_dim: int,
        out_groups: int,
        out_dim: int,
        *,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        matrix_poses: bool = False,
        shared_transform: bool = False,
        coordinate_addition: bool = False,
        routing: str | Callable[..., Routed] = "em",
        num_iterations: int = 3,
        recompute: bool = False,
    ):
        super().__init__()
        self.grid = grid
        self.in_groups = in_groups
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.stride = stride
        self.rows = math.isqrt(in_dim) if matrix_poses else 1
        self.coordinate_addition = coordinate_addition
        self.out_grid = tuple(
            (size - kernel) // stride + 1 for size, kernel in zip(grid, self.kernel_size, strict=True)
        )
        self.routing = Routing(routing, num_iterations=num_iterations)
        self.recompute = recompute
        taps, inner, outer = math.prod(self.kernel_size), in_dim // self.rows, out_dim // self.rows
        bound = (3 / inner) ** 0.5
        shape = (1 if shared_transform else taps, in_groups, inner, out_groups, outer)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.routing_weights = self.routing.new_weights(i=taps * in_groups, d=in_dim, o=out_groups, h=out_dim)

    def forward(self, capsules: Capsules) -> Capsules:
        return self.capsules_of(self.route(capsules))

    def capsules_of(self, routed: Routed) -> Capsules:
        """Flatten the positions, and drop the couplings of a routing result."""
        return Capsules(routed.poses.flatten(1, 2), routed.activations.flatten(1, 2))

    def route(self, capsules: Capsules) -> Routed:
        """Compute output capsules and couplings, `[b positions ...]`; input capsules have the order `(taps groups)`."""
        return checkpoint(self._route, capsules, use_reentrant=False) if self.recompute else self._route(capsules)

    def _route(self, capsules: Capsules) -> Routed:
        seen = self.under_kernel(capsules.poses)
        votes, poses = self.votes(seen).flatten(2, 3), seen.flatten(2, 3)
        activations = self.under_kernel(capsules.activations[..., None]).flatten(2)
        if "softmax" in self.routing.parameters:
            numbers = torch.arange(math.prod(self.grid) * self.in_groups, dtype=torch.float64)
            inputs = self.under_kernel(numbers[None, :, None])[0].flatten(1).long()
            softmax = partial(softmax_over_parents, inputs=inputs, num_inputs=len(numbers))
            return self.routing(votes, activations, poses=poses, softmax=softmax, **self.routing_weights)
        # For routing, each position is a separate example.
        routed = self.routing(
            votes.flatten(0, 1), activations.flatten(0, 1), poses=poses.flatten(0, 1), **self.routing_weights
        )
        return Routed(*(array.unflatten(0, votes.shape[:2]) for array in routed))

    def under_kernel(self, values: Float[Tensor, "b capsules d"]) -> Float[Tensor, "b positions taps i d"]:
        """Gather the values under each tap of the kernel, at each output position."""
        height, width = self.grid
        images = rearrange(
            values, "b (height width i) d -> b (i d) height width", height=height, width=width, i=self.in_groups
        )
        patches = unfold(images, self.kernel_size, stride=self.stride)
        return rearrange(patches, "b (i d taps) positions -> b positions taps i d", i=self.in_groups, d=values.shape[2])

    def votes(self, poses: Float[Tensor, "b positions taps i d"]) -> Float[Tensor, "b positions taps i o h"]:
        """Predict the pose of each output capsule at a position from each input capsule under its kernel."""
        matrices = rearrange(poses, "b p t i (rows inner) -> b p t i 1 rows inner", rows=self.rows)
        votes = matrices @ rearrange(self.weight, "t i inner o outer -> t i o inner outer")
        if self.coordinate_addition:
            height, width = self.kernel_size
            down = (torch.arange(height).to(votes) + 0.5) / height
            across = (torch.arange(width).to(votes) + 0.5) / width
            # To the last column of two rows of a matrix, or to the first two components of a vector.
            first, second = ((0, -1), (1, -1)) if self.rows > 1 else ((0, 0), (0, 1))
            votes[..., *first] += down.repeat_interleave(width)[:, None, None]
            votes[..., *second] += across.repeat(height)[:, None, None]
        return votes.flatten(-2)


def softmax_over_parents(
    logits: Float[Tensor, "b positions i o"], *, inputs: Int[Tensor, "positions i"], num_inputs: int
) -> Float[Tensor, "b positions i o"]:
    """Softmax over all output capsules, at all positions, that an input capsule is connected to.

    Args:
        logits: logits of the input capsules under each kernel.
        inputs: indices of these input capsules.
        num_inputs: number of input capsules.
    """
    batch, positions, _, outputs = logits.shape
    # A dense table of all inputs and outputs. With -inf in it, the softmax of an input under no kernel would be NaN.
    table = logits.new_full((batch, num_inputs, positions, outputs), torch.finfo(logits.dtype).min)
    at_positions = torch.arange(positions)[:, None].expand_as(inputs)
    table = table.index_put((torch.arange(batch)[:, None, None], inputs, at_positions), logits)
    shares = table.flatten(2).softmax(dim=2).view_as(table)
    return shares[:, inputs, at_positions]
