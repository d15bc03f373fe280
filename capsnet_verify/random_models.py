"""Random architectures, one for each seed, small enough to be verified in seconds."""

from dataclasses import replace
from typing import Any

import numpy as np

from capsnet_jax.config import ModelConfig, TrainingConfig
from capsnet_jax.errors import UsageError
from capsnet_jax.routing import ROUTINGS
from capsnet_verify.subjects import EVERY_TERM, Subject, of_model


def random_subject(seed: int) -> Subject:
    """Draw an architecture from a seed: images, stem, capsule layers of every kind, routing, decoder and losses."""
    rng = np.random.default_rng(seed)
    while True:
        image_shape = (*_integers(rng, (9, 21), (9, 21)), int(rng.integers(1, 4)))
        model = _random_model(rng)
        num_classes, labels_per_image = _integers(rng, (2, 7), (1, 3))
        model = replace(model, image_shape=image_shape, num_classes=num_classes)
        if _fits(model) and _gradients_pass(model):
            break
    subject = of_model(f"random model {seed}", model, labels_per_image=labels_per_image)
    training = TrainingConfig(
        loss="margin" if labels_per_image > 1 else _choice(rng, "margin", "spread"),
        reconstruction_weight=_choice(rng, 0.5, 10.0),
        reconstruction_error=_choice(rng, "mean", "sum"),
    )
    return subject._replace(run=subject.run._replace(config=replace(subject.run.config, training=training)))


def _random_model(rng: np.random.Generator) -> ModelConfig:
    matrices, depthwise = _chance(rng, 0.2), _chance(rng, 0.2)
    square = _choice(rng, 4, 9)

    def pose_size() -> int:
        return square if matrices else int(rng.integers(2, 9))

    groups, dim = int(rng.integers(2, 5)), pose_size()
    routing = _choice(rng, *ROUTINGS)
    if _chance(rng, 0.5):
        routing = EVERY_TERM.get(routing, routing)
    # In the first iteration of variational routing, activations of all outputs differ only by rounding errors, by which
    # it then divides.
    fewest_iterations = 2 if routing.startswith("variational") else 1
    stem_channels, stem_kernel, stem_stride = _integers(rng, (3, 12), (1, 5), (1, 3))
    primary_kernel, primary_stride = _integers(rng, (1, 5), (1, 3))
    return ModelConfig(
        stem_below=tuple(_integers(rng, (3, 8), (1, 4)) for _ in range(rng.integers(3))),
        stem_channels=groups * dim if depthwise else stem_channels,
        stem_kernel=stem_kernel,
        stem_stride=stem_stride,
        batch_norm=_chance(rng, 0.2),
        primary_groups=groups,
        primary_dim=dim,
        primary_kernel=primary_kernel,
        primary_stride=primary_stride,
        primary_scale=_choice(rng, 0.01, 1.0, 4.0),
        primary_depthwise=depthwise,
        primary_squash=_choice(rng, "none", "squash", "exponential"),
        primary_activation="norm" if depthwise else _choice(rng, "norm", "sigmoid"),
        conv_capsules=tuple(
            (int(rng.integers(2, 5)), pose_size(), *_integers(rng, (1, 4), (1, 3))) for _ in range(rng.integers(3))
        ),
        matrix_poses=matrices,
        hidden_capsules=tuple((int(rng.integers(2, 9)), pose_size()) for _ in range(rng.integers(3))),
        class_dim=pose_size(),
        shared_class_transform=_chance(rng, 0.2),
        decoder_hidden=None if _chance(rng, 0.2) else _integers(rng, (5, 20), (5, 20)),
        decoder_bias=_chance(rng, 0.5),
        routing=routing,
        num_iterations=int(rng.integers(fewest_iterations, 5)),
        routing_implementation=_choice(rng, "votes", "fused") if routing.startswith("dynamic") else "auto",
        standardize_images=_chance(rng, 0.2),
        recompute_routing=_chance(rng, 0.2),
    )


def _fits(model: ModelConfig) -> bool:
    try:
        _ = model.primary_grid
    except UsageError:
        return False
    return True


def _gradients_pass(model: ModelConfig) -> bool:
    """Return whether gradients reach the first layer with more than rounding errors in them.

    A layer norm of two values leaves only their signs, without gradient. Four layers of variational routing multiply
    rounding errors in float64 to 2e-12 of the gradients, which is more than the tolerance.
    """
    layers = [*((types, dim) for types, dim, *_ in model.conv_capsules), *model.hidden_capsules]
    layers.append((model.num_classes, model.class_dim))
    if str(model.routing).startswith("inverted_attention"):  # over each pose
        return min(dim for _, dim in layers) > 2
    if str(model.routing).startswith("variational"):  # over all capsules
        return min(number for number, _ in layers) > 2 and len(layers) < 4
    return True


def _integers(rng: np.random.Generator, *ranges: tuple[int, int]) -> Any:
    """Draw an integer from each range, whose end is excluded."""
    return tuple(int(rng.integers(*ends)) for ends in ranges)


def _chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def _choice(rng: np.random.Generator, *values: Any) -> Any:
    return values[rng.integers(len(values))]
