"""The whole model: every intermediate, loss and gradient, in order, so that the first divergence is the one named."""

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import capsnet_torch
from capsnet_jax.config import ModelConfig
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.ops import convolution
from capsnet_torch.model import ONLY_IN_JAX
from capsnet_verify.checks import VALUES
from capsnet_verify.report import sentence
from capsnet_verify.subjects import SMALL, of_model
from capsnet_verify.values import in_jax, in_torch
from capsnet_verify.verification import Settings, verify
from parity_tests import oracle
from parity_tests.compare import assert_close
from parity_tests.pairs import make_pair

OPTIONS = {
    "default": {},
    "one iteration": {"num_iterations": 1},
    "five iterations": {"num_iterations": 5},
    "three capsule layers": {"hidden_capsules": ((60, 9), (8, 5)), "primary_scale": 10.0},
    "stride of 3": {"primary_stride": 3},
    "squashed, all biases, as official": {
        "primary_scale": 2.0,
        "primary_squash": "squash",
        "decoder_bias": True,
        "routing": "dynamic,capsule_bias=0.1",
    },
    "normalised and depthwise, as efficient": {
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
    "convolutional and dense capsules": {
        "primary_scale": 20.0,
        "conv_capsules": ((4, 7, 3, 2),),
        "hidden_capsules": ((8, 5),),
        "routing": "self_routing",
        "recompute_routing": True,
    },
    "standardized images of two classes each": {"standardize_images": True, "labels_per_image": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_intermediate_and_gradient_agrees(name, dtype):
    options = dict(OPTIONS[name])
    labels = options.pop("labels_per_image", 1)
    subject = of_model(name, replace(SMALL, **options), labels_per_image=labels)
    # Batch normalisation divides by deviations of the batch, and of three images PyTorch itself is off by 7e-5.
    batch_size = 12 if subject.run.config.model.batch_norm else 3
    verification = verify(subject, Settings(dtype, steps=0, batch_size=batch_size))
    assert all(found.hot or options.get("num_iterations") == 1 for found in verification.heats)
    assert verification.status == 0, sentence(verification)


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
    capsules = pair.jax_model.encode(pair.images)
    images = np.asarray(pair.images)
    poses = np.stack([oracle.encode(image, state, groups=2, stride=2, scale=1.0) for image in images])
    assert_close("poses", capsules.poses, poses, tolerance=1e-12)
    decoded = pair.jax_model.decode(capsules.poses, pair.labels)
    labels = np.asarray(pair.labels)
    expected = [oracle.decode(pose[label], label, state) for pose, label in zip(poses, labels, strict=True)]
    assert_close("reconstructions", decoded, np.stack(expected).transpose(0, 2, 3, 1), tolerance=1e-12)


def test_full_size_agrees_at_the_reference_scale():
    """The 8.2 million weights of the reference model as they are drawn: capsules 4e-4 long, gradients from 4.5e-7."""
    pair = make_pair("float32", batch_size=2, **vars(ModelConfig()))
    assert sum(param.size for param in to_torch(pair.jax_model).values()) == 8_214_272
    ours = in_jax(pair)
    for name, expected in in_torch(pair).items():
        assert_close(name, ours[name], expected, tolerance=VALUES["float32"], floor=1e-7)


def test_the_twin_has_the_fields_of_the_config_and_their_defaults():
    parameters = inspect.signature(capsnet_torch.CapsNet).parameters
    fields = {name: value for name, value in vars(ModelConfig()).items() if name not in ONLY_IN_JAX}
    assert {name: parameter.default for name, parameter in parameters.items()} == fields


def test_jit_and_the_other_convolution_change_nothing(float64):
    """What runs on a GPU, XLA's own convolution, is the same function as what runs here."""
    pair = make_pair(float64)
    eager = pair.jax_model.encode(pair.images).poses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capsnet_jax.nn.fast.convolution.matrix_product", native_with_count := _Counted())
        native = jax.jit(pair.jax_model.encode)(pair.images).poses
    assert native_with_count.calls == 2
    assert_close("native", native, eager, tolerance=1e-12)


class _Counted:
    """XLA's convolution, counting its traces, so that the test knows that it ran."""

    calls = 0

    def __call__(self, images, kernel, *, stride):
        self.calls += 1
        return convolution(images, kernel, stride)


def test_channels_last_and_first_are_told_apart(float64):
    """A check of the checks: an image mirrored on one side only is noticed."""
    pair = make_pair(float64)
    mirrored = pair._replace(images=jnp.flip(pair.images, 2))
    ours = pair.jax_model.encode(pair.images).poses
    theirs = pair.torch_model.encode(mirrored.torch_batch[0]).poses
    with pytest.raises(AssertionError, match="scale-relative error"):
        assert_close("mirrored", ours, theirs.detach(), tolerance=1e-3)


def test_float32_inputs_do_not_pass_as_float64(float64):
    pair = make_pair(float64)
    poses = pair.torch_model.float().encode(pair.torch_batch[0].float()).poses
    with pytest.raises(AssertionError, match="dtype"):
        assert_close("poses", pair.jax_model.encode(pair.images).poses, poses.detach(), tolerance=1)
    assert poses.dtype == torch.float32
