"""What the benchmark measures of the JAX model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_benchmark.jax_gradient import forward_and_backward, random_like
from capsnet_benchmark.jax_work import Work
from capsnet_benchmark.measurements import MEASUREMENTS
from capsnet_jax.config import Config, ModelConfig, TrainingConfig

pytestmark = pytest.mark.slow  # many start processes, and none depends on the version of Python


def test_forward_and_backward_of_a_part():
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    inputs, fixed = jnp.array([[1.0, -2.0, 0.5]]), jnp.array([0.5, 2.0, -1.0, 3.0])
    call = forward_and_backward(layer, lambda layer, x, y: layer(x) * y, (inputs,), (fixed,))
    outputs, (of_weights, (of_inputs,)) = call()
    kernel = np.asarray(layer.kernel[...])
    # The random gradient of the outputs, times what they are multiplied by.
    cotangent = np.asarray(random_like(jax.ShapeDtypeStruct((1, 4), jnp.float32)) * fixed)
    np.testing.assert_allclose(outputs, (np.asarray(inputs) @ kernel) * np.asarray(fixed), rtol=1e-5)
    np.testing.assert_allclose(of_inputs, cotangent @ kernel.T, rtol=1e-5)
    np.testing.assert_allclose(of_weights["kernel"][...], np.asarray(inputs).T @ cotangent, rtol=1e-5)
    assert cotangent.std() > 0.1


@pytest.fixture(scope="module")
def work():
    """The measurements of a tiny model."""
    model = ModelConfig(
        (9, 11, 1), 7, stem_channels=6, stem_kernel=3, primary_groups=2, primary_dim=4, primary_kernel=3, class_dim=5
    )
    return Work(
        config=Config(model=model, training=TrainingConfig(batch_size=3)).to_json(),
        shift=0.2,
        train_images=12,
        test_images=20,
        evaluation_batch=4,
        gemm_sizes={"cpu": 16, "gpu": 16},
    )


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_of_the_jax_model_computes(name, work):
    calls = work.prepare(name)
    for call, _ in calls:
        first, second = call(), call()
        work.block(second)
        leaves = [leaf for leaf in jax.tree.leaves(second) if isinstance(leaf, jax.Array)]
        assert leaves or name == "epoch"
        assert all(np.isfinite(leaf).all() and np.asarray(leaf).any() for leaf in leaves if leaf.size > 1)
        if name in ("step", "dispatch"):
            assert first.total != second.total  # it trains
    times = [times for _, times in calls]
    assert times == ([4, 5] if name == "epoch" else [1])


def test_inference_and_routing_are_those_of_the_model(work):
    model = work._new_model()
    (inference, _), (routing, _) = *work.prepare("inference"), *work.prepare("routing")
    np.testing.assert_allclose(inference().poses, model.encode(work._images).poses, rtol=1e-5)
    layer, capsules = work._last_layer()
    routed, (of_weights, (of_poses,)) = routing()
    np.testing.assert_allclose(routed.poses, layer(capsules).poses, rtol=1e-5)
    assert capsules.poses.shape == of_poses.shape == (3, 2 * 3 * 4, 4)
    assert of_weights["weight"][...].shape == layer.weight.shape


def test_an_epoch_on_cpu_is_steps_and_batches(work):
    (train, _), (evaluate, _) = work.prepare("epoch")
    assert [train().step, train().step] == [1, 2]
    assert evaluate().num_images == 4
