"""Dynamic routing by hand; how routing algorithms are looked up; learned weights, options and errors."""

import inspect
import sys
import traceback
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float

from capsnet_jax import Capsules, UsageError
from capsnet_jax.nn.layers import CapsuleLayer
from capsnet_jax.routing import ROUTINGS, dynamic, get_routing, learns
from capsnet_jax.routing.arguments import learned_axes

INPUTS, OUTPUTS, SIZE = 11, 5, 6
VOTES = jnp.asarray(np.random.default_rng(0).normal(size=(INPUTS, OUTPUTS, SIZE)), jnp.float32)
ACTIVATIONS = jnp.asarray(np.random.default_rng(1).uniform(size=INPUTS), jnp.float32)


@pytest.mark.parametrize("num_iterations", [1, 2, 4])
def test_couplings_sum_to_one_and_activations_are_norms(num_iterations):
    routed = dynamic(VOTES, ACTIVATIONS, num_iterations=num_iterations)
    np.testing.assert_allclose(routed.couplings.sum(axis=1), 1, rtol=1e-6)
    assert np.all(routed.couplings > 0)
    np.testing.assert_allclose(routed.activations, np.linalg.norm(routed.poses, axis=1), rtol=1e-6)
    assert np.all(routed.activations < 1)


def test_one_iteration_is_a_squashed_mean_of_votes():
    total = np.asarray(VOTES, np.float64).sum(axis=0) / OUTPUTS
    norm = np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(
        dynamic(VOTES, ACTIVATIONS, num_iterations=1).poses, norm * total / (1 + norm**2), rtol=1e-5
    )


def test_a_capsule_gets_more_of_the_votes_that_agree():
    """Two input capsules agree on output 0. The third disagrees, and sends its vote to output 1."""
    votes = jnp.array([[[3.0, 0], [1, 0]], [[3, 0], [1, 0]], [[-3, 0], [1, 0]]])
    couplings = jax.jit(dynamic)(votes, jnp.ones(3)).couplings
    assert np.all(couplings[:2, 0] > 0.8)
    assert couplings[2, 0] < 0.1


def test_permuted_capsules_give_permuted_results():
    inputs, outputs = np.random.default_rng(2).permutation(INPUTS), np.random.default_rng(3).permutation(OUTPUTS)
    routed = dynamic(VOTES, ACTIVATIONS)
    permuted = dynamic(VOTES[inputs][:, outputs], ACTIVATIONS[inputs])
    np.testing.assert_allclose(permuted.poses, routed.poses[outputs], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(permuted.couplings, routed.couplings[inputs][:, outputs], rtol=1e-5)


def test_gradients_are_finite_at_any_scale():
    gradient = jax.jit(jax.grad(lambda votes: dynamic(votes, ACTIVATIONS).poses.sum()))
    for scale in (0, 1e-30, 1e-10, 1e5, 1e10):
        assert np.all(np.isfinite(gradient(scale * VOTES))), scale


def test_examples_of_a_batch_are_independent():
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, rngs=nnx.Rngs(0))
    poses = jnp.asarray(np.random.default_rng(4).normal(size=(3, INPUTS, 4)), jnp.float32)
    route = nnx.jit(layer)
    together = route(Capsules(poses, jnp.linalg.norm(poses, axis=-1))).poses
    changed = route(Capsules(poses.at[1:].multiply(-5), jnp.ones((3, INPUTS)))).poses
    np.testing.assert_array_equal(changed[0], together[0])
    assert np.abs(changed[1] - together[1]).max() > 0.1


@pytest.mark.parametrize("num_iterations", [0, -2])
def test_no_iteration_is_an_error(num_iterations):
    with pytest.raises(UsageError, match=rf"num_iterations is {num_iterations}, and must be at least 1"):
        dynamic(VOTES, ACTIVATIONS, num_iterations=num_iterations)


@pytest.mark.parametrize("name", ["dynamic", "em", "variational", "inverted_attention", "kmeans"])
def test_so_many_iterations_that_tracing_takes_hours_are_refused(name):
    get_routing(name, num_iterations=100)
    message = f"Routing {name}: num_iterations is 101, and must be at least 1 and at most 100"
    with pytest.raises(UsageError, match=message):
        get_routing(name, num_iterations=101)
    with pytest.raises(UsageError, match=message):
        get_routing(f"{name},num_iterations=101")


