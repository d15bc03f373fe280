"""Wrong dynamic routings without votes: the right one with one place of its source edited; parity must catch them."""

from collections.abc import Callable
from typing import NamedTuple

from capsnet_jax.capsules import Routed
from capsnet_jax.nn.fast.fused_dynamic import fused_dynamic
from capsnet_verify.mutants.edited import edited

ALL = "dynamic,leaky=true,prior_logits=0,capsule_bias=0.1"


class FusedMutant(NamedTuple):
    """A mistake, and the first result or gradient that must catch it.

    Attributes:
        mistake: in words.
        spec: routing and options with which the mistake shows.
        right: what the source says.
        wrong: what the mutant has instead, wherever it does.
        caught_by: what is the first to differ, in the order couplings, poses, activations, gradients.
    """

    mistake: str
    spec: str
    right: str
    wrong: str
    caught_by: str

    @property
    def function(self) -> Callable[..., Routed]:
        """With the signature of the right one."""
        return edited(fused_dynamic, self.right, self.wrong)

    def __str__(self) -> str:
        return self.mistake.replace(" ", "_")


MUTANTS = [
    FusedMutant("softmax over inputs", "dynamic", "softmax(logits, axis=0)", "softmax(logits, axis=2)", "couplings"),
    FusedMutant("agreement with the last poses alone", "dynamic", "agreed += ", "agreed = ", "couplings"),
    FusedMutant(
        "last chunk left out",
        "dynamic",
        "return step(carry, whole * length, inputs % length) if inputs % length else carry",
        "return carry",
        "couplings",
    ),
    FusedMutant("first chunk left out", "dynamic", "fori_loop(0, whole,", "fori_loop(1, whole,", "couplings"),
    FusedMutant("leaks from the second iteration on", "dynamic,leaky=true", "[2] + leaky)", "[2])", "couplings"),
    FusedMutant("returns the leak", "dynamic,leaky=true", "[int(leaky) :]", "[: -int(leaky)]", "couplings"),
    FusedMutant("bias after squash", ALL, " + bias)", ") + bias", "couplings"),
    FusedMutant("no prior in the first iteration", ALL, "prior is None else coupled", "True else coupled", "couplings"),
    FusedMutant("no prior in later iterations", ALL, "if operands.prior is not None:", "if False:", "couplings"),
    FusedMutant("detaches nothing", "dynamic,detach=true", "if detach", "if False", "gradient of poses"),
    FusedMutant("detaches undemanded", "dynamic", "if detach", "if True", "gradient of poses"),
    FusedMutant(
        "detaches the output poses alone", "dynamic,detach=true", "if detach:", "if False:", "gradient of poses"
    ),
    FusedMutant(
        "detaches the first iteration",
        "dynamic",
        "\n    for _ in range(num_iterations - 1):",
        "\n    routed = jax.lax.stop_gradient(routed)\n    for _ in range(num_iterations - 1):",
        "gradient of poses",
    ),
    FusedMutant(
        "gradient of an exponential for that of the softmax",
        "dynamic",
        'of_couplings - reduce(couplings * of_couplings, "o i b -> 1 i b", "sum")',
        "of_couplings",
        "gradient of poses",
    ),
    FusedMutant("no gradient of poses by couplings", "dynamic", "of_poses += ", "_ = ", "gradient of poses"),
    FusedMutant("no gradient of the weight by couplings", "dynamic", "of_weight += ", "_ = ", "gradient of weight"),
    FusedMutant(
        "no gradient of the prior", ALL, "reduce(of_logits,", "reduce(0 * of_logits,", "gradient of prior_logits"
    ),
    FusedMutant("gradient of the first iteration alone", "dynamic", "old + new", "new", "gradient of poses"),
    FusedMutant(
        "gradients of a chunk go to the first", "dynamic", "old + new, start", "old + new, 0", "gradient of poses"
    ),
    FusedMutant(
        "no gradient of the agreement", "dynamic", "gradients[1] + of_agreed", "gradients[1]", "gradient of poses"
    ),
    FusedMutant(
        "the same of the last chunk alone", "dynamic", "gradients[1] + of_agreed", "of_agreed", "gradient of poses"
    ),
]
