"""Layers whose weights stay as they are during training."""

from collections.abc import Sequence

from flax import nnx
from flax.nnx.filterlib import Predicate

from capsnet_jax.errors import UsageError
from capsnet_jax.nn.model import CapsNet


def is_frozen(names: Sequence[str]) -> Predicate:
    """Make a filter for `nnx.state` that selects everything in the layers of these names, such as "stem.norms"."""
    beginnings = tuple(f"{name}." for name in names)
    return lambda path, value: f"{'.'.join(map(str, path))}.".startswith(beginnings)


def freeze_layers(model: CapsNet, names: Sequence[str]) -> None:
    """Put layers into evaluation mode, so that batch normalization uses its running averages and keeps them.

    Raises:
        UsageError: there is no such layer, or no weight is left to train.
    """
    paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    layers = dict.fromkeys(".".join(path[:length]) for path in paths for length in range(1, len(path)))
    for name in names:
        if name not in layers:
            raise UsageError(f"freeze has {name!r}, which is no layer of this model; expected {', '.join(layers)}.")
    selects = is_frozen(names)
    if all(selects(path, None) for path in paths):
        raise UsageError(f"freeze is {' '.join(names)}, which leaves no weight to train; expected fewer layers.")
    for path, module in nnx.iter_modules(model):
        if selects(path, module):
            module.eval()
