"""Wrong routings, each a right one with one place of its source edited; parity must catch every one of them."""

from collections.abc import Callable
from typing import NamedTuple

from capsnet_jax.capsules import Routed
from capsnet_jax.routing import ROUTINGS
from capsnet_verify.mutants.edited import edited


class Mutant(NamedTuple):
    """A mistake, and the first result or gradient that must catch it.

    Attributes:
        mistake: in words.
        spec: routing and options with which the mistake shows.
        right: what the source says.
        wrong: what the mutant has instead, wherever it does.
        caught_by: what is the first to differ, in the order couplings, poses, activations, gradients.
        positions: whether an input capsule has parents at several positions.
    """

    mistake: str
    spec: str
    right: str
    wrong: str
    caught_by: str
    positions: bool = False

    @property
    def function(self) -> Callable[..., Routed]:
        """With the signature of the right one."""
        return edited(ROUTINGS[self.spec.split(",")[0]], self.right, self.wrong)

    def __str__(self) -> str:
        return f"{self.spec.split(',')[0]} {self.mistake}".replace(" ", "_")


EM = "em,inverse_temperature=4,annealing=0.5,min_variance=0.4"
LEAKY = "dynamic,leaky=true"
LEARNED = "dynamic,prior_logits=0,capsule_bias=0.1"
OVER_OUTPUTS, OVER_INPUTS = "axis=1)", "axis=0)"
LEAKY_SOFTMAX = "return jax.nn.softmax(logits, axis=1)[:, int(leaky) :]"
COSINES = 'couplings = jax.nn.softmax(jnp.einsum("ioh,oh->io", direction(votes), direction(centers)), axis=1)'

