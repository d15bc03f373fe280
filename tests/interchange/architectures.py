"""Architectures that have every kind of weight, and random weights for them."""

import dataclasses
from pathlib import Path

import numpy as np
from einops import rearrange
from flax import nnx

from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.interchange.weights import weight_table
from capsnet_jax.runs.folder import Run

# All weights that a dense architecture can have: several convolutions, normalization, routing weights, hidden layers.
MANY = ModelConfig(
    image_shape=(19, 22, 2),
    num_classes=5,
    stem_below=((3, 4), (5, 2)),
    stem_channels=4,
    stem_kernel=3,
    stem_stride=2,
    batch_norm=True,
    primary_groups=2,
    primary_dim=6,
    primary_kernel=2,
    primary_stride=2,
    primary_scale=1.5,
    primary_activation="sigmoid",
    hidden_capsules=((8, 9), (7, 5)),
    class_dim=3,
    decoder_hidden=(12, 14),
    decoder_bias=True,
    routing="dynamic,capsule_bias=0.1",
)
DEPTHWISE = ModelConfig(
    image_shape=(19, 22, 2), num_classes=5,
    stem_channels=12, stem_kernel=3, primary_groups=3, primary_dim=4, primary_kernel=3, primary_stride=3,
    primary_depthwise=True, class_dim=5, decoder_hidden=(6, 7),
)  # fmt: skip
PLAIN = dataclasses.replace(DEPTHWISE, primary_depthwise=False, primary_stride=2)
# The sizes of this model cannot be inferred from its weights, but files keep the weights all the same.
CONVOLUTIONAL = ModelConfig(
    image_shape=(19, 22, 2),
    num_classes=5,
    stem_channels=4,
    stem_kernel=5,
    stem_stride=2,
    primary_groups=3,
    primary_dim=4,
    primary_kernel=1,
    primary_stride=1,
    primary_activation="sigmoid",
    conv_capsules=((2, 4, 3, 2),),
    matrix_poses=True,
    class_dim=4,
    shared_class_transform=True,
    decoder_hidden=None,
    routing="em",
)
ARCHITECTURES = {"plain": PLAIN, "depthwise": DEPTHWISE, "everything": MANY}
FROM_CONFIG = ("stem_stride", "primary_scale", "primary_squash", "routing", "num_iterations", "initial_weights")


def new_run(model: ModelConfig, folder: Path = Path("run")) -> Run:
    return Run(folder, Config(model), tuple("01234"))


def random_state(run: Run, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    model = nnx.eval_shape(run.new_model)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    state = {}
    for row in weight_table(model):
        array = rng.uniform(0.1, 1, flat[row.path].shape).astype(dtype)
        state[row.name] = np.array(rearrange(array, f"{row.jax_axes} -> {row.torch_axes}"), order="C")
    return state


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert state[name].dtype == array.dtype
        np.testing.assert_array_equal(state[name], array)
