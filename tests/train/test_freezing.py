"""Frozen layers: they keep every bit, also their running averages, and the others train as before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsnet_jax import CapsNet, UsageError, fit
from capsnet_jax.config import Config, DataConfig, TrainingConfig, differences
from capsnet_jax.train.freezing import freeze_layers
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.step import compute_losses, create_state, make_train_step
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset

# With everything that touches weights in a step.
ALL = TrainingConfig(
    epochs=1, batch_size=16, accumulate=2, learning_rate=0.01, ema_decay=0.9, clip_norm=0.5, precision="bfloat16"
)
QUICK = SMALL | {"routing": "uniform", "stem_below": ((5, 2),), "batch_norm": True}


def new_model(seed: int = 0) -> CapsNet:
    """A model whose running averages are not those of a new one."""
    model = CapsNet(IMAGE_SHAPE, 10, **QUICK, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for norm in model.stem.norms:
        norm.mean[...], norm.var[...] = rng.uniform(0.1, 0.4, norm.mean.shape), rng.uniform(0.5, 2, norm.var.shape)
    return model


def weights(model: CapsNet, *kinds) -> dict[str, np.ndarray]:
    """Weights and running averages, or only one kind of them, by name."""
    flat = nnx.to_flat_state(nnx.state(model, kinds or (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


@pytest.mark.parametrize(
    ("freeze", "fixed"),
    [
        (("stem", "capsule_layers.0"), ("stem.", "capsule_layers.0.")),
        pytest.param(("stem.norms.1", "decoder"), ("stem.norms.1.", "decoder."), marks=pytest.mark.exhaustive),
    ],
)
def test_frozen_layers_of_all_seeds_keep_every_bit_and_all_others_are_trained(freeze, fixed):
    config = dataclasses.replace(ALL, freeze=freeze)
    trainer = Trainer(new_model, make_small_dataset(), config, augment=("shift=0.1",), seeds=(3, 4))
    sizes = {name: array.size for name, array in weights(new_model(), nnx.Param).items()}
    assert trainer.num_params == sum(sizes.values())
    assert trainer.num_frozen == sum(size for name, size in sizes.items() if name.startswith(fixed))
    assert sum(1 for _ in trainer.run()) == 3
    for seed, model in zip((3, 4), trainer.models(), strict=True):
        before, after = weights(new_model(seed)), weights(model)
        assert changed(before, after) == {name for name in before if not name.startswith(fixed)}
    # Adam has no moments for them.
    state = trainer.snapshot.state
    moments = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state)}
    assert any("primary_capsules" in name for name in moments)
    assert not any(f"'{freeze[-1].partition('.')[0]}'" in name for name in moments)


def test_a_step_has_loss_and_gradients_of_frozen_layers_in_evaluation_mode():
    """A frozen layer normalizes by its running averages; only the gradients of the other layers are in the norm."""
    dataset, model = make_small_dataset(), new_model()
    images, labels = jnp.asarray(dataset.train_images / np.float32(255)), jnp.asarray(dataset.train_labels)
    graphdef, params, others = nnx.split(model, nnx.Param, ...)  # in evaluation mode

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return compute_losses(nnx.merge(graphdef, params, others), images, labels, reconstruction_weight=0.0).total

    value, gradients = loss(params)
    squares = {"stem": 0.0, "others": 0.0}
    for path, variable in nnx.to_flat_state(gradients):
        squares["stem" if path[0] == "stem" else "others"] += float(jnp.sum(variable[...] ** 2))
    config = TrainingConfig(freeze=("stem",), reconstruction_weight=0.0)
    optimizer = optax.sgd(0.1)
    graphdef, state = create_state(model, optimizer, freeze=config.freeze)
    state, metrics = jax.jit(make_train_step(graphdef, optimizer, config))(state, images, labels)
    assert float(metrics.total) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics.gradient_norm) == pytest.approx(np.sqrt(squares["others"]), rel=1e-4)
    assert squares["stem"] > 0.01 * squares["others"]
    new = nnx.merge(graphdef, state.weights).capsule_layers[0].weight[...]
    old, gradient = (of["capsule_layers"][0]["weight"][...] for of in (params, gradients))
    np.testing.assert_allclose(new, old - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_fit_keeps_frozen_layers():
    model = CapsNet(IMAGE_SHAPE, 10, **SMALL | {"routing": "uniform", "decoder_hidden": None}, rngs=nnx.Rngs(1))
    before = weights(model)
    config = TrainingConfig(epochs=1, batch_size=25, freeze=("stem", "primary_capsules"), reconstruction_weight=0.0)
    assert len(list(fit(model, make_small_dataset(), config))) == 2
    assert changed(before, weights(model)) == {"capsule_layers.0.weight"}


def test_unknown_layers_are_refused_with_a_list_of_all():
    with pytest.raises(UsageError) as error:
        fit(new_model(), make_small_dataset(), TrainingConfig(batch_size=9, freeze=("stem", "stern")))
    assert str(error.value) == (
        "freeze has 'stern', which is no layer of this model; expected capsule_layers, capsule_layers.0, decoder, "
        "primary_capsules, primary_capsules.convolution, stem, stem.convolutions, stem.convolutions.0, "
        "stem.convolutions.1, stem.norms, stem.norms.0, stem.norms.1."
    )
    for name in ("", "ste", "stem.", "stem.convolutions.2", "capsule_layers.0.weight"):  # layers, not weights
        with pytest.raises(UsageError, match="is no layer of this model; expected capsule_layers,"):
            freeze_layers(new_model(), (name,))
    with pytest.raises(UsageError, match="leaves no weight to train; expected fewer layers"):
        freeze_layers(new_model(), ("decoder", "capsule_layers", "primary_capsules", "stem"))


def test_without_new_options_config_and_checkpoints_are_those_of_earlier_versions():
    """They have no such options, and no such arrays."""
    fields = Config().to_json()
    assert ("freeze" in fields["training"], "transpose" in fields["data"]) == (False, False)
    assert Config.from_json(fields) == Config()
    used = Config(data=DataConfig(transpose=True), training=TrainingConfig(freeze=("stem",)))
    assert Config.from_json(used.to_json()) == used
    assert differences(fields, used.to_json()) == [
        "freeze was not there and is ['stem']",
        "transpose was not there and is True",
    ]
    _, state = create_state(new_model(), optax.adam(0.1))
    assert jax.tree.leaves(state.frozen) == []
    assert len(jax.tree.leaves(state.params)) == 15
