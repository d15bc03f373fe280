"""Name the most likely cause of a difference: shown by the numbers, or usual for the first check that differs."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from capsnet_verify.checks import Array

CLOSE = 1e-5  # of the largest value; rounding errors of float32 are smaller
VISIBLE = 1e-3  # mistakes other than a lack of precision are larger

# By the first words of the name of the first check that differs; all checks before it agree.
PLACES = {
    "weight": "weights of another training step or precision, or an entry that was changed",
    "poses with running means": "the running means of batch normalization, or a layer that stays in training mode",
    "stem": "stride, padding or axis order of a convolution, standardization of images, or batch normalization",
    "primary poses": "the order in which channels become capsules (height, width, groups), their scale or their squash",
    "primary activations": "the axis of the norm, or which channel the activation is",
    "votes": "the axes of the transformation (input capsule, input pose, output capsule, output pose)",
    "couplings": "softmax axis, number of iterations, logits of other examples, or a bias or prior",
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
    """Return the usual cause if this check is the first that differs."""
    return next(words for place, words in PLACES.items() if name.startswith(place))


def cause(name: str, actual: Array, expected: Array) -> str:
    """Return the cause that the numbers show, or else the usual one.

    Args:
        name: name of the check.
        actual: computed by JAX.
        expected: computed by PyTorch.
    """
    if actual.shape != expected.shape:
        return "another order of axes, or other sizes"
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return "a quotient, root or logarithm at zero, or an overflow"
    if _off_by(actual, expected) < VISIBLE:
        if name.startswith("weight"):  # not computed from anything
            return usual_cause(name)
        return f"an epsilon, or less precision somewhere in between; otherwise {usual_cause(name)}"
    return next(_shown(name, actual, expected), usual_cause(name))


def cause_of_weight(name: str, actual: Array, expected: Array, weights: Mapping[str, Array]) -> str:
    """Return the cause for a weight from a file; `weights` are all weights of JAX, one of which it may equal."""
    for other, array in weights.items():
        if other != name and np.ptp(expected) > 0 and np.array_equal(array, expected):
            return f"entries mixed up: {name} of PyTorch is {other} of JAX"
    return cause(f"weight {name}", actual, expected)


def _off_by(actual: Array, expected: Array) -> float:
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), np.finfo(float).tiny))


def _shown(name: str, actual: Array, expected: Array) -> Iterator[str]:
    """Yield the causes that the numbers show, the most certain first."""
    sides = {"JAX": actual, "PyTorch": expected}
    if name.startswith("couplings"):
        for side, couplings in sides.items():
            over_inputs, over_outputs = (_off_by(couplings.sum(axis), np.ones(1)) < CLOSE for axis in (-2, -1))
            if over_inputs and not over_outputs:
                yield f"the softmax axis: couplings of {side} sum to one over input capsules, not over output capsules"
        for side, couplings in sides.items():
            if np.ptp(couplings) < CLOSE * couplings.max():  # relative, as couplings over many inputs are small
                yield f"routing that does nothing in {side}: its couplings are all the same"
    if expected.ndim > 1 and len(expected) > 1 and not name.startswith(("weight", "gradient")):
        same = {side: np.ptp(array, axis=0).max() < CLOSE * np.abs(array).max() for side, array in sides.items()}
        if same["JAX"] != same["PyTorch"]:
            side = "JAX" if same["JAX"] else "PyTorch"
            yield f"something averaged over the batch in {side}: all examples are the same"
    for axes in itertools.permutations(range(expected.ndim)):
        transposed = expected.transpose(axes)
        if list(axes) != sorted(axes) and transposed.shape == actual.shape and _off_by(actual, transposed) < CLOSE:
            yield f"transposed: JAX has the axes of PyTorch in the order {', '.join(map(str, axes))}"
    if expected.size < 2:
        return
    if _off_by(np.sort(actual, axis=None), np.sort(expected, axis=None)) <= CLOSE:
        yield "axis order: both have the same numbers, in another order, as after a wrong reshape"
    factor = float((actual * expected).sum() / max((expected * expected).sum(), np.finfo(float).tiny))
    if abs(factor) >= CLOSE and _off_by(actual, factor * expected) <= CLOSE:
        yield f"a factor: JAX has {factor:.6g} times the values of PyTorch, so a scale, or a mean in place of a sum"
