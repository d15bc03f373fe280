"""A part of the model, forward and backward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def forward_and_backward(
    layer: nnx.Module,
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    fixed: tuple[Any, ...] = (),
    *,
    in_precision: Callable[[nnx.State], nnx.State] = lambda params: params,
) -> Callable[[], Any]:
    """A compiled call without arguments that gives the outputs, and gradients by weights and inputs.

    The gradients are those for a random gradient of the outputs.

    Args:
        layer: whose weights they are.
        function: `(layer, *inputs, *fixed) -> outputs`.
        inputs: that have gradients, too.
        fixed: further inputs, which have none.
        in_precision: casts the weights; gradients are of those before.
    """
    graphdef, params, *rest = nnx.split(layer, nnx.Param, ...)

    def forward(params: nnx.State, inputs: Any, fixed: Any) -> Any:
        return function(nnx.merge(graphdef, in_precision(params), *rest, copy=True), *inputs, *fixed)

    @jax.jit
    def both(params: nnx.State, inputs: Any, fixed: Any, cotangents: Any) -> Any:
        outputs, pullback = jax.vjp(lambda params, inputs: forward(params, inputs, fixed), params, inputs)
        # The outputs are given back as well, or what the gradient does not need would not be computed.
        return outputs, pullback(cotangents)

    cotangents = random_like(jax.eval_shape(forward, params, inputs, fixed))
    return lambda: both(params, inputs, fixed, cotangents)


def random_like(tree: Any) -> Any:
    """Arrays of these shapes and dtypes, uniform in [0, 1)."""
    key = jax.random.key(0)
    return jax.tree.map(lambda leaf: jax.random.uniform(key, leaf.shape, jnp.float32).astype(leaf.dtype), tree)
