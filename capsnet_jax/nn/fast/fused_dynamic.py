r"""Dynamic routing without storing votes: the same function as `dynamic`, of poses and capsule weight.

Routing only multiplies votes $u_{io} = x_i W_{io}$ by output poses, and sums them over input capsules. Both are matrix
products that need no votes:

$$u_{io} \cdot v_o = x_i \cdot (W_{io} v_o), \quad \sum_i c_{io} u_{io} = \sum_i (c_{io} x_i) W_{io}$$

Logits are not stored between iterations either: they are the prior plus $u_{io} \cdot a_o$, where $a_o$ is the sum of
all earlier output poses. All intermediates are computed for one chunk of input capsules at a time, and recomputed in
the backward pass. Apart from arguments, gradients, and transposed copies of the poses and their gradient, the memory
does not depend on the number of input capsules.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.fast.derivatives import with_backward
from capsnet_jax.ops import capsule_norm, squash
from capsnet_jax.routing.dynamic import dynamic

CHUNK_ON_CPU = 640 * 2**10  # bytes of the largest array of a chunk, so that a few of them fit into the caches
CHUNK_ELSEWHERE = 64 * 2**20  # enough work to keep a GPU busy

CoupledSum = Callable[[Any, Array], Float[Array, "o h b"]]


class Operands(NamedTuple):
    """Arrays with an axis of input capsules. Examples are the last axis, which fills vectors at any pose size."""

    poses: Float[Array, "i d b"]
    weight: Float[Array, "i d o h"]
    prior: Float[Array, "i o"] | None


def fused_dynamic(
    poses: Float[Array, "b i d"],
    weight: Float[Array, "i d o h"],
    *,
    num_iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    prior_logits: Float[Array, "i o"] | float | None = None,
    capsule_bias: Float[Array, "o h"] | float | None = None,
) -> Routed:
    """Dynamic routing of a batch; equal to `dynamic` of the votes of each example, with the same options.

    Args:
        poses: poses of the input capsules.
        weight: capsule weight. Products are in its dtype, everything else in float32 or float64.
        num_iterations: number of times the output capsules are computed.
        leaky: let input capsules send a share nowhere.
        detach: treat all but the last iteration as constants in the gradient.
        prior_logits: learned initial logits.
        capsule_bias: learned bias, added before squash in every iteration.

    Returns:
        Output capsules and couplings of each example. Under `jax.jit`, unused couplings are not computed. Used ones
        need memory for each example, input capsule and output capsule.

    Raises:
        UsageError: `num_iterations` is less than 1, or poses and weight have different input capsules.
    """
    if poses.shape[1:] != weight.shape[:2]:
        raise UsageError(
            f"Routing dynamic: poses are {poses.shape}, weight is {weight.shape}; expected [b i d] and [i d o h]."
        )
    if num_iterations < 1:
        raise UsageError(f"Routing dynamic: num_iterations is {num_iterations}, and must be at least 1.")
    inputs, _, outputs, size = weight.shape
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    prior = None if prior_logits is None else jnp.zeros((inputs, outputs), dtype) + prior_logits
    bias = 0 if capsule_bias is None else capsule_bias
    operands = Operands(rearrange(poses.astype(weight.dtype), "b i d -> i d b"), weight, prior)
    agreed = jnp.zeros((outputs, size, len(poses)), dtype)
    coupled = _coupled_sum(leaky, detach)
    sums, operands = _sum_over_inputs(partial(_uniform_sum, leaky) if prior is None else coupled, operands, agreed)
    routed = squash(rearrange(sums, "o h b -> b o h") + bias)
    for _ in range(num_iterations - 1):
        agreed += rearrange(jax.lax.stop_gradient(routed) if detach else routed, "b o h -> o h b")
        sums, operands = _sum_over_inputs(coupled, operands, agreed)
        routed = squash(rearrange(sums, "o h b -> b o h") + bias)
    couplings = rearrange(_couplings(leaky, detach, operands, _project(weight, agreed)), "o i b -> b i o")
    return Routed(routed, capsule_norm(routed), couplings)


FUSED: dict[Callable[..., Routed], Callable[..., Routed]] = {dynamic: fused_dynamic}
"""Implementations without votes, `(poses [b i d], weight [i d o h], **options) -> Routed` of a batch, by algorithm."""


def _uniform_sum(leaky: bool, operands: Operands, agreed: Float[Array, "o h b"]) -> Float[Array, "o h b"]:
    """Sum the votes of these input capsules with uniform couplings: the first iteration without a prior."""
    poses, weight, _ = operands
    votes = jnp.einsum("idoh,idb->ohb", weight, poses, preferred_element_type=agreed.dtype)
    return votes / (weight.shape[2] + leaky)


def _coupled_sum(leaky: bool, detach: bool) -> CoupledSum:
    """Make the function `(operands, agreed) -> sum over input capsules of couplings times votes`."""

    # A custom backward pass fixes the order of axes in all products, because transposing takes as long as multiplying.
    @with_backward(partial(_coupled_sum_backward, leaky, detach))
    def coupled_sum(operands: Operands, agreed: Float[Array, "o h b"]) -> Float[Array, "o h b"]:
        couplings = _couplings(leaky, detach, operands, _project(operands.weight, agreed))
        return _sum_of_votes(operands.weight, rearrange(couplings, "o i b -> o i 1 b") * operands.poses)

    return coupled_sum


def _coupled_sum_backward(
    leaky: bool, detach: bool, arguments: tuple[Operands, Array], cotangent: Array
) -> tuple[Operands, Array]:
    operands, agreed = arguments
    poses, weight, prior = operands
    of_agreed, of_cotangent = _project(weight, agreed), _project(weight, cotangent)
    couplings = _couplings(leaky, detach, operands, of_agreed)
    of_couplings = reduce(of_cotangent * poses, "o i d b -> o i b", "sum")
    of_logits = couplings * (of_couplings - reduce(couplings * of_couplings, "o i b -> 1 i b", "sum"))
    of_prior = None if prior is None else reduce(of_logits, "o i b -> i o", "sum")
    couplings = rearrange(couplings, "o i b -> o i 1 b")
    of_poses, of_weight = couplings * of_cotangent, _outer(couplings * poses, cotangent, weight.dtype)
    if detach:
        of_sums = jnp.zeros_like(agreed)
    else:
        of_logits = rearrange(of_logits, "o i b -> o i 1 b")
        of_poses += of_logits * of_agreed
        of_weight += _outer(of_logits * poses, agreed, weight.dtype)
        of_sums = _sum_of_votes(weight, of_logits * poses)
    gradients = Operands(
        reduce(of_poses, "o i d b -> i d b", "sum").astype(poses.dtype),
        rearrange(of_weight, "o i d h -> i d o h").astype(weight.dtype),
        of_prior,
    )
    return gradients, of_sums


def _project(weight: Float[Array, "i d o h"], outputs: Float[Array, "o h b"]) -> Float[Array, "o i d b"]:
    """Multiply the weight by output poses; the product with an input pose is the vote times the output pose."""
    weight = rearrange(weight, "i d o h -> o i d h")
    return jnp.einsum("oidh,ohb->oidb", weight, outputs.astype(weight.dtype), preferred_element_type=outputs.dtype)


def _sum_of_votes(weight: Float[Array, "i d o h"], poses: Float[Array, "o i d b"]) -> Float[Array, "o h b"]:
    """Sum the votes of input poses that differ between output capsules."""
    weight = rearrange(weight, "i d o h -> o i d h")
    return jnp.einsum("oidh,oidb->ohb", weight, poses.astype(weight.dtype), preferred_element_type=poses.dtype)


def _outer(poses: Float[Array, "o i d b"], outputs: Float[Array, "o h b"], dtype: Any) -> Float[Array, "o i d h"]:
    """Sum outer products over the batch: the gradient of the weight."""
    operands = poses.astype(dtype), outputs.astype(dtype)
    return jnp.einsum("oidb,ohb->oidh", *operands, preferred_element_type=outputs.dtype)


def _couplings(
    leaky: bool, detach: bool, operands: Operands, projected: Float[Array, "o i d b"]
) -> Float[Array, "o i b"]:
    logits = reduce(projected * operands.poses, "o i d b -> o i b", "sum")
    if detach:
        logits = jax.lax.stop_gradient(logits)
    if operands.prior is not None:
        logits += rearrange(operands.prior, "i o -> o i 1")
    if leaky:
        logits = jnp.pad(logits, ((1, 0), (0, 0), (0, 0)))
    return jax.nn.softmax(logits, axis=0)[int(leaky) :]


def _sum_over_inputs(
    summed: CoupledSum, operands: Operands, agreed: Float[Array, "o h b"]
) -> tuple[Float[Array, "o h b"], Operands]:
    """Sum a function over all chunks of input capsules; also return the operands, unchanged.

    Later iterations must use the returned operands. Their gradient then arrives here as a cotangent, to which each
    chunk adds its own gradient in place. One array holds the gradient of the weight, for any number of iterations.
    """

    @with_backward(partial(_backward, summed))
    def sum_over_inputs(operands: Operands, agreed: Array) -> tuple[Array, Operands]:
        def add(sums: Array, start: Any, length: int) -> Array:
            return sums + summed(_chunk(operands, start, length), agreed)

        return _over_chunks(add, jnp.zeros_like(agreed), operands), operands

    return sum_over_inputs(operands, agreed)


def _backward(
    summed: CoupledSum, arguments: tuple[Operands, Array], cotangents: tuple[Array, Operands]
) -> tuple[Operands, Array]:
    operands, agreed = arguments
    of_sums, of_operands = cotangents

    def add(gradients: tuple[Operands, Array], start: Any, length: int) -> tuple[Operands, Array]:
        _, pull = jax.vjp(summed, _chunk(operands, start, length), agreed)
        of_chunk, of_agreed = pull(of_sums)

        def add_to(whole: Array, old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, old + new, start, axis=0)

        totals = jax.tree.map(add_to, gradients[0], _chunk(gradients[0], start, length), of_chunk)
        return totals, gradients[1] + of_agreed

    return _over_chunks(add, (of_operands, jnp.zeros_like(agreed)), operands)


def _chunk(operands: Operands, start: Any, length: int) -> Operands:
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, length), operands)


def _over_chunks(step: Callable[[Any, Any, int], Any], initial: Any, operands: Operands) -> Any:
    """Loop over chunks: call `step(carry, start, length)` with the first input capsule and the length of each chunk."""
    (inputs, dim, outputs, size), batch_size = operands.weight.shape, operands.poses.shape[2]
    bytes_of_capsule = 4 * dim * outputs * (batch_size + size)  # projections and weight of one input capsule

    def length_within(chunk_bytes: int) -> int:
        most = min(max(chunk_bytes // bytes_of_capsule, 1), inputs)
        # A length that divides the number of capsules saves a second program for the remainder.
        return next((length for length in range(most, most // 2, -1) if inputs % length == 0), most)

    def run(length: int, initial: Any) -> Any:
        whole = inputs // length
        carry = jax.lax.fori_loop(0, whole, lambda chunk, carry: step(carry, chunk * length, length), initial)
        return step(carry, whole * length, inputs % length) if inputs % length else carry

    on_cpu, elsewhere = length_within(CHUNK_ON_CPU), length_within(CHUNK_ELSEWHERE)
    if on_cpu == elsewhere:
        return run(on_cpu, initial)  # traces the loop once instead of once for each platform
    return jax.lax.platform_dependent(initial, cpu=partial(run, on_cpu), default=partial(run, elsewhere))
