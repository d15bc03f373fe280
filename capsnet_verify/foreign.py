"""Any PyTorch module in place of the twin: our model given its weights, made hot, and compared with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import nn

from capsnet_jax.errors import UsageError
from capsnet_jax.interchange.weights import from_torch, to_torch, weight_table
from capsnet_verify.causes import cause, usual_cause
from capsnet_verify.checks import AGREES, DIFFERS, Check, compare, tolerance_of
from capsnet_verify.foreign_module import ForeignModule
from capsnet_verify.heat import Heat, heat
from capsnet_verify.map_mistakes import mended
from capsnet_verify.pair import Pair, both_on, new_pair
from capsnet_verify.proposal import propose_map, propose_outputs
from capsnet_verify.subjects import Settings, Subject
from capsnet_verify.torch_module import default_dtype
from capsnet_verify.values import AT_REST, in_jax, in_torch
from capsnet_verify.verification import Verification
from capsnet_verify.weight_map import WeightMap

Array = Shaped[np.ndarray, "..."]
NAMES = {"encoded poses": "poses", "encoded activations": "activations"}  # as the map calls them
CHANNELS_FIRST = ("stem", "reconstructions")
ALL_BUT = 1e-4  # of an error is left where the mistake was all but the whole of it
NO_VALUES = ("gradient", "margin loss", "reconstruction loss", "total loss")


def verify_module(module: nn.Module, weight_map: WeightMap, subject: Subject, settings: Settings) -> Verification:
    """Compares a module with our model of these sizes, which is given the module's weights.

    In forward order, the intermediates and outputs in the map; then the loss of the subject and the gradient of each
    weight, with the axes of ours. If reconstructions are not in the map, our model has no decoder. If they are and
    labels are not, forward must mask by its own largest activation, and those classes are the labels.

    Args:
        module: theirs. Its weights, dtype, device and mode are changed: weights that are constant get noise, and those
            of capsule layers are multiplied by a power of two.
        weight_map: which part of it is which of ours.
        subject: our model; its weights, if it has any, are not used.
        settings: how; there are no training steps.

    Raises:
        UsageError: the map does not fit the module or our model, or the module raises.
    """
    reconstructs = "reconstructions" in weight_map.outputs
    if reconstructs and subject.run.config.model.decoder_hidden is None:
        raise UsageError(f"{weight_map.path}: [outputs] has reconstructions, and our model has no decoder.")
    verification = Verification(subject, settings)
    with both_on(settings.device, settings.dtype):
        pair = _new_pair(subject, settings, decoder=reconstructs)
        foreign = ForeignModule(module, weight_map, pair, subject.run.num_classes)
        foreign.shake(np.random.default_rng(settings.seed))
        from_torch(pair.jax_model, foreign.state())
        verification.heats = heat(pair)
        _heat(foreign, verification.heats)
        found, ours = _both_sides(foreign)
        _compare(verification, foreign, found, ours)
    verification.notes = foreign.notes
    return verification


def propose(module: nn.Module, subject: Subject, settings: Settings) -> str:
    """The text of a map to be looked through, from names and shapes of weights and outputs.

    Args:
        module: theirs; its dtype, device and mode are changed.
        subject: our model.
        settings: how it is to be verified.

    Raises:
        UsageError: our model cannot be made.
    """
    with both_on(settings.device, settings.dtype), torch.no_grad():
        pair = _new_pair(subject, settings, decoder=subject.run.config.model.decoder_hidden is not None)
        images, _ = pair.torch_batch
        module = module.to(device=images.device, dtype=images.dtype).eval()
        number, classes = len(images), subject.run.num_classes
        shapes = {"poses": (number, classes, subject.run.config.model.class_dim), "activations": (number, classes)}
        if pair.jax_model.decoder is not None:
            shapes["reconstructions"] = tuple(images.shape)
        weights = propose_map(module, to_torch(pair.jax_model))
        try:
            with default_dtype(images.dtype):
                returned = module(images)
        except Exception as error:  # the user's code may raise anything
            returned = error
    return f"{weights}\n{propose_outputs(returned, shapes)}"


def _new_pair(subject: Subject, settings: Settings, *, decoder: bool) -> Pair:
    """Our model, in training mode, and a batch; the twin has weights of its own, and only tells names and shapes."""
    run = subject.run
    model, training = run.config.model, run.config.training
    if decoder:  # which the loss must not leave out
        training = replace(training, reconstruction_weight=training.reconstruction_weight or 1.0)
    else:
        model = replace(model, decoder_hidden=None)
    config = replace(run.config, model=model, training=training)
    return new_pair(subject._replace(run=run._replace(config=config), state=None), settings)


def _heat(foreign: ForeignModule, heats: Sequence[Heat]) -> None:
    """Multiplies their weight of each capsule layer as ours was."""
    for row in weight_table(foreign.pair.jax_model):
        if row.path[0] == "capsule_layers" and row.path[-1] == "weight":
            with torch.no_grad():
                foreign.weights[row.name].tensor.mul_(heats[int(row.path[1])].factor)


def _both_sides(foreign: ForeignModule) -> tuple[dict[str, Array], dict[str, Array]]:
    """What is compared of theirs, and all of ours in the order in which it depends on each other, channels first."""
    outputs = foreign.map.outputs
    means = None
    if foreign.pair.jax_model.stem.norms:
        if "poses" in outputs:
            foreign.module.eval()  # before training mode changes the running means
            means = foreign.call().outputs["poses"]
        else:
            foreign.notes.append("Running means were not compared, as there are no poses among [outputs].")
    foreign.settle()
    seen = foreign.call()
    if foreign.map.labels is None and "reconstructions" in outputs:
        activations = seen.outputs["activations"] if "activations" in outputs else seen.outputs["poses"].norm(dim=2)
        labels = activations.flatten(1).argmax(dim=1)
        foreign.pair = foreign.pair._replace(labels=jnp.asarray(labels.numpy(force=True), "int32"))
    values = in_jax(foreign.pair)
    ours = {NAMES.get(name, name): _channels_first(name, values[name]) for name in in_torch(foreign.pair)}
    if "activations" not in outputs:
        norms = np.linalg.norm(ours["poses"], axis=2)
        if compare("", norms, ours["activations"], tolerance=1e-2).verdict == DIFFERS:
            raise UsageError(f"{foreign.map.path}: [outputs] lacks activations, which are not the norms of poses here.")
    found = foreign.as_ours(seen, _shapes(ours))
    if means is not None:
        found[AT_REST] = outputs["poses"].axes.to_ours(
            f"{foreign.map.path}: [outputs] poses", means, ours[AT_REST].shape
        )
    found["total loss"] = foreign.loss(found)
    gradients = foreign.gradients(found["total loss"])
    found |= {f"gradient {name}": gradient for name, gradient in gradients.items()}
    return {name: tensor.numpy(force=True) for name, tensor in found.items()}, ours


def _channels_first(name: str, array: Array) -> Array:
    if name.startswith(CHANNELS_FIRST):
        return rearrange(array, "b height width channels -> b channels height width")
    return array


def _shapes(ours: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Of all outputs and intermediates."""
    return {name: array.shape for name, array in ours.items() if not name.startswith(NO_VALUES)}


