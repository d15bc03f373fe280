"""Which implementation computes a layer: decided here, once, from shapes, platform and options.

Plain implementations (a convolution of XLA, votes and then routing) are the reference; the others compute the same
values faster or in less memory, and each is tested against the plain one.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jax.typing import DTypeLike

from capsnet_jax.errors import UsageError
from capsnet_jax.nn.fast.fourier import Tiling, multiplications, possible_tilings
from capsnet_jax.nn.fast.fused_dynamic import FUSED
from capsnet_jax.ops import positions_after
from capsnet_jax.routing import Routing

# Cost of a multiplication of spectra, or in their transforms, relative to one in a large matrix product: fitted to
# times of a dozen sizes on two cores with AVX2, rounded up, as many small tiles cost more than is counted here.
COST_OF_SPECTRA = 1.5
COST_OF_TRANSFORMS = 1.0

ROUTING_IMPLEMENTATIONS = ("auto", "votes", "fused")
FEWEST_EXAMPLES = 16  # with fewer, votes are faster on CPU; with more, they are slower; see docs/performance.md


Size = Any  # an int; or a symbol, as the batch size of a program that is exported for all of them


class Choice(NamedTuple):
    """An implementation of a layer, and why it was chosen.

    Attributes:
        name: "xla", "patches" or "fourier" for a convolution; "votes" or "fused" for routing.
        reason: in words, to follow "because".
        tilings: how "fourier" cuts height and width; None for all others.
    """

    name: str
    reason: str
    tilings: tuple[Tiling, Tiling] | None = None

    def __str__(self) -> str:
        return f"{self.name}, because {self.reason}"


def choose_convolution(
    images: Sequence[Size], kernel: Sequence[int], stride: int, dtype: DTypeLike, *, platform: str | None = None
) -> Choice:
    """The implementation of a convolution without padding.

    Args:
        images: shape `[b height width channels]`; b may be symbolic, of a program exported for all batch sizes.
        kernel: shape `[kernel_height kernel_width channels features]`.
        stride: step of the kernel along both axes.
        dtype: of the operands.
        platform: "cpu", "gpu" ...; by default the one that JAX uses.
    """
    if (platform or jax.default_backend()) != "cpu":
        return Choice("xla", "the platform has convolutions of its own")
    batch_size, height, width, channels = images
    if is_symbolic_dim(batch_size):
        return Choice("patches", "the batch size is not known")
    if jnp.finfo(dtype).bits < 32:
        return Choice("patches", "Fourier transforms in less than float32 lose too much")
    if jax.device_count() > 1:
        # The gradient of each spectrum would be summed over devices by itself, not that of the kernel.
        return Choice("patches", f"the batch is shared by {jax.device_count()} devices")
    rows, columns = positions_after((height, width), kernel[:2], stride)

    def cost(tilings: tuple[Tiling, Tiling]) -> float:
        of_products, of_transforms = multiplications(batch_size, channels, kernel[3], stride, tilings)
        return COST_OF_SPECTRA * of_products + COST_OF_TRANSFORMS * of_transforms

    direct = batch_size * rows * columns * math.prod(kernel)
    tilings = product(possible_tilings(rows, kernel[0], stride), possible_tilings(columns, kernel[1], stride))
    best = min(tilings, key=cost, default=None)
    if best is None or cost(best) >= direct:
        return Choice("patches", "a matrix product of patches costs less than Fourier transforms")
    share = cost(best) / direct
    return Choice("fourier", f"it costs {share:.2f} of a matrix product of patches", best)


def choose_routing(routing: Routing, option: str, num_examples: Size) -> Choice:
    """The implementation of a capsule layer's routing.

    Args:
        routing: of the layer.
        option: "votes", "fused", or "auto" for the better one.
        num_examples: batch size.

    Raises:
        UsageError: there is no such option, or the routing has no fused implementation.
    """
    if option not in ROUTING_IMPLEMENTATIONS:
        raise UsageError(f"routing_implementation is {option!r}; expected {', '.join(ROUTING_IMPLEMENTATIONS)}.")
    if option == "fused" and routing.function not in FUSED:
        known = ", ".join(function.__name__ for function in FUSED)
        raise UsageError(f"Routing {routing.name} has no implementation without votes; expected {known}.")
    if option != "auto":
        return Choice(option, f"routing_implementation is {option!r}")
    if routing.function not in FUSED:
        return Choice("votes", f"routing {routing.name} has no other implementation")
    if jax.device_count() > 1:
        # The gradient of each chunk of the weight would be summed over devices by itself.
        return Choice("votes", f"the batch is shared by {jax.device_count()} devices")
    if num_examples < FEWEST_EXAMPLES:
        return Choice("votes", f"{num_examples} < {FEWEST_EXAMPLES} examples")
    return Choice("fused", f"{num_examples} >= {FEWEST_EXAMPLES} examples on one device")
