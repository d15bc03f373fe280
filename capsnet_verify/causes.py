"""What usually makes two implementations part where they did: by the numbers if they tell, or by the place."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Shaped

Array = Shaped[np.ndarray, "..."]

CLOSE = 1e-5  # of the largest value: rounding errors of float32 are smaller
VISIBLE = 1e-3  # mistakes other than of precision are larger

# By the first words of a check. What is computed before it agrees.
PLACES = {
    "weight": "weights of another training step or precision, or an entry that was changed",
    "poses with running means": "the running means of batch normalisation, or a layer that stays in training mode",
    "stem": "stride, padding or axis order of a convolution, standardisation of images, or batch normalisation",
    "primary poses": "the order in which channels become capsules (height, width, groups), their scale or their squash",
    "primary activations": "the axis of the norm, or which channel the activation is",
    "votes": "the axes of the transformation (input capsule, input pose, output capsule, output pose)",
    "couplings": "softmax axis, number of iterations, logits that are not those of this example, or a bias or prior",
    "poses": "the squash or its axis, or a bias before or after it",
    "activations": "the axis of the norm, or an activation that is not the norm",
    "encoded": "a layer that the model does not call, or calls in another order or mode",
    "decoder": "which capsule is masked, or the order of its axes",
    "reconstructions": "the last layer's axis order or bias, or what follows it",
    "margin loss": "the margins, the weight of absent classes, or a mean in place of a sum over classes",
    "reconstruction loss": "a mean in place of a sum, or the other way round",
    "total loss": "the weight of a part of the loss",
    "gradient": "a stop-gradient or detach, a derivative written by hand, or one at zero; the values agree",
    "step": "constants of the optimizer (epsilon, betas, bias correction), or the order of loss and update",
}


def usual_cause(name: str) -> str:
    """What usually makes a check the first that differs, in words."""
    return next(words for place, words in PLACES.items() if name.startswith(place))


def cause(name: str, actual: Array, expected: Array) -> str:
    """The same, or what the numbers tell if they do.

    Args:
        name: of the check.
        actual: what JAX computed.
        expected: what PyTorch computed.
    """
    if actual.shape != expected.shape:
        return "another order of axes, or other sizes"
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return "a quotient, root or logarithm at zero, or an overflow"
    if _off_by(actual, expected) < VISIBLE:
        if name.startswith("weight"):  # of which nothing is computed
            return usual_cause(name)
        return f"an epsilon, or less precision somewhere in between; otherwise {usual_cause(name)}"
    found = (sign(name, actual, expected) for sign in SIGNS)
    return next(filter(None, found), usual_cause(name))


def _off_by(actual: Array, expected: Array) -> float:
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), np.finfo(float).tiny))


def _even_couplings(name: str, actual: Array, expected: Array) -> str | None:
    if not name.startswith("couplings"):
        return None
    for side, couplings in (("JAX", actual), ("PyTorch", expected)):
        if np.ptp(couplings) < CLOSE:
            return f"routing that does nothing in {side}: its couplings are all the same"
    return None


def _softmax_axis(name: str, actual: Array, expected: Array) -> str | None:
    if not name.startswith("couplings"):
        return None
    sums = {
        side: [np.ptp(couplings.sum(axis)) < CLOSE * couplings.sum(axis).max() for axis in (-2, -1)]
        for side, couplings in (("JAX", actual), ("PyTorch", expected))
    }
    for side, (over_inputs, over_outputs) in sums.items():
        if over_inputs and not over_outputs:
            return f"the softmax axis: couplings of {side} sum to one over input capsules, not over output capsules"
    return None


def _same_for_all(name: str, actual: Array, expected: Array) -> str | None:
    if expected.ndim < 2 or len(expected) < 2 or name.startswith(("weight", "gradient")):
        return None
    alike = [np.ptp(array, axis=0).max() < CLOSE * np.abs(array).max() for array in (actual, expected)]
    if alike[0] == alike[1]:
        return None
    return f"something averaged over the batch in {'JAX' if alike[0] else 'PyTorch'}: all examples are the same"


def _factor(name: str, actual: Array, expected: Array) -> str | None:
    if expected.size < 2:
        return None
    factor = float((actual * expected).sum() / max((expected * expected).sum(), np.finfo(float).tiny))
    if abs(factor) < CLOSE or _off_by(actual, factor * expected) > CLOSE:
        return None
    return f"a factor: JAX has {factor:.6g} times the values of PyTorch, so a scale, or a mean in place of a sum"


def _other_axes(name: str, actual: Array, expected: Array) -> str | None:
    for axes in itertools.permutations(range(expected.ndim)):
        same_shape = tuple(expected.shape[axis] for axis in axes) == actual.shape
        if same_shape and list(axes) != sorted(axes) and _off_by(actual, expected.transpose(axes)) < CLOSE:
            return f"transposed: JAX has the axes of PyTorch in the order {', '.join(map(str, axes))}"
    return None


def _other_order(name: str, actual: Array, expected: Array) -> str | None:
    if expected.size < 2 or _off_by(np.sort(actual, axis=None), np.sort(expected, axis=None)) > CLOSE:
        return None
    return "axis order: both have the same numbers, in another order, as after a reshape that takes axes apart wrongly"


SIGNS: tuple[Callable[[str, Array, Array], str | None], ...] = (
    _even_couplings,
    _softmax_axis,
    _same_for_all,
    _other_axes,
    _other_order,
    _factor,
)
"""What the numbers tell, the surest first."""


def mixed_up(name: str, expected: Array, others: Mapping[str, Array]) -> str | None:
    """Which other weight of JAX this one of PyTorch is, if it is one."""
    own = name.removeprefix("weight ")
    for other, array in others.items():
        if other != own and name != own and np.array_equal(array, expected):
            return f"entries mixed up: {own} of PyTorch is {other} of JAX"
    return None
