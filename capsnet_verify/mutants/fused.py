"""Wrong dynamic routings without votes, each the right one with one mistake; parity must catch them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from capsnet_jax.capsules import Routed
from capsnet_jax.nn.fast import fused_dynamic as right
from capsnet_verify.mutants.mistakes import Mistake, edited, given, replaced

ALL = "dynamic,leaky=true,prior_logits=0,capsule_bias=0.1"


class FusedMutant(NamedTuple):
    """A mistake, and the first result or gradient that must catch it.

    Attributes:
        mistake: in words.
        spec: routing and options with which the mistake shows.
        wrong: makes it, of the right routing.
        caught_by: what is the first to differ, in the order couplings, poses, activations, gradients.
    """

    mistake: str
    spec: str
    wrong: Mistake
    caught_by: str

    @property
    def function(self) -> Callable[..., Routed]:
        """With the signature of the right one."""
        return self.wrong(right.fused_dynamic)

    def __str__(self) -> str:
        return self.mistake.replace(" ", "_")


def _replaced(names: Mapping[str, Any]) -> Mistake:
    """Other functions, which call those of the module and so are given operands of its class."""
    return replaced({"Operands": right.Operands, **names})


def _without_prior(leaky: bool, detach: bool, operands: right.Operands, projected: jax.Array) -> jax.Array:
    return right._couplings(leaky, detach, operands._replace(prior=None), projected)


def _leak_first(logits: jax.Array, axis: int) -> jax.Array:
    """Couplings in another order, of which the first, taken for the leak, is that of the last output."""
    return jnp.roll(jax.nn.softmax(logits, axis=axis), 1, axis=axis)


def _over_all_but_three(step: Any, initial: Any, operands: right.Operands) -> Any:
    """Leaves out 3 of the 11 input capsules: the last chunk, as chunks are of 4."""
    return right._over_chunks(step, initial, jax.tree.map(lambda array: array[:-3], operands))


def _with_constant_couplings(name: str, leaky: bool, detach: bool, *arguments: Any) -> Any:
    gradients, of_agreed = right._coupled_sum_backward(leaky, detach, *arguments)
    detached, _ = right._coupled_sum_backward(leaky, True, *arguments)
    return gradients._replace(**{name: getattr(detached, name)}), of_agreed


def _without_gradient_of_prior(*arguments: Any) -> Any:
    gradients, of_agreed = right._coupled_sum_backward(*arguments)
    return gradients._replace(prior=jax.tree.map(jnp.zeros_like, gradients.prior)), of_agreed


def _without_gradient_of_agreement(*arguments: Any) -> Any:
    gradients, of_agreed = right._coupled_sum_backward(*arguments)
    return gradients, jnp.zeros_like(of_agreed)


MUTANTS = [
    FusedMutant(
        "softmax over inputs",
        "dynamic",
        replaced({"jax.nn.softmax": lambda logits, axis: jax.nn.softmax(logits, axis=1)}),
        "couplings",
    ),
    FusedMutant("agreement with the last poses alone", "dynamic", edited("agreed += ", "agreed = "), "couplings"),
    FusedMutant(
        "last chunk left out",
        "dynamic",
        _replaced({"_over_chunks": _over_all_but_three}),
        "couplings",
    ),
    FusedMutant(
        "first chunk left out",
        "dynamic",
        replaced({"jax.lax.fori_loop": lambda first, *rest: jax.lax.fori_loop(first + 1, *rest)}),
        "couplings",
    ),
    FusedMutant(
        "leaks from the second iteration on",
        "dynamic,leaky=true",
        _replaced({"_uniform_sum": lambda leaky, *rest: right._uniform_sum(False, *rest)}),
        "couplings",
    ),
    FusedMutant("returns the leak", "dynamic,leaky=true", replaced({"jax.nn.softmax": _leak_first}), "couplings"),
    FusedMutant("bias after squash", ALL, edited(" + bias)", ") + bias"), "couplings"),
    FusedMutant(
        "no prior in the first iteration", ALL, edited("prior is None else coupled", "True else coupled"), "couplings"
    ),
    FusedMutant("no prior in later iterations", ALL, _replaced({"_couplings": _without_prior}), "couplings"),
    FusedMutant("detaches nothing", "dynamic,detach=true", given(detach=False), "gradient of poses"),
    FusedMutant("detaches undemanded", "dynamic", given(detach=True), "gradient of poses"),
    FusedMutant(
        "detaches the output poses alone",
        "dynamic,detach=true",
        _replaced({"_coupled_sum": lambda leaky, detach: right._coupled_sum(leaky, detach=False)}),
        "gradient of poses",
    ),
    FusedMutant(
        "detaches the first iteration",
        "dynamic",
        edited(
            "\n    for _ in range(num_iterations - 1):",
            "\n    routed = jax.lax.stop_gradient(routed)\n    for _ in range(num_iterations - 1):",
        ),
        "gradient of poses",
    ),
    FusedMutant(
        "gradient of an exponential for that of the softmax",
        "dynamic",
        edited('of_couplings - reduce(couplings * of_couplings, "o i b -> 1 i b", "sum")', "of_couplings"),
        "gradient of poses",
    ),
    FusedMutant(
        "no gradient of poses by couplings",
        "dynamic",
        _replaced({"_coupled_sum_backward": partial(_with_constant_couplings, "poses")}),
        "gradient of poses",
    ),
    FusedMutant(
        "no gradient of the weight by couplings",
        "dynamic",
        _replaced({"_coupled_sum_backward": partial(_with_constant_couplings, "weight")}),
        "gradient of weight",
    ),
    FusedMutant(
        "no gradient of the prior",
        ALL,
        _replaced({"_coupled_sum_backward": _without_gradient_of_prior}),
        "gradient of prior_logits",
    ),
    FusedMutant("gradient of the first iteration alone", "dynamic", edited("old + new", "new"), "gradient of poses"),
    FusedMutant(
        "gradients of a chunk go to the first",
        "dynamic",
        edited("old + new, start", "old + new, 0"),
        "gradient of poses",
    ),
    FusedMutant(
        "no gradient of the agreement",
        "dynamic",
        _replaced({"_coupled_sum_backward": _without_gradient_of_agreement}),
        "gradient of poses",
    ),
    FusedMutant(
        "the same of the last chunk alone",
        "dynamic",
        edited("gradients[1] + of_agreed", "of_agreed"),
        "gradient of poses",
    ),
]
