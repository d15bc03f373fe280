"""Configs by name: published networks, each with its source and expected result.

Examples:
    >>> from capsnet_jax import PRESETS
    >>> list(PRESETS)
    ['readable', 'digits', 'official', 'paper', 'efficient', 'em']
    >>> PRESETS["efficient"].model.routing
    'self_attention'
"""

import dataclasses

from capsnet_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from capsnet_jax.errors import UsageError

# The authors' code, https://github.com/Sarasra/models, research/capsules; 641 epochs are its 300,000 steps. Its loss is
# divided by 20, which has no effect on Adam. The primary scale is the share of one of 32 types; with leaky routing, the
# leak is one more, and the scale is 1 / 33.
_OFFICIAL = Config(
    model=ModelConfig(
        primary_scale=1 / 32,
        primary_squash="squash",
        decoder_bias=True,
        initial_weights="official",
        routing="dynamic,capsule_bias=0.1",
    ),
    data=DataConfig(augment=("shift_pixels=2",)),
    training=TrainingConfig(
        epochs=641,
        batch_size=128,
        schedule="exponential",
        learning_rate_floor=1e-6,
        reconstruction_weight=0.01,
        reconstruction_error="sum",
    ),
)

PRESETS: dict[str, Config] = {
    # The reference model, https://github.com/arogozhnikov/readable_capsnet, on images of 28 x 28.
    # capsnet train --preset readable --dataset mnist --epochs 1: 98.41 % (docs/results.md).
    "readable": Config(),
    # Small and quick, for images of 8 x 8. Sigmoid activations and poses of about unit size suit every routing.
    # capsnet train: 98 % or more in a minute or two on 2 CPU cores (docs/results.md).
    "digits": Config(
        model=ModelConfig(
            image_shape=(8, 8, 1),
            stem_channels=64,
            stem_kernel=3,
            primary_groups=8,
            primary_kernel=4,
            primary_stride=1,
            primary_scale=1.0,
            primary_activation="sigmoid",
        ),
        training=TrainingConfig(epochs=30, batch_size=32, learning_rate=2e-3),
    ),
    # capsnet train --preset official --dataset mnist: published 0.25 % error; hours on a GPU.
    "official": _OFFICIAL,
    # The same with the weight of the reconstruction loss from the text of the paper, relative to the sum over classes.
    # Sabour, Frosst, Hinton (2017), section 4.1.
    "paper": dataclasses.replace(
        _OFFICIAL, training=dataclasses.replace(_OFFICIAL.training, reconstruction_weight=0.0005)
    ),
    # Mazzia, Salvetti, Chiaberge (2021), https://github.com/EscVM/Efficient-CapsNet: 0.26 % error on MNIST, with their
    # augmentation, whose squeezing and erasing are not implemented here; 161,824 weights without the decoder. They
    # divide pixels by 256, not 255, and change the learning rate after every epoch, not every step. The epsilon of Adam
    # in Keras is 1e-7, not 1e-8.
    "efficient": Config(
        model=ModelConfig(
            stem_below=((32, 5), (64, 3), (64, 3)),
            stem_channels=128,
            stem_kernel=3,
            stem_stride=2,
            batch_norm=True,
            primary_groups=16,
            primary_stride=1,
            primary_scale=1.0,
            primary_depthwise=True,
            primary_squash="exponential",
            decoder_bias=True,
            routing="self_attention",
        ),
        data=DataConfig(augment=("rotation=30", "shift=0.1")),
        training=TrainingConfig(
            epochs=150,
            batch_size=16,
            learning_rate=5e-4,
            schedule="exponential",
            learning_rate_decay=0.97,
            learning_rate_decay_steps=3750,  # an epoch of MNIST
            learning_rate_floor=5e-5,
            reconstruction_weight=0.392,
        ),
    ),
    # Hinton, Sabour, Frosst (2018), the small network of 68,000 weights: 2.2 % error on smallNORB, cropped to
    # 32 x 32. The learning rates were chosen here; the authors' code, capsule_em in
    # https://github.com/google-research/google-research, has another scale of the activations.
    "em": Config(
        model=ModelConfig(
            image_shape=(32, 32, 2),
            num_classes=5,
            stem_channels=64,
            stem_kernel=5,
            stem_stride=2,
            primary_groups=8,
            primary_dim=16,
            primary_kernel=1,
            primary_stride=1,
            primary_scale=3.0,
            primary_activation="sigmoid",
            conv_capsules=((16, 16, 3, 2), (16, 16, 3, 1)),
            matrix_poses=True,
            shared_class_transform=True,
            decoder_hidden=None,
            routing="em,min_variance=0.1,inverse_temperature=1",
        ),
        training=TrainingConfig(
            epochs=50,
            learning_rate=5e-3,
            schedule="exponential",
            learning_rate_decay_steps=20000,
            loss="spread",
            reconstruction_weight=0.0,
        ),
    ),
}


def get_preset(name: str) -> Config:
    """Look up a config by its name in `PRESETS`.

    Raises:
        UsageError: there is no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}; expected {', '.join(PRESETS)}.")
    return PRESETS[name]