def test_a_routing_is_a_name_or_a_module_path_or_a_function():
    for routing in ("dynamic", "capsnet_jax.routing.dynamic:dynamic", dynamic):
        found = get_routing(routing, num_iterations=2)
        np.testing.assert_array_equal(
            found(VOTES, ACTIVATIONS).poses, dynamic(VOTES, ACTIVATIONS, num_iterations=2).poses
        )


def test_num_iterations_is_passed_to_functions_that_take_it():
    assert get_routing(partial(dynamic, num_iterations=1), num_iterations=5) is not None
    plain = get_routing(lambda votes, activations: dynamic(votes, activations, num_iterations=1), num_iterations=5)
    np.testing.assert_array_equal(
        plain(VOTES, ACTIVATIONS).couplings, np.full((INPUTS, OUTPUTS), 1 / OUTPUTS, np.float32)
    )


@pytest.mark.parametrize("name", ["dynamo", "capsnet_jax.ops:nothing", "no_such_module:dynamic"])
def test_an_unknown_routing_is_refused_by_name(name):
    with pytest.raises(UsageError, match=name):
        get_routing(name, num_iterations=3)


def test_the_error_lists_the_names():
    with pytest.raises(UsageError, match=", ".join(ROUTINGS)):
        get_routing("dynamo", num_iterations=3)


def test_only_declared_arguments_are_learned():
    @learns(mix="h h")
    def mixed(u, a, *, mix=0.5, shift: Float[Array, " h"] | float = 0.0, top: int | None = None, **others):
        return dynamic(u @ jnp.broadcast_to(mix, (SIZE, SIZE)) + shift, a)

    routing = get_routing(mixed)
    assert routing.weights == {"mix": (("h", "h"), 0.5)}
    assert not routing.takes("others")
    assert get_routing(partial(mixed, mix=2.0, shift=1.0)).weights == {"mix": (("h", "h"), 2.0)}
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, routing=mixed, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.routing_weights["mix"][...], np.full((SIZE, SIZE), 0.5, np.float32))


def test_learns_returns_the_function_itself():
    """The default is used without the weight, and is the initial value in a layer."""

    def scaled(votes, activations, *, scale=2.0):
        return dynamic(scale * votes, activations)

    assert learns(scale="")(scaled) is scaled
    expected = dynamic(2 * VOTES, ACTIVATIONS).poses
    np.testing.assert_array_equal(scaled(VOTES, ACTIVATIONS).poses, expected)
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, routing=scaled, rngs=nnx.Rngs(0))
    assert layer.routing_weights["scale"][...] == 2


def test_a_weight_without_default_is_learned_if_an_option_sets_it():
    assert get_routing("dynamic").weights == {}
    routing = get_routing("dynamic,capsule_bias=0.1,prior_logits=0")
    assert routing.weights == {"prior_logits": (("i", "o"), 0.0), "capsule_bias": (("o", "h"), 0.1)}


@pytest.mark.parametrize("name", ROUTINGS)
def test_declared_axes_match_the_annotations(name):
    parameters = inspect.signature(ROUTINGS[name]).parameters
    for weight, axes in learned_axes(ROUTINGS[name]).items():
        array, *_ = get_args(parameters[weight].annotation)
        assert tuple(array.dim_str.split()) == axes
    arrays = {parameter.name for parameter in parameters.values() if get_args(parameter.annotation)[1:] != ()}
    assert learned_axes(ROUTINGS[name]).keys() == arrays - {"softmax"}


NO_DEFAULT = "is not a keyword argument with a default to start from; expected one of gain, bias."


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"gian": "o"}, f"'gian' {NO_DEFAULT}"),
        ({"must": "o"}, f"'must' {NO_DEFAULT}"),
        (
            {"poses": "i d"},
            f"'poses' {NO_DEFAULT}",
        ),
        ({"gain": "io"}, "'gain' has the axes 'io'; expected i, o, d or h, with spaces between."),
    ],
)
def test_a_wrong_declaration_is_refused(axes, words):
    def f(votes, activations, *, must, poses=None, gain=1.0, bias=None): ...

    with pytest.raises(UsageError) as caught:
        learns(**axes)(f)
    assert str(caught.value) == f"Routing f: the learned weight {words}"


