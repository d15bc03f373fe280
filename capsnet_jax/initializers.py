"""The initial distributions of the PyTorch model, so that both sides start training from the same place."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

Initializer = Callable[..., Float[Array, "..."]]


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
