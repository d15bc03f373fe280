"""Mistakes that are planted in the JAX side, and for each the check that must be the first to catch it.

A mutant is a row of a table: the model or routing in which it is planted, the mistake, the check that must catch it,
the function that is replaced, and its replacement.
"""

import functools
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx

from capsnet_jax.capsules import Routed
from capsnet_jax.nn.fast import fused_dynamic
from capsnet_jax.ops import squash
from capsnet_verify.routings import INPUTS, OUTPUTS, SIZE, Case
from capsnet_verify.subjects import EVERY_TERM, SMALL, Subject, of_model

PLAIN = of_model("small", SMALL)
TWO_LABELS = of_model("standardized images of two classes", replace(SMALL, standardize_images=True), labels_per_image=2)
NORMALIZED = of_model("batch normalization", replace(SMALL, batch_norm=True))
# A CPU multiplies the patches under these kernels in one gradient.
LARGE = of_model("large kernels", replace(SMALL, stem_kernel=6, primary_kernel=6))
# With so many channels, it does so for features, too.
PATCHES = of_model(
    "large kernels, eight channels",
    replace(SMALL, image_shape=(22, 24, 8), stem_channels=8, stem_kernel=6, primary_kernel=6),
)
# Its primary kernel is larger than the output; GPUs convolve blocks of pixels.
BLOCKS = of_model("large strided kernel", replace(SMALL, image_shape=(14, 13, 2)))
# A CPU uses Fourier transforms for its primary kernel.
SPECTRAL = of_model(
    "many channels",
    replace(SMALL, stem_channels=32, primary_groups=8, primary_dim=8, primary_kernel=7, primary_stride=1),
)

Function = Callable[..., Any]
Table = dict[str, list[tuple[str, str, str, Any]]]


class Mutant(NamedTuple):
    """A mistake in the JAX side.

    Attributes:
        subject: a model or routing in which the mistake has an effect.
        mistake: what is wrong, in words.
        caught_by: name of the check that must be the first to differ; None if nothing is wrong.
        place: dotted name of the function that is replaced.
        wrong: what replaces it.
    """

    subject: Subject | Case
    mistake: str
    caught_by: str | None = None
    place: str = ""
    wrong: Any = None

    def __str__(self) -> str:
        return self.mistake.replace(" ", "_")

    def planted(self) -> AbstractContextManager[Any]:
        """Return a context in which the function is replaced."""
        if not self.place:
            return nullcontext()
        if isinstance(self.wrong, _MadeOf):
            return mock.patch(self.place, self.wrong.make(pkgutil.resolve_name(self.place)))
        return mock.patch(self.place, self.wrong)


class _MadeOf(NamedTuple):
    """A replacement that is made from the right function, again for every run."""

    make: Callable[[Function], Function]


def _by(change: Function) -> _MadeOf:
    """Make a replacement that passes the right function and its arguments to another function."""
    return _MadeOf(lambda right: functools.wraps(right)(lambda *args, **options: change(right, *args, **options)))


def _given(**arguments: Any) -> _MadeOf:
    """Make a replacement that always passes these arguments to the right function."""
    return _by(lambda right, *args, **options: right(*args, **options | arguments))


def _times(factor: float) -> _MadeOf:
    """Make a replacement that multiplies the result of the right function."""
    return _by(lambda right, *args, **options: factor * right(*args, **options))


def _knowing(argument: str, place: str, wrong_for: Callable[[Any], Function]) -> _MadeOf:
    """Make a replacement that calls the right function while another one is replaced, depending on an argument."""

    def change(right: Function, *args: Any, **options: Any) -> Any:
        with mock.patch(place, wrong_for(options[argument])):
            return right(*args, **options)

    return _by(change)


def _changed(pattern: str, change: Callable[[list[Any]], Any]) -> _MadeOf:
    """Make a replacement of einsum or an einops function that changes the results of calls with this pattern."""

    def make(right: Function) -> Function:
        results: list[Any] = []

        def wrong(*arguments: Any, **sizes: int) -> Any:
            result = right(*arguments, **sizes)
            if not any(isinstance(argument, str) and argument == pattern for argument in arguments):
                return result
            results.append(result)
            return change(results)

        return wrong

    return _MadeOf(make)