MUTANTS = [
    Mutant("softmax over inputs", "dynamic", OVER_OUTPUTS, OVER_INPUTS, "couplings"),
    Mutant(
        "leaks and renormalises",
        LEAKY,
        LEAKY_SOFTMAX,
        "return jax.nn.softmax(logits[:, int(leaky) :], axis=1)",
        "couplings",
    ),
    Mutant("returns the leak", LEAKY, "[:, int(leaky) :]", "[:, : -int(leaky)]", "couplings"),
    Mutant("leaks from the second iteration on", LEAKY, "(num_outputs + leaky)", "num_outputs", "couplings"),
    Mutant("detaches nothing", "dynamic,detach=true", "if detach else", "if False else", "gradient of votes"),
    Mutant("detaches undemanded", "dynamic", "if detach else", "if True else", "gradient of votes"),
    Mutant(
        "detaches the last couplings, too",
        f"{LEARNED},detach=true",
        "_softmax(logits, leaky)\n        poses",
        "constant(_softmax(logits, leaky))\n        poses",
        "gradient of prior_logits",
    ),
    Mutant("bias after squash", LEARNED, " + bias)", ") + bias", "couplings"),
    Mutant(
        "prior in the first iteration only",
        LEARNED,
        "logits += prior_logits\n        couplings = _softmax(logits, leaky)",
        "couplings = _softmax(logits + prior_logits, leaky)",
        "couplings",
    ),
    Mutant(
        "softmax over inputs",
        EM,
        "= jax.nn.softmax,",
        "= lambda logits: jax.nn.softmax(logits, axis=-2),",
        "couplings",
    ),
    Mutant("softmax at each position", EM, " softmax(", " jax.nn.softmax(", "couplings", positions=True),
    Mutant(
        "E step ignores output activations",
        EM,
        'rearrange(jax.nn.log_sigmoid(logits), "... o -> ... 1 o") + log_density',
        "log_density",
        "couplings",
    ),
    Mutant(
        "M step ignores input activations",
        EM,
        'couplings * rearrange(activations, "... i -> ... i 1")',
        "couplings",
        "couplings",
    ),
    Mutant("means not normalised", EM, "reduce(normalized * votes,", "reduce(shares[..., None] * votes,", "couplings"),
    Mutant(
        "variance about zero", EM, "reduce(normalized * squares,", "reduce(normalized * jnp.square(votes),", "couplings"
    ),
    Mutant("deviation for variance", EM, "2 * variances", "2 * jnp.sqrt(variances)", "couplings"),
    Mutant("density not normalised", EM, "reduce(log_deviations + 0.5", "reduce(0 * log_deviations + 0.5", "couplings"),
    Mutant("cost of one vote", EM, "costs * mass * even_share", "costs", "couplings"),
    Mutant("no annealing", EM, "(1 - annealing**iteration)", "1", "couplings"),
    Mutant(
        "no gradient through couplings",
        EM,
        "shares = couplings",
        "shares = jax.lax.stop_gradient(couplings)",
        "gradient of votes",
    ),
    Mutant("softmax over inputs", "variational", OVER_OUTPUTS, OVER_INPUTS, "couplings"),
    Mutant("no mixing proportions in the softmax", "variational", "softmax(log_share + ", "softmax(", "couplings"),
    Mutant("ignores input activations", "variational", "couplings * activations[:, None]", "couplings", "couplings"),
    Mutant(
        "logarithm for digamma",
        "variational",
        "digamma(alpha) - digamma(alpha.sum())",
        "jnp.log(alpha) - jnp.log(alpha.sum())",
        "couplings",
    ),
    Mutant("one degree of freedom", "variational", "nu - jnp.arange(size)", "nu - 0 * jnp.arange(size)", "couplings"),
    Mutant("means not shrunk", "variational", "mass / kappa * mean_votes", "mean_votes", "couplings"),
    Mutant("distances without nu", "variational", 'rearrange(nu, "o 1 -> o") * distances', "distances", "couplings"),
    Mutant("variance about zero", "variational", "votes - mean_votes", "votes", "couplings"),
    Mutant(
        "activations not normalised",
        "variational",
        "standardize(-jnp.exp(log_share) * entropy, epsilon=norm_epsilon)",
        "-jnp.exp(log_share) * entropy",
        "activations",
    ),
    Mutant("entropy of a full share", "variational", "jnp.exp(log_share) * entropy", "entropy", "activations"),
    Mutant("softmax over inputs", "self_attention", OVER_OUTPUTS, "axis=0)", "couplings"),
    Mutant("no division by the root of h", "self_attention", " / votes.shape[-1] ** 0.5", "", "couplings"),
    Mutant(
        "prior inside the softmax",
        "self_attention",
        "(attention, axis=1) + prior",
        "(attention + prior, axis=1)",
        "couplings",
    ),
    Mutant("the other squash", "self_attention", "exponential_squash\n", "squash as exponential_squash\n", "poses"),
    Mutant("softmax over inputs", "inverted_attention", "size**0.5), axis=1)", "size**0.5), axis=0)", "couplings"),
    Mutant("no division by the root of h", "inverted_attention", " / size**0.5", "", "couplings"),
    Mutant(
        "no layer norm",
        "inverted_attention",
        "standardize(poses, epsilon=epsilon)",
        "poses",
        "couplings",
    ),
    Mutant(
        "layer norm over capsules",
        "inverted_attention",
        "standardize(poses, epsilon=epsilon)",
        "standardize(poses.T, epsilon=epsilon).T",
        "couplings",
    ),
    Mutant("no gain", "inverted_attention", " * gain", "", "couplings"),
    Mutant("no readout bias", "inverted_attention", " + readout_bias\n", "\n", "activations"),
    Mutant("softmax over inputs", "self_routing", OVER_OUTPUTS, OVER_INPUTS, "couplings"),
    Mutant("no bias", "self_routing", " + route_bias, axis", ", axis", "couplings"),
    Mutant("ignores activations", "self_routing", "activations[:, None] * couplings", "couplings", "poses"),
    Mutant("poses not normalised", "self_routing", " / (mass[:, None] + epsilon)", "", "poses"),
    Mutant("activations not normalised", "self_routing", "mass / (activations.sum() + epsilon)", "mass", "activations"),
    Mutant("softmax over inputs", "kmeans", OVER_OUTPUTS, OVER_INPUTS, "couplings"),
    Mutant(
        "logits accumulated",
        "kmeans",
        COSINES,
        "cosines = (cosines if _ else 0) + "
        + COSINES[len("couplings = jax.nn.softmax(") : -len(", axis=1)")]
        + "\n        couplings = jax.nn.softmax(cosines, axis=1)",
        "couplings",
    ),
    Mutant("agreement for cosine", "kmeans", "direction(votes), direction(centers)", "votes, centers", "couplings"),
    Mutant(
        "squashed in each iteration",
        "kmeans",
        'jnp.einsum("io,ioh->oh", couplings, votes)',
        'squash(jnp.einsum("io,ioh->oh", couplings, votes))',
        "poses",
    ),
    Mutant(
        "shares of the inputs", "uniform", "num_outputs = votes.shape[1]", "num_outputs = votes.shape[0]", "couplings"
    ),
    Mutant("sum for mean", "uniform", '"sum") / num_outputs', '"sum")', "poses"),
    Mutant(
        "not normalised",
        "random",
        "dirichlet(np.ones(num_outputs), num_inputs)",
        "exponential(size=(num_inputs, num_outputs))",
        "couplings",
    ),
    Mutant("seed ignored", "random,seed=3", "default_rng(seed)", "default_rng(0)", "couplings"),
]
