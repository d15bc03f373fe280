"""What every routing promises, on dynamic routing; and how routings are found."""

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
def test_couplings_are_shares_and_activations_are_norms_below_1(num_iterations):
    routed = dynamic(VOTES, ACTIVATIONS, num_iterations=num_iterations)
    np.testing.assert_allclose(routed.couplings.sum(axis=1), 1, rtol=1e-6)
    assert np.all(routed.couplings > 0)
    np.testing.assert_allclose(routed.activations, np.linalg.norm(routed.poses, axis=1), rtol=1e-6)
    assert np.all(routed.activations < 1)


def test_one_iteration_is_a_squashed_mean():
    total = np.asarray(VOTES, np.float64).sum(axis=0) / OUTPUTS
    norm = np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(
        dynamic(VOTES, ACTIVATIONS, num_iterations=1).poses, norm * total / (1 + norm**2), rtol=1e-5
    )


def test_a_capsule_gets_more_of_the_votes_that_agree():
    """Two inputs vote alike for output 0, a third against them; it turns to output 1."""
    votes = jnp.array([[[3.0, 0], [1, 0]], [[3, 0], [1, 0]], [[-3, 0], [1, 0]]])
    couplings = dynamic(votes, jnp.ones(3)).couplings
    assert np.all(couplings[:2, 0] > 0.8)
    assert couplings[2, 0] < 0.1


def test_order_of_inputs_does_not_matter_and_outputs_follow_theirs():
    inputs, outputs = np.random.default_rng(2).permutation(INPUTS), np.random.default_rng(3).permutation(OUTPUTS)
    routed = dynamic(VOTES, ACTIVATIONS)
    permuted = dynamic(VOTES[inputs][:, outputs], ACTIVATIONS[inputs])
    np.testing.assert_allclose(permuted.poses, routed.poses[outputs], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(permuted.couplings, routed.couplings[inputs][:, outputs], rtol=1e-5)


@pytest.mark.parametrize("scale", [0, 1e-30, 1e-10, 1e5, 1e10])
def test_gradients_are_finite_at_any_scale(scale):
    grads = jax.grad(lambda votes: dynamic(votes, ACTIVATIONS).poses.sum())(scale * VOTES)
    assert np.all(np.isfinite(grads))


def test_an_example_does_not_see_its_batch_mates():
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, rngs=nnx.Rngs(0))
    poses = jnp.asarray(np.random.default_rng(4).normal(size=(3, INPUTS, 4)), jnp.float32)
    together = layer(Capsules(poses, jnp.linalg.norm(poses, axis=-1))).poses
    changed = layer(Capsules(poses.at[1:].multiply(-5), jnp.ones((3, INPUTS)))).poses
    np.testing.assert_array_equal(changed[0], together[0])
    assert np.abs(changed[1] - together[1]).max() > 0.1


@pytest.mark.parametrize("num_iterations", [0, -2])
def test_no_iteration_is_an_error(num_iterations):
    with pytest.raises(UsageError, match=rf"num_iterations is {num_iterations}, and must be at least 1"):
        dynamic(VOTES, ACTIVATIONS, num_iterations=num_iterations)


def test_a_routing_is_found_by_name_by_module_or_given():
    for routing in ("dynamic", "capsnet_jax.routing.dynamic:dynamic", dynamic):
        found = get_routing(routing, num_iterations=2)
        np.testing.assert_array_equal(
            found(VOTES, ACTIVATIONS).poses, dynamic(VOTES, ACTIVATIONS, num_iterations=2).poses
        )


def test_a_routing_without_iterations_is_called_without():
    assert get_routing(partial(dynamic, num_iterations=1), num_iterations=5) is not None
    plain = get_routing(lambda votes, activations: dynamic(votes, activations, num_iterations=1), num_iterations=5)
    np.testing.assert_array_equal(
        plain(VOTES, ACTIVATIONS).couplings, np.full((INPUTS, OUTPUTS), 1 / OUTPUTS, np.float32)
    )


@pytest.mark.parametrize("name", ["dynamo", "capsnet_jax.ops:nothing", "no_such_module:dynamic"])
def test_an_unknown_routing_is_an_error_that_names_it(name):
    with pytest.raises(UsageError, match=name):
        get_routing(name, num_iterations=3)


def test_the_error_lists_the_names():
    with pytest.raises(UsageError, match=", ".join(ROUTINGS)):
        get_routing("dynamo", num_iterations=3)


def test_learned_weights_are_what_is_declared():
    @learns(mix="h h")
    def mixed(u, a, *, mix=0.5, shift: Float[Array, " h"] | float = 0.0, top: int | None = None, **others):
        return dynamic(u @ jnp.broadcast_to(mix, (SIZE, SIZE)) + shift, a)

    routing = get_routing(mixed)
    assert routing.weights == {"mix": (("h", "h"), 0.5)}
    assert not routing.takes("others")
    assert get_routing(partial(mixed, mix=2.0, shift=1.0)).weights == {"mix": (("h", "h"), 2.0)}
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, routing=mixed, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.routing_weights["mix"][...], np.full((SIZE, SIZE), 0.5, np.float32))


