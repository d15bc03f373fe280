"""Frequent deviations of other people's models, as changes of `capsnet_torch` that can be tried one by one."""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import capsnet_torch
from capsnet_jax.config import ModelConfig
from capsnet_jax.routing import get_routing
from capsnet_torch.layers import SQUASHES
from capsnet_torch.ops import capsule_norm, squash
from capsnet_torch.routing import ROUTINGS
from capsnet_verify.causes import VISIBLE
from capsnet_verify.checks import AGREES, Array, Check, compare
from capsnet_verify.pair import Pair
from capsnet_verify.subjects import as_settings
from capsnet_verify.values import in_torch

ALMOST = 1e-3  # largest fraction of an error that may remain if a change explains it
VALUES = ("primary", "votes", "couplings", "poses", "activations")
OTHER_AXIS = {-1: -2, 1: 2}  # of the two axes of couplings
AGREEMENT = "bioh,boh->bio"  # of votes and poses
Patched = Callable[[], AbstractContextManager[Any]]


class Deviation(NamedTuple):
    """Something that a model may do otherwise.

    Attributes:
        words: what it does.
        options: fields of the config with which the JAX model would do the same; empty if it has none for this.
        patched: context in which `capsnet_torch` does the same.
        changes: what the names of values that it changes start with.
    """

    words: str
    options: Mapping[str, Any] = {}
    patched: Patched = nullcontext
    changes: str | tuple[str, ...] = VALUES

    def __str__(self) -> str:
        return f"in PyTorch, {self.words}"

    @property
    def remedy(self) -> str:
        """With what both would agree."""
        return f"--set {as_settings(self.options)}" if self.options else "the same in capsnet_torch"

    def values(self, pair: Pair, weights: Mapping[str, Tensor]) -> dict[str, Array]:
        """Compute all values of `in_torch` with this change.

        Args:
            pair: the JAX model, whose config the twin gets, and the batch.
            weights: weights of the twin.
        """
        with torch.random.fork_rng(), self.patched():
            twin = capsnet_torch.CapsNet.from_config({**vars(pair.jax_model.config), **self.options})
            twin.to(pair.torch_batch[0]).load_state_dict(weights, strict=False)
            return in_torch(pair._replace(torch_model=twin))


def deviations(config: ModelConfig) -> Iterator[Deviation]:
    """List the deviations that a model of this config may have, with the same weights; none for a user's routing."""
    routing = get_routing(config.routing)
    if routing.name not in ROUTINGS:
        return
    function = ROUTINGS[routing.name]
    module = sys.modules[function.__module__]

    def with_torch(**others: Any) -> Patched:
        return partial(mock.patch.object, module, "torch", SimpleNamespace(**vars(torch) | others))

    def with_agreement(changed: Callable[[Tensor, Tensor], Tensor]) -> Patched:
        return with_torch(einsum=partial(_einsum, changed))

    softmaxes = {name: partial(_on_other_axis, getattr(torch, name)) for name in ("softmax", "logsumexp")}
    over_inputs = with_torch(**softmaxes)
    if routing.takes("softmax"):
        other = partial(function, softmax=partial(torch.softmax, dim=-2))
        over_inputs = partial(mock.patch.dict, ROUTINGS, {routing.name: other})
    yield Deviation("a softmax over input capsules, not over output capsules", patched=over_inputs)
    if routing.takes("num_iterations") and "num_iterations" not in str(config.routing):
        for number in range(1, config.num_iterations + 3):
            if number != config.num_iterations:
                words = f"{number} routing iteration{'s' * (number > 1)}, not {config.num_iterations}"
                yield Deviation(words, {"num_iterations": number})
    scales = dict.fromkeys((config.primary_scale, 1.0))
    for name, scale in itertools.product(SQUASHES, scales):
        if (name, scale) != (config.primary_squash, config.primary_scale):
            words = f"primary capsules of scale {scale:g} {'without a' if name == 'none' else f'with the {name}'}"
            words = words if name == "squash" else f"{words} squash"
            yield Deviation(words, {"primary_squash": name, "primary_scale": scale})
    yield Deviation(
        "primary capsules of neighbouring pixels, by a view that mixes channels and positions",
        patched=partial(mock.patch, "capsnet_torch.layers.rearrange", _of_neighbouring_pixels),
    )
    yield Deviation(
        "a squash of primary capsules along the capsules",
        patched=partial(mock.patch.dict, SQUASHES, {config.primary_squash: _squash_along_capsules}),
    )
    if routing.name == "dynamic":
        yield Deviation("a leaky softmax", {"routing": f"{config.routing},leaky=true"})
        yield Deviation(
            "logits averaged over the batch",
            patched=with_agreement(lambda votes, poses: _agreement(votes, poses).mean(0).expand(len(votes), -1, -1)),
        )
        detached = {"routing": f"{config.routing},detach=true"}
        yield Deviation("a detached agreement in the routing", detached, changes="gradient")
        yield Deviation(
            "detached poses in the agreement",
            patched=with_agreement(lambda votes, poses: _agreement(votes, poses.detach())),
            changes="gradient",
        )
        yield Deviation(
            "detached votes in the agreement",
            patched=with_agreement(lambda votes, poses: _agreement(votes.detach(), poses)),
            changes="gradient",
        )
        yield Deviation(
            "a squash of output capsules along the capsules",
            patched=partial(mock.patch.object, module, "squash", _squash_along_capsules),
        )
        yield Deviation(
            "a softmax of the activations",
            patched=partial(mock.patch.object, module, "capsule_norm", lambda poses: capsule_norm(poses).softmax(-1)),
        )


def explanation(check: Check, changes: Iterable[tuple[Any, Array, Array]]) -> tuple[Any, str] | None:
    """Find the change after which a check agrees, or else the one that reduces its error most.

    Small errors are not explained, because wrong lines of a map and deviations cause larger ones.

    Args:
        check: a check that differs.
        changes: changes, and the values of JAX and of PyTorch with each.

    Returns:
        The change and its outcome in words; None if no change reduces the error to a thousandth.
    """
    if not VISIBLE <= check.error < math.inf:
        return None
    best, error = None, ALMOST * check.error
    for change, actual, expected in changes:
        found = compare(check.name, actual, expected, tolerance=check.tolerance)
        if found.error <= error and found.verdict == AGREES:
            return change, "both agree"
        if found.error <= error:
            best, error = (change, f"they differ by {found.error:.1e} only"), found.error
    return best


def _on_other_axis(function: Callable[..., Tensor], logits: Tensor, *, dim: int, **options: Any) -> Tensor:
    return function(logits, dim=OTHER_AXIS[dim], **options)


def _agreement(votes: Tensor, poses: Tensor) -> Tensor:
    return torch.einsum(AGREEMENT, votes, poses)


def _einsum(agreement: Callable[[Tensor, Tensor], Tensor], pattern: str, *tensors: Tensor) -> Tensor:
    return agreement(*tensors) if pattern == AGREEMENT else torch.einsum(pattern, *tensors)


def _squash_along_capsules(poses: Tensor) -> Tensor:
    return squash(poses.mT).mT


def _of_neighbouring_pixels(channels: Tensor, pattern: str, *, groups: int) -> Tensor:
    """Replace the `rearrange` of primary capsules by a view of `[b channels height width]`."""
    return channels.reshape(len(channels), -1, channels.shape[1] // groups)
