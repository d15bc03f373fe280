"""Model configs inferred from the shapes of weights."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from capsnet_jax import UsageError
from capsnet_jax.config import ModelConfig
from capsnet_jax.interchange.architecture import infer_architecture
from capsnet_jax.presets import PRESETS
from capsnet_jax.runs.folder import Run
from tests.interchange.architectures import (
    ARCHITECTURES,
    FROM_CONFIG,
    PLAIN,
    assert_same,
    new_run,
    random_state,
)


@pytest.fixture(scope="module")
def state():
    return random_state(new_run(PLAIN))


@pytest.mark.parametrize("model", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_all_sizes_are_inferred(model):
    run = new_run(model)
    state = random_state(run)
    told = {name: getattr(model, name) for name in FROM_CONFIG}
    known = dataclasses.replace(PRESETS["digits"].model, **told)
    assert infer_architecture(state, known) == model


@pytest.mark.parametrize("preset", ["readable", "digits", "official", "paper", "efficient"])
def test_a_preset_is_inferred_from_its_weights(preset):
    config = PRESETS[preset]
    run = Run(Path("run"), config.with_sizes((28, 28, 1), 10), tuple("0123456789"))
    assert infer_architecture(random_state(run), config.model) == run.config.model


def test_weights_without_a_decoder_need_the_image_shape():
    run = new_run(dataclasses.replace(PLAIN, decoder_hidden=None))
    state = random_state(run)
    with pytest.raises(UsageError, match=r"have no decoder.* expected --image-shape HEIGHT WIDTH CHANNELS, or a"):
        infer_architecture(state, run.config.model)
    assert infer_architecture(state, run.config.model, image_shape=(19, 22, 2)) == run.config.model
    with pytest.raises(UsageError, match=r"image2primary_capsules.0.weight is of 2 channels; .* \(19, 22, 1\)"):
        infer_architecture(state, run.config.model, image_shape=(19, 22, 1))


def test_an_ambiguous_stride_is_refused():
    """19 x 22 images: a stem of 3 leaves 17 x 20; under a kernel of 9, strides 6 to 8 all make 2 x 2."""
    run = new_run(dataclasses.replace(PLAIN, primary_kernel=9, primary_stride=6))
    state = random_state(run)
    assert infer_architecture(state, run.config.model) == run.config.model
    with pytest.raises(
        UsageError, match="do not determine the stride of the primary capsules: 6, 7, 8 make 12 of images"
    ):
        infer_architecture(state, ModelConfig())


def test_an_ambiguous_activation_is_taken_from_the_config():
    """Of 6 channels, 3 groups of 2 at 1 x 2 positions, or 2 groups of 2 + 1 at 1 x 3."""
    norm = dataclasses.replace(PLAIN, primary_groups=3, primary_dim=2, primary_stride=4)
    sigmoid = dataclasses.replace(norm, primary_groups=2, primary_activation="sigmoid", primary_stride=2)
    runs = [new_run(dataclasses.replace(model, image_shape=(5, 9, 2))) for model in (norm, sigmoid)]
    state, other = map(random_state, runs)
    assert_same(state, other)
    for run in runs:
        assert infer_architecture(state, run.config.model) == run.config.model


def test_depthwise_capsules_are_inferred_unless_there_is_one_channel():
    other = dataclasses.replace(PLAIN, primary_depthwise=True)
    assert infer_architecture(random_state(new_run(PLAIN)), other) == PLAIN
    one = dataclasses.replace(other, stem_channels=1, primary_groups=1, primary_dim=1)
    for model in (one, dataclasses.replace(one, primary_depthwise=False)):
        assert infer_architecture(random_state(new_run(one)), model) == model


def change(state, **changes):
    """Replace entries by zeros of other shapes."""
    names = {"classes": "encoder.primary2digit_capsules.input_caps2U.weight", "pixels": "decoder.4.weight"}
    names |= {"stem": "encoder.image2primary_capsules.0.weight"}
    return state | {names[name]: np.zeros(shape, np.float32) for name, shape in changes.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: change(state, classes=(191, 4, 5, 5)), "are of 191 primary capsules, which no stride makes"),
        (lambda state: change(state, classes=(192, 4, 5)), r"input_caps2U.weight is \(192, 4, 5\); expected 4 axes"),
        (lambda state: change(state, pixels=(7, 1, 19, 22)), r"0.weight is of 2 channels; .* shape \(19, 22, 1\)"),
        (lambda state: change(state, stem=(12, 2, 3, 4)), r"capsules.0.weight has a kernel of 3 x 4; expected"),
        (lambda state: {name: state[name] for name in state if "caps2U" not in name}, r"lack encoder.*caps2U.weight"),
        (lambda state: {name: state[name] for name in state if name != "decoder.4.weight"}, r"lack decoder.4.weight\."),
        (lambda state: {name: state[name] for name in state if "capsules.2" not in name}, r"lack .*capsules.2.weight"),
        (lambda state: {f"module.{name}": state[name] for name in state}, r"but module.encoder.*; expected the names"),
        (
            lambda state: state | {"encoder.hidden_capsules.0.weight": np.zeros((9, 3, 4, 2, 4), np.float32)},
            r"encoder.hidden_capsules.0.weight is of convolutional capsules, .* expected a config.json beside them",
        ),
    ],
)  # fmt: skip
def test_contradictory_weights_are_refused_by_name(state, damage, message):
    with pytest.raises(UsageError, match=message):
        infer_architecture(damage(state), PLAIN)


def test_images_smaller_than_the_kernels_are_refused(state):
    small = change(state, pixels=(7, 2, 4, 22))
    with pytest.raises(UsageError, match=re.escape("Images of 4 x 22 are too small")):
        infer_architecture(small, PLAIN)
