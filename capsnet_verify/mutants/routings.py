"""Wrong routings, each a right one with one mistake; parity must catch every one of them."""

from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from capsnet_jax.capsules import Routed
from capsnet_jax.ops import squash, standardize
from capsnet_jax.routing import ROUTINGS
from capsnet_verify.mutants.mistakes import (
    Function,
    Mistake,
    copied,
    edited,
    given,
    replaced,
    returning,
    without_activations,
)
from capsnet_verify.routings import SIZE


class Mutant(NamedTuple):
    """A mistake, and the first result or gradient that must catch it.

    Attributes:
        mistake: in words.
        spec: routing and options with which the mistake shows.
        wrong: makes it, of the right routing.
        caught_by: what is the first to differ, in the order couplings, poses, activations, gradients.
        positions: whether an input capsule has parents at several positions.
    """

    mistake: str
    spec: str
    wrong: Mistake
    caught_by: str
    positions: bool = False

    @property
    def function(self) -> Callable[..., Routed]:
        """With the signature of the right one."""
        return self.wrong(ROUTINGS[self.spec.split(",")[0]])

    def __str__(self) -> str:
        return f"{self.spec.split(',')[0]} {self.mistake}".replace(" ", "_")


def _leaking(change: Callable[[jax.Array], jax.Array]) -> Mistake:
    """What is made of the logits, that of the leak first, by dynamic routing."""
    return replaced({"_softmax": lambda logits, leaky: change(jnp.pad(logits, ((0, 0), (int(leaky), 0))))})


def _prior_inside_softmax(function: Function) -> Function:
    def wrong(votes: jax.Array, activations: jax.Array, *, prior: jax.Array) -> Routed:
        softmax = {"jax.nn.softmax": lambda attention, axis: jax.nn.softmax(attention + prior, axis=axis)}
        routed: Routed = copied(function, softmax)(votes, activations)
        return routed

    wrong.__dict__.update(function.__dict__)
    return wrong


def _logits_accumulated(function: Function) -> Function:
    def wrong(votes: jax.Array, activations: jax.Array, *, num_iterations: int = 3) -> Routed:
        seen: list[jax.Array] = []

        def softmax(logits: jax.Array, axis: int) -> jax.Array:
            seen.append(logits)
            return jax.nn.softmax(sum(seen[1:], start=seen[0]), axis=axis)

        accumulating = copied(function, {"jax.nn.softmax": softmax})
        routed: Routed = accumulating(votes, activations, num_iterations=num_iterations)
        return routed

    return wrong


def _exponential(seed: int) -> mock.Mock:
    rng = np.random.default_rng(seed)
    return mock.Mock(dirichlet=lambda ones, number: rng.exponential(size=(number, len(ones))))


def _shares(couplings: jax.Array, activations: jax.Array) -> jax.Array:
    return (activations[:, None] * couplings).sum(axis=0)


EM = "em,inverse_temperature=4,annealing=0.5,min_variance=0.4"
LEAKY = "dynamic,leaky=true"
LEARNED = "dynamic,prior_logits=0,capsule_bias=0.1"
OVER_INPUTS = replaced({"jax.nn.softmax": lambda logits, axis: jax.nn.softmax(logits, axis=1 - axis)})

