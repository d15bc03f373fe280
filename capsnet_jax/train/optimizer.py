"""Adam, its learning rate, and what is done to gradients before it."""

import optax

from capsnet_jax.config import TrainingConfig


def create_optimizer(config: TrainingConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam, with the learning rate and the clipping of the config."""
    adam = optax.adam(learning_rate(config, steps_per_epoch))
    return adam if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def learning_rate(config: TrainingConfig, steps_per_epoch: int) -> optax.Schedule:
    """The step size of Adam as a function of the number of steps done.

    Args:
        config: its fields `schedule`, `learning_rate...` and `warmup_steps`.
        steps_per_epoch: tells, with the number of epochs, where a cosine ends.
    """
    warmup, peak = config.warmup_steps, config.learning_rate
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(
            peak, max(config.epochs * steps_per_epoch - warmup, 1), alpha=config.learning_rate_floor / peak
        )
    elif config.schedule == "exponential":
        after = optax.exponential_decay(
            peak, config.learning_rate_decay_steps, config.learning_rate_decay, end_value=config.learning_rate_floor
        )
    else:
        after = optax.constant_schedule(peak)
    # The first step of a warm-up is not for nothing: it has a share of the peak, and so has each that follows.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup]) if warmup else after
