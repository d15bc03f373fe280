"""Compare any PyTorch module with a JAX model that has the module's weights."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from capsnet_jax.config import ModelConfig
from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.interchange.weights import StateDict, from_torch, to_torch
from capsnet_jax.routing import get_routing
from capsnet_torch import CapsNet
from capsnet_torch.losses import margin_loss, reconstruction_loss, spread_loss, spread_margin
from capsnet_torch.ops import Images
from capsnet_verify.causes import VISIBLE, cause, usual_cause
from capsnet_verify.checks import AGREES, DIFFERS, Array, Check, compare
from capsnet_verify.deviations import Deviation, deviations, explanation
from capsnet_verify.foreign_module import ForeignModule, named_inputs, run
from capsnet_verify.pair import Pair, add_noise, both_on, new_pair
from capsnet_verify.proposal import ALONE, propose_map, propose_outputs
from capsnet_verify.scaling import scale_weights
from capsnet_verify.subjects import Settings, Subject, as_settings
from capsnet_verify.values import AT_REST, CHANNELS_LAST, in_jax, in_torch
from capsnet_verify.verification import Verification, compare_in_order
from capsnet_verify.weight_map import LABELS, OUTPUTS, Part, Shape, WeightMap, patterns, toml_line

NAMES = {"encoded poses": "poses", "encoded activations": "activations"}  # in a map
HAVE_CHANNELS = ("stem", "reconstructions")  # which are the first axis after the batch in PyTorch
Change = tuple[list[Part], Deviation | None]  # other lines of the map, and a deviation of the module
DERIVED = ("gradient", "margin loss", "reconstruction loss", "total loss")  # from the outputs, not returned by a module


def verify_module(module: nn.Module, weight_map: WeightMap, subject: Subject, settings: Settings) -> Verification:
    """Compare a module with a JAX model that gets the module's weights.

    Values and outputs in the map are compared in forward order, then the loss and the gradient of each weight. Constant
    weights get noise, and weights of capsule layers are scaled; see `scale_weights`. Without reconstructions in the
    map, the JAX model has no decoder. With reconstructions but without labels, `forward` must mask by its own largest
    activation, and those classes are the labels.

    Args:
        module: its dtype, device and mode are changed.
        weight_map: map from the weights and outputs of the module to those of the JAX model.
        subject: sizes and losses of the JAX model; its weights are not used.
        settings: how to compare; there are no training steps.

    Raises:
        UsageError: the map does not fit the module or the JAX model, or the module raises.
    """
    outputs = {part.name for part in weight_map.outputs}
    if "reconstructions" in outputs and subject.run.config.model.decoder_hidden is None:
        raise UsageError(f"{weight_map.path}: [outputs] has reconstructions, and the JAX model has no decoder.")
    verification = Verification(subject, settings)
    with both_on(settings.device, settings.dtype):
        pair, shapes = _new_pair(subject, settings, decoder="reconstructions" in outputs)
        settings.check_names(shapes)
        foreign = ForeignModule(module, weight_map, pair, shapes)
        rng = np.random.default_rng(settings.seed)
        from_torch(pair.jax_model, {name: add_noise(name, array, rng) for name, array in foreign.state().items()})
        verification.scalings = scale_weights(pair)
        weights = {name: torch.tensor(array).requires_grad_() for name, array in to_torch(pair.jax_model).items()}
        found = {}
        if AT_REST in shapes and "poses" in outputs:
            foreign.module.eval()
            found[AT_REST] = foreign.call(weights)["poses"]
        elif AT_REST in shapes:
            foreign.notes.append("Running means were not compared, as there are no poses among [outputs].")
        foreign.settle(weights)
        if not foreign.module.training:
            pair.jax_model.eval()
        found |= foreign.call(weights)
        activations = found["activations"] if "activations" in found else found["poses"].norm(dim=2)
        if weight_map.labels is None and "reconstructions" in outputs:
            foreign.labels = activations.argmax(dim=1)
            pair = pair._replace(labels=jnp.asarray(foreign.labels.numpy(force=True), "int32"))
        found["total loss"] = _loss(activations, found.get("reconstructions"), foreign, pair.loss)
        found |= _gradients(
            found["total loss"], {name: weights[name] for name in weights if f"gradient {name}" in shapes}
        )
        values = _as_in_map(in_jax(pair))
        norms = compare("", np.linalg.norm(values["poses"], axis=2), values["activations"], tolerance=1e-2)
        if "activations" not in outputs and norms.verdict == DIFFERS:
            raise UsageError(f"{weight_map.path}: [outputs] lacks activations, which are not the norms of poses here.")
        verification.notes = foreign.notes
        expected = {name: found[name].numpy(force=True) for name in shapes if name in found}
        _compare(
            verification,
            values,
            expected,
            names=shapes,
            explain=partial(_explain, foreign, pair, weights),
            replay=lambda: _as_in_map(in_jax(pair, given=_as_in_jax(expected))),
        )
    return verification


def propose(module: nn.Module, subject: Subject, settings: Settings) -> str:
    """Propose a map from names and shapes of weights and outputs.

    Args:
        module: its dtype, device and mode are changed.
        subject: sizes of the JAX model.
        settings: how the module will be verified.
    """
    with both_on(settings.device, settings.dtype):
        pair, shapes = _new_pair(subject, settings, decoder=subject.run.config.model.decoder_hidden is not None)
        images, labels = pair.torch_batch
        config = pair.jax_model.config
        module.to(images).eval()
        errors: list[BaseException] = []
        for kind in (None, *LABELS):
            inputs = named_inputs(images, labels, kind, config.num_classes)
            try:
                with torch.no_grad():
                    returned = run(module, [*inputs.values()], {})
                break
            except (Exception, SystemExit) as error:  # the user's code may raise anything
                errors.append(error)
        else:
            kind, returned = None, errors[0]
    maps = {}
    for options in ({}, *_other_weights(config)):
        with torch.device("meta"):
            state = CapsNet.from_config({**vars(config), **options}).state_dict()
        weights = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
        maps[as_settings(options)] = propose_map(module, weights, kind)
    alone = {options: text.count(ALONE) for options, text in maps.items()}
    best = min(alone, key=alone.__getitem__)
    hint = f"# With --set {best}, fewer weights have no partner: {alone[best]}, not {alone['']}.\n" if best else ""
    outputs = {name: shapes[name] for name in OUTPUTS if name in shapes}
    return f"{hint}{maps['']}\n{propose_outputs(returned, outputs)}"


def _other_weights(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yield options with which the JAX model would have other weights."""
    for name in ("decoder_bias", "batch_norm"):
        yield {name: not getattr(config, name)}
    if not config.primary_depthwise:
        yield {"primary_activation": "sigmoid" if config.primary_activation == "norm" else "norm"}
    yield {"decoder_hidden": None if config.decoder_hidden else (512, 1024)}
    if get_routing(config.routing).name == "dynamic":
        yield from ({"routing": f"{config.routing},{name}=0"} for name in ("prior_logits", "capsule_bias"))


