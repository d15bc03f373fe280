"""Mixed precision: products in bfloat16, everything else in float32; losses and gradients close to float32."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet, Capsules
from capsnet_jax.interchange.weights import weight_table
from capsnet_jax.nn.losses import margin_loss, reconstruction_loss
from capsnet_jax.nn.precision import for_products
from capsnet_jax.ops import at_least_float32
from capsnet_jax.presets import PRESETS
from capsnet_jax.routing.dynamic import dynamic

IMAGE_SHAPE = (9, 11, 1)
SMALL: dict[str, Any] = {
    "stem_channels": 8,
    "stem_kernel": 3,
    "primary_groups": 2,
    "primary_dim": 4,
    "primary_kernel": 3,
    "primary_scale": 1.0,
    "class_dim": 4,
    "decoder_hidden": (48, 52),
}
MODELS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "as efficient": {
        "batch_norm": True,
        "primary_depthwise": True,
        "primary_squash": "exponential",
        "decoder_bias": True,
        "routing": "self_attention",
    },
    "convolutional capsules of matrices": {
        "conv_capsules": ((3, 4, 2, 1),),
        "matrix_poses": True,
        "shared_class_transform": True,
        "primary_activation": "sigmoid",
        "routing": "self_routing",
    },
}
# Primitives whose result in bfloat16, with 8 bits, would lose more than the rounding of an operand.
SENSITIVE = {
    "exp",
    "expm1",
    "log",
    "log1p",
    "logistic",
    "sqrt",
    "rsqrt",
    "div",
    "pow",
    "integer_pow",
    "reduce_max",
    "mul",
}


class Case:
    """A model, a batch, and the loss as a function of the dtype of products."""

    def __init__(self, **options: Any):
        model = CapsNet(IMAGE_SHAPE, 5, **(SMALL | options), rngs=nnx.Rngs(0))
        model.train()
        self.graphdef, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        rng = np.random.default_rng(1)
        self.images = jnp.asarray(rng.random((7, *IMAGE_SHAPE)), jnp.float32)
        self.labels = jnp.asarray(rng.integers(0, 5, 7), jnp.int32)

    def model(self, params: nnx.State, dtype: str) -> CapsNet:
        return nnx.merge(self.graphdef, for_products(params, dtype), self.rest, copy=True)

    def loss(self, params: nnx.State, dtype: str) -> jax.Array:
        model = self.model(params, dtype)
        capsules = model.encode(self.images)
        reconstructions = model.decode(capsules.poses, self.labels)
        margin = margin_loss(capsules.activations, self.labels).mean()
        return margin + 10 * reconstruction_loss(reconstructions, self.images).mean()


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_close_to_float32(name):
    case = Case(**MODELS[name])
    loss = jax.jit(jax.value_and_grad(case.loss), static_argnums=1)
    (exact, exact_grads), (rounded, grads) = loss(case.params, "float32"), loss(case.params, "bfloat16")
    assert rounded.dtype == jnp.float32
    assert rounded != exact
    np.testing.assert_allclose(rounded, exact, rtol=2e-2)
    for (path, expected), (_, grad) in zip(nnx.to_flat_state(exact_grads), nnx.to_flat_state(grads), strict=True):
        assert grad[...].dtype == jnp.float32, path
        expected, grad = (np.asarray(values[...], np.float64).ravel() for values in (expected, grad))
        assert np.all(np.isfinite(grad)), path
        cosine = grad @ expected / (np.linalg.norm(grad) * np.linalg.norm(expected))
        assert cosine > 0.99, (path, cosine)
        np.testing.assert_allclose(np.linalg.norm(grad), np.linalg.norm(expected), rtol=5e-2, err_msg=str(path))


@pytest.mark.parametrize("preset", PRESETS)
def test_only_weights_of_products_are_cast_in_every_preset(preset):
    """In PyTorch these are called weight and have several axes; the weight of a batch normalization has one."""
    shape = (8, 8, 1) if preset == "digits" else (28, 28, 1)
    model = nnx.eval_shape(lambda: CapsNet.from_preset(preset, image_shape=shape, num_classes=10, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    before = dict(nnx.to_flat_state(params))
    after = dict(nnx.to_flat_state(jax.eval_shape(lambda params: for_products(params, jnp.bfloat16), params)))
    assert after.keys() == before.keys()
    names = {row.path: row.name for row in weight_table(model)}
    for path, variable in after.items():
        is_product = names[path].endswith(".weight") and len(variable.shape) > 1
        assert variable.dtype == (jnp.bfloat16 if is_product else jnp.float32), path
        assert variable.shape == before[path].shape
        assert type(variable) is type(before[path])


def test_learned_weights_of_routings_are_never_cast():
    params = nnx.State({"weight": nnx.Param(jnp.ones(2)), "routing_weights": {"weight": nnx.Param(jnp.ones(3))}})
    cast = for_products(params, jnp.bfloat16)
    assert cast["weight"][...].dtype == jnp.bfloat16
    assert cast["routing_weights"]["weight"][...].dtype == jnp.float32


@pytest.mark.parametrize("layers", [{}, {"conv_capsules": ((3, 4, 2, 1),)}], ids=["dense", "convolutional"])
def test_routing_gets_float32(layers):
    seen = []

    def spy(votes, activations, *, poses):
        seen.extend([votes.dtype, activations.dtype, poses.dtype])
        return dynamic(votes, activations)

    case = Case(**layers, routing=spy)
    seen.clear()
    capsules = jax.eval_shape(lambda params: case.model(params, "bfloat16").encode(case.images), case.params)
    assert seen == [jnp.float32] * 3 * (1 + len(layers))
    assert (capsules.poses.dtype, capsules.activations.dtype) == (jnp.float32, jnp.float32)


def test_only_products_are_in_bfloat16_and_all_products_of_weights_are():
    case = Case()
    forward = list(equations(jax.make_jaxpr(case.loss, static_argnums=1)(case.params, "bfloat16").jaxpr))
    backward = list(equations(jax.make_jaxpr(jax.grad(case.loss), static_argnums=1)(case.params, "bfloat16").jaxpr))
    dtypes = [(equation.primitive.name, operand_dtypes(equation)) for equation in forward]
    # Two convolutions in two implementations each, votes, three decoder layers; then the products of routing.
    assert dtypes.count(("conv_general_dilated", {"bfloat16"})) == 2
    assert dtypes.count(("dot_general", {"bfloat16"})) == 2 + 1 + 3
    assert dtypes.count(("dot_general", {"float32"})) == 2 * 2
    weights = {variable.shape for _, variable in nnx.to_flat_state(case.params) if len(variable.shape) > 1}
    for equation in (*forward, *backward):
        name, operands = equation.primitive.name, operand_dtypes(equation)
        if name in ("dot_general", "conv_general_dilated"):
            assert len(operands) == 1, equation  # mixed ones would be cast up
            if operands == {"float32"}:
                assert not weights & {variable.aval.shape for variable in equation.invars}, equation
        elif name in SENSITIVE:
            assert operands == {"float32"}, equation
    assert SENSITIVE & {equation.primitive.name for equation in backward} >= {"exp", "sqrt", "div", "logistic"}


def test_features_are_bfloat16_and_batch_norm_is_float32():
    case = Case(batch_norm=True)
    model = case.model(case.params, "bfloat16")
    convolution, norm = model.stem.convolutions[0], model.stem.norms[0]
    features = jax.jit(convolution)(case.images)
    assert features.dtype == jnp.bfloat16
    assert nnx.jit(lambda model: model.stem(case.images))(model).dtype == jnp.float32
    assert {norm.scale[...].dtype, norm.bias[...].dtype} == {jnp.dtype("float32")}
    assert {norm.mean[...].dtype, norm.var[...].dtype} == {jnp.dtype("float32")}
    features = np.maximum(np.asarray(features, np.float64), 0)
    np.testing.assert_allclose(norm.mean[...], 0.01 * features.mean(axis=(0, 1, 2)), rtol=1e-5)


def test_a_model_with_bfloat16_parameters_returns_float32():
    def decoded() -> tuple[Capsules, Capsules, jax.Array]:
        model = CapsNet(IMAGE_SHAPE, 5, **SMALL, batch_norm=True, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        images = jnp.ones((2, *IMAGE_SHAPE))
        primary, capsules = model.primary_capsules(model.stem(images)), model.encode(images)
        return primary, capsules, model.decode(capsules.poses, jnp.array([0, 1]))

    assert [array.dtype for array in jax.tree.leaves(jax.eval_shape(decoded))] == [jnp.float32] * 5


def test_at_least_float32_never_casts_down():
    with jax.enable_x64(True):
        for dtype, expected in (("bfloat16", "float32"), ("float16", "float32"), ("float32",) * 2, ("float64",) * 2):
            assert at_least_float32(jnp.ones(2, dtype)).dtype == expected


def operand_dtypes(equation: Any) -> set[str]:
    return {
        str(variable.aval.dtype) for variable in equation.invars if jnp.issubdtype(variable.aval.dtype, jnp.floating)
    }


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, including those of inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))
