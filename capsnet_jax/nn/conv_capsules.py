"""Convolutional capsules: capsules on a grid, each routed to from those under its kernel."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.fast.choice import Choice
from capsnet_jax.nn.initializers import TORCH, Scheme, new_param
from capsnet_jax.nn.layers import is_captured, new_routing_weights
from capsnet_jax.ops import at_least_float32, positions_after
from capsnet_jax.routing import get_routing


class ConvCapsules(nnx.Module):
    """Groups of capsules at each position of a grid; a position sees the input capsules under its kernel.

    Capsules come and go in the flat order of every other layer, `(height width groups)`. The transformation of a
    group of input capsules to a group of output capsules is one for each tap of the kernel, the same at every
    position. A routing that takes `softmax` shares out each input capsule among its parents at all positions; any
    other is run for each position by itself.

    Args:
        grid: height and width of the input, in positions.
        in_groups: number of input capsules at each position.
        in_dim: pose size of the input capsules.
        out_groups: number of output capsules at each position.
        out_dim: pose size of the output capsules.
        kernel_size: height and width of the kernel, in positions; that of the grid makes a dense layer.
        stride: step of the kernel, in positions.
        matrix_poses: poses are square matrices, row by row, and the transformation multiplies them from the right;
            otherwise they are vectors.
        shared_transform: one transformation for all taps of the kernel.
        coordinate_addition: the place of the input capsule under the kernel, from 0 to 1 down and across, is added to
            the first two components of its votes (of matrices: to the last column of the first two rows), so that
            votes with a shared transformation still tell where they come from.
        routing: as in `CapsuleLayer`.
        num_iterations: number of routing iterations, for routings that iterate.
        recompute: as in `CapsuleLayer`.
        scheme: distribution of the weight.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        UsageError: the kernel is larger than the grid, poses are no square matrices, or the routing is unknown.

    References:
        Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing" (2018), sections 4 (coordinate addition) and 3.
    """

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
        scheme: Scheme = TORCH,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if self.kernel_size[0] > grid[0] or self.kernel_size[1] > grid[1]:
            raise UsageError(f"A kernel of {self.kernel_size} capsules is larger than their grid of {grid}.")
        self.rows = 1
        if matrix_poses:
            self.rows = math.isqrt(in_dim)
            if in_dim != out_dim or in_dim != self.rows**2:
                raise UsageError(
                    f"Poses of {in_dim} and {out_dim} are no square matrices of one size; expected 16 and 16, say."
                )
        if coordinate_addition and out_dim < 2:
            raise UsageError(f"Coordinates are added to two components of a pose, and out_dim is {out_dim}.")
        self.grid = grid
        self.stride = stride
        self.in_groups = in_groups
        self.out_grid = positions_after(grid, self.kernel_size, stride)
        self.coordinate_addition = coordinate_addition
        self.routing = get_routing(routing, num_iterations=num_iterations)
        self.recompute = recompute
        taps = math.prod(self.kernel_size)
        inner, outer = in_dim // self.rows, out_dim // self.rows
        shape = (1 if shared_transform else taps, in_groups, inner, out_groups, outer)
        self.weight = new_param(scheme.einsum(inner), shape, param_dtype, rngs)
        self.routing_weights = nnx.data(
            new_routing_weights(self.routing, taps * in_groups, in_dim, out_groups, out_dim, param_dtype)
        )

    def __call__(self, capsules: Capsules) -> Capsules:
        return self.capsules_of(self.route(capsules))

    def capsules_of(self, routed: Routed) -> Capsules:
        """The output capsules in flat order."""
        return Capsules(
            rearrange(routed.poses, "b positions o h -> b (positions o) h"),
            rearrange(routed.activations, "b positions o -> b (positions o)"),
        )

    def route(self, capsules: Capsules) -> Routed:
        """The output capsules and the couplings of every vote, `[b positions ...]`; inputs are `(taps groups)`."""
        routed = (jax.checkpoint(self._route) if self.recompute else self._route)(capsules)
        if is_captured(self):
            self.sow(nnx.Intermediate, "votes", self.votes(self.under_kernel(capsules.poses)))
            self.sow(nnx.Intermediate, "couplings", routed.couplings)
        return routed

    def choice(self, num_examples: int) -> Choice:
        """The implementation for batches of this size."""
        return Choice("votes", "convolutional capsules have no other implementation")

    def _route(self, capsules: Capsules) -> Routed:
        seen = self.under_kernel(capsules.poses)
        poses = rearrange(seen, "b positions taps i d -> b positions (taps i) d")
        activations = self.under_kernel(capsules.activations[..., None])[..., 0]
        activations = rearrange(activations, "b positions taps i -> b positions (taps i)")
        votes = rearrange(self.votes(seen), "b positions taps i o h -> b positions (taps i) o h")
        weights = {name: weight[...] for name, weight in self.routing_weights.items()}

        def route(
            votes: Float[Array, "*positions i o h"],
            activations: Float[Array, "*positions i"],
            poses: Float[Array, "*positions i d"],
        ) -> Routed:
            softmax = partial(softmax_over_parents, inputs=self._inputs())
            return self.routing(votes, activations, poses=poses, softmax=softmax, **weights)

        if not self.routing.takes("softmax"):
            route = jax.vmap(route)
        return jax.vmap(route)(votes, activations, poses)

    def under_kernel(self, values: Float[Array, "b capsules d"]) -> Float[Array, "b positions taps i d"]:
        """What each position of the output sees under each tap of its kernel."""
        values = rearrange(values, "b (places i) d -> b places i d", i=self.in_groups)
        return values[:, places_under_kernel(self.grid, self.kernel_size, self.stride)]

    def votes(self, poses: Float[Array, "b positions taps i d"]) -> Float[Array, "b positions taps i o h"]:
        """What each input capsule under a kernel predicts for each output capsule there."""
        matrices = rearrange(poses, "b positions taps i (rows inner) -> b positions taps i rows inner", rows=self.rows)
        weight = self.weight[...]
        matrices = matrices.astype(weight.dtype)
        if weight.shape[0] == 1:
            votes = jnp.einsum("bptirn,inom->bptiorm", matrices, weight[0])
        else:
            votes = jnp.einsum("bptirn,tinom->bptiorm", matrices, weight)
        votes = at_least_float32(votes)
        if self.coordinate_addition:
            votes += jnp.asarray(self._coordinates(votes.shape[-1])[:, None, None], votes.dtype)
        return rearrange(votes, "b positions taps i o rows outer -> b positions taps i o (rows outer)")

    def _coordinates(self, outer: int) -> np.ndarray:
        """What is added to the pose matrix of a vote from each tap: `[taps rows outer]`."""
        height, width = self.kernel_size
        down, across = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        added = np.zeros((height * width, self.rows, outer))
        first, second = ((0, -1), (1, -1)) if self.rows > 1 else ((0, 0), (0, 1))
        added[:, *first], added[:, *second] = down.ravel(), across.ravel()
        return added

    def _inputs(self) -> np.ndarray:
        """The number of each input capsule under each kernel: `[positions (taps groups)]`."""
        places = places_under_kernel(self.grid, self.kernel_size, self.stride)
        inputs = places[..., None] * self.in_groups + np.arange(self.in_groups)
        return rearrange(inputs, "positions taps groups -> positions (taps groups)")


def places_under_kernel(grid: tuple[int, int], kernel_size: tuple[int, int], stride: int) -> np.ndarray:
    """The place in the grid, row by row, of each tap of the kernel at each position: `[positions taps]`."""
    places = np.arange(math.prod(grid)).reshape(grid)
    windows = np.lib.stride_tricks.sliding_window_view(places, kernel_size)[::stride, ::stride]
    return rearrange(windows, "out_height out_width height width -> (out_height out_width) (height width)")


def softmax_over_parents(
    logits: Float[Array, "positions i o"], *, inputs: Int[np.ndarray, "positions i"]
) -> Float[Array, "positions i o"]:
    """Shares of each input capsule among all its parents: the output capsules at all positions that see it.

    Args:
        logits: of each input capsule under each kernel.
        inputs: the number of that input capsule; it stands wherever a kernel sees the capsule.

    Returns:
        Shares that sum to 1 over all places where an input capsule stands, and over the outputs there.
    """
    number = int(inputs.max()) + 1
    highest = jnp.full(number, -jnp.inf, logits.dtype).at[inputs].max(jax.lax.stop_gradient(logits).max(axis=-1))
    shares = jnp.exp(logits - highest[inputs][..., None])
    totals = jnp.zeros(number, logits.dtype).at[inputs].add(shares.sum(axis=-1))
    return shares / totals[inputs][..., None]
