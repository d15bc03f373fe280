"""The first hour: run `capsnet train --run-dir runs/digits`, then `python docs/first_hour.py runs/digits`."""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import capsnet_jax
from capsnet_jax import CapsNet, Routed, load_dataset, margin_loss, reconstruction_loss
from capsnet_jax.ops import squash, to_unit_range
from capsnet_jax.routing import learns

dataset = load_dataset("digits")  # 1,797 handwritten digits of 8 x 8 pixels
images = to_unit_range(jnp.asarray(dataset.train_images[:64]))
labels = jnp.asarray(dataset.train_labels[:64])


@learns(prior="i o")  # a learned array [input capsules, output capsules], initially zero
def my_routing(votes, activations, *, prior=0.0):
    """Route one example by agreement with the mean vote; layers map this function over the batch."""
    agreement = jnp.einsum("ioh,oh->io", votes, votes.mean(axis=0))
    couplings = jax.nn.softmax(agreement + prior, axis=1)  # over the output capsules
    poses = squash(jnp.einsum("io,ioh->oh", couplings, votes))
    return Routed(poses, jnp.sqrt((poses**2).sum(axis=-1) + 1e-9), couplings)


# The preset `digits` with this routing; a model is a Flax module.
model = CapsNet.from_preset("digits", routing=my_routing, rngs=nnx.Rngs(0))
print(nnx.tabulate(model, images, depth=2))
for layer, choice in model.implementations(batch_size=64).items():
    print(f"{layer}: {choice}")

# A training loop as in any Flax program; `capsnet_jax.fit` adds data loading, schedules and seeds.
optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, images, labels):
    def loss(model):
        _, activations, reconstructions = model(images, labels)
        return (margin_loss(activations, labels) + 10 * reconstruction_loss(reconstructions, images)).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


losses = [float(step(model, optimizer, images, labels)) for _ in range(20)]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

couplings = model.route(images)[-1].couplings  # [b, input capsules, classes]; also captured as intermediates:
_, captured = nnx.capture(model, nnx.Intermediate)(images)
print("couplings", couplings.shape, "captured", list(captured["capsule_layers"][0]))

trained = capsnet_jax.load(sys.argv[1])
predictions = trained(to_unit_range(jnp.asarray(dataset.test_images))).activations.argmax(axis=1)
print(f"test accuracy of {sys.argv[1]}: {(predictions == dataset.test_labels).mean():.4f}")
