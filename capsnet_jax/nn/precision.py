"""Mixed precision: products in a small dtype such as bfloat16, everything else in float32.

A layer casts the operands of a product to the dtype of its weight, and the result back up before anything that sums
many numbers or has exponents, roots or quotients: norms, squash, softmax, batch normalisation, sigmoid. What precision
a model computes in is therefore said by its weights alone; one of float32 or float64 weights has no casts at all.
"""

from flax import nnx
from jax.typing import DTypeLike

PRODUCTS = {"kernel", "weight", "from_capsules", "hidden_weight", "to_pixels"}
"""Names of weights that something is multiplied by: of convolutions, capsule layers and the decoder."""


def for_products(params: nnx.State, dtype: DTypeLike) -> nnx.State:
    """Casts the weights of products, and leaves biases, batch normalisation and what routings learn as they are.

    It is differentiable: gradients come in the dtype that the weights had.

    Args:
        params: those of a model, or of layers of it.
        dtype: of the products, such as bfloat16.
    """

    def cast(path: tuple[str | int, ...], variable: nnx.Variable) -> nnx.Variable:
        # A routing may call what it learns as it likes.
        if path[-1] in PRODUCTS and "routing_weights" not in path:
            return variable.replace(variable[...].astype(dtype))
        return variable

    return nnx.map_state(cast, params)
