"""A function with a custom backward pass has the derivatives of the plain function in all modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax.nn.fast.derivatives import with_backward

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(3, 4)), RNG.normal(size=(4, 2))


def plain(x, y):
    return {"product": jnp.sin(x @ y), "square": (x**2).sum()}


def make_counted():
    """The same function with a custom backward pass, and a list that grows when that is traced."""
    calls = []

    def backward(arguments, cotangent):
        calls.append(1)
        return jax.vjp(plain, *arguments)[1](cotangent)

    return with_backward(backward)(plain), calls


def make_loss(function):
    def loss(x, y):
        results = function(x, y)
        return (results["product"] ** 3).sum() * results["square"]

    return loss


def of_batch(loss):
    """Sum over examples that share y."""
    return lambda xs, y: (jax.vmap(loss, (0, None))(xs, y) ** 2).sum()


DERIVATIVES = {
    "value": lambda loss: loss(X, Y),
    "grad": lambda loss: jax.grad(loss, argnums=(0, 1))(X, Y),
    "jvp": lambda loss: jax.jvp(loss, (X, Y), (Y.reshape(2, 4)[[0, 1, 0]], X[:, :2].repeat(2, 0)[:4]))[1],
    "linearize": lambda loss: jax.linearize(loss, X, Y)[1](2 * X, Y),
    "hessian": lambda loss: jax.hessian(loss, argnums=(0, 1))(X, Y),
    "forward over forward": lambda loss: jax.jacfwd(jax.jacfwd(loss))(X, Y),
    "reverse over reverse": lambda loss: jax.jacrev(jax.jacrev(loss))(X, Y),
    "reverse over forward": lambda loss: jax.jacrev(jax.jacfwd(loss))(X, Y),
    "third": lambda loss: jax.jacfwd(jax.hessian(loss, argnums=1), argnums=1)(X, Y),
    "vmap": lambda loss: jax.vmap(loss, (0, None))(np.stack([X, -X]), Y),
    "grad of vmap": lambda loss: jax.grad(of_batch(loss), argnums=(0, 1))(np.stack([X, 3 * X]), Y),
    "vmap of grad": lambda loss: jax.vmap(jax.grad(loss, argnums=1), (None, 2), 1)(X, np.stack([Y, Y / 2], 2)),
    "vmap of hessian": lambda loss: jax.vmap(jax.hessian(loss), (0, None))(np.stack([X, -X]), Y),
    "checkpoint": lambda loss: jax.grad(jax.checkpoint(loss))(X, Y),
    "scan": lambda loss: jax.grad(lambda x: jax.lax.map(lambda y: loss(x, y), np.stack([Y, 2 * Y])).sum())(X),
}


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_equal_those_of_the_plain_function(derivative, compiled):
    with jax.enable_x64(True):
        function, _ = make_counted()
        loss = make_loss(function)
        actual = jax.jit(lambda: derivative(jax.jit(loss)))() if compiled else derivative(loss)
        expected = jax.jit(lambda: derivative(make_loss(plain)))()
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            scale = np.abs(theirs).max()
            assert scale > 0
            assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= 1e-12 * scale


def test_reverse_mode_calls_the_backward_pass_and_forward_mode_does_not():
    with jax.enable_x64(True):
        function, calls = make_counted()
        jax.jvp(make_loss(function), (X, Y), (X, Y))
        assert not calls
        jax.grad(make_loss(function))(X, Y)
        assert len(calls) == 1


def test_a_wrong_backward_pass_changes_reverse_mode_only():
    with jax.enable_x64(True):
        doubled = with_backward(lambda arguments, cotangent: (2 * cotangent,))(lambda x: 1.0 * x)
        np.testing.assert_array_equal(jax.grad(lambda x: doubled(x).sum())(X), np.full_like(X, 2))
        np.testing.assert_array_equal(jax.jvp(doubled, (X,), (X,))[1], X)
