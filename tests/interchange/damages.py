"""Ways to damage a file of weights, each with the words of the error message."""

import os
from collections.abc import Callable

import ml_dtypes
import numpy as np

State = dict[str, np.ndarray]
NAME = "decoder.2.weight"  # of 14 x 12 weights in a small model


def _changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[State], State]:
    return lambda state: state | {NAME: change(state[NAME])}


def _with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[3, 2] = value
        return array

    return change


DAMAGED_STATES: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (lambda state: {name: array for name, array in state.items() if name != NAME}, f"lack {NAME}."),
    "extra": (
        lambda state: state | {"decoder.6.weight": np.ones((3, 2), np.float32)},
        "have unknown entries decoder.6.weight.",
    ),
    "renamed": (
        lambda state: {name.replace("2.w", "3.w") if name == NAME else name: state[name] for name in state},
        f"lack {NAME} and have unknown entries decoder.3.weight; both are of one shape, and may be the same weight "
        "renamed.",
    ),
    "transposed": (
        _changed(lambda array: array.T.copy()),
        f"The weight {NAME} is (12, 14); this model expects (14, 12).",
    ),
    "integers": (_changed(lambda array: array.astype(np.int32)), f"The entry {NAME} is int32; expected float16,"),
    "bfloat16": (
        _changed(lambda array: array.astype(ml_dtypes.bfloat16)),
        f"The entry {NAME} is bfloat16; expected float16,",
    ),
    "another float": (
        _changed(lambda array: array.astype(np.float64)),
        f"The entry {NAME} is float64, and 8 of 9 are float32; expected one type for all.",
    ),
    "nan": (_changed(_with_value(np.nan)), f"The entry {NAME} has values that are not finite"),
    "infinite": (_changed(_with_value(-np.inf)), f"The entry {NAME} has values that are not finite"),
    "no entry": (lambda state: {}, "is empty: it has no entry"),
}


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (self.trace,)
