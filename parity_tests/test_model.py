"""The whole model: every intermediate, loss and gradient, and training.

Float64 and one model of each kind are ordinary tests; float32 and other options are exhaustive ones.
"""

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsnet_torch
from capsnet_jax.config import ModelConfig
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.nn.fast import fused_dynamic
from capsnet_jax.ops import convolution
from capsnet_torch.model import ONLY_IN_JAX
from capsnet_verify.checks import STEPS, VALUES
from capsnet_verify.mutants import PLAIN
from capsnet_verify.report import sentence
from capsnet_verify.subjects import EVERY_TERM, SMALL, Settings, of_model
from capsnet_verify.values import in_jax, in_torch
from capsnet_verify.verification import verify, worst
from parity_tests import oracle
from parity_tests.compare import assert_close
from parity_tests.pairs import make_pair

TWO_LAYERS = {"hidden_capsules": ((8, 7),), "primary_scale": 5.0, "routing": EVERY_TERM["dynamic"]}
ORDINARY = {
    "normalized and depthwise, as efficient": {
        "stem_below": ((5, 3), (6, 2)),
        "stem_channels": 12,
        "stem_stride": 2,
        "batch_norm": True,
        "primary_stride": 1,
        "primary_depthwise": True,
        "primary_squash": "exponential",
        "routing": "self_attention",
    },
    "matrices and convolutional capsules, as em": {
        "stem_stride": 2,
        "primary_kernel": 1,
        "primary_stride": 1,
        "primary_activation": "sigmoid",
        "primary_scale": 3.0,
        "conv_capsules": ((4, 4, 3, 2), (6, 4, 2, 1)),
        "matrix_poses": True,
        "class_dim": 4,
        "shared_class_transform": True,
        "routing": "em,annealing=0,min_variance=0.1",
    },
    "two capsule layers, squashed, all biases, fused": TWO_LAYERS
    | {"primary_squash": "squash", "decoder_bias": True, "routing_implementation": "fused"},
}
EXHAUSTIVE = {
    "default": {},
    "squashed, all biases, as official": {
        "primary_scale": 2.0,
        "primary_squash": "squash",
        "decoder_bias": True,
        "routing": "dynamic,capsule_bias=0.1",
    },
    "fused": {"routing_implementation": "fused"},
    "one iteration": {"num_iterations": 1},
    "five iterations": {"num_iterations": 5},
    "two capsule layers": TWO_LAYERS,
    "three capsule layers": {"hidden_capsules": ((60, 9), (8, 5)), "primary_scale": 10.0},
    "stride of 3": {"primary_stride": 3},
    "convolutional and dense capsules": {
        "primary_scale": 20.0,
        "conv_capsules": ((4, 7, 3, 2),),
        "hidden_capsules": ((8, 5),),
        "routing": "self_routing",
        "recompute_routing": True,
    },
    "standardized images of two classes each": {"standardize_images": True, "labels_per_image": 2},
}
OPTIONS = ORDINARY | EXHAUSTIVE


def assert_model_agrees(name: str, dtype: str, **changes: int) -> None:
    options = OPTIONS[name] | changes
    labels = options.pop("labels_per_image", 1)
    subject = of_model(name, replace(SMALL, **options), labels_per_image=labels)
    # Batch normalization divides by deviations of the batch; over three images, PyTorch itself is off by 7e-5.
    batch_size = 12 if subject.run.config.model.batch_norm else 3
    verification = verify(subject, Settings(dtype, steps=0, batch_size=batch_size))
    assert all(found.routing_matters or options.get("num_iterations") == 1 for found in verification.scalings)
    assert verification.status == 0, sentence(verification)


@pytest.fixture(autouse=True)
def _in_chunks(monkeypatch):
    """Fused routing takes a few of the 216 primary capsules at a time."""
    monkeypatch.setattr(fused_dynamic, "CHUNK_ON_CPU", 36_000)
    monkeypatch.setattr(fused_dynamic, "CHUNK_ELSEWHERE", 36_000)


