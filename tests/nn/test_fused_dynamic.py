"""Fused dynamic routing equals dynamic routing in values, first and second gradients, and needs less memory."""

import importlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet, Capsules, UsageError
from capsnet_jax.nn.fast.choice import choose_routing
from capsnet_jax.nn.fast.fused_dynamic import FUSED, fused_dynamic
from capsnet_jax.nn.layers import CapsuleLayer
from capsnet_jax.routing import dynamic, get_routing
from tests.conftest import IMAGE_SHAPE, SMALL

BATCH, INPUTS, DIM, OUTPUTS, SIZE = 3, 10, 4, 5, 6
BYTES_OF_CAPSULE = 4 * DIM * OUTPUTS * (BATCH + SIZE)
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}
ARGUMENTS = {
    "poses": (BATCH, INPUTS, DIM),
    "weight": (INPUTS, DIM, OUTPUTS, SIZE),
    "prior_logits": (INPUTS, OUTPUTS),
    "capsule_bias": (OUTPUTS, SIZE),
}
PLAIN, LEARNED = ("poses", "weight"), tuple(ARGUMENTS)

# Names of the differentiated arguments, and options.
CASES = [
    (LEARNED, {"num_iterations": 1, "leaky": True}),
    (PLAIN, {"num_iterations": 2, "leaky": True, "prior_logits": 0.7, "capsule_bias": 0.1}),
    (PLAIN, {"num_iterations": 3}),
    (LEARNED, {"num_iterations": 2, "detach": True}),
    *(
        pytest.param(names, options, marks=pytest.mark.exhaustive)
        for names, options in (
            (PLAIN, {"num_iterations": 1}),
            (LEARNED, {"num_iterations": 3, "detach": True}),
            (LEARNED, {"num_iterations": 4}),
            (("poses", "weight", "prior_logits"), {"num_iterations": 2, "leaky": True, "detach": True}),
            (("poses", "weight", "prior_logits"), {"num_iterations": 4, "leaky": True, "detach": True}),
        )
    ),
]


@pytest.fixture
def set_chunk(monkeypatch):
    """Set the number of input capsules per chunk; by default, a chunk has all of them."""
    module = importlib.import_module("capsnet_jax.nn.fast.fused_dynamic")  # its name in the package is the function's

    def set_chunk(capsules: int) -> None:
        for name in ("CHUNK_ON_CPU", "CHUNK_ELSEWHERE"):
            monkeypatch.setattr(module, name, capsules * BYTES_OF_CAPSULE)

    return set_chunk


@pytest.mark.parametrize(("names", "options"), CASES, ids=str)
def test_values_and_gradients_equal_those_of_dynamic(names, options, set_chunk):
    """With chunks of 4, 4 and 2 input capsules."""
    set_chunk(4)
    with jax.enable_x64(True):
        arguments = make_arguments(names)
        assert_all_close(
            values_and_gradients(partial(fused_dynamic, **options), arguments),
            values_and_gradients(partial(by_votes, **options), arguments),
        )


@pytest.mark.parametrize(("chunk", "lengths"), [(10, {10}), (5, {5}), (4, {4, 2}), (1, {1}), (0, {1})])
def test_the_length_of_chunks(chunk, lengths, set_chunk):
    set_chunk(chunk)
    arguments = make_arguments(PLAIN)
    program = str(jax.make_jaxpr(lambda arguments: fused_dynamic(**arguments, num_iterations=1))(arguments))
    slices = re.findall(rf"slice_sizes=\((\d+), {DIM}, {OUTPUTS}, {SIZE}\)", program)
    assert {int(length) for length in slices} == lengths


def test_platforms_have_chunks_of_their_own(monkeypatch):
    """With 10 capsules, chunks of 5 on CPU and of 4, 4 and 2 elsewhere; the results are the same."""
    module = importlib.import_module("capsnet_jax.nn.fast.fused_dynamic")
    for name, capsules in (("CHUNK_ON_CPU", 5), ("CHUNK_ELSEWHERE", 4)):
        monkeypatch.setattr(module, name, capsules * BYTES_OF_CAPSULE)
    traced = jax.jit(partial(fused_dynamic, num_iterations=2)).trace(**make_arguments(PLAIN))
    for platform, lengths in (("cpu", {5}), ("cuda", {4, 2})):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        slices = re.findall(rf"sizes = \[(\d+), {DIM}, {OUTPUTS}, {SIZE}\]", program)
        assert {int(length) for length in slices} == lengths, platform