def _new_pair(subject: Subject, settings: Settings, *, decoder: bool) -> tuple[Pair, dict[str, Shape]]:
    """Create the JAX model in training mode and a batch, and find the shapes of all its values, in forward order."""
    model, training = subject.run.config.model, subject.run.config.training
    if decoder:  # the loss must not leave it out
        training = replace(training, reconstruction_weight=training.reconstruction_weight or 1.0)
    else:
        model = replace(model, decoder_hidden=None)
    config = replace(subject.run.config, model=model, training=training)
    pair = new_pair(subject._replace(run=subject.run._replace(config=config), state=None), settings)
    return pair, {name: array.shape for name, array in _as_in_map(in_torch(pair)).items()}


def _as_in_map(values: Mapping[str, Array]) -> StateDict:
    """Rename outputs as in a map, with the channels of images first."""
    return _renamed(values, NAMES, "b height width channels -> b channels height width")


def _as_in_jax(values: Mapping[str, Array]) -> StateDict:
    """Undo `_as_in_map`."""
    return _renamed(values, {name: own for own, name in NAMES.items()}, CHANNELS_LAST)


def _renamed(values: Mapping[str, Array], names: Mapping[str, str], axes: str) -> StateDict:
    return {
        names.get(name, name): rearrange(array, axes) if name.startswith(HAVE_CHANNELS) else array
        for name, array in values.items()
    }


def _loss(
    activations: Float[Tensor, "b o"],
    reconstructions: Images | None,
    foreign: ForeignModule,
    options: Mapping[str, Any],
) -> Float[Tensor, ""]:
    """Compute the loss of the JAX model from the outputs of the module."""
    if options["loss"] == "spread":
        total = spread_loss(activations, foreign.labels, margin=spread_margin(0)).mean()
    else:
        total = margin_loss(activations, foreign.labels).mean()
    if reconstructions is not None:
        errors = reconstruction_loss(reconstructions, foreign.images, error=options["reconstruction_error"])
        total = total + options["reconstruction_weight"] * errors.mean()
    return total


