"""What every routing asks of its arguments, so that a wrong one is told in the routing's own name."""

from jaxtyping import Array, Float

from capsnet_jax.errors import UsageError


def check_arguments(
    routing: str,
    votes: Float[Array, "..."],
    activations: Float[Array, "..."],
    *,
    num_iterations: int = 1,
    positions: int = 0,
) -> None:
    """Refuses votes and activations that are not of one example, and a number of iterations below 1.

    Args:
        routing: name of the algorithm, for the message.
        votes: expected to be `[i o h]`.
        activations: expected to be `[i]`.
        num_iterations: expected to be at least 1.
        positions: number of axes that may come before these.

    Raises:
        UsageError: names the routing, the argument, what was got and what was expected.
    """
    if not 3 <= votes.ndim <= 3 + positions:
        raise UsageError(f"Routing {routing}: votes are {votes.shape}; expected three axes, [i o h], of one example.")
    if activations.shape != votes.shape[:-2]:
        raise UsageError(
            f"Routing {routing}: activations are {activations.shape}; expected {votes.shape[:-2]}, one for each input "
            f"capsule of votes of shape {votes.shape}."
        )
    if num_iterations < 1:
        raise UsageError(f"Routing {routing}: num_iterations is {num_iterations}, and must be at least 1.")
