"""Dynamic routing against its twin and the oracle, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from capsnet_jax.routing import dynamic
from capsnet_torch.routing import dynamic as torch_dynamic
from parity_tests import oracle
from parity_tests.compare import TOLERANCE, assert_close

BATCH, INPUTS, OUTPUTS, SIZE = 3, 11, 5, 6


def votes(dtype: str) -> np.ndarray:
    return (0.6 * np.random.default_rng(5).normal(size=(BATCH, INPUTS, OUTPUTS, SIZE))).astype(dtype)


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5])
def test_values_and_gradients_agree(num_iterations, dtype):
    values, activations = votes(dtype), np.ones((BATCH, INPUTS), dtype)
    weights = np.random.default_rng(6).normal(size=(BATCH, OUTPUTS, SIZE)).astype(dtype)
    routing = jax.vmap(partial(dynamic, num_iterations=num_iterations))
    routed = routing(jnp.asarray(values), jnp.asarray(activations))
    grad = jax.grad(lambda votes: jnp.sum(weights * routing(votes, jnp.asarray(activations)).poses))(
        jnp.asarray(values)
    )
    torch_values = torch.tensor(values, requires_grad=True)
    torch_routed = torch_dynamic(torch_values, torch.tensor(activations), num_iterations=num_iterations)
    torch_routed.poses.backward(torch.tensor(weights))
    assert 0.1 < torch_routed.activations.mean() < 0.9, "not hot: routing would have no effect"
    for name in routed._fields:
        expected = getattr(torch_routed, name).detach()
        assert_close(name, getattr(routed, name), expected, tolerance=TOLERANCE[dtype])
    assert_close("gradient of votes", grad, torch_values.grad, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5])
def test_agrees_with_the_oracle(num_iterations, float64):
    values = votes(float64)[0]
    routed = dynamic(jnp.asarray(values), jnp.ones(INPUTS), num_iterations=num_iterations)
    poses, couplings = oracle.dynamic(values, num_iterations)
    assert_close("poses", routed.poses, poses, tolerance=1e-12)
    assert_close("couplings", routed.couplings, couplings, tolerance=1e-12)
    assert_close("activations", routed.activations, np.array([oracle.norm(pose) for pose in poses]), tolerance=1e-12)


def test_an_iteration_changes_the_poses_visibly(float64):
    """What the checks above rest on: with these votes, a routing that does nothing is far off."""
    one, three = (dynamic(jnp.asarray(votes(float64)[0]), jnp.ones(INPUTS), num_iterations=n).poses for n in (1, 3))
    assert jnp.abs(one - three).max() > 0.1 * jnp.abs(three).max()
