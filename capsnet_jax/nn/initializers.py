"""The initial distributions of the models that are reproduced here, so that training starts from the same place."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Initializer = Callable[..., Float[Array, "..."]]


class Scheme(NamedTuple):
    """How a model draws its weights: functions of the number of inputs that an output sums over.

    Attributes:
        stem: kernels of the first convolutions.
        kernel: kernels of primary capsules, and the dense layer in the middle of the decoder.
        bias: biases of both.
        einsum: capsule weights, and the outer layers of the decoder.
    """

    stem: Callable[[int], Initializer]
    kernel: Callable[[int], Initializer]
    bias: Callable[[int], Initializer]
    einsum: Callable[[int], Initializer]


def fan_in_uniform(fan_in: int) -> Initializer:
    r"""Uniform in $\pm 1 / \sqrt{n}$: what `torch.nn.Conv2d` and `torch.nn.Linear` draw weights *and* biases from.

    Warning:
        Differs from the defaults of Flax, which draw weights from a truncated normal of deviation $1 / \sqrt{n}$
        ($\sqrt 3$ times wider) and start biases at zero.

    Args:
        fan_in: n, the number of inputs that each output sums over.
    """
    return _uniform(fan_in**-0.5)


def unit_variance_uniform(fan_in: int) -> Initializer:
    r"""Uniform in $\pm\sqrt{3 / n}$: inputs of unit variance give outputs of unit variance; `einops`' EinMix draws so.

    Args:
        fan_in: n, the product of the contracted sizes.
    """
    return _uniform((3 / fan_in) ** 0.5)


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


# Named as in `ModelConfig.initial_weights`. Those of the authors: https://github.com/Sarasra/models, research/capsules.
SCHEMES: dict[str, Scheme] = {
    "torch": Scheme(fan_in_uniform, fan_in_uniform, fan_in_uniform, unit_variance_uniform),
    "official": Scheme(
        stem=lambda fan_in: _truncated_normal(0.05),
        kernel=lambda fan_in: _truncated_normal(0.1),
        bias=lambda fan_in: jax.nn.initializers.constant(0.1),
        einsum=lambda fan_in: _truncated_normal(0.1),
    ),
}
TORCH = SCHEMES["torch"]


def _truncated_normal(deviation: float) -> Initializer:
    """Normal with this deviation, drawn again beyond two of it, as TensorFlow's `truncated_normal`."""
    return lambda key, shape, dtype: deviation * jax.random.truncated_normal(key, -2, 2, shape, dtype)


def new_param(initializer: Initializer, shape: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param:
    """A weight drawn from the next key of `rngs.params`."""
    return nnx.Param(initializer(rngs.params(), shape, dtype))