def _like(module: ModuleType, **others: Any) -> SimpleNamespace:
    """Copy a module with some functions replaced, for one of the modules that use it."""
    return SimpleNamespace(**vars(module) | others)


softmax, constant = jax.nn.softmax, jax.lax.stop_gradient  # the right functions, for use in replacements


def _over_inputs(logits: jax.Array, axis: int) -> jax.Array:
    return softmax(logits, axis=1 - axis)


# Models.


def _no_agreement(logits: jax.Array, axis: int) -> jax.Array:
    return softmax(0 * logits, axis=axis)


def _no_gradient_of_agreement(logits: jax.Array, axis: int) -> jax.Array:
    return softmax(constant(logits), axis=axis)


def _averaging_logits(vmap: Function, function: Function) -> Function:
    def averaged(logits: jax.Array, leaky: bool) -> jax.Array:
        return softmax(jax.lax.pmean(logits, "batch"))

    def route(*arguments: Any) -> Any:
        with mock.patch("capsnet_jax.routing.dynamic._softmax", averaged):
            return function(*arguments)

    return vmap(route, axis_name="batch")


def _as_capsules(wrong: Function) -> _MadeOf:
    """Make a replacement of `rearrange` that divides the channels of the primary capsules in another way."""
    return _by(lambda right, *arguments, **sizes: (wrong if "groups" in sizes else right)(*arguments, **sizes))


def _in_order(pattern: str) -> _MadeOf:
    return _as_capsules(lambda features, _, groups: rearrange(features, pattern, groups=groups))


