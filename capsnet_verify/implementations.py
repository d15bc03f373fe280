"""Find the implementations that `auto` may choose for a model, and batch sizes at which each of them is chosen."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import jax

from capsnet_jax.nn.model import CapsNet
from capsnet_verify.pair import FEWEST_IMAGES

SIZES = (*range(FEWEST_IMAGES, 65), 128, 256, 1, 2)
"""Batch sizes at which an implementation may first be chosen, the preferred ones first."""
FAST = ("fourier", "fused")
PLATFORMS = ("cpu", "gpu")
MOST_PRODUCTS = 2e8  # in XLA's convolutions; a CPU takes 15 seconds for this many, gradients included

Layer = tuple[str, str]
"""Name of a layer and of its implementation."""


class Batch(NamedTuple):
    """A batch to compare, and what computes each layer of it.

    Attributes:
        size: number of images.
        implementations: name of the implementation of each layer.
        platform: platform that would choose these implementations, if not the one that computes.
    """

    size: int
    implementations: Mapping[str, str]
    platform: str | None = None

    def __str__(self) -> str:
        return f"batch of {self.size}" + (f" as on {self.platform.upper()}" if self.platform else "")


class Plan(NamedTuple):
    """The batches to compare.

    Attributes:
        batches: batches whose values and gradients are compared.
        unproved: layers and implementations that `auto` may choose, but that no batch uses.
    """

    batches: Sequence[Batch]
    unproved: Sequence[Layer]

    @property
    def for_training(self) -> Batch:
        """The batch with the most fast implementations, among the batches for this platform."""
        here = [batch for batch in self.batches if batch.platform is None]
        return max(here, key=lambda batch: sum(name in FAST for name in batch.implementations.values()))

    def new(self, batch: Batch) -> list[Layer]:
        """Return the layers and implementations that no earlier batch uses."""
        earlier = self.batches[: self.batches.index(batch)]
        seen = {layer for other in earlier for layer in other.implementations.items()}
        return [layer for layer in batch.implementations.items() if layer not in seen]


def plan(model: CapsNet, platform: str, *, only: int | None = None, training_size: int = FEWEST_IMAGES) -> Plan:
    """Find a few small batches that together use every implementation that `auto` may choose, on every platform.

    Args:
        model: its weights may be abstract.
        platform: platform of both frameworks, "cpu" or "gpu".
        only: size of the one batch to compare.
        training_size: batch size with which the model is trained.
    """
    possible = {
        each: [
            Batch(size, implementations(model, size, each), None if each == platform else each)
            for size in dict.fromkeys((*SIZES, training_size))
        ]
        for each in sorted(PLATFORMS, key=lambda name: name != platform)
    }
    every = dict.fromkeys(layer for of in possible.values() for batch in of for layer in batch.implementations.items())
    size = only or FEWEST_IMAGES
    batches = [Batch(size, implementations(model, size, platform))]
    missing = every.keys() - batches[0].implementations.items()

    def num_new(batch: Batch) -> int:
        return len(missing & batch.implementations.items())

    for of_platform in possible.values() if only is None else ():
        affordable = [batch for batch in of_platform if _is_affordable(model, batch)]
        while affordable and num_new(best := max(affordable, key=num_new)):
            batches.append(best)
            missing -= best.implementations.items()
    return Plan(batches, [layer for layer in every if layer in missing])


def in_words(layers: Iterable[Layer]) -> str:
    """Format layers and their implementations, as in "primary capsules by fourier, routing 0 by fused"."""
    return ", ".join(f"{layer} by {name}" for layer, name in layers)


def implementations(model: CapsNet, batch_size: int, platform: str) -> dict[str, str]:
    """Return the name of the implementation of each layer, for batches of this size on this platform."""
    with mock.patch.object(jax, "default_backend", return_value=platform):
        return {layer: choice.name for layer, choice in model.implementations(batch_size).items()}


@contextmanager
def as_on(platform: str | None) -> Iterator[None]:
    """Trace functions with the implementations of another platform than the one they run on; None changes nothing."""
    if platform is None:
        yield
        return

    def choose(*operands: Any, default: Any, **branches: Any) -> Any:
        return branches.get(platform, default)(*operands)

    with (
        mock.patch.object(jax.lax, "platform_dependent", choose),
        mock.patch.object(jax, "default_backend", return_value=platform),
    ):
        yield


def _is_affordable(model: CapsNet, batch: Batch) -> bool:
    """Return whether a CPU computes the XLA convolutions of a batch, if any, in seconds rather than minutes."""
    if batch.platform in (None, "cpu"):
        return True
    shape, products = (batch.size, *model.config.image_shape), 0
    convolutions = (*model.stem.convolutions, model.primary_capsules.convolution)
    for convolution, implementation in zip(convolutions, batch.implementations.values(), strict=False):
        shape = convolution.out_shape(shape)
        if implementation in ("xla", "space_to_depth"):
            # The gradient of a strided convolution multiplies zeros between rows and columns, too.
            with_zeros = convolution.stride**2 if implementation == "xla" else 1
            products += math.prod(shape[:3]) * math.prod(convolution.kernel.shape) * with_zeros
    return products <= MOST_PRODUCTS