MUTANTS = [
    Mutant("softmax over inputs", "dynamic", OVER_INPUTS, "couplings"),
    Mutant(
        "leaks and renormalises", LEAKY, _leaking(lambda logits: jax.nn.softmax(logits[:, 1:], axis=1)), "couplings"
    ),
    Mutant("returns the leak", LEAKY, _leaking(lambda logits: jax.nn.softmax(logits, axis=1)[:, :-1]), "couplings"),
    Mutant("leaks from the second iteration on", LEAKY, edited("(num_outputs + leaky)", "num_outputs"), "couplings"),
    Mutant("detaches nothing", "dynamic,detach=true", given(detach=False), "gradient of votes"),
    Mutant("detaches undemanded", "dynamic", given(detach=True), "gradient of votes"),
    Mutant(
        "detaches the last couplings, too",
        f"{LEARNED},detach=true",
        _leaking(lambda logits: jax.lax.stop_gradient(jax.nn.softmax(logits, axis=1))),
        "gradient of prior_logits",
    ),
    Mutant("bias after squash", LEARNED, edited(" + bias)", ") + bias"), "couplings"),
    Mutant(
        "prior in the first iteration only",
        LEARNED,
        edited(
            "logits += prior_logits\n        couplings = _softmax(logits, leaky)",
            "couplings = _softmax(logits + prior_logits, leaky)",
        ),
        "couplings",
    ),
    Mutant("softmax over inputs", EM, given(softmax=lambda logits: jax.nn.softmax(logits, axis=-2)), "couplings"),
    Mutant("softmax at each position", EM, given(softmax=jax.nn.softmax), "couplings", positions=True),
    Mutant("E step ignores output activations", EM, replaced({"jax.nn.log_sigmoid": jnp.zeros_like}), "couplings"),
    Mutant("M step ignores input activations", EM, without_activations, "couplings"),
    Mutant(
        "means not normalised",
        EM,
        edited("reduce(normalized * votes,", "reduce(shares[..., None] * votes,"),
        "couplings",
    ),
    Mutant(
        "variance about zero",
        EM,
        edited("reduce(normalized * squares,", "reduce(normalized * jnp.square(votes),"),
        "couplings",
    ),
    Mutant("deviation for variance", EM, edited("2 * variances", "2 * jnp.sqrt(variances)"), "couplings"),
    Mutant(
        "density not normalised",
        EM,
        edited("reduce(log_deviations + 0.5", "reduce(0 * log_deviations + 0.5"),
        "couplings",
    ),
    Mutant("cost of one vote", EM, edited("costs * mass * even_share", "costs"), "couplings"),
    Mutant("no annealing", EM, given(annealing=0.0), "couplings"),
    Mutant(
        "no gradient through couplings",
        EM,
        given(softmax=lambda logits: jax.lax.stop_gradient(jax.nn.softmax(logits))),
        "gradient of votes",
    ),
    Mutant("softmax over inputs", "variational", OVER_INPUTS, "couplings"),
    Mutant(
        "no mixing proportions in the softmax", "variational", edited("softmax(log_share + ", "softmax("), "couplings"
    ),
    Mutant("ignores input activations", "variational", without_activations, "couplings"),
    Mutant("logarithm for digamma", "variational", replaced({"digamma": jnp.log}), "couplings"),
    Mutant(
        "one degree of freedom",
        "variational",
        replaced({"jnp.arange": jnp.zeros}),
        "couplings",
    ),
    Mutant("means not shrunk", "variational", edited("mass / kappa * mean_votes", "mean_votes"), "couplings"),
    Mutant(
        "distances without nu",
        "variational",
        edited('rearrange(nu, "o 1 -> o") * distances', "distances"),
        "couplings",
    ),
    Mutant("variance about zero", "variational", edited("votes - mean_votes", "votes"), "couplings"),
    Mutant(
        "activations not normalised",
        "variational",
        replaced({"standardize": lambda values, epsilon: values}),
        "activations",
    ),
    Mutant("entropy of a full share", "variational", replaced({"jnp.exp": jnp.ones_like}), "activations"),
    Mutant("softmax over inputs", "self_attention", OVER_INPUTS, "couplings"),
    Mutant(
        "no division by the root of h",
        "self_attention",
        replaced({"reduce": lambda votes, *how: votes.shape[-1] ** 0.5 * reduce(votes, *how)}),
        "couplings",
    ),
    Mutant("prior inside the softmax", "self_attention", _prior_inside_softmax, "couplings"),
    Mutant("the other squash", "self_attention", replaced({"exponential_squash": squash}), "poses"),
    Mutant("softmax over inputs", "inverted_attention", OVER_INPUTS, "couplings"),
    Mutant(
        "no division by the root of h",
        "inverted_attention",
        replaced({"jax.nn.softmax": lambda logits, axis: jax.nn.softmax(SIZE**0.5 * logits, axis=axis)}),
        "couplings",
    ),
    Mutant("no layer norm", "inverted_attention", replaced({"standardize": lambda poses, epsilon: poses}), "couplings"),
    Mutant(
        "layer norm over capsules",
        "inverted_attention",
        replaced({"standardize": lambda poses, epsilon: standardize(poses.T, epsilon=epsilon).T}),
        "couplings",
    ),
    Mutant("no gain", "inverted_attention", given(gain=1.0), "couplings"),
    Mutant("no readout bias", "inverted_attention", given(readout_bias=0.0), "activations"),
    Mutant("softmax over inputs", "self_routing", OVER_INPUTS, "couplings"),
    Mutant("no bias", "self_routing", given(route_bias=0.0), "couplings"),
    Mutant("ignores activations", "self_routing", without_activations, "poses"),
    Mutant(
        "poses not normalised",
        "self_routing",
        returning(
            lambda routed, votes, activations: routed._replace(
                poses=routed.poses * _shares(routed.couplings, activations)[:, None]
            )
        ),
        "poses",
    ),
    Mutant(
        "activations not normalised",
        "self_routing",
        returning(
            lambda routed, votes, activations: routed._replace(activations=routed.activations * activations.sum())
        ),
        "activations",
    ),
    Mutant("softmax over inputs", "kmeans", OVER_INPUTS, "couplings"),
    Mutant("logits accumulated", "kmeans", _logits_accumulated, "couplings"),
    Mutant("agreement for cosine", "kmeans", replaced({"direction": lambda poses: poses}), "couplings"),
    Mutant("squashed in each iteration", "kmeans", replaced({"squash": lambda poses: squash(squash(poses))}), "poses"),
    Mutant(
        "shares of the inputs",
        "uniform",
        returning(
            lambda routed, votes, activations: routed._replace(couplings=jnp.full_like(votes[..., 0], 1 / len(votes)))
        ),
        "couplings",
    ),
    Mutant(
        "sum for mean",
        "uniform",
        returning(lambda routed, votes, activations: routed._replace(poses=squash(votes.sum(axis=0)))),
        "poses",
    ),
    Mutant("not normalised", "random", replaced({"np.random.default_rng": _exponential}), "couplings"),
    Mutant("seed ignored", "random,seed=3", given(seed=0), "couplings"),
]