@pytest.mark.parametrize("chunk", [5, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_the_size_of_chunks_changes_nothing(chunk, set_chunk):
    """Chunks of 4, with a remainder, are tested above, and a chunk of 1 is as one of 5."""
    set_chunk(chunk)
    with jax.enable_x64(True):
        arguments = make_arguments(LEARNED)
        fused, votes = (partial(function, num_iterations=2) for function in (fused_dynamic, by_votes))
        assert_all_close(values_and_gradients(fused, arguments), values_and_gradients(votes, arguments))


def test_vmap_over_models_changes_nothing(set_chunk):
    """Models of several seeds are trained under vmap."""
    set_chunk(4)
    with jax.enable_x64(True):
        seeds = [make_arguments(LEARNED, seed) for seed in (0, 1)]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *seeds)
        fused, votes = (partial(function, num_iterations=2) for function in (fused_dynamic, by_votes))
        mapped = jax.jit(jax.vmap(results_of(fused)), compiler_options=QUICKLY_COMPILED)(stacked)
        of_one_model = jax.jit(results_of(votes), compiler_options=QUICKLY_COMPILED)
        for seed, arguments in enumerate(seeds):
            ours = jax.tree.map(lambda array, seed=seed: np.asarray(array)[seed], mapped)
            assert_all_close(ours, of_one_model(arguments))


@pytest.mark.parametrize(
    ("names", "chunk"),
    [(PLAIN, 5), *(pytest.param(LEARNED, chunk, marks=pytest.mark.exhaustive) for chunk in (5, 4))],
    ids=str,
)
def test_second_gradients_equal_those_of_dynamic(names, chunk, set_chunk):
    set_chunk(chunk)

    def second(function):
        def squares_of_gradients(arguments):
            _, gradients = results_of(partial(function, num_iterations=2))(arguments)
            return sum(jnp.sum(gradient**2) for gradient in gradients.values())

        return jax.jit(jax.grad(squares_of_gradients), compiler_options=QUICKLY_COMPILED)(make_arguments(names))

    with jax.enable_x64(True):
        assert_all_close(second(fused_dynamic), second(by_votes))


def test_bfloat16_weights_give_results_close_to_float32_and_in_float32(set_chunk):
    set_chunk(4)
    arguments = {name: jnp.asarray(array, jnp.bfloat16) for name, array in make_arguments(LEARNED).items()}
    arguments["poses"] = arguments["poses"].astype("float32")
    fused, votes = (partial(function, num_iterations=2) for function in (fused_dynamic, by_votes))
    routed, gradients = values_and_gradients(fused, arguments)
    exact = {name: array.astype("float32") for name, array in arguments.items()}
    expected = values_and_gradients(votes, exact)
    assert {array.dtype for array in routed} == {jnp.dtype("float32")}
    assert {name: gradient.dtype for name, gradient in gradients.items()} == {
        name: array.dtype for name, array in arguments.items()
    }
    in_float32 = jax.tree.map(lambda array: array.astype("float32"), (routed, gradients))
    assert_all_close(in_float32, expected, tolerance=3e-2)


def test_gradients_are_finite_at_any_scale():
    gradients = jax.jit(jax.grad(lambda scale, poses, weight: fused_dynamic(scale * poses, weight).poses.sum(), (1, 2)))
    arguments = make_arguments(PLAIN)
    for scale in (0.0, 1e-30, 1e-10, 1e5, 1e10):
        assert all(np.isfinite(gradient).all() for gradient in gradients(scale, *arguments.values())), scale


def test_memory_does_not_grow_with_the_votes():
    """Temporary memory only; the votes of these batches alone would take 84 and 671 MB."""
    batch, dim, outputs, size = 16, 8, 10, 16

    def needed(inputs: int) -> int:
        shapes = (batch, inputs, dim), (inputs, dim, outputs, size)
        gradients = jax.jit(jax.grad(lambda poses, weight: jnp.sum(fused_dynamic(poses, weight).poses ** 2), (0, 1)))
        arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
        return gradients.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    of_few, of_many = needed(8_192), needed(65_536)
    assert 0 < of_many <= 4 * batch * 65_536 * outputs * size / 8
    # Transposed copies of the poses and of their gradient, which JAX 0.10 (unlike 0.12) writes into the result.
    assert of_many - of_few <= 2 * 4 * batch * (65_536 - 8_192) * dim + 1_024


@pytest.mark.parametrize("routing", ["dynamic", "dynamic,leaky=true,prior_logits=0.5,capsule_bias=0.1"])
def test_a_layer_returns_the_same_with_either_implementation(routing):
    """Also the couplings that `route` returns. "auto" uses votes for this few examples."""
    layers = {
        implementation: CapsuleLayer(
            INPUTS, DIM, OUTPUTS, SIZE, routing=routing, implementation=implementation, rngs=nnx.Rngs(0)
        )
        for implementation in ("votes", "fused", "auto")
    }
    poses = make_arguments(PLAIN)["poses"]
    capsules = Capsules(poses, jnp.ones(poses.shape[:2]))
    traced = {name: jax.jit(layer.route).trace(capsules) for name, layer in layers.items()}
    has_votes = {name: f"[{BATCH},{INPUTS},{OUTPUTS},{SIZE}]" in str(each.jaxpr) for name, each in traced.items()}
    assert has_votes == {"votes": True, "fused": False, "auto": True}
    fused, votes = (traced[name].lower().compile(QUICKLY_COMPILED)(capsules)._asdict() for name in ("fused", "votes"))
    for name, expected in votes.items():
        np.testing.assert_allclose(fused[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
    assert np.ptp(fused["couplings"]) > 0.2


def test_options_of_the_routing_reach_the_fused_implementation(set_chunk):
    """Number of iterations and options, however the routing is given."""
    set_chunk(4)
    arguments = make_arguments(PLAIN)
    expected = jax.jit(partial(by_votes, leaky=True, num_iterations=2))(**arguments)
    for routing in (
        "dynamic,leaky=true",
        partial(dynamic, leaky=True),
        "capsnet_jax.routing.dynamic:dynamic,leaky=true",
    ):
        bound = get_routing(routing, num_iterations=2)
        fused = partial(FUSED[bound.function], **dict(bound.options))
        np.testing.assert_allclose(jax.jit(fused)(**arguments).couplings, expected.couplings, rtol=1e-4)


def test_the_choice_of_implementation(monkeypatch):
    def chosen(routing, option, num_examples):
        return choose_routing(get_routing(routing), option, (num_examples, 1152, 10, 16)).name

    assert chosen("dynamic", "auto", 16) == "fused"
    assert chosen("dynamic", "auto", 15) == "votes"
    assert chosen("dynamic", "fused", 1) == "fused"
    assert chosen("dynamic", "votes", 16) == "votes"
    assert chosen("em", "auto", 16) == "votes"
    assert chosen("em", "votes", 16) == "votes"
    with monkeypatch.context() as patch:
        patch.setattr("jax.default_backend", lambda: "gpu")
        assert chosen("dynamic", "auto", 16) == "votes"
        assert chosen("dynamic", "auto", 2712) == "votes"  # 2.0 GB
        assert chosen("dynamic", "auto", 2713) == "fused"
        assert chosen("dynamic", "fused", 16) == "fused"
    monkeypatch.setattr("jax.device_count", lambda: 2)
    assert chosen("dynamic", "auto", 16) == "votes"
    assert chosen("dynamic", "fused", 16) == "fused"


@pytest.mark.parametrize("num_iterations", [0, -2])
def test_no_iteration_is_an_error(num_iterations):
    arguments = make_arguments(PLAIN)
    with pytest.raises(UsageError, match=rf"dynamic: num_iterations is {num_iterations}, and must be at least 1"):
        fused_dynamic(**arguments, num_iterations=num_iterations)
    with pytest.raises(UsageError, match=rf"dynamic: num_iterations is {num_iterations}, and must be at least 1"):
        CapsuleLayer(
            INPUTS,
            DIM,
            OUTPUTS,
            SIZE,
            num_iterations=num_iterations,
            implementation="fused",
            rngs=nnx.Rngs(0),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing_implementation": "fast"}, "routing_implementation is 'fast'; expected auto, votes, fused"),
        ({"routing_implementation": "fused", "routing": "em"}, "Routing em has no .*without votes.*dynamic"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_implementation_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        CapsNet(IMAGE_SHAPE, 10, **SMALL, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("implementation", ["votes", "fused"])
def test_a_wrong_number_of_input_capsules_is_refused(implementation):
    layer = CapsuleLayer(INPUTS, DIM, OUTPUTS, SIZE, implementation=implementation, rngs=nnx.Rngs(0))
    for inputs in (INPUTS - 1, INPUTS + 1):
        poses = jnp.ones((BATCH, inputs, DIM))
        with pytest.raises((TypeError, ValueError)):
            layer(Capsules(poses, poses[..., 0]))


def make_arguments(names, seed=0):
    """Random arguments for which some couplings are several times larger than others."""
    rng = np.random.default_rng(seed)
    values = {name: jnp.asarray(0.8 * rng.normal(size=shape)) for name, shape in ARGUMENTS.items()}
    return {name: values[name] for name in names}


def by_votes(poses, weight, **options):
    """Dynamic routing of the votes of each example."""
    votes = jnp.einsum("bid,idoh->bioh", poses, weight)
    return jax.vmap(lambda votes: dynamic(votes, jnp.ones(len(votes), votes.dtype), **options))(votes)


def results_of(function):
    """Make a function that returns the routing result, and the gradients of a weighted sum of it."""
    rng = np.random.default_rng(7)
    shapes = (BATCH, OUTPUTS, SIZE), (BATCH, OUTPUTS), (BATCH, INPUTS, OUTPUTS)
    coefficients = [rng.normal(size=shape) for shape in shapes]

    def weighted_sum(arguments):
        routed = function(**arguments)
        terms = zip(coefficients, routed, strict=True)
        return sum(jnp.sum(coefficient.astype(array.dtype) * array) for coefficient, array in terms), routed

    def results(arguments):
        gradients, routed = jax.grad(weighted_sum, has_aux=True)(arguments)
        return routed, gradients

    return results


def values_and_gradients(function, arguments):
    return jax.jit(results_of(function), compiler_options=QUICKLY_COMPILED)(arguments)


def assert_all_close(actual, expected, tolerance=1e-12):
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (name, ours), theirs in pairs:
        assert ours.shape == theirs.shape, name
        assert ours.dtype == theirs.dtype, name
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= tolerance, f"{jax.tree_util.keystr(name)}: {error:.1e}"