def _compare(
    verification: Verification, foreign: ForeignModule, found: Mapping[str, Array], ours: Mapping[str, Array]
) -> None:
    settings = verification.settings
    unseen: list[str] = []
    for name, actual in ours.items():
        if name not in found:
            unseen.append(name)
            continue
        tolerance = tolerance_of(name, settings.dtype, settings.device)
        measure = partial(compare, name, actual, tolerance=tolerance, euclidean=settings.dtype == "bfloat16")
        check = measure(expected=found[name])
        verification.checks.append(check)
        if check.verdict == AGREES:
            unseen = []
        elif check.verdict == DIFFERS and verification.cause is None:
            in_map = _mistake_in_map(foreign, check, _shapes(ours), measure)
            verification.cause = in_map or _cause(name, actual, found[name], unseen)


def _mistake_in_map(
    foreign: ForeignModule, check: Check, shapes: Mapping[str, tuple[int, ...]], measure: Callable[..., Check]
) -> str | None:
    """What makes a check that differs agree if it is taken back, or all but agree, if anything does."""
    if check.name not in shapes or check.name == AT_REST:
        return None
    for mistake, seen in mended(foreign):
        mended_check = measure(expected=foreign.as_ours(seen, shapes)[check.name].numpy(force=True))
        if mended_check.verdict == AGREES:
            return mistake.replace("{agrees}", "this agrees")
        if mended_check.error < ALL_BUT * check.error:  # as with an epsilon that ours has not
            return mistake.replace("{agrees}", f"this is off by {mended_check.error:.1e} only")
    return None


def _cause(name: str, actual: Array, expected: Array, unseen: Sequence[str]) -> str:
    """What the numbers tell, or what usually goes wrong in the steps since the last check that agrees."""
    if actual.dtype != expected.dtype:
        return f"a cast to {expected.dtype} in PyTorch"
    words = cause(name, actual, expected)
    steps = {usual_cause(name): name}
    for step in unseen:
        steps.setdefault(usual_cause(step), step)
    if name.startswith(NO_VALUES) or words != usual_cause(name) or len(steps) == 1:
        return words
    places = "; ".join(f"in {step}, {usually}" for usually, step in steps.items())
    return f"not seen without more [values] in the map, as one of these: {places}"
