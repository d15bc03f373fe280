"""Initial weight distributions of the published models, so that training starts from the same place."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

Initializer = Callable[..., Float[Array, "..."]]

SIZES = (2**8, 2**12, 2**16, 2**20)


class Scheme(NamedTuple):
    """Initializers of a model, each a function of the fan-in: the number of inputs that an output sums over.

    Attributes:
        stem: kernels of the stem.
        kernel: kernel of the primary capsules, and the hidden dense layer of the decoder.
        bias: biases of these layers.
        einsum: weights of capsule layers, and the outer layers of the decoder.
    """

    stem: Callable[[int], Initializer]
    kernel: Callable[[int], Initializer]
    bias: Callable[[int], Initializer]
    einsum: Callable[[int], Initializer]


def fan_in_uniform(fan_in: int) -> Initializer:
    r"""Uniform in $\pm 1 / \sqrt{n}$: the default of `torch.nn.Conv2d` and `torch.nn.Linear` for weights *and* biases.

    Warning:
        Differs from the defaults of Flax: a truncated normal of standard deviation $1 / \sqrt{n}$ for weights, which
        is $\sqrt 3$ times wider, and zeros for biases.

    Args:
        fan_in: n.
    """
    return _uniform(fan_in**-0.5)


def unit_variance_uniform(fan_in: int) -> Initializer:
    r"""Uniform in $\pm\sqrt{3 / n}$: inputs of unit variance give outputs of unit variance. The default of `EinMix`.

    Args:
        fan_in: n, the product of the contracted sizes.
    """
    return _uniform((3 / fan_in) ** 0.5)


def _uniform(bound: float) -> Initializer:
    return _in_few_sizes(lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound))


def _truncated_normal(deviation: float) -> Initializer:
    """Normal of this standard deviation, then truncated at two deviations, like TensorFlow's `truncated_normal`."""
    return _in_few_sizes(lambda key, shape, dtype: deviation * jax.random.truncated_normal(key, -2, 2, shape, dtype))


def _in_few_sizes(draw: Initializer) -> Initializer:
    """Make an initializer draw one of a few numbers of values, at least as many as are needed, and keep the first.

    JAX compiles the generator for each shape anew, which took most of the time to create a model. The values are the
    same: by default, a value depends on the key and its flat index alone (`jax_threefry_partitionable`).
    """

    def initializer(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
        size = math.prod(shape)
        drawn = next((number for number in SIZES if number >= size), size)
        return draw(key, (drawn,), dtype)[:size].reshape(shape)

    return initializer


TORCH = Scheme(fan_in_uniform, fan_in_uniform, fan_in_uniform, unit_variance_uniform)
# "official" is the authors' code: https://github.com/Sarasra/models, research/capsules.
OFFICIAL = Scheme(
    stem=lambda fan_in: _truncated_normal(0.05),
    kernel=lambda fan_in: _truncated_normal(0.1),
    bias=lambda fan_in: jax.nn.initializers.constant(0.1),
    einsum=lambda fan_in: _truncated_normal(0.1),
)
SCHEMES = {"torch": TORCH, "official": OFFICIAL}
"""Schemes by the value of `ModelConfig.initial_weights`."""


def new_param(initializer: Initializer, shape: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param:
    """Create a parameter from the next key of `rngs.params`."""
    return nnx.Param(initializer(rngs.params(), shape, dtype))
