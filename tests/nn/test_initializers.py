"""Initial values do not depend on the number of values that are drawn at once."""

import jax
import numpy as np
import pytest

from capsnet_jax.nn.initializers import OFFICIAL, TORCH


@pytest.mark.parametrize("shape", [(), (5,), (16, 16), (3, 86), (2**16 + 3,)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_that_jax_draws_for_their_shape(shape, dtype):
    key = jax.random.key(3)
    np.testing.assert_array_equal(
        TORCH.kernel(16)(key, shape, dtype), jax.random.uniform(key, shape, dtype, -0.25, 0.25), strict=True
    )
    np.testing.assert_array_equal(
        OFFICIAL.kernel(16)(key, shape, dtype), 0.1 * jax.random.truncated_normal(key, -2, 2, shape, dtype), strict=True
    )