def test_a_wrong_declaration_in_a_module_is_reported_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "misdeclared.py").write_text(
        "from capsnet_jax.routing import learns\n@learns(gain='x')\ndef f(votes, activations, *, gain=1.0): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"^Routing f: the learned weight 'gain' has the axes 'x'; expected"):
        get_routing("misdeclared:f")


FAULTY = """
import functools
import jax
from capsnet_jax import UsageError
from capsnet_jax.ops import squash

def divides(votes, activations):
    share = 1 / 0
    return share

def helped(votes, activations):
    return squash(
        votes + "a"
    )

@jax.jit
def compiled(votes, activations):
    if votes[0, 0, 0] > 0:
        return votes

def bare(votes, activations):
    raise KeyError

def refuses(votes, activations):
    raise UsageError("Votes are cold.")

def exhausts(votes, activations):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")

def needs(votes, activations, *, sharpness):
    return votes

class Callable:
    def __call__(self, votes, activations):
        return votes[:, 9, 9, 9]

called = Callable()
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "faulty_routing", raising=False)
    (tmp_path / "faulty_routing.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    return "faulty_routing"


@pytest.mark.parametrize(
    ("name", "words", "cause"),
    [
        ("divides", "ZeroDivisionError: division by zero (faulty_routing.py, line 8).", ZeroDivisionError),
        ("helped", "TypeError: ", TypeError),
        (
            "compiled",
            "TracerBoolConversionError: Attempted boolean conversion of traced array with shape bool[] "
            "(faulty_routing.py, line 18).",
            jax.errors.TracerBoolConversionError,
        ),
        ("bare", "KeyError: (no message) (faulty_routing.py, line 22).", KeyError),
        ("needs", "TypeError: needs() missing 1 required keyword-only argument: 'sharpness'.", TypeError),
        ("called", "IndexError: ", IndexError),
    ],
)
def test_an_error_in_a_routing_is_reported_with_its_line_and_cause(faulty, name, words, cause):
    with pytest.raises(UsageError) as caught:
        get_routing(f"{faulty}:{name}")(VOTES, ACTIVATIONS)
    assert str(caught.value).startswith(f"Routing {faulty}:{name} raises {words}")
    assert type(caught.value.__cause__) is cause
    frames = traceback.extract_tb(caught.value.__cause__.__traceback__)
    inside = [frame for frame in frames if frame.filename.endswith("faulty_routing.py")]
    assert [frame.name for frame in inside] == {"called": ["__call__"], "needs": []}.get(name, [name])
    if inside:
        assert str(caught.value).endswith(f" (faulty_routing.py, line {inside[-1].lineno}).")


def test_an_error_in_a_routing_is_reported_the_same_by_a_layer(faulty):
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, routing=f"{faulty}:divides", rngs=nnx.Rngs(0))
    capsules = Capsules(jnp.ones((2, INPUTS, 4)), jnp.ones((2, INPUTS)))
    words = "Routing faulty_routing:divides raises ZeroDivisionError: division by zero (faulty_routing.py, line 8)."
    for call in (layer, nnx.jit(layer)):
        with pytest.raises(UsageError) as caught:
            call(capsules)
        assert str(caught.value) == words
        assert type(caught.value.__cause__) is ZeroDivisionError
        assert "share = 1 / 0" in "".join(traceback.format_exception(caught.value))


def test_usage_errors_and_device_errors_pass_unchanged(faulty):
    with pytest.raises(UsageError, match=r"^Votes are cold.$"):
        get_routing(f"{faulty}:refuses")(VOTES, ACTIVATIONS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        get_routing(f"{faulty}:exhausts")(VOTES, ACTIVATIONS)


def test_an_error_outside_the_routing_passes_unchanged(monkeypatch):
    monkeypatch.setattr(CapsuleLayer, "votes", lambda layer, poses: 1 / 0)
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, routing="uniform", rngs=nnx.Rngs(0))
    with pytest.raises(ZeroDivisionError, match=r"^division by zero$"):
        layer(Capsules(jnp.ones((2, INPUTS, 4)), jnp.ones((2, INPUTS))))


def test_options_have_the_type_of_their_default(tmp_path, monkeypatch):
    (tmp_path / "typed.py").write_text(
        "def f(votes, activations, *, top: int | None = None, sharp=2.0, name: str = 'a', flag: bool = False): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = dict(get_routing("typed:f, top=3, sharp=4, name=b, flag=True").options)
    assert options == {"top": 3, "sharp": 4.0, "name": "b", "flag": True}
    assert [type(options[name]) for name in ("top", "sharp")] == [int, float]


def test_a_partial_with_unknown_keywords_is_refused():
    with pytest.raises(UsageError, match=r"binds \['leak'\]; expected keywords among num_iterations"):
        get_routing(partial(dynamic, leak=True))