def _gradients(total: Float[Tensor, ""], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the gradients of the loss, under the names of checks; zero for weights that the loss does not depend on.

    Raises:
        UsageError: the module cannot be differentiated.
    """
    found: Sequence[Tensor] = [torch.zeros_like(weight) for weight in weights.values()]
    if total.requires_grad:
        try:
            found = torch.autograd.grad(total, [*weights.values()], materialize_grads=True)
        except Exception as error:  # of a derivative written by hand, or of a change in place
            raise UsageError(f"The gradient of the torch model raises {in_words(error)}.") from error
    return {f"gradient {name}": gradient for name, gradient in zip(weights, found, strict=True)}


def _compare(
    verification: Verification,
    actual: StateDict,
    expected: StateDict,
    *,
    names: Iterable[str],
    explain: Callable[[Check, Array, Array], str | None],
    replay: Callable[[], StateDict],
) -> None:
    """Add a check for each value that the module returned, and the likely cause of the first that differs.

    If its error is small, as by an epsilon, a note has the likely cause of the first large error.
    """
    checks = compare_in_order(actual, expected, verification.settings, replay=replay)
    largest = 0.0  # error of a check that differs
    unseen: list[str] = []  # checks that are not in the map, since the last one that agrees
    for name in names:
        if name not in expected:
            unseen.append(name)
            continue
        check = next(checks)
        verification.checks.append(check)
        if check.verdict == AGREES:
            unseen = []
        elif check.verdict == DIFFERS and (verification.cause is None or largest < VISIBLE <= check.error):
            sides = actual[name], expected[name]
            why = explain(check, *sides) or _cause(name, *sides, unseen)
            if verification.cause is not None:
                verification.notes.append(f"The first large error is that of {name}. Most likely: {why}.")
            verification.cause = verification.cause or why
            largest = check.error


def _explain(
    foreign: ForeignModule, pair: Pair, weights: Mapping[str, Tensor], check: Check, actual: Array, expected: Array
) -> str | None:
    """Find other lines of the map, a deviation of the module, or both, with which a check agrees or nearly does."""
    if check.name == AT_REST:
        return None
    maps: list[tuple[list[Part], Array]] = []  # other lines, and the value of the module with them
    models: list[tuple[Deviation, Array]] = []  # deviations, and the value of the twin with each

    def single_changes() -> Iterator[tuple[Change, Array, Array]]:
        for lines in [] if check.name.startswith(DERIVED) else _other_lines(foreign):
            changed = {part.source: part for part in lines}
            with torch.no_grad():
                values = foreign.call(weights, [changed.get(part.source, part) for part in foreign.map.weights])
            maps.append((lines, values[check.name].numpy(force=True)))
            yield (lines, None), actual, maps[-1][1]
        for deviation in deviations(foreign.config):
            if check.name.startswith(deviation.changes):
                models.append((deviation, _as_in_map(deviation.values(pair, weights))[check.name]))
                yield ([], deviation), models[-1][1], expected

    def two_changes() -> Iterator[tuple[Change, Array, Array]]:
        for (lines, theirs), (deviation, ours) in itertools.product(maps, models):
            yield (lines, deviation), ours, theirs

    found = explanation(check, single_changes()) or explanation(check, two_changes())
    if found is None:
        return None
    (lines, deviation), outcome = found
    mistakes = ["a mistake in the map"] if lines else []
    remedies = [toml_line(part.source, name=part.name, axes=part.axes, sizes=part.sizes) for part in lines]
    if deviation is not None:
        mistakes.append(str(deviation))
        remedies.append(deviation.remedy)
    return f"{' and, '.join(mistakes)}: with {' and '.join(remedies)}, {outcome}"


def _other_lines(foreign: ForeignModule) -> Iterator[list[Part]]:
    """Yield other lines of the map that fit the shapes.

    Two weights are swapped, one has another order of axes, or the channels or capsules of a layer are in another order.
    """
    parts, config = foreign.map.weights, foreign.config
    shapes = {part.name: (foreign.weights[part.name], tuple(foreign.entries[part.source].shape)) for part in parts}
    for one, other in itertools.combinations(parts, 2):
        if shapes[one.name] == shapes[other.name]:
            yield [replace(one, name=other.name), replace(other, name=one.name)]
    for part in parts:
        target, source = shapes[part.name]
        yield from ([replace(part, axes=axes, sizes={})] for axes in patterns(source, part.name, target))
    # Channels of the primary capsules, with the components of a pose before groups or after them.
    layer = [name for name in foreign.weights if "image2primary_capsules" in name][-1].rpartition(".")[0]
    for order in ("g d", "d g"):
        lines = []
        for part in [part for part in parts if part.name.startswith(layer)]:
            target, source = shapes[part.name]
            first, rest = f"({order})" if len(source) == len(target) else order, " ".join("abc"[: len(target) - 1])
            line = replace(
                part, axes=f"{first} {rest}".rstrip() + f" -> (g d) {rest}".rstrip(), sizes={"g": config.primary_groups}
            )
            lines += [line] if line.fits(source, target) else []
        yield lines
    # Input capsules of the first dense layer, with groups before positions.
    groups = [config.primary_groups, *(groups for groups, *_ in config.conv_capsules)][-1]
    for part in [part for part in parts if part.name.endswith("input_caps2U.weight")][:1]:
        target, source = shapes[part.name]
        for axes in patterns(source, part.name, target, groups=groups):
            if "g p" in axes:
                yield [replace(part, axes=axes, sizes={"g": groups})]


def _cause(name: str, actual: Array, expected: Array, unseen: Sequence[str]) -> str:
    """Return the cause that the numbers show, or usual causes of the values since the last check that agrees."""
    if actual.dtype != expected.dtype:
        return f"a cast to {expected.dtype} in PyTorch"
    words = cause(name, actual, expected)
    steps = {usual_cause(name): name}
    for step in unseen:
        steps.setdefault(usual_cause(step), step)
    if name.startswith(DERIVED) or words != usual_cause(name) or len(steps) == 1:
        return words
    places = "; ".join(f"in {step}, {usually}" for usually, step in steps.items())
    return f"not seen without more [values] in the map, as one of these: {places}"
