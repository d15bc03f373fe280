"""Mixed precision: matrix products and convolutions in a small dtype such as bfloat16, everything else in float32.

Each layer casts its input to the dtype of its weight, and casts the product back to float32. Everything that sums many
numbers or has exponents, roots or quotients is in float32: norms, squash, softmax, batch normalization, sigmoid. The
dtype of the weights alone therefore sets the precision. A model of float32 or float64 weights has no casts at all.
"""

import jax
from flax import nnx
from jax.typing import DTypeLike

PRODUCTS = {"kernel", "weight", "from_capsules", "hidden_weight", "to_pixels"}
"""Names of the weights of convolutions, capsule layers and dense layers."""


@jax.named_scope("casts")
def for_products(params: nnx.State, dtype: DTypeLike) -> nnx.State:
    """Cast the weights of matrix products and convolutions; other parameters keep their dtype.

    Biases, batch normalization and learned weights of routings are not cast. The cast is differentiable: gradients
    have the dtype of the original weights.

    Args:
        params: parameters of a model or of some of its layers.
        dtype: dtype of the products, such as bfloat16.

    Returns:
        The parameters, in the same structure.
    """

    def cast(path: tuple[str | int, ...], variable: nnx.Variable) -> nnx.Variable:
        # A learned weight of a routing may have any of these names.
        if path[-1] in PRODUCTS and "routing_weights" not in path:
            return variable.replace(variable[...].astype(dtype))
        return variable

    return nnx.map_state(cast, params)
