"""Routing algorithms agree with the code of their authors, values and gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from capsnet_jax.nn.conv_capsules import softmax_over_parents
from capsnet_jax.routing import ROUTINGS
from tests import golden


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_authors_code_agrees(name):
    with jax.enable_x64(True):
        golden.assert_agrees(route(golden.read(name)), golden.read(name).expected)


def route(case: golden.Golden) -> dict[str, Any]:
    given = case.options | {name: jnp.asarray(weight) for name, weight in case.weights.items()}
    if case.inputs is not None:
        given["softmax"] = partial(softmax_over_parents, inputs=case.inputs)

    def readout(arrays):
        routed = jax.vmap(lambda arrays: ROUTINGS[case.routing](**arrays, **given))(arrays)
        return jnp.sum(routed.poses * case.cotangent), routed

    @jax.jit
    def results(arrays):
        gradients, routed = jax.grad(readout, has_aux=True)(arrays)
        return {name: (routed._asdict() | {"gradient_of_votes": gradients["votes"]})[name] for name in case.expected}

    return results(case.arrays)


def test_every_routing_with_authors_has_a_file():
    assert {golden.read(name).routing for name in golden.NAMES} == set(ROUTINGS) - {"uniform", "random"}
