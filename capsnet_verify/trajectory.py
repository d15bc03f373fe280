"""Steps of Adam from shared weights on shared batches, and the first at which losses or weights part."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from capsnet_jax.config import TrainingConfig
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.train.step import create_state, make_train_step
from capsnet_torch.training import train_step as torch_train_step
from capsnet_verify.checks import DIFFERS, NO_POWER, STEPS, Check, compare
from capsnet_verify.pair import Pair, to_channels_first
from capsnet_verify.values import QUICKLY_COMPILED

NOT_COMPARED = ("running_var", "num_batches_tracked")  # PyTorch keeps n / (n - 1) of a variance, and Flax what it is
IN_FLOAT32 = 5  # steps; rounding errors grow by themselves from one to the next


def trajectory(
    pair: Pair,
    num_steps: int,
    *,
    learning_rate: float,
    seed: int = 10,
    optimizer: Callable[[float], optax.GradientTransformation] = optax.adam,
) -> Iterator[Check]:
    """A check of each step: its loss and, in float64, the weights and running means after it.

    In float32 and bfloat16 weights are not compared, nor are later steps: Adam divides rounding errors by small
    gradients, and weights part by a whole step while losses agree.

    Args:
        pair: its weights are where both sides start; the twin is trained.
        num_steps: number of steps.
        learning_rate: of Adam.
        seed: of the batches, which are of the shapes of that of the pair.
        optimizer: of JAX, given the learning rate.
    """
    adam = optimizer(learning_rate)
    graphdef, state = create_state(pair.jax_model, adam)
    config = TrainingConfig(precision="bfloat16" if pair.dtype == "bfloat16" else "float32", **pair.loss)
    train_step = make_train_step(graphdef, adam, config)
    step = jax.jit(train_step, compiler_options=QUICKLY_COMPILED)
    torch_optimizer = torch.optim.Adam(pair.torch_model.parameters(), learning_rate)
    rng = np.random.default_rng(seed)
    for number in range(num_steps if pair.dtype == "float64" else min(num_steps, IN_FLOAT32)):
        images = rng.random(pair.images.shape).astype(pair.images.dtype)
        labels = rng.permutation(np.asarray(pair.labels))
        state, ours = step(state, jnp.asarray(images), jnp.asarray(labels))
        batch = to_channels_first(images), torch.tensor(labels).long()
        theirs = torch_train_step(pair.torch_model, torch_optimizer, *batch, **pair.loss, step=number)
        sides = {"loss": (ours.total, theirs.total.numpy(force=True))}
        if pair.dtype == "float64":
            weights = to_torch(nnx.merge(graphdef, state.params, state.batch_stats))
            for name, tensor in pair.torch_model.state_dict().items():
                if not name.endswith(NOT_COMPARED):
                    sides[name] = weights[name], tensor.numpy(force=True)
        yield _worst(f"step {number + 1}", sides, STEPS[pair.dtype])


def _worst(name: str, sides: dict[str, tuple[Any, np.ndarray]], tolerance: float) -> Check:
    """The check of what is off by most, under a name for all of them."""
    checks = [compare(of, *pair, tolerance=tolerance) for of, pair in sides.items()]
    worst = max(checks, key=lambda check: (check.verdict == DIFFERS, check.verdict == NO_POWER, check.error))
    return worst._replace(name=name, reason=f"{worst.name}: {worst.reason}" if worst.reason else "")