def _of_neighbouring_pixels(features: jax.Array, _: str, groups: int) -> jax.Array:
    return features.transpose(0, 3, 1, 2).reshape(len(features), -1, features.shape[-1] // groups)


_groups_first = _in_order("b height width (groups d) -> b (groups height width) d")
_strided = _in_order("b height width (d groups) -> b (height width groups) d")
_apart = partial(jax.nn.standardize, axis=(1, 2))
_next_label = _by(lambda mask, poses, labels: mask(poses, (labels + 1) % poses.shape[1]))
_first_label = _by(lambda multi_hot, labels, *rest: multi_hot(labels[:, 0], *rest))
_mirrored = _by(
    lambda convolve, images, kernel, *args, **options: convolve(images, kernel[::-1, ::-1], *args, **options)
)


def _together(images: jax.Array) -> jax.Array:
    return (images - images.mean()) / images.std()


def _nothing(model: Any) -> None:
    pass


def _with(**constants: float) -> _MadeOf:
    """Batch normalization with other constants."""

    def call(right: Function, norm: nnx.BatchNorm, *args: Any) -> Any:
        vars(norm).update(constants)
        return right(norm, *args)

    return _by(call)


def _no_gradient_of_images(backward: Function, *arguments: Any) -> Any:
    of_images, of_kernel = backward(*arguments)
    return jnp.zeros_like(of_images), of_kernel


# Routings alone.


def _accumulated(softmax: Function) -> Function:
    seen: list[jax.Array] = []

    def wrong(logits: jax.Array, axis: int) -> jax.Array:
        seen.append(logits)
        return softmax(sum(seen[1:], start=seen[0]), axis=axis)

    return wrong


def _renormalized(logits: jax.Array, leaky: bool) -> jax.Array:
    return softmax(logits, axis=1)


def _with_leak(logits: jax.Array, leaky: bool) -> jax.Array:
    return softmax(jnp.pad(logits, ((0, 0), (1, 0))), axis=1)[:, :-1]


def _constant_couplings(logits: jax.Array, *_: Any) -> jax.Array:
    return constant(softmax(logits, axis=-1))


def _bias_after(place: str) -> _MadeOf:
    return _knowing("capsule_bias", place, lambda bias: lambda poses: squash(poses - bias) + bias)


def _without_prior_later(prior: jax.Array) -> Function:
    calls = itertools.count()
    return lambda logits, leaky: softmax(logits - (prior if next(calls) else 0), axis=1)


def _with_prior_inside(prior: jax.Array) -> Function:
    return lambda logits, axis: softmax(logits + prior, axis=axis) - prior


def _every_second(change: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda results: results[-1] if len(results) % 2 else change(results)


_prior_at_first = _knowing("prior_logits", "capsnet_jax.routing.dynamic._softmax", _without_prior_later)
_prior_inside = _knowing("prior", "jax.nn.softmax", _with_prior_inside)
_votes_added_up = _changed("... o i -> ... o 1", lambda results: jnp.ones_like(results[-1]))
# In EM, calls with these patterns give in turn means and variances, costs and densities.
_about_zero = _changed("...oi,...oih->...oh", _every_second(lambda results: results[-1] + jnp.square(results[-2])))
_no_density = _changed("... o h -> ... o", _every_second(lambda results: 0 * results[-1]))
_no_cost = _changed("... o h -> ... o", lambda results: (1 - len(results) % 2) * results[-1])
# In variational routing, with this one kappa and nu.
_no_nu = _changed("... o 1 -> ... 1 o", _every_second(lambda results: jnp.ones_like(results[-1])))
_sharper = _by(lambda softmax, logits, axis: softmax(SIZE**0.5 * logits, axis=axis))
_ignoring = _by(lambda route, votes, activations, **options: route(votes, jnp.ones_like(activations), **options))


def _deviations(einsum: Function, pattern: str, *arrays: jax.Array) -> jax.Array:
    if pattern == "...oih,...oh->...oi":  # the second are 1 / (2 variance)
        return einsum(pattern, arrays[0], jnp.sqrt(arrays[1] / 2))
    return einsum(pattern, *arrays)


def _no_mixing_proportions(digamma: Function, values: jax.Array) -> jax.Array:
    return digamma(values) if values.shape == (OUTPUTS, SIZE) else jnp.zeros_like(values)


def _not_standardized(values: jax.Array, epsilon: float) -> jax.Array:
    return values


def _over_capsules(standardize: Function, poses: jax.Array, epsilon: float) -> jax.Array:
    return standardize(poses.T, epsilon=epsilon).T


def _poses_times_mass(route: Function, votes: jax.Array, activations: jax.Array, **options: Any) -> Routed:
    routed = route(votes, activations, **options)
    mass = (activations[:, None] * routed.couplings).sum(axis=0)
    return routed._replace(poses=routed.poses * mass[:, None])


def _activations_times_mass(route: Function, votes: jax.Array, activations: jax.Array, **options: Any) -> Routed:
    routed = route(votes, activations, **options)
    return routed._replace(activations=routed.activations * activations.sum())


def _shares_of_inputs(votes: jax.Array, share: float) -> jax.Array:
    return jnp.full_like(votes, 1 / INPUTS)


def _exponential(seed: int) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    return SimpleNamespace(dirichlet=lambda ones, number: rng.exponential(size=(number, len(ones))))


# Dynamic routing without votes; the replaced functions are in its module.

# Results of calls with these patterns are added to earlier ones, and subtracted for the gradient of a softmax.
_last_alone = _changed("b o h -> o h b", lambda results: results[-1] - sum(results[-2:-1]))
_first_constant = _changed("b o h -> o h b", lambda results: results[-1] if results[1:] else constant(results[-1]))
_of_exponential = _changed("o i b -> 1 i b", lambda results: 0 * results[-1])
_no_leak_at_first = _by(lambda uniform_sum, leaky, *rest: uniform_sum(False, *rest))
_not_detached = _by(lambda coupled_sum, leaky, detach: coupled_sum(leaky, False))
_no_first_chunk = _by(lambda loop, first, *rest: loop(first + 1, *rest))
_to_the_first = _by(lambda update, whole, part, start, axis: update(whole, part, 0, axis))


def _fused_over_inputs(logits: jax.Array, axis: int) -> jax.Array:
    return softmax(logits, axis=1)


def _leak_first(logits: jax.Array, axis: int) -> jax.Array:
    """Compute couplings in another order: the first, taken for the leak, belongs to the last output."""
    return jnp.roll(softmax(logits, axis=axis), 1, axis=axis)


def _without_prior(couplings: Function, leaky: bool, detach: bool, operands: Any, projected: jax.Array) -> jax.Array:
    return couplings(leaky, detach, operands._replace(prior=None), projected)


def _uniform_at_first(sum_over_inputs: Function) -> Function:
    calls, uniform = itertools.count(), partial(fused_dynamic._uniform_sum, True)
    return lambda summed, *rest: sum_over_inputs(summed if next(calls) else uniform, *rest)


def _no_last_chunk(over_chunks: Function, step: Any, initial: Any, operands: Any) -> Any:
    """Leave out the last 3 of the 11 input capsules, a chunk of its own as chunks have 4."""
    return over_chunks(step, initial, jax.tree.map(lambda array: array[:-3], operands))


def _agreed_of_last_chunk(over_chunks: Function, step: Any, initial: Any, operands: Any) -> Any:
    def forgetful(carry: Any, *chunk: Any) -> Any:
        return step((carry[0], jnp.zeros_like(carry[1])) if isinstance(carry, tuple) else carry, *chunk)

    return over_chunks(forgetful, initial, operands)


def _constant_for(name: str) -> _MadeOf:
    """Make a backward pass of a sum of votes in which couplings are constants for one of the gradients."""

    def change(backward: Function, leaky: bool, detach: bool, *arguments: Any) -> Any:
        gradients, of_agreed = backward(leaky, detach, *arguments)
        detached, zeros = backward(leaky, True, *arguments)
        if name == "agreed":
            return gradients, zeros
        return gradients._replace(**{name: getattr(detached, name)}), of_agreed

    return _by(change)


def _no_gradient_of_prior(backward: Function, *arguments: Any) -> Any:
    gradients, of_agreed = backward(*arguments)
    return gradients._replace(prior=jax.tree.map(jnp.zeros_like, gradients.prior)), of_agreed


def _first_gradient_alone(backward: Function, summed: Any, arguments: Any, cotangents: Any) -> Any:
    of_sums, of_operands = cotangents
    return backward(summed, arguments, (of_sums, jax.tree.map(jnp.zeros_like, of_operands)))


NN, DYNAMIC, NORM = "capsnet_jax.nn", "capsnet_jax.routing.dynamic", "flax.nnx.BatchNorm.__call__"
LAYERS, FUSED, CONVOLUTION = f"{NN}.layers", f"{NN}.fast.fused_dynamic", f"{NN}.fast.convolution"
OF_BIAS = "gradient encoder.image2primary_capsules.0.bias"
OF_VOTES = "gradient encoder.primary2digit_capsules.input_caps2U.weight"

MODELS = [
    (PLAIN, "softmax over input capsules", "couplings 0", "jax.nn.softmax", _over_inputs),
    (PLAIN, "one iteration fewer", "couplings 0", f"{DYNAMIC}.range", lambda number: range(number - 1)),
    (PLAIN, "squash along the capsules", "couplings 0", f"{DYNAMIC}.squash", lambda poses: squash(poses.T).T),
    (PLAIN, "no agreement update at all", "couplings 0", "jax.nn.softmax", _no_agreement),
    (PLAIN, "no gradient through the agreement", OF_VOTES, "jax.nn.softmax", _no_gradient_of_agreement),
    (PLAIN, "logits averaged over the batch", "couplings 0", "jax.vmap", _by(_averaging_logits)),
    (PLAIN, "groups before positions", "primary poses", f"{LAYERS}.rearrange", _groups_first),
    (PLAIN, "a capsule's channels strided over groups", "primary poses", f"{LAYERS}.rearrange", _strided),
    (
        PLAIN,
        "capsules of neighbouring pixels",
        "primary poses",
        f"{LAYERS}.rearrange",
        _as_capsules(_of_neighbouring_pixels),
    ),
    (PLAIN, "decoder masked by the wrong label", "reconstructions", f"{NN}.model.mask_by_label", _next_label),
    (TWO_LABELS, "images standardized together", "stem 0", f"{LAYERS}.standardize_images", _together),
    (TWO_LABELS, "channels standardized apart", "stem 0", f"{LAYERS}.standardize_images", _apart),
    (TWO_LABELS, "only the first of two labels kept", "decoder 0", "capsnet_jax.ops.multi_hot", _first_label),
    (TWO_LABELS, "only the first of two labels wanted", "margin loss", f"{NN}.losses.multi_hot", _first_label),
    (TWO_LABELS, "targets of two labels that sum to 1", "margin loss", f"{NN}.losses.multi_hot", _times(0.5)),
    (NORMALIZED, "softmax over normalized inputs", "couplings 0", "jax.nn.softmax", _over_inputs),
    (NORMALIZED, "no evaluation mode", "poses with running means", f"{NN}.model.CapsNet.eval", _nothing),
    (NORMALIZED, "another epsilon of batch normalization", "stem 0", NORM, _with(epsilon=1e-5)),
    (NORMALIZED, "another momentum of batch normalization", "step 1", NORM, _with(momentum=0.01)),
    (
        PLAIN,
        "kernel mirrored in the gradient of a convolution",
        OF_BIAS,
        f"{CONVOLUTION}.rearrange",
        _changed("height width channels features -> height width features channels", lambda results: results[-1][::-1]),
    ),
    (LARGE, "no gradient of images by patches", OF_BIAS, f"{CONVOLUTION}.by_patches", _times(0)),
    (SPECTRAL, "kernel mirrored in spectra", "primary poses", f"{CONVOLUTION}.fourier", _mirrored),
    (
        SPECTRAL,
        "no gradient of images by spectra",
        OF_BIAS,
        f"{NN}.fast.fourier._backward",
        _by(_no_gradient_of_images),
    ),
    (PLAIN, "Adam with epsilon in the root", "step 1", "optax.adam", _given(eps=0, eps_root=1e-8)),
    (PLAIN, "Adam with Nesterov momentum", "step 1", "optax.adam", optax.nadam),
    (PLAIN, "Adam with another second moment", "step 2", "optax.adam", _given(b2=0.99)),
    (PLAIN, "Adam with decayed weights", "step 1", "optax.adam", partial(optax.adamw, weight_decay=1e-2)),
]
# Mistakes in implementations that a batch of 3 on a CPU does not use.
IN_ONE_IMPLEMENTATION = [
    (PLAIN, "fused softmax over inputs", "couplings 0, batch of 16", "jax.nn.softmax", _fused_over_inputs),
    (
        PLAIN,
        "fused agreement without gradient",
        f"{OF_VOTES}, batch of 16",
        f"{FUSED}._coupled_sum_backward",
        _constant_for("agreed"),
    ),
    (PATCHES, "kernel mirrored by XLA", "stem 0, batch of 3 as on GPU", f"{CONVOLUTION}.convolution", _mirrored),
    (
        BLOCKS,
        "pixels of a block in another order than taps",
        "primary poses, batch of 3 as on GPU",
        f"{CONVOLUTION}.rearrange",
        _changed("(i p) (j q) c f -> i j (p q c) f", lambda results: jnp.roll(results[-1], 1, axis=2)),
    ),
]

# For each routing: the mistake, the check, the function in the module of the routing or in JAX, and its replacement.
LEARNED = "dynamic,prior_logits=0,capsule_bias=0.1"
ROUTINGS: Table = {
    "dynamic": [
        ("softmax over inputs", "couplings", "jax.nn.softmax", _over_inputs),
        ("detaches without the option", "gradient of votes", "dynamic", _given(detach=True)),
    ],
    "dynamic,leaky=true": [
        ("leaks and renormalizes", "couplings", "_softmax", _renormalized),
        ("returns the leak", "couplings", "_softmax", _with_leak),
        ("leaks from the second iteration on", "couplings", "reduce", _times((OUTPUTS + 1) / OUTPUTS)),
    ],
    "dynamic,detach=true": [("detaches nothing", "gradient of votes", "dynamic", _given(detach=False))],
    f"{LEARNED},detach=true": [
        ("detaches the last couplings, too", "gradient of prior_logits", "_softmax", _constant_couplings),
    ],
    LEARNED: [
        ("bias after squash", "couplings", "dynamic", _bias_after(f"{DYNAMIC}.squash")),
        ("prior in the first iteration only", "couplings", "dynamic", _prior_at_first),
    ],
    EVERY_TERM["em"]: [
        ("softmax over inputs", "couplings", "em", _given(softmax=partial(softmax, axis=-2))),
        ("E step ignores output activations", "couplings", "jax.nn.log_sigmoid", jnp.zeros_like),
        ("M step ignores input activations", "couplings", "em", _ignoring),
        ("votes added up, not averaged", "couplings", "reduce", _votes_added_up),
        ("variance about zero", "couplings", "jax.numpy.einsum", _about_zero),
        ("deviation for variance", "couplings", "jax.numpy.einsum", _by(_deviations)),
        ("density not normalized", "couplings", "reduce", _no_density),
        ("cost without deviations", "couplings", "reduce", _no_cost),
        ("no annealing", "couplings", "em", _given(annealing=0.0)),
        ("no gradient through couplings", "gradient of votes", "em", _given(softmax=_constant_couplings)),
    ],
    "variational": [
        ("softmax over inputs", "couplings", "variational", _given(softmax=partial(softmax, axis=-2))),
        ("no mixing proportions", "couplings", "digamma", _by(_no_mixing_proportions)),
        ("ignores input activations", "couplings", "variational", _ignoring),
        ("logarithm for digamma", "couplings", "digamma", jnp.log),
        ("one degree of freedom", "couplings", "jnp", _like(jnp, arange=jnp.zeros)),
        ("no prior of the means", "couplings", "variational", _given(kappa0=0.0)),
        ("distances without nu", "couplings", "rearrange", _no_nu),
        ("absolute deviations for squares", "couplings", "jnp", _like(jnp, square=jnp.abs)),
        ("activations not normalized", "activations", "standardize", _not_standardized),
        ("entropy of a full share", "activations", "jnp", _like(jnp, exp=jnp.ones_like)),
    ],
    "self_attention": [
        ("softmax over inputs", "couplings", "jax.nn.softmax", _over_inputs),
        ("no division by the root of h", "couplings", "reduce", _times(SIZE**0.5)),
        ("prior inside the softmax", "couplings", "self_attention", _prior_inside),
        ("the other squash", "poses", "exponential_squash", squash),
    ],
    "inverted_attention": [
        ("softmax over inputs", "couplings", "jax.nn.softmax", _over_inputs),
        ("no division by the root of h", "couplings", "jax.nn.softmax", _sharper),
        ("no layer norm", "couplings", "standardize", _not_standardized),
        ("layer norm over capsules", "couplings", "standardize", _by(_over_capsules)),
        ("no gain", "couplings", "inverted_attention", _given(gain=1.0)),
        ("no readout bias", "activations", "inverted_attention", _given(readout_bias=0.0)),
    ],
    "self_routing": [
        ("softmax over inputs", "couplings", "jax.nn.softmax", _over_inputs),
        ("no bias", "couplings", "self_routing", _given(route_bias=0.0)),
        ("ignores activations", "poses", "self_routing", _ignoring),
        ("poses not normalized", "poses", "self_routing", _by(_poses_times_mass)),
        ("activations not normalized", "activations", "self_routing", _by(_activations_times_mass)),
    ],
    "kmeans": [
        ("softmax over inputs", "couplings", "jax.nn.softmax", _over_inputs),
        ("logits accumulated", "couplings", "jax.nn.softmax", _MadeOf(_accumulated)),
        ("agreement for cosine", "couplings", "direction", lambda poses: poses),
        ("squashed in each iteration", "poses", "squash", lambda poses: squash(squash(poses))),
    ],
    "uniform": [
        ("shares of the inputs", "couplings", "jnp", _like(jnp, full_like=_shares_of_inputs)),
        ("sum for mean", "poses", "reduce", _times(OUTPUTS)),
    ],
    "random": [("not normalized", "couplings", "np", _like(np, random=SimpleNamespace(default_rng=_exponential)))],
    "random,seed=3": [("seed ignored", "couplings", "random", _given(seed=0))],
}
FUSED_ROUTINGS: Table = {
    "dynamic": [
        ("softmax over inputs", "couplings", "jax.nn.softmax", _fused_over_inputs),
        ("agreement with the last poses alone", "couplings", "rearrange", _last_alone),
        ("last chunk left out", "couplings", "_over_chunks", _by(_no_last_chunk)),
        ("first chunk left out", "couplings", "jax.lax.fori_loop", _no_first_chunk),
        ("detaches without the option", "gradient of poses", "fused_dynamic", _given(detach=True)),
        ("detaches the first iteration", "gradient of poses", "rearrange", _first_constant),
        ("gradient of an exponential for the softmax's", "gradient of poses", "reduce", _of_exponential),
        ("no gradient of poses by couplings", "gradient of poses", "_coupled_sum_backward", _constant_for("poses")),
        ("no gradient of weight by couplings", "gradient of weight", "_coupled_sum_backward", _constant_for("weight")),
        ("no gradient of the agreement", "gradient of poses", "_coupled_sum_backward", _constant_for("agreed")),
        (
            "gradient of the last chunk's agreement alone",
            "gradient of poses",
            "_over_chunks",
            _by(_agreed_of_last_chunk),
        ),
        ("gradient of the first iteration alone", "gradient of poses", "_backward", _by(_first_gradient_alone)),
        ("gradients go to the first chunk", "gradient of poses", "jax.lax.dynamic_update_slice_in_dim", _to_the_first),
    ],
    "dynamic,leaky=true": [
        ("leaks from the second iteration on", "couplings", "_uniform_sum", _no_leak_at_first),
        ("returns the leak", "couplings", "jax.nn.softmax", _leak_first),
    ],
    "dynamic,detach=true": [
        ("detaches nothing", "gradient of poses", "fused_dynamic", _given(detach=False)),
        ("detaches the output poses alone", "gradient of poses", "_coupled_sum", _not_detached),
    ],
    EVERY_TERM["dynamic"]: [
        ("bias after squash", "couplings", "fused_dynamic", _bias_after(f"{FUSED}.squash")),
        ("no prior in the first iteration", "couplings", "_sum_over_inputs", _MadeOf(_uniform_at_first)),
        ("no prior in later iterations", "couplings", "_couplings", _by(_without_prior)),
        ("no gradient of the prior", "gradient of prior_logits", "_coupled_sum_backward", _by(_no_gradient_of_prior)),
    ],
}


def _of_routings(table: Table, kind: str) -> Iterator[Mutant]:
    for spec, rows in table.items():
        case = Case(spec, kind=kind)
        module = FUSED if kind == "fused" else f"capsnet_jax.routing.{case.name}"
        title = "dynamic without votes" if kind == "fused" else case.name
        for mistake, caught_by, place, wrong in rows:
            place = place if place.startswith("jax.") else f"{module}.{place}"
            yield Mutant(case, f"{title}: {mistake}", caught_by, place, wrong)


AT_EACH_POSITION: Table = {
    EVERY_TERM[name]: [("softmax at each position", "couplings", name, _given(softmax=softmax))]
    for name in ("em", "variational")
}
OF_MODELS, OF_IMPLEMENTATIONS = ([Mutant(*row) for row in rows] for rows in (MODELS, IN_ONE_IMPLEMENTATION))
OF_ROUTINGS = [*_of_routings(ROUTINGS, "votes"), *_of_routings(AT_EACH_POSITION, "positions")]
OF_FUSED = [*_of_routings(FUSED_ROUTINGS, "fused")]
MUTANTS = [*OF_MODELS, *OF_IMPLEMENTATIONS, *OF_ROUTINGS, *OF_FUSED]