@pytest.mark.parametrize("name", ORDINARY)
def test_every_intermediate_and_gradient_agrees(name):
    """With two iterations; the exhaustive test below has three."""
    assert_model_agrees(name, "float64", num_iterations=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_intermediate_and_gradient_agrees_with_every_option(name, dtype):
    assert_model_agrees(name, dtype)


@pytest.mark.parametrize(
    ("dtype", "steps", "compared"),
    [
        ("float32", 7, 5),
        pytest.param("float64", 50, 50, marks=pytest.mark.exhaustive),
        pytest.param("float32", 50, 5, marks=pytest.mark.exhaustive),
        pytest.param("bfloat16", 50, 5, marks=pytest.mark.exhaustive),
    ],
)
def test_values_and_training_agree(dtype, steps, compared):
    """In float64 the weights after each step, too; in float32 only losses, and only of the first steps."""
    verification = verify(PLAIN, Settings(dtype, steps=steps, batch_size=3))
    checks = [check for check in verification.checks if check.name.startswith("step")]
    assert [check.name for check in checks] == [f"step {number}" for number in range(1, compared + 1)]
    assert all(check.error <= STEPS[dtype] for check in checks)
    assert verification.status == 0


def test_the_worst_check_of_a_step_is_one_that_differs():
    """Even if an array that is too small to be compared is off by more."""
    cold, off = (np.full(3, 3e-8), np.full(3, 1e-8)), (np.array(1.0), np.array(1.5))
    found = worst("step 4", {"bias": cold, "loss": off}, 1e-9)
    assert (found.name, found.verdict, found.reason.partition(":")[0]) == ("step 4", "DIFFERS", "loss")
    found = worst("step 4", {"bias": cold, "loss": (off[0], off[0])}, 1e-9)
    assert (found.verdict, found.reason.partition(",")[0]) == ("no power", "bias: too small")


def test_agrees_with_the_oracle(float64):
    small = {
        "image_shape": (8, 9, 2),
        "stem_channels": 3,
        "stem_kernel": 3,
        "primary_groups": 2,
        "primary_kernel": 3,
        "primary_dim": 4,
        "num_classes": 3,
        "class_dim": 5,
        "decoder_hidden": (6, 7),
        "batch_size": 2,
    }
    pair = make_pair(float64, **small)
    state = to_torch(pair.jax_model)
    poses_in_jax = jax.jit(lambda: pair.jax_model.encode(pair.images).poses)()
    images = np.asarray(pair.images)
    poses = np.stack([oracle.encode(image, state, groups=2, stride=2, scale=1.0) for image in images])
    assert_close("poses", poses_in_jax, poses, tolerance=1e-12)
    decoded = jax.jit(pair.jax_model.decode)(poses_in_jax, pair.labels)
    labels = np.asarray(pair.labels)
    expected = [oracle.decode(pose[label], label, state) for pose, label in zip(poses, labels, strict=True)]
    assert_close("reconstructions", decoded, np.stack(expected).transpose(0, 2, 3, 1), tolerance=1e-12)


@pytest.mark.exhaustive
def test_full_size_agrees_at_the_reference_scale():
    """The 8.2 million initial weights of the reference model: capsules 4e-4 long, gradients from 4.5e-7."""
    pair = make_pair("float32", batch_size=2, **vars(ModelConfig()))
    actual = in_jax(pair)
    for name, expected in in_torch(pair).items():
        assert_close(name, actual[name], expected, tolerance=VALUES["float32"], floor=1e-7)


def test_the_twin_has_the_fields_of_the_config_and_their_defaults():
    parameters = inspect.signature(capsnet_torch.CapsNet).parameters
    fields = {name: value for name, value in vars(ModelConfig()).items() if name not in ONLY_IN_JAX}
    assert {name: parameter.default for name, parameter in parameters.items()} == fields


@pytest.fixture(scope="module")
def poses_in_float64():
    """The small model in float64, and its class capsules without `jax.jit`."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        pair = make_pair("float64")
        return pair, pair.jax_model.encode(pair.images).poses


def test_jit_and_the_convolution_of_a_gpu_change_nothing(poses_in_float64, float64, monkeypatch):
    """XLA's own convolution, which runs on a GPU, computes the same as the one that runs here."""
    pair, eager = poses_in_float64
    calls = []

    def native(images, kernel, *, stride):
        calls.append(stride)
        return convolution(images, kernel, stride)

    monkeypatch.setattr("capsnet_jax.nn.fast.convolution.direct", native)
    assert_close("native", jax.jit(pair.jax_model.encode)(pair.images).poses, eager, tolerance=1e-12)
    assert len(calls) == 2


def test_an_image_mirrored_on_one_side_is_noticed(poses_in_float64, float64):
    pair, poses = poses_in_float64
    mirrored = pair._replace(images=jnp.flip(pair.images, 2))
    in_torch = pair.torch_model.encode(mirrored.torch_batch[0]).poses
    with pytest.raises(AssertionError, match="scale-relative error"):
        assert_close("mirrored", poses, in_torch.detach(), tolerance=1e-3)


def test_float32_does_not_pass_as_float64(poses_in_float64, float64):
    _, poses = poses_in_float64
    with pytest.raises(AssertionError, match="dtype"):
        assert_close("poses", poses, np.asarray(poses, np.float32), tolerance=1)
