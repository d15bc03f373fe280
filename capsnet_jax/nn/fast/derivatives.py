"""Functions with a custom backward pass that can still be differentiated in forward mode.

`jax.custom_vjp` does not support `jax.jvp`, `jax.linearize` and `jax.hessian`. Here a custom JVP rule passes tangents
to a primitive. In forward mode, the primitive applies JAX's own derivative of the function; its transpose, which
reverse mode uses, is the custom backward pass. `jax.custom_derivatives.linear_call` is similar, but cannot be batched.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Function = Callable[..., Any]


def with_backward(backward: Function) -> Callable[[Function], Function]:
    """Decorate a function of arrays so that reverse-mode differentiation calls `backward`.

    Args:
        backward: `(arguments, cotangent) -> cotangents of the arguments`, in the structure of the tuple of arguments.
            It must be linear in the cotangent, and differentiable if second derivatives are needed.

    Returns:
        A decorator for functions that take and return pytrees of floating-point arrays, by position.
    """

    def decorate(function: Function) -> Function:
        @jax.custom_jvp
        @wraps(function)
        def primal(*arguments: Any) -> Any:
            return function(*arguments)

        @primal.defjvp
        def _(arguments: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
            def push(arguments: Any, tangents: Any) -> Any:
                return jax.jvp(function, arguments, tangents)[1]

            results = primal(*arguments)
            return results, linear_map(push, backward, arguments, tangents, results)

        return primal

    return decorate


def linear_map(apply: Function, transpose: Function, constants: Any, operands: Any, like: Any) -> Any:
    """Call `apply(constants, operands)`, a linear function of the operands with a custom transpose.

    Args:
        apply: function that is linear in its second argument.
        transpose: `(constants, cotangent of the result) -> cotangent of the operands`.
        constants: pytree of arrays in which the function need not be linear.
        operands: pytree of arrays.
        like: pytree of arrays of the shapes and dtypes of the result. Tracing `apply` would tell them, too, but takes
            long, and reverse mode does not need it otherwise.
    """
    flat_constants, constants_tree = jax.tree.flatten(constants)
    flat_operands, operands_tree = jax.tree.flatten(operands)
    flat_like, result_tree = jax.tree.flatten(like)

    def flat(function: Function, tree: Any) -> Function:
        def call(constants: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
            return jax.tree.leaves(
                function(jax.tree.unflatten(constants_tree, constants), jax.tree.unflatten(tree, arrays))
            )

        return call

    results = linear_map_p.bind(
        *flat_constants,
        *flat_operands,
        apply=flat(apply, operands_tree),
        transpose=flat(transpose, result_tree),
        num_constants=len(flat_constants),
        avals=_avals(flat_like),
    )
    return jax.tree.unflatten(result_tree, results)


linear_map_p = Primitive("linear_map")
linear_map_p.multiple_results = True


@linear_map_p.def_impl
def _evaluate(*arrays: Any, apply: Function, num_constants: int, **_: Any) -> list[Any]:
    return apply(arrays[:num_constants], arrays[num_constants:])


@linear_map_p.def_abstract_eval
def _abstract(*_: Any, avals: Sequence[Any], **__: Any) -> list[Any]:
    return list(avals)


def _avals(arrays: Sequence[Any], *axes: int) -> tuple[Any, ...]:
    """Return the shapes, with these axes in front, and the dtypes of arrays or other abstract values."""
    return tuple(jax.core.ShapedArray((*axes, *array.shape), array.dtype) for array in arrays)


mlir.register_lowering(linear_map_p, mlir.lower_fun(_evaluate, multiple_results=True))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    """The product rule d(A x) = A dx + (dA) x, where the matrix A depends on the constants and x are the operands."""
    n = params["num_constants"]
    constants, operands = primals[:n], primals[n:]
    results = linear_map_p.bind(*primals, **params)
    moved = [ad.instantiate_zeros(tangent) for tangent in tangents]
    of_results = linear_map_p.bind(*constants, *moved[n:], **params)
    if not all(type(tangent) is ad.Zero for tangent in tangents[:n]):
        _, of_constants = jax.jvp(lambda *arrays: params["apply"](arrays, operands), tuple(constants), tuple(moved[:n]))
        of_results = [one + other for one, other in zip(of_results, of_constants, strict=True)]
    return results, of_results


def _transpose(cotangents: Sequence[Any], *arrays: Any, **params: Any) -> list[Any]:
    n = params["num_constants"]
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    of_operands = linear_map_p.bind(
        *arrays[:n],
        *cotangents,
        apply=params["transpose"],
        transpose=params["apply"],
        num_constants=n,
        avals=_avals([operand.aval for operand in arrays[n:]]),
    )
    return [None] * n + of_operands


def _batch(arrays: Sequence[Any], axes: Sequence[int | None], **params: Any) -> tuple[list[Any], list[int]]:
    n = params["num_constants"]
    in_axes = (list(axes[:n]), list(axes[n:]))

    def transpose(constants: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        each = jax.vmap(params["transpose"], (in_axes[0], 0))(list(constants), list(cotangents))
        # The cotangent of an operand that is shared by all examples is a sum.
        return [
            part.sum(axis=0) if axis is None else jnp.moveaxis(part, 0, axis)
            for part, axis in zip(each, in_axes[1], strict=True)
        ]

    def apply(constants: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
        return jax.vmap(params["apply"], in_axes)(list(constants), list(operands))

    size = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)
    avals = _avals(params["avals"], size)
    results = linear_map_p.bind(*arrays, apply=apply, transpose=transpose, num_constants=n, avals=avals)
    return results, [0] * len(results)


ad.primitive_jvps[linear_map_p] = _jvp
ad.primitive_transposes[linear_map_p] = _transpose
batching.primitive_batchers[linear_map_p] = _batch
