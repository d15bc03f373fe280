"""Inputs and results of the authors' own code, in the files beside this one; README.md says where each comes from."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capsnet_jax.routing import ROUTINGS

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
TOLERANCE = 1e-12  # of the largest value, in float64
ARRAYS = {"votes": "votes", "activations_in": "activations", "poses_in": "poses"}  # in a file: argument of a routing
RESULTS = ("poses", "activations", "couplings", "gradient_of_votes")
THEIR_OWN = ("their_num_iterations", "activation_logits_before_batch_norm", "length_with_their_epsilon")
KERAS_EPSILON = 1e-7  # their length is the root of the squared length plus this


class Golden(NamedTuple):
    """One file.

    Attributes:
        routing: name of the routing.
        arrays: its votes, activations and poses, with an axis of examples in front.
        weights: its learned weights.
        options: its other arguments, which are numbers.
        inputs: in a convolutional layer, the indices of the input capsules at each position.
        cotangent: gradient of a scalar with respect to the poses; 0 without a gradient of the votes.
        expected: the authors' results, by name.
    """

    routing: str
    arrays: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    options: dict[str, Any]
    inputs: np.ndarray | None
    cotangent: np.ndarray
    expected: dict[str, np.ndarray]


def read(name: str) -> Golden:
    """Read a file under the names that routings use here."""
    values = dict(np.load(FOLDER / f"{name}.npz"))
    expected = {result: values.pop(result) for result in RESULTS if result in values}
    inputs, cotangent = values.pop("inputs", None), values.pop("cotangent", np.zeros(()))
    own = {key: values.pop(key) for key in THEIR_OWN if key in values}
    if "activation_logits_before_batch_norm" in own:  # here, they are normalized over outputs
        logits = own["activation_logits_before_batch_norm"]
        centered = logits - logits.mean(axis=-1, keepdims=True)
        normalized = centered / np.sqrt(logits.var(axis=-1, keepdims=True) + 1e-5)
        expected["activations"] = 1 / (1 + np.exp(-normalized))
    if "length_with_their_epsilon" in own:
        expected["activations"] = np.sqrt(own["length_with_their_epsilon"] ** 2 - KERAS_EPSILON)
    arrays = {argument: values.pop(key) for key, argument in ARRAYS.items() if key in values}
    arrays.setdefault("activations", np.ones(arrays["votes"].shape[:-2]))
    weights = {key: value for key, value in values.items() if value.ndim}
    options = {key.removeprefix("our_"): value.item() for key, value in values.items() if not value.ndim}
    if "leaky" in options:
        options["leaky"] = bool(options["leaky"])
    routing = next(routing for routing in ROUTINGS if name.startswith(routing))
    return Golden(routing, arrays, weights, options, inputs, cotangent, expected)


def assert_agrees(actual: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    """Assert that all results are the authors', relative to the largest value of each."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        error = np.abs(np.asarray(actual[name]) - value).max() / np.abs(value).max()
        assert error < TOLERANCE, f"{name} are off by {error:.1e}"
