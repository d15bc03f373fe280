r"""Dynamic routing without votes: what `dynamic` computes, from the poses and the weight that votes are made of.

A vote $u_{io} = x_i W_{io}$ is only ever multiplied by an output pose, or summed over the input capsules, and

$$u_{io} \cdot v_o = x_i \cdot (W_{io} v_o), \quad \sum_i c_{io} u_{io} = \sum_i (c_{io} x_i) W_{io}$$

take two matrix products for each output capsule. Nor are logits kept from one iteration to the next: they are the
prior plus $u_{io} \cdot a_o$, with $a_o$ the sum of all output poses so far. What lies between is made of a chunk of
the input capsules at a time, and made again in the backward pass: beyond arguments, gradients and transposed copies of
the poses and of theirs, the memory needed does not depend on the number of input capsules.
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

CHUNK_ON_CPU = 640 * 2**10  # bytes of the largest array of a chunk: a few of them stay in the caches
CHUNK_ELSEWHERE = 64 * 2**20  # keeps a GPU busy

CoupledSum = Callable[[Any, Array], Float[Array, "o h b"]]


class Operands(NamedTuple):
    """What there is of each input capsule; examples come last, as they fill vectors however small the capsules are."""

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
    """Dynamic routing of a batch, equal to `dynamic` of each example's votes; options are explained there.

    Args:
        poses: those of the input capsules.
        weight: that of the votes. Products are of operands of its dtype; all else is in float32 at least.
        num_iterations: number of times the output capsules are computed.
        leaky: each input capsule may send a share to nowhere.
        detach: gradients pass through the last iteration only.
        prior_logits: what the logits start from; learned.
        capsule_bias: added before squash in every iteration; learned.

    Returns:
        Output capsules and couplings of each example. Under `jax.jit`, couplings that are not used are not computed;
        if they are, they take memory for each example, input and output capsule, as elsewhere.

    Raises:
        UsageError: `num_iterations` is less than 1, or poses and weight are not of the same input capsules.
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
"""Routings that have an implementation without votes: `(poses [b i d], weight [i d o h]) -> Routed` of a batch."""


def _uniform_sum(leaky: bool, operands: Operands, agreed: Float[Array, "o h b"]) -> Float[Array, "o h b"]:
    """The coupled sum of the first iteration, without a prior: no input capsule prefers any output."""
    poses, weight, _ = operands
    votes = jnp.einsum("idoh,idb->ohb", weight, poses, preferred_element_type=agreed.dtype)
    return votes / (weight.shape[2] + leaky)


def _coupled_sum(leaky: bool, detach: bool) -> CoupledSum:
    """The function `(operands, agreed) -> sum of the votes of these input capsules, times their couplings`."""

    # A backward pass of our own, for the order of the axes in every product: transposing takes as long as multiplying.
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
    """Each input pose times this is its vote times the output."""
    weight = rearrange(weight, "i d o h -> o i d h")
    return jnp.einsum("oidh,ohb->oidb", weight, outputs.astype(weight.dtype), preferred_element_type=outputs.dtype)


def _sum_of_votes(weight: Float[Array, "i d o h"], poses: Float[Array, "o i d b"]) -> Float[Array, "o h b"]:
    """The votes of poses that are others for each output."""
    weight = rearrange(weight, "i d o h -> o i d h")
    return jnp.einsum("oidh,oidb->ohb", weight, poses.astype(weight.dtype), preferred_element_type=poses.dtype)


def _outer(poses: Float[Array, "o i d b"], outputs: Float[Array, "o h b"], dtype: Any) -> Float[Array, "o i d h"]:
    """The gradient of a weight, from those of both its sides."""
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
    """The sum of a function over all chunks of input capsules, and the operands as they are.

    The operands are to be used after this in their place. Their gradients so come in here from what is done later, and
    this adds its own to them, chunk by chunk: one array for the gradient of the weight, however many iterations.
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
    """Calls a step with what the one before returned, for every chunk's first input capsule and number of them."""
    (inputs, dim, outputs, size), batch_size = operands.weight.shape, operands.poses.shape[2]
    bytes_of_capsule = 4 * dim * outputs * (batch_size + size)  # of its share of the projections and of the weight

    def run(chunk_bytes: int, initial: Any) -> Any:
        most = min(max(chunk_bytes // bytes_of_capsule, 1), inputs)
        # Chunks of one length, if there is a fair one, need no second program for what is left over.
        length = next((length for length in range(most, most // 2, -1) if inputs % length == 0), most)
        whole = inputs // length
        carry = jax.lax.fori_loop(0, whole, lambda chunk, carry: step(carry, chunk * length, length), initial)
        return step(carry, whole * length, inputs % length) if inputs % length else carry

    return jax.lax.platform_dependent(initial, cpu=partial(run, CHUNK_ON_CPU), default=partial(run, CHUNK_ELSEWHERE))
