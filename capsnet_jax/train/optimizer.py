"""Adam with learning rate schedules and gradient clipping."""

import optax

from capsnet_jax.config import TrainingConfig


def create_optimizer(config: TrainingConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Create Adam with the learning rate schedule and the gradient clipping of a config."""
    adam = optax.adam(learning_rate(config, steps_per_epoch))
    return adam if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def learning_rate(config: TrainingConfig, steps_per_epoch: int) -> optax.Schedule:
    """Create the learning rate schedule: the step size as a function of the number of steps done.

    Args:
        config: its fields `schedule`, `learning_rate...` and `warmup_steps` are used.
        steps_per_epoch: number of steps in an epoch; a cosine ends after the last epoch.
    """
    warmup, peak, floor = config.warmup_steps, config.learning_rate, config.learning_rate_floor
    if config.schedule == "cosine":
        steps = max(config.epochs * steps_per_epoch - warmup, 1)
        after = optax.cosine_decay_schedule(peak, steps, alpha=floor / peak)
    elif config.schedule == "exponential":
        steps, factor = config.learning_rate_decay_steps, config.learning_rate_decay
        after = optax.exponential_decay(peak, steps, factor, end_value=floor)
    else:
        after = optax.constant_schedule(peak)
    # The warm-up starts at peak / (warmup + 1), not at 0, so that the first step is not wasted.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup]) if warmup else after
