"""Choose the implementation of each layer from shapes, platform and options.

The plain implementations, XLA's convolution and routing from votes, are the reference. All others compute the same
values faster or in less memory, and are tested against the plain ones.
"""

import math
from collections.abc import Sequence
from functools import cache
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

# Cost of a multiplication of spectra, or in their transforms, relative to one in a large matrix product. Fitted to the
# times of a dozen sizes on two cores with AVX2, and rounded up because many small tiles cost more than is counted here.
COST_OF_SPECTRA = 1.5
COST_OF_TRANSFORMS = 1.0

MOST_TAPS = 25  # of kernels for which XLA's own convolution is fastest on CPU
FEW_CHANNELS = 8  # of images; with fewer, copying patches on CPU takes longer than XLA's own convolution

ROUTING_IMPLEMENTATIONS = ("auto", "votes", "fused")
FEWEST_EXAMPLES = 16  # smallest batch for which "fused" is faster than "votes" on CPU; see docs/performance.md
MOST_GIGABYTES = 2.0  # largest votes that "auto" stores on other platforms; a training step needs a few such arrays

Size = Any  # an int, or a symbolic dimension in a program that is exported for any batch size


class Choice(NamedTuple):
    """The implementation of a layer, and the reason for it.

    Attributes:
        name: "xla", "direct", "direct+patches" (for the gradient of the images), "space_to_depth", "patches", "fourier"
            or "taps" for a convolution; "votes" or "fused" for routing.
        reason: the reason, to be printed after "because".
        tilings: how "fourier" divides height and width into tiles; None for all others.
    """

    name: str
    reason: str
    tilings: tuple[Tiling, Tiling] | None = None

    def __str__(self) -> str:
        return f"{self.name}, because {self.reason}"


def choose_convolution(
    images: Sequence[Size], kernel: Sequence[int], stride: int, dtype: DTypeLike, *, platform: str | None = None
) -> Choice:
    """Choose the implementation of a convolution without padding.

    Args:
        images: shape `[b height width channels]`; b may be a symbolic dimension.
        kernel: shape `[kernel_height kernel_width channels features]`.
        stride: stride of the kernel along both axes.
        dtype: dtype of images and kernel.
        platform: "cpu", "gpu" and so on; by default the one that JAX uses.
    """
    batch_size, height, width, channels = images
    rows, columns = positions_after((height, width), kernel[:2], stride)
    if (platform or jax.default_backend()) != "cpu":
        if kernel[0] <= rows and kernel[1] <= columns:
            return Choice("xla", "the platform has convolutions of its own")
        # XLA for GPU would compute the gradients of such a kernel as convolutions that multiply many zeros.
        larger = "the kernel is larger than the output"
        if stride > 1 and kernel[0] <= stride * rows and kernel[1] <= stride * columns:
            return Choice("space_to_depth", f"{larger}, but not if blocks of {stride} x {stride} pixels are channels")
        return Choice("patches", larger)
    if is_symbolic_dim(batch_size):
        return Choice("patches", "the batch size is not known")
    if jnp.finfo(dtype).bits < 32:
        return Choice("patches", "Fourier transforms in less than float32 lose too much")
    if jax.device_count() > 1:
        # Devices would sum the gradient of each spectrum, not the smaller gradient of the kernel.
        return Choice("patches", f"the batch is shared by {jax.device_count()} devices")
    if kernel[0] * kernel[1] <= MOST_TAPS:
        return Choice("direct", "the kernel is small")
    if channels < FEW_CHANNELS:
        return Choice("direct+patches", "the kernel is large and has few channels")
    direct = batch_size * rows * columns * math.prod(kernel)
    of_tilings = _costs(rows, columns, *kernel[:2], channels, kernel[3], stride)
    costs = [(batch_size * for_image + for_kernel, tilings) for tilings, for_image, for_kernel in of_tilings]
    cost, best = min(costs, key=lambda pair: pair[0], default=(math.inf, None))
    if cost >= direct:
        return Choice("patches", "a matrix product of patches costs less than Fourier transforms")
    share = cost / direct
    return Choice("fourier", f"it costs {share:.2f} of a matrix product of patches", best)


@cache
def _costs(
    rows: int, columns: int, kernel_height: int, kernel_width: int, channels: int, num_features: int, stride: int
) -> list[tuple[tuple[Tiling, Tiling], float, float]]:
    """List all tilings, each with its cost for an image and for the kernel; cached, as batches of all sizes need it."""
    costs = []
    of_rows, of_columns = possible_tilings(rows, kernel_height, stride), possible_tilings(columns, kernel_width, stride)
    for tilings in product(of_rows, of_columns):
        of_spectra, of_image, of_kernel = multiplications(channels, num_features, stride, tilings)
        for_image = COST_OF_SPECTRA * of_spectra + COST_OF_TRANSFORMS * of_image
        costs.append((tilings, for_image, COST_OF_TRANSFORMS * of_kernel))
    return costs


def choose_routing(routing: Routing, option: str, votes: Sequence[Size]) -> Choice:
    """Choose the implementation of the routing of a dense capsule layer.

    Args:
        routing: routing algorithm of the layer.
        option: "votes", "fused", or "auto" for the faster one.
        votes: shape `[b i o h]`.

    Raises:
        UsageError: the option is unknown, or the routing has no fused implementation.
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
        # Devices would sum the gradient of each chunk of the weight separately.
        return Choice("votes", f"the batch is shared by {jax.device_count()} devices")
    num_examples, gigabytes = votes[0], 4e-9 * math.prod(votes)
    if jax.default_backend() != "cpu":
        if gigabytes > MOST_GIGABYTES:
            return Choice("fused", f"the votes of {num_examples} examples are {gigabytes:.1f} GB")
        return Choice("votes", f"the votes of {num_examples} examples are {gigabytes:.2g} GB, and need fewer kernels")
    if num_examples < FEWEST_EXAMPLES:
        return Choice("votes", f"{num_examples} < {FEWEST_EXAMPLES} examples")
    return Choice("fused", f"{num_examples} >= {FEWEST_EXAMPLES} examples on one device")
