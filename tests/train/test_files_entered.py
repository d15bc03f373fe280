"""A forward pass and a training step call functions in few files, as a measure of readability."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsnet_jax
from capsnet_jax import CapsNet
from capsnet_jax.config import Config
from capsnet_jax.data import make_dataset
from capsnet_jax.train.loop import Trainer

PACKAGE = Path(capsnet_jax.__file__).parent
IMAGE_SHAPE = (28, 28, 1)


def files_entered(function: Callable[[], object]) -> list[str]:
    """Files of the package whose functions are called, in order of the first call."""
    entered: dict[str, None] = {}
    gc.collect()  # or else generators of earlier tests may be closed meanwhile

    def note(frame, event, argument):
        if event == "call":
            entered[frame.f_code.co_filename] = None

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return [str(Path(name).relative_to(PACKAGE)) for name in entered if Path(name).is_relative_to(PACKAGE)]


@pytest.mark.parametrize(("batch_size", "most", "most_beside_fast"), [(3, 10, 6), (64, 8, 3)])
def test_a_forward_pass(batch_size, most, most_beside_fast):
    """A small batch is routed from votes, a large one without them; convolutions enter `nn/fast` on CPU."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: CapsNet(IMAGE_SHAPE, 10, rngs=nnx.Rngs(0))))
    images = jnp.zeros((batch_size, *IMAGE_SHAPE))
    forward = lambda state, images: nnx.merge(graphdef, state)(images)  # noqa: E731
    files = files_entered(lambda: jax.eval_shape(forward, state, images))
    assert len(files) <= most, f"{len(files)}: {', '.join(files)}"
    beside_fast = [file for file in files if not file.startswith("nn/fast/")]
    assert len(beside_fast) <= most_beside_fast, ", ".join(beside_fast)


def test_a_training_step():
    config = Config()
    images, labels = np.zeros((64, *IMAGE_SHAPE), np.uint8), np.arange(64) % 10
    trainer = Trainer(
        lambda seed: CapsNet.from_config(config.model, rngs=nnx.Rngs(seed)),
        make_dataset(images, labels, images, labels, num_classes=10),
        config.training,
        augment=config.data.augment,
    )
    arguments = trainer._arguments(1)
    files = files_entered(lambda: jax.eval_shape(trainer._train_chunk, *arguments))
    assert len(files) <= 12, f"{len(files)}: {', '.join(files)}"