def test_a_declaration_leaves_the_function_as_it_is():
    """Without the weight, the default is used, which is what a layer starts from."""

    def scaled(votes, activations, *, scale=2.0):
        return dynamic(scale * votes, activations)

    assert learns(scale="")(scaled) is scaled
    expected = dynamic(2 * VOTES, ACTIVATIONS).poses
    np.testing.assert_array_equal(scaled(VOTES, ACTIVATIONS).poses, expected)
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, routing=scaled, rngs=nnx.Rngs(0))
    assert layer.routing_weights["scale"][...] == 2


def test_a_weight_that_starts_from_none_is_learned_if_a_number_is_given():
    assert get_routing("dynamic").weights == {}
    routing = get_routing("dynamic,capsule_bias=0.1,prior_logits=0")
    assert routing.weights == {"prior_logits": (("i", "o"), 0.0), "capsule_bias": (("o", "h"), 0.1)}


@pytest.mark.parametrize("name", ROUTINGS)
def test_declared_axes_are_those_of_the_annotations(name):
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
def test_a_wrong_declaration_is_an_error_where_it_stands(axes, words):
    def f(votes, activations, *, must, poses=None, gain=1.0, bias=None): ...

    with pytest.raises(UsageError) as caught:
        learns(**axes)(f)
    assert str(caught.value) == f"Routing f: the learned weight {words}"


def test_a_wrong_declaration_is_told_by_the_command_as_it_is(tmp_path, monkeypatch):
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
def test_an_error_of_a_routing_is_told_with_its_place_and_has_the_original_as_its_cause(faulty, name, words, cause):
    with pytest.raises(UsageError) as caught:
        get_routing(f"{faulty}:{name}")(VOTES, ACTIVATIONS)
    assert str(caught.value).startswith(f"Routing {faulty}:{name} raises {words}")
    assert type(caught.value.__cause__) is cause
    frames = traceback.extract_tb(caught.value.__cause__.__traceback__)
    inside = [frame for frame in frames if frame.filename.endswith("faulty_routing.py")]
    assert [frame.name for frame in inside] == {"called": ["__call__"], "needs": []}.get(name, [name])
    if inside:
        assert str(caught.value).endswith(f" (faulty_routing.py, line {inside[-1].lineno}).")


def test_an_error_of_a_routing_is_told_alike_by_a_layer_with_the_traceback_of_the_function(faulty):
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, routing=f"{faulty}:divides", rngs=nnx.Rngs(0))
    capsules = Capsules(jnp.ones((2, INPUTS, 4)), jnp.ones((2, INPUTS)))
    words = "Routing faulty_routing:divides raises ZeroDivisionError: division by zero (faulty_routing.py, line 8)."
    for call in (layer, nnx.jit(layer)):
        with pytest.raises(UsageError) as caught:
            call(capsules)
        assert str(caught.value) == words
        assert type(caught.value.__cause__) is ZeroDivisionError
        assert "share = 1 / 0" in "".join(traceback.format_exception(caught.value))


def test_an_error_that_is_in_words_or_of_the_device_is_passed_on(faulty):
    with pytest.raises(UsageError, match=r"^Votes are cold.$"):
        get_routing(f"{faulty}:refuses")(VOTES, ACTIVATIONS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        get_routing(f"{faulty}:exhausts")(VOTES, ACTIVATIONS)


def test_an_error_outside_the_routing_is_not_blamed_on_it(monkeypatch):
    monkeypatch.setattr(CapsuleLayer, "votes", lambda layer, poses: 1 / 0)
    layer = CapsuleLayer(INPUTS, 4, OUTPUTS, SIZE, routing="uniform", rngs=nnx.Rngs(0))
    with pytest.raises(ZeroDivisionError, match=r"^division by zero$"):
        layer(Capsules(jnp.ones((2, INPUTS, 4)), jnp.ones((2, INPUTS))))


def test_options_are_of_the_type_of_their_annotation(tmp_path, monkeypatch):
    (tmp_path / "typed.py").write_text(
        "def f(votes, activations, *, top: int | None = None, sharp=2.0, name: str = 'a', flag: bool = False): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = dict(get_routing("typed:f, top=3, sharp=4, name=b, flag=True").options)
    assert options == {"top": 3, "sharp": 4.0, "name": "b", "flag": True}
    assert [type(options[name]) for name in ("top", "sharp")] == [int, float]


def test_a_partial_with_unknown_keywords_is_an_error():
    with pytest.raises(UsageError, match=r"binds \['leak'\]; expected keywords among num_iterations"):
        get_routing(partial(dynamic, leak=True))
