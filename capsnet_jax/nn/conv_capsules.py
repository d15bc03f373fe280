"""Convolutional capsules: output capsules on a grid, each computed from the input capsules under its kernel."""

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
from capsnet_jax.errors import UsageError, check_sizes
from capsnet_jax.nn.fast.choice import Choice
from capsnet_jax.nn.fast.derivatives import with_backward
from capsnet_jax.nn.initializers import TORCH, Scheme, new_param
from capsnet_jax.nn.layers import check_capsules, is_captured, new_routing_weights
from capsnet_jax.ops import at_least_float32, positions_after
from capsnet_jax.routing import get_routing


class ConvCapsules(nnx.Module):
    """A convolutional capsule layer: groups of capsules at each position of a grid, with shared transformations.

    Input and output capsules are in the flat order `(height width groups)`, as for all layers. Each tap of the kernel
    has its own weight matrix from each input group to each output group, shared by all positions. A routing with an
    argument `softmax` (`em`, `variational`) divides each input capsule among its output capsules at all positions; any
    other routing runs at each position separately, as in the authors' code.

    Args:
        grid: height and width of the input, in positions.
        in_groups: number of input capsules at each position.
        in_dim: pose size of the input capsules.
        out_groups: number of output capsules at each position.
        out_dim: pose size of the output capsules.
        kernel_size: height and width of the kernel, in positions. A kernel as large as the grid makes a dense layer.
        stride: stride of the kernel, in positions.
        matrix_poses: whether poses are square matrices, stored row by row and multiplied by weight matrices from the
            right. Otherwise they are vectors.
        shared_transform: whether all taps of the kernel share one weight matrix per pair of groups.
        coordinate_addition: whether to add the relative position of the input capsule under the kernel, in [0, 1] down
            and across, to the first two components of its votes (for matrices: to the last column of the first two
            rows). Votes of a shared transformation then still depend on the position.
        routing: as in `CapsuleLayer`.
        num_iterations: number of routing iterations, for routings that iterate.
        recompute: as in `CapsuleLayer`.
        scheme: initial distribution of the weight.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters.

    Raises:
        UsageError: the kernel is larger than the grid, poses are not square matrices, or the routing is unknown.

    References:
        Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing" (2018), sections 3 and 4 (coordinate addition).

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from capsnet_jax import Capsules, ConvCapsules
        >>> layer = ConvCapsules((6, 6), 2, 16, 4, 16, kernel_size=3, routing="uniform", rngs=nnx.Rngs(0))
        >>> capsules = nnx.jit(layer)(Capsules(jnp.ones((3, 6 * 6 * 2, 16)), jnp.ones((3, 6 * 6 * 2))))
        >>> capsules.poses.shape  # 4 x 4 positions of 4 capsules
        (3, 64, 16)
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
            raise UsageError(f"A kernel of {self.kernel_size} positions is larger than the grid of {grid}.")
        height, width = self.kernel_size
        check_sizes(in_groups=in_groups, in_dim=in_dim, out_groups=out_groups, out_dim=out_dim)
        check_sizes(kernel_height=height, kernel_width=width, stride=stride)
        self.rows = 1
        if matrix_poses:
            self.rows = math.isqrt(in_dim)
            if in_dim != out_dim or in_dim != self.rows**2:
                raise UsageError(
                    f"Poses of {in_dim} and {out_dim} are not square matrices of one size; expected, say, 16 and 16."
                )
        if coordinate_addition and out_dim < 2:
            raise UsageError(f"Coordinates are added to two components of a pose, and out_dim is {out_dim}.")
        self.grid = grid
        self.stride = stride
        self.in_groups, self.in_dim = in_groups, in_dim
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
        """Flatten the positions, and drop the couplings of a routing result."""
        return Capsules(
            rearrange(routed.poses, "b positions o h -> b (positions o) h"),
            rearrange(routed.activations, "b positions o -> b (positions o)"),
        )

    @jax.named_scope("routing")
    def route(self, capsules: Capsules) -> Routed:
        """Compute the output capsules and the couplings of all votes, with an axis of positions after the batch.

        The input capsules of a position are in the order `(taps groups)`.
        """
        check_capsules(capsules, math.prod(self.grid) * self.in_groups, self.in_dim)
        routed = (jax.checkpoint(self._route) if self.recompute else self._route)(capsules)
        if is_captured(self):
            self.sow(nnx.Intermediate, "votes", self.votes(self.under_kernel(capsules.poses)))
            self.sow(nnx.Intermediate, "couplings", routed.couplings)
        return routed

    def choice(self, num_examples: int) -> Choice:
        """Return the implementation for batches of this size."""
        return Choice("votes", "convolutional capsules have no other implementation")

    def _route(self, capsules: Capsules) -> Routed:
        seen = self.under_kernel(capsules.poses)
        poses = rearrange(seen, "b positions taps i d -> b positions (taps i) d")
        activations = self.under_kernel(capsules.activations[..., None])[..., 0]
        activations = rearrange(activations, "b positions taps i -> b positions (taps i)")
        votes = rearrange(self.votes(seen), "b positions taps i o h -> b positions (taps i) o h")
        weights = {name: weight[...] for name, weight in self.routing_weights.items()}
        places = places_under_kernel(self.grid, self.kernel_size, self.stride)
        inputs = np.add.outer(places * self.in_groups, np.arange(self.in_groups)).reshape(len(places), -1)

        def route(
            votes: Float[Array, "*positions i o h"],
            activations: Float[Array, "*positions i"],
            poses: Float[Array, "*positions i d"],
        ) -> Routed:
            softmax = partial(softmax_over_parents, inputs=inputs)
            return self.routing(votes, activations, poses=poses, softmax=softmax, **weights)

        if not self.routing.takes("softmax"):
            route = jax.vmap(route)
        return jax.vmap(route)(votes, activations, poses)

    def under_kernel(self, values: Float[Array, "b capsules d"]) -> Float[Array, "b positions taps i d"]:
        """Gather the values of the input capsules under each tap of the kernel, at each output position."""
        values = rearrange(values, "b (places i) d -> b places i d", i=self.in_groups)
        return values[:, places_under_kernel(self.grid, self.kernel_size, self.stride)]

    @jax.named_scope("votes")
    def votes(self, poses: Float[Array, "b positions taps i d"]) -> Float[Array, "b positions taps i o h"]:
        """Compute the vote of each input capsule under a kernel for each output capsule at that position."""
        weight = self._pose_matrices()
        num_examples, num_positions, *_ = poses.shape
        # All poses that share a weight matrix are the rows of one matrix.
        together = rearrange(
            poses.astype(weight.dtype),
            "b positions (taps shared) i d -> taps i (b positions shared) d",
            taps=weight.shape[0],
        )
        votes = rearrange(
            at_least_float32(_product(together, weight)),
            "taps i (b positions shared) (o h) -> b positions (taps shared) i o h",
            b=num_examples,
            positions=num_positions,
            o=self.weight.shape[3],
        )
        if self.coordinate_addition:
            votes += jnp.asarray(self._coordinates()[:, None, None], votes.dtype)
        return votes

    def _pose_matrices(self) -> Float[Array, "taps i d votes"]:
        """Return the matrices by which flat poses are multiplied, with the votes `(o h)` as columns.

        For matrix poses they are block-diagonal, with the same block for each row of a pose. One large product takes
        less time than many small ones, although most of its numbers are zeros.
        """
        blocks = jnp.einsum("tinom,rs->tirnosm", self.weight[...], jnp.eye(self.rows, dtype=self.weight.dtype))
        return rearrange(blocks, "taps i rows inner o row outer -> taps i (rows inner) (o row outer)")

    def _coordinates(self) -> np.ndarray:
        """Relative positions of the taps, at the components of a vote that they are added to: `[taps h]`."""
        height, width = self.kernel_size
        down, across = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        added = np.zeros((height * width, self.rows, self.weight.shape[-1]))
        first, second = ((0, -1), (1, -1)) if self.rows > 1 else ((0, 0), (0, 1))
        added[:, *first], added[:, *second] = down.ravel(), across.ravel()
        return rearrange(added, "taps rows outer -> taps (rows outer)")


def _product_backward(
    operands: tuple[Float[Array, "taps i n d"], Float[Array, "taps i d votes"]],
    cotangent: Float[Array, "taps i n votes"],
) -> tuple[Float[Array, "taps i n d"], Float[Array, "taps i d votes"]]:
    poses, weight = operands
    return cotangent @ weight.mT, poses.mT @ cotangent


@with_backward(_product_backward)
def _product(
    poses: Float[Array, "taps i n d"], weight: Float[Array, "taps i d votes"]
) -> Float[Array, "taps i n votes"]:
    """Multiply batches of matrices. The gradient in JAX would transpose that of the votes, the largest array."""
    return poses @ weight


def places_under_kernel(grid: tuple[int, int], kernel_size: tuple[int, int], stride: int) -> np.ndarray:
    """Compute the flat index in the grid of each tap of the kernel, at each output position: `[positions taps]`."""
    places = np.arange(math.prod(grid)).reshape(grid)
    windows = np.lib.stride_tricks.sliding_window_view(places, kernel_size)[::stride, ::stride]
    return rearrange(windows, "out_height out_width height width -> (out_height out_width) (height width)")


def softmax_over_parents(
    logits: Float[Array, "positions i o"], *, inputs: Int[np.ndarray, "positions i"]
) -> Float[Array, "positions i o"]:
    """Softmax of each input capsule over all its parents: the output capsules at every position that sees it.

    Args:
        logits: logits of the input capsules under each kernel.
        inputs: indices of these input capsules; a capsule occurs at each position whose kernel covers it.

    Returns:
        Shares that sum to 1 over all occurrences of an input capsule and their output capsules.
    """
    number = int(inputs.max()) + 1
    highest = jnp.full(number, -jnp.inf, logits.dtype).at[inputs].max(jax.lax.stop_gradient(logits).max(axis=-1))
    shares = jnp.exp(logits - highest[inputs][..., None])
    totals = jnp.zeros(number, logits.dtype).at[inputs].add(shares.sum(axis=-1))
    return shares / totals[inputs][..., None]
