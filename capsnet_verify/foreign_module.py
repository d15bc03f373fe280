"""A PyTorch module of any make, run as its map says, so that what it computes can be laid beside ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from capsnet_jax.errors import UsageError, in_words
from capsnet_torch.losses import margin_loss, reconstruction_loss, spread_loss, spread_margin
from capsnet_torch.ops import is_label
from capsnet_verify.pair import Pair
from capsnet_verify.torch_module import default_dtype, described, listed, pick, train_without_dropout, watched
from capsnet_verify.weight_map import OUTPUTS, Axes, WeightMap

Array = Shaped[np.ndarray, "..."]


class Weight(NamedTuple):
    """A weight of theirs that has a counterpart.

    Attributes:
        name: in their state_dict.
        tensor: the parameter or buffer itself.
        axes: of theirs -> ours.
    """

    name: str
    tensor: Tensor
    axes: Axes


class Seen(NamedTuple):
    """What one call of forward gave, with axes as theirs are.

    Attributes:
        outputs: under our names, as in `weight_map.OUTPUTS`.
        values: outputs of submodules, under our names.
    """

    outputs: dict[str, Tensor]
    values: dict[str, Tensor]


def mapped_weights(
    module: nn.Module, weight_map: WeightMap, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Weight]:
    """Their weights, under the names of ours and in our order.

    Args:
        module: theirs.
        weight_map: which of theirs is which of ours.
        shapes: of all of ours.

    Raises:
        UsageError: the map names what there is not, or leaves one of ours out.
    """
    entries = module.state_dict(keep_vars=True)
    found = {}
    for name, counterpart in weight_map.weights.items():
        ours = counterpart.name
        where = f'{weight_map.path}: [weights] "{name}"'
        if name not in entries:
            raise UsageError(f"{where} is not in the state_dict of the torch model; it has {listed(entries)}.")
        if ours not in shapes:
            if ours.startswith("decoder.") and "reconstructions" not in weight_map.outputs:
                raise UsageError(
                    f'{where} is "{ours}", and there are no reconstructions in [outputs] to compare it by.'
                )
            raise UsageError(f'{where} is "{ours}", which ours has not; it has {listed(shapes)}.')
        if not entries[name].is_floating_point():
            raise UsageError(f"{where} is {entries[name].dtype}; expected a floating-point type.")
        found[ours] = Weight(name, entries[name], counterpart.axes)
    missing = [name for name in shapes if name not in found]
    if missing:
        raise UsageError(f"{weight_map.path}: [weights] lacks {listed(missing)} of ours; expected all of them.")
    return {name: found[name] for name in shapes}


class ForeignModule:
    """Their module, with what of it is compared.

    Args:
        module: its dtype, device and mode are changed, and its weights may be.
        weight_map: which part of it is which of ours.
        pair: our model, whose images it is to see, and options of the loss.
        num_classes: number of classes.

    Raises:
        UsageError: the map does not fit the module or our model.

    Attributes:
        weights: under our names.
        notes: what is to be told of how it was run, in sentences.
    """

    def __init__(self, module: nn.Module, weight_map: WeightMap, pair: Pair, num_classes: int):
        images, _ = pair.torch_batch
        self.module = module.to(device=images.device, dtype=images.dtype)
        self.map = weight_map
        self.pair = pair
        self.num_classes = num_classes
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in pair.torch_model.state_dict().items()
            if tensor.is_floating_point()
        }
        self.weights = mapped_weights(module, weight_map, shapes)
        self.shapes = shapes
        used = {weight.name for weight in self.weights.values()}
        parts = dict(module.named_modules())
        for name in weight_map.values:
            if name not in parts:
                known = listed(part for part in parts if part)
                raise UsageError(
                    f'{weight_map.path}: [values] "{name}" is no submodule of the torch model; it has {known}.'
                )
        unused = [
            name for name, tensor in module.state_dict().items() if name not in used and tensor.is_floating_point()
        ]
        self.notes = [f"Not in the map, and so not compared by themselves: {', '.join(unused)}."] if unused else []

    def state(self) -> dict[str, Array]:
        """Their weights as ours; copies."""
        return {
            name: np.array(self.arranged(name, weight, weight.tensor.numpy(force=True)))
            for name, weight in self.weights.items()
        }

    def arranged(self, name: str, weight: Weight, array: Any) -> Any:
        """A weight of theirs, or its gradient, with the axes of ours."""
        return weight.axes.to_ours(f'{self.map.path}: [weights] "{weight.name}"', array, self.shapes[name])

    def shake(self, rng: np.random.Generator) -> None:
        """Adds noise to weights that are constant, often zero, which would hide what is wrong with them."""
        for weight in self.weights.values():
            tensor = weight.tensor.detach()
            if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                tensor += torch.tensor(rng.uniform(-0.3, 0.3, tuple(tensor.shape)), dtype=tensor.dtype)

    def settle(self) -> None:
        """Training mode but for dropout; or evaluation mode, if outputs are still random then.

        Raises:
            UsageError: they are random in evaluation mode, too.
        """
        dropouts = train_without_dropout(self.module)
        if dropouts:
            self.notes.append(f"The torch model ran in training mode, but for its dropout ({', '.join(dropouts)}).")
        if self._is_random():
            self.module.eval()
            self.notes.append("The torch model ran in evaluation mode, as its outputs are random in training mode.")
            if self._is_random():
                raise UsageError("The outputs of the torch model are random; expected the same for the same images.")

    def _is_random(self) -> bool:
        first, second = (self.call().outputs for _ in range(2))
        return not all(torch.allclose(first[name], second[name], equal_nan=True) for name in first)

    def call(self) -> Seen:
        """Runs forward on the images of the pair.

        Raises:
            UsageError: it raises, or does not return or run what the map says.
        """
        images, labels = self.pair.torch_batch
        inputs = [images]
        if self.map.labels is not None:
            hot = is_label(labels, self.num_classes).to(images.dtype)
            inputs.append(hot if self.map.labels == "one-hot" else labels)
        with watched(self.module, self.map.values) as seen, default_dtype(images.dtype):
            try:
                returned = self.module(*inputs)
            except Exception as error:  # the user's code may raise anything
                given = ["images", "labels"][: len(inputs)]
                shown = " and ".join(f"{name} {tuple(of.shape)}" for name, of in zip(given, inputs, strict=True))
                raise UsageError(f"The torch model, called with {shown}, raises {in_words(error)}.") from error
        outputs = {
            name: pick(f'{self.map.path}: [outputs] "{name}"', returned, output.source)
            for name, output in self.map.outputs.items()
        }
        values = {}
        for name, counterpart in self.map.values.items():
            where, runs = f'{self.map.path}: [values] "{name}"', seen[name]
            if len(runs) != 1:
                raise UsageError(f"{where} ran {len(runs)} times in one call; expected a submodule that runs once.")
            if not isinstance(runs[0], Tensor):
                raise UsageError(f"{where} returns {described(runs[0])}; expected one tensor.")
            values[counterpart.name] = torch.relu(runs[0]) if counterpart.relu else runs[0]
        return Seen(outputs, values)

    def as_ours(self, seen: Seen, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """All of it with the axes of ours.

        Args:
            seen: what a call gave.
            shapes: of our outputs and intermediates, channels first.

        Raises:
            UsageError: there is no such intermediate of ours, or a shape is another.
        """
        arranged = {}
        for name, counterpart in self.map.values.items():
            where = f'{self.map.path}: [values] "{name}"'
            known = [name for name in shapes if name not in OUTPUTS]
            if counterpart.name not in known:
                raise UsageError(f'{where} is "{counterpart.name}", which ours has not; it has {", ".join(known)}.')
            arranged[counterpart.name] = counterpart.axes.to_ours(
                where, seen.values[counterpart.name], shapes[counterpart.name]
            )
        for name, tensor in seen.outputs.items():
            where = f'{self.map.path}: [outputs] "{name}"'
            arranged[name] = self.map.outputs[name].axes.to_ours(where, tensor, shapes[name])
        return arranged

    def loss(self, found: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The loss that our model minimises, of what theirs returned; activations are norms if there are only poses."""
        images, labels = self.pair.torch_batch
        options = self.pair.loss
        activations = found["activations"] if "activations" in found else found["poses"].norm(dim=-1)
        if options["loss"] == "spread":
            total = spread_loss(activations, labels, margin=spread_margin(0)).mean()
        else:
            total = margin_loss(activations, labels).mean()
        if "reconstructions" in found:
            errors = reconstruction_loss(found["reconstructions"], images, error=options["reconstruction_error"])
            total = total + options["reconstruction_weight"] * errors.mean()
        return total

    def gradients(self, total: Float[Tensor, ""]) -> dict[str, Tensor]:
        """That of each mapped weight, with the axes of ours; zero where nothing flows.

        Raises:
            UsageError: the module cannot be differentiated.
        """
        learned = {name: weight for name, weight in self.weights.items() if weight.tensor.requires_grad}
        grads = {name: torch.zeros_like(weight.tensor) for name, weight in self.weights.items()}
        if total.requires_grad:
            tensors = [weight.tensor for weight in learned.values()]
            try:
                found = torch.autograd.grad(total, tensors, materialize_grads=True)
            except Exception as error:  # of a derivative written by hand, or of a change in place
                raise UsageError(f"The gradient of the torch model raises {in_words(error)}.") from error
            grads |= dict(zip(learned, found, strict=True))
        return {name: self.arranged(name, self.weights[name], grad) for name, grad in grads.items()}
