"""Adam, and its learning rate."""

import optax

from capsnet_jax.config import TrainingConfig


def create_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Adam, with the learning rate of the config."""
    return optax.adam(learning_rate(config))


def learning_rate(config: TrainingConfig) -> optax.Schedule:
    """The step size of Adam as a function of the number of steps done."""
    if config.learning_rate_decay == 1:
        return optax.constant_schedule(config.learning_rate)
    return optax.exponential_decay(
        config.learning_rate,
        config.learning_rate_decay_steps,
        config.learning_rate_decay,
        end_value=config.learning_rate_floor,
    )
