"""Convolutional capsules: receptive fields, votes, and the softmax over the parents of an input capsule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet, Capsules, Routed, UsageError
from capsnet_jax.nn.conv_capsules import ConvCapsules, places_under_kernel, softmax_over_parents
from capsnet_jax.nn.layers import CapsuleLayer
from capsnet_jax.routing import ROUTINGS, get_routing

GRID, IN_GROUPS, IN_DIM, OUT_GROUPS, OUT_DIM, KERNEL, STRIDE = (5, 6), 2, 4, 3, 7, (3, 2), 2
OUT_GRID = (2, 3)
BATCH = 2


def new_layer(**options) -> ConvCapsules:
    options = {"kernel_size": KERNEL, "stride": STRIDE, "out_dim": OUT_DIM, "routing": "dynamic"} | options
    return ConvCapsules(GRID, IN_GROUPS, IN_DIM, OUT_GROUPS, **options, rngs=nnx.Rngs(0))


def capsules(seed: int = 0) -> Capsules:
    rng = np.random.default_rng(seed)
    count = GRID[0] * GRID[1] * IN_GROUPS
    poses = jnp.asarray(rng.normal(size=(BATCH, count, IN_DIM)), jnp.float32)
    return Capsules(poses, jnp.asarray(rng.uniform(size=(BATCH, count)), jnp.float32))


def test_each_tap_gathers_the_capsules_at_its_position():
    """The poses encode their row, column, group and component, so any mix-up shows."""
    layer = new_layer()
    coded = np.array(
        [
            [1000 * row + 100 * column + 10 * group + component for component in range(IN_DIM)]
            for row in range(GRID[0])
            for column in range(GRID[1])
            for group in range(IN_GROUPS)
        ],
        np.float32,
    )
    seen = layer.under_kernel(jnp.asarray(coded)[None])
    assert layer.out_grid == OUT_GRID
    assert seen.shape == (1, 2 * 3, 3 * 2, IN_GROUPS, IN_DIM)
    for position, (y, x) in enumerate(np.ndindex(*OUT_GRID)):
        for tap, (row, column) in enumerate(np.ndindex(*KERNEL)):
            for group in range(IN_GROUPS):
                code = 1000 * (y * STRIDE + row) + 100 * (x * STRIDE + column) + 10 * group
                np.testing.assert_array_equal(seen[0, position, tap, group], code + np.arange(IN_DIM))


@pytest.mark.parametrize("routing", ["dynamic", "em", "self_routing"])
def test_a_capsule_changes_only_the_positions_that_cover_it(routing):
    """The kernels of this layer do not overlap, so that EM cannot couple positions either."""
    layer = new_layer(routing=routing, kernel_size=(2, 2), stride=2)
    before = capsules()
    row, column = 1, 4
    index = (row * GRID[1] + column) * IN_GROUPS + 1
    after = Capsules(before.poses.at[:, index].multiply(-3), before.activations)
    route = nnx.jit(layer)
    change = np.abs(route(after).poses - route(before).poses).max(axis=(0, 2)).reshape(2, 3, OUT_GROUPS)
    # Kernels of 2 x 2 in steps of 2 do not overlap: rows 0 and 1, columns 4 and 5 are the output at (0, 2).
    assert np.all(change[0, 2] > 1e-3)
    change[0, 2] = 0
    np.testing.assert_array_equal(change, 0)


@pytest.mark.parametrize("matrix", [False, True], ids=["vectors", "matrices"])
@pytest.mark.parametrize("shared", [False, True], ids=["by tap", "shared"])
def test_votes_equal_explicit_loops(matrix, shared):
    layer = new_layer(
        out_dim=IN_DIM if matrix else OUT_DIM, matrix_poses=matrix, shared_transform=shared, coordinate_addition=shared
    )
    poses = np.random.default_rng(1).normal(size=(1, 2, 6, IN_GROUPS, IN_DIM))
    votes = layer.votes(jnp.asarray(poses, jnp.float32))
    weight = np.asarray(layer.weight[...], np.float64)
    for position, tap, i, o in np.ndindex(2, 6, IN_GROUPS, OUT_GROUPS):
        transform = weight[0 if shared else tap, i, :, o]
        pose = poses[0, position, tap, i].reshape(2 if matrix else 1, -1)
        expected = pose @ transform
        if shared:
            down, across = (tap // 2 + 0.5) / 3, (tap % 2 + 0.5) / 2
            if matrix:
                expected[0, -1] += down
                expected[1, -1] += across
            else:
                expected[0, :2] += [down, across]
        np.testing.assert_allclose(votes[0, position, tap, i, o], expected.ravel(), atol=1e-5)


def test_the_softmax_is_over_all_parents_of_an_input():
    inputs = np.array([[0, 1, 2], [1, 2, 4], [2, 4, 0]])  # at three positions, none of which covers capsule 3
    logits = 2 * np.random.default_rng(2).normal(size=(3, 3, 5))
    logits[1] += 200  # overflows unless the maximum over all positions is subtracted
    shares = softmax_over_parents(jnp.asarray(logits, jnp.float32), inputs=inputs)
    for number in (0, 1, 2, 4):
        places = inputs == number
        exponentials = np.exp(logits[places] - logits[places].max())
        np.testing.assert_allclose(shares[places], exponentials / exponentials.sum(), atol=1e-5)
        assert shares[places].sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("routing", ["em,inverse_temperature=1", "variational,psi0=1"])
def test_a_capsule_is_divided_among_all_positions_that_cover_it(routing):
    layer = new_layer(routing=routing, kernel_size=3, stride=1)
    couplings = jax.jit(layer.route)(capsules()).couplings
    totals = np.zeros((BATCH, GRID[0] * GRID[1], IN_GROUPS))
    for position, places in enumerate(places_under_kernel(GRID, (3, 3), 1)):
        for tap, place in enumerate(places):
            of_tap = couplings[:, position, tap * IN_GROUPS : (tap + 1) * IN_GROUPS]
            totals[:, place] += of_tap.sum(axis=-1)
    np.testing.assert_allclose(totals, 1, rtol=1e-5)
    # Nine positions cover a capsule in the middle, so none of them has all of it.
    assert couplings.sum(axis=-1).min() < 0.5


def test_capsules_at_different_positions_compete_where_the_authors_let_them():
    assert {name for name in ROUTINGS if get_routing(name).takes("softmax")} == {"em", "variational"}


def test_a_routing_without_softmax_runs_separately_at_each_position():
    layer = new_layer(routing="dynamic")
    routed = layer.route(capsules())
    np.testing.assert_allclose(routed.couplings.sum(axis=-1), 1, rtol=1e-5)
    seen = layer.under_kernel(capsules().poses)
    votes = layer.votes(seen).reshape(BATCH, 6, -1, OUT_GROUPS, OUT_DIM)
    alone = layer.routing(votes[1, 4], jnp.ones(votes.shape[2]))
    np.testing.assert_allclose(routed.poses[1, 4], alone.poses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routing", ["dynamic", "em", "self_routing"])
def test_a_kernel_as_large_as_the_grid_equals_a_dense_layer(routing):
    conv = new_layer(kernel_size=GRID, routing=routing)
    dense = CapsuleLayer(GRID[0] * GRID[1] * IN_GROUPS, IN_DIM, OUT_GROUPS, OUT_DIM, routing=routing, rngs=nnx.Rngs(1))
    dense.weight[...] = conv.weight[...].reshape(dense.weight.shape)
    for name in dense.routing_weights:
        value = jnp.asarray(np.random.default_rng(3).normal(size=dense.routing_weights[name].shape), jnp.float32)
        dense.routing_weights[name][...] = conv.routing_weights[name][...] = value
    actual, expected = jax.jit(lambda capsules: (conv(capsules), dense(capsules)))(capsules())
    np.testing.assert_allclose(actual.poses, expected.poses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual.activations, expected.activations, rtol=1e-4)


def test_any_routing_stacks_on_any_other():
    """Abstract evaluation: all return the same shapes and dtypes, and accept them."""
    shapes = [(BATCH, 18, OUT_DIM), (BATCH, 18)]
    between = Capsules(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    for name in ROUTINGS:
        below, above = new_layer(routing=name), CapsuleLayer(18, OUT_DIM, 4, 5, routing=name, rngs=nnx.Rngs(0))
        assert jax.eval_shape(below.__call__, capsules()) == between
        poses, activations = jax.eval_shape(above.__call__, between)
        assert (poses.shape, activations.shape) == ((BATCH, 4, 5), (BATCH, 4))


def test_wrong_sizes_are_errors():
    with pytest.raises(UsageError, match=r"kernel of \(6, 2\) positions is larger than the grid of \(5, 6\)"):
        new_layer(kernel_size=(6, 2))
    with pytest.raises(UsageError, match=r"Poses of 4 and 7 are not square matrices of one size"):
        new_layer(matrix_poses=True)


def test_a_routing_that_returns_wrong_shapes_is_an_error_when_the_model_is_made():
    def transposed(votes, activations):
        return Routed(votes[0].T, jnp.ones(votes.shape[1]), jnp.ones(votes.shape[:2]))

    with pytest.raises(UsageError, match=r"Routing transposed: poses are \(5, 4\); expected \(4, 5\)"):
        CapsNet(
            (9, 9, 1),
            4,
            stem_channels=3,
            stem_kernel=3,
            primary_groups=2,
            primary_dim=4,
            primary_kernel=3,
            class_dim=5,
            routing=transposed,
            rngs=nnx.Rngs(0),
        )
