"""The JAX functions that the benchmark times."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from capsnet_benchmark import jax_work
from capsnet_benchmark.jax_work import Work, random_like
from capsnet_jax.config import Config, ModelConfig, TrainingConfig
from capsnet_jax.errors import UsageError
from capsnet_jax.ops import mask_by_label
from capsnet_jax.train.loop import Trainer

ARGUMENTS = {"shift": 0.2, "train_images": 12, "test_images": 20, "evaluation_batch": 4}
ARGUMENTS |= {"gemm_sizes": {"cpu": 16, "gpu": 16}}


@pytest.fixture(scope="module")
def work() -> Work:
    """The measurements of a tiny model."""
    sizes = {"stem_channels": 6, "stem_kernel": 3, "primary_groups": 2, "primary_dim": 4, "primary_kernel": 3}
    model = ModelConfig((9, 11, 1), 7, **sizes, class_dim=5, decoder_hidden=(6, 8), num_iterations=2)
    return Work(config=Config(model=model, training=TrainingConfig(batch_size=3)).to_json(), **ARGUMENTS)


def test_a_step_trains_and_changes_the_state(work):
    ((call, weight),) = work.prepare("step")
    (_, first), (state, second) = call(), call()
    assert weight == 1
    assert second.total < first.total
    assert state.step == 2


def test_inference_computes_the_class_capsules(work):
    ((call, weight),) = work.prepare("inference")
    model = work._new_model()
    expected = jax.jit(lambda images: model.encode(images).poses)(work._images)
    np.testing.assert_allclose(call().poses, expected, rtol=1e-5)
    assert weight == 1


def test_the_optimizer_moves_weights_by_the_learning_rate(work):
    ((call, _),) = work.prepare("optimizer")
    call()
    (params, _), _ = call()
    # The first steps of Adam with a constant positive gradient.
    for after, before in zip(jax.tree.leaves(params), weights(work._new_model()), strict=True):
        np.testing.assert_allclose(np.subtract(after, before), -2e-3, rtol=0.02)


def test_augmentation_shifts_images(work):
    ((call, _),) = work.prepare("augmentation")
    shifted = np.asarray(call())
    assert shifted.shape == work._images.shape
    pixels, known = np.unique(shifted), np.unique(work._images)
    assert np.isin(pixels[pixels > 0], known).all()
    assert (shifted != work._images).any()


def test_gemm_is_a_product_of_matrices(work):
    ((call, _),) = work.prepare("gemm")
    left, right = jax.random.uniform(jax.random.key(0), (2, 16, 16))
    np.testing.assert_allclose(call(), left @ right, rtol=1e-5)


def test_dispatch_is_a_share_of_a_chunk_of_steps(work, monkeypatch):
    calls = []

    def program(state: int, images: jax.Array, labels: jax.Array, indices: jax.Array, key: jax.Array):
        calls.append((state, images.shape, labels.shape, indices.tolist(), key.shape))
        return state + 1, None

    monkeypatch.setattr(Trainer, "compiled", lambda trainer: program)
    monkeypatch.setattr(Trainer, "chunk", 2)
    monkeypatch.setattr(Trainer, "snapshot", SimpleNamespace(state=7))
    ((call, weight),) = work.prepare("dispatch")
    call()
    call()
    assert weight == 1 / 2
    expected = ((12, 9, 11, 1), (12,), [[[0, 1, 2], [3, 4, 5]]], (1,))
    assert calls == [(7, *expected), (8, *expected)]


def weights(model: nnx.Module) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(
    "name",
    # parity_tests/test_benchmark.py compares all parts with PyTorch.
    [
        "routing",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("stem", "primary", "votes", "decoder")),
    ],
)
def test_a_part_computes_outputs_and_gradients(name, work):
    """Outputs and gradients of the input are compared with those of the layer itself, gradients of weights by shape."""
    model = work._new_model()
    (last,) = model.capsule_layers
    features, capsules, class_poses = random_like(jax.eval_shape(work._intermediates, work._images))
    layer, function, inputs = {
        "stem": (model.stem, lambda: model.stem(work._images), ()),
        "primary": (model.primary_capsules, model.primary_capsules, (features,)),
        "votes": (last, last.votes, (capsules.poses,)),
        "routing": (last, lambda poses: last(capsules._replace(poses=poses)), (capsules.poses,)),
        "decoder": (model.decoder, lambda poses: model.decoder(mask_by_label(poses, work._labels)), (class_poses,)),
    }[name]

    @jax.jit
    def expect(*inputs: jax.Array):
        outputs, pullback = jax.vjp(function, *inputs)
        return outputs, pullback(random_like(outputs))

    ((call, weight),) = work.prepare(name)
    outputs, (of_weights, of_inputs) = call()
    expected, expected_gradients = expect(*inputs)
    assert weight == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), outputs, expected)
    for ours, theirs in zip(jax.tree.leaves(of_inputs), expected_gradients, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    gradients = jax.tree.leaves(of_weights)
    assert [leaf.shape for leaf in gradients] == [leaf.shape for leaf in weights(layer)]
    assert all(np.asarray(leaf).any() for leaf in gradients)
    assert work.temp_bytes() >= 0


@pytest.mark.exhaustive
def test_dispatch_and_epoch_train_on_cpu(work):
    ((call, weight),) = work.prepare("dispatch")
    (_, first), (_, second) = call(), call()
    assert weight == 1
    assert first.total != second.total
    (train, _), (evaluate, _) = work.prepare("epoch")
    assert [train().step, train().step] == [1, 2]
    assert evaluate().num_images == 4


@pytest.mark.parametrize(("platform", "weights", "steps"), [("cpu", [4, 5], [1, 2]), ("gpu", [1], [3, 6])])
def test_an_epoch_is_a_sum_of_steps_and_evaluations_on_cpu_and_whole_on_gpu(
    platform, weights, steps, work, monkeypatch
):
    trained = (SimpleNamespace(step=step, ends_epoch=step % 3 == 0) for step in range(1, 10))
    sizes = []

    def random_trainer(config, train_images, test_images, *, augment):
        sizes.extend([config.training.epochs, train_images, test_images, augment])
        evaluate = lambda: "evaluated"  # noqa: E731
        return SimpleNamespace(run=lambda: trained, evaluate_test=evaluate, steps_per_epoch=8, chunk=2)

    monkeypatch.setattr(jax_work, "random_trainer", random_trainer)
    monkeypatch.setattr(work, "platform", platform)
    calls = work.prepare("epoch")
    assert [weight for _, weight in calls] == weights
    assert [calls[0][0]().step for _ in range(2)] == steps
    assert [call() for call, _ in calls[1:]] == ["evaluated"] * (platform == "cpu")
    assert sizes == [10**6, 12, 4 if platform == "cpu" else 20, ("shift=0.2",)]


def test_only_one_device_is_measured(monkeypatch):
    device = SimpleNamespace(platform="gpu", device_kind="A GPU")
    monkeypatch.setattr(jax_work.jax, "devices", lambda: [device, device])
    with pytest.raises(UsageError, match="There are 2 devices; expected one, as with CUDA_VISIBLE_DEVICES=0"):
        Work(config={}, **ARGUMENTS)
