"""Other people's PyTorch models agree with the JAX model by a right map; mistakes in map or model are found."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from capsnet_jax.errors import UsageError
from capsnet_verify.report import describe
from parity_tests.foreign_models import (
    DECODER_GRADIENTS,
    ENCODER_GRADIENTS,
    EVERYTHING,
    LENGTHS,
    LENGTHS_AND_IMAGES,
    NORM,
    NORMALIZED,
    STACKED,
    SUBJECT,
    VOTES,
    Everything,
    Lengths,
    LengthsAndImages,
    LengthsOverInputs,
    NeighbouringPixels,
    Normalized,
    OneMoreIteration,
    StackedConvolutions,
    names_of,
    with_detach,
)

OF_IMAGES = ["reconstructions", "total loss", *DECODER_GRADIENTS, *ENCODER_GRADIENTS]


@pytest.mark.parametrize(
    ("build", "text", "names", "notes"),
    [
        (Lengths, LENGTHS, ["stem 0", "activations", "total loss", *ENCODER_GRADIENTS], []),
        (StackedConvolutions, STACKED, ["stem 0", "activations", "total loss", *ENCODER_GRADIENTS], []),
        (
            LengthsAndImages,
            LENGTHS_AND_IMAGES,
            ["stem 0", "poses 0", "activations", *OF_IMAGES],
            [
                "Not in the map, and so not compared by themselves: temperature.",
                "The torch model ran in training mode, but for its dropout (dropout).",
            ],
        ),
        (
            Everything,
            EVERYTHING,
            ["poses", *OF_IMAGES],
            None,
        ),
    ],
)
def test_a_right_model_agrees_with_the_right_map(verify_foreign, build, text, names, notes):
    verification = verify_foreign(build, text)
    assert names_of(verification) == names
    assert verification.status == 0
    assert all(found.routing_matters for found in verification.scalings)
    assert max(check.error for check in verification.checks) < 1e-13
    assert notes is None or verification.notes == notes


class ByIndices(LengthsAndImages):
    def forward(self, x, y):
        return super().forward(x, F.one_hot(y, 5).to(x.dtype))


def test_labels_may_be_indices_and_the_loss_may_be_spread_and_summed(verify_foreign):
    run = SUBJECT.run
    training = replace(run.config.training, loss="spread", reconstruction_error="sum")
    subject = SUBJECT._replace(run=run._replace(config=replace(run.config, training=training)))
    verification = verify_foreign(ByIndices, LENGTHS_AND_IMAGES.replace("one-hot", "indices"), subject)
    assert verification.status == 0
    assert names_of(verification) == ["stem 0", "poses 0", "activations", *OF_IMAGES]


@pytest.mark.parametrize(
    ("build", "text", "old", "new", "first", "right"),
    [
        pytest.param(
            LengthsAndImages,
            LENGTHS_AND_IMAGES,
            '"decoder.2.weight" = "decoder.2.weight"',
            '"decoder.2.weight" = { name = "decoder.2.weight", axes = "a b -> b a" }',
            "reconstructions",
            '"decoder.2.weight" = "decoder.2.weight"',
            id="square transposed",
        ),
        pytest.param(
            LengthsAndImages,
            LENGTHS_AND_IMAGES,
            "f (o h) -> o h f",
            "f (h o) -> o h f",
            "reconstructions",
            '"decoder.0.weight" = { name = "decoder.0.weight", axes = "c (a b) -> a b c" }',
            id="flattened in another order",
        ),
        pytest.param(
            Lengths,
            LENGTHS,
            '0.bias"\n"primary.weight" = "encoder.image2primary_capsules.2.weight"\n'
            '"primary.bias" = "encoder.image2primary_capsules.2.bias"',
            '2.bias"\n"primary.weight" = "encoder.image2primary_capsules.2.weight"\n'
            '"primary.bias" = "encoder.image2primary_capsules.0.bias"',
            "stem 0",
            '"conv1.bias" = "encoder.image2primary_capsules.0.bias" and '
            '"primary.bias" = "encoder.image2primary_capsules.2.bias"',
            id="weights swapped",
        ),
        pytest.param(
            Lengths,
            LENGTHS,
            'axes = "1 (g p) o h d -> (p g) d o h", sizes = { g = 3 }',
            'axes = "1 i o h d -> i d o h"',
            "activations",
            f'"W" = {{ name = "{VOTES}", axes = "1 (g p) o h d -> (p g) d o h", sizes = {{ g = 3 }} }}',
            id="groups before positions",
        ),
    ],
)
def test_a_mistake_in_the_map_is_found_and_the_right_line_shown(verify_foreign, build, text, old, new, first, right):
    assert old in text
    verification = verify_foreign(build, text.replace(old, new))
    assert verification.status == 1
    assert verification.first_divergence.name == first
    assert verification.cause == f"a mistake in the map: with {right}, both agree"


AGREES = "with the same in capsnet_torch, both agree"
WITHOUT_SIZES = LENGTHS.replace("1 (g p) o h d -> (p g) d o h", "1 i o h d -> i d o h").replace(
    ", sizes = { g = 3 }", ""
)


@pytest.mark.parametrize(
    ("build", "text", "first", "cause"),
    [
        pytest.param(
            StackedConvolutions,
            STACKED.replace("-> (g d)", "-> (d g)"),
            "activations",
            "a mistake in the map: with "
            '"primary.*.weight" = { name = "encoder.image2primary_capsules.2.weight", '
            'axes = "d g a b c -> (g d) a b c", sizes = { g = 3 } } and '
            '"primary.*.bias" = { name = "encoder.image2primary_capsules.2.bias", axes = "d g -> (g d)", '
            "sizes = { g = 3 } }, both agree",
            id="stacked convolutions in another order",
        ),
        pytest.param(
            NeighbouringPixels,
            WITHOUT_SIZES,
            "activations",
            "in PyTorch, primary capsules of neighbouring pixels, by a view that mixes channels and positions: "
            + AGREES,
            id="a view that mixes channels",
        ),
        pytest.param(
            LengthsOverInputs,
            LENGTHS,
            "activations",
            f"in PyTorch, a softmax over input capsules, not over output capsules: {AGREES}",
            id="a softmax over inputs",
        ),
        pytest.param(
            with_detach,
            LENGTHS_AND_IMAGES,
            f"gradient {VOTES}",
            "in PyTorch, a detached agreement in the routing: with --set routing=dynamic,detach=true, both agree",
            id="a detached routing",
        ),
        pytest.param(
            OneMoreIteration,
            LENGTHS,
            "activations",
            "in PyTorch, 4 routing iterations, not 3: with --set num_iterations=4, both agree",
            id="one more iteration",
        ),
        pytest.param(
            OneMoreIteration,
            WITHOUT_SIZES,
            "activations",
            "a mistake in the map and, in PyTorch, 4 routing iterations, not 3: "
            f'with "W" = {{ name = "{VOTES}", axes = "1 (g p) o h d -> (p g) d o h", sizes = {{ g = 3 }} }} and '
            "--set num_iterations=4, both agree",
            id="a wrong order and a wrong number",
        ),
    ],
)
def test_typical_deviations_of_public_models_are_named(verify_foreign, build, text, first, cause):
    verification = verify_foreign(build, text)
    assert verification.first_divergence.name == first
    assert verification.cause == cause


class WithEpsilon(Lengths):
    """Capsules are divided by a norm that is a little too long, as in much public code."""

    def forward(self, x):
        return super().forward(x) * (1 - 1e-8)


def test_a_mistake_in_the_map_is_found_despite_an_epsilon(verify_foreign):
    verification = verify_foreign(WithEpsilon, LENGTHS.replace("(g p)", "(p g)"))
    assert verification.first_divergence.name == "activations"
    assert verification.cause.startswith('a mistake in the map: with "W" = ')
    assert verification.cause.endswith("they differ by 1.0e-08 only")


def test_an_epsilon_is_not_taken_for_a_mistake_in_the_map(verify_foreign):
    verification = verify_foreign(WithEpsilon, LENGTHS)
    assert verification.first_divergence.name == "activations"
    assert verification.cause.startswith("an epsilon, or less precision")


class StemOffByARoundingError(Lengths):
    """Two biases that are almost equal, and an error of the tolerance in the layer below."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.primary.bias.copy_(self.conv1.bias * (1 - 2e-5))
        self.conv1.register_forward_hook(lambda module, inputs, output: output * (1 + 2.05e-5))


def test_a_line_of_the_map_that_hardly_changes_the_error_is_not_blamed(verify_foreign):
    verification = verify_foreign(StemOffByARoundingError, LENGTHS, dtype="float32")
    assert verification.first_divergence.name == "stem 0"
    assert verification.cause.startswith("an epsilon, or less precision")


class EpsilonBelowOneMoreIteration(OneMoreIteration):
    def __init__(self):
        super().__init__()
        self.conv1.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-8))


def test_a_mistake_above_an_epsilon_is_found(verify_foreign):
    verification = verify_foreign(EpsilonBelowOneMoreIteration, WITHOUT_SIZES)
    assert verification.first_divergence.name == "stem 0"
    assert verification.cause.startswith("an epsilon, or less precision")
    (note,) = verification.notes
    assert note.startswith(
        "The first large error is that of activations. Most likely: a mistake in the map and, in PyTorch, 4 routing "
        'iterations, not 3: with "W" = '
    )
    assert note.endswith(" and --set num_iterations=4, they differ by 4.4e-08 only.")


class Tanh(LengthsAndImages):
    def __init__(self):
        super().__init__()
        self.decoder[5] = nn.Tanh()


class TanhAndScaledStem(Tanh):
    def __init__(self):
        super().__init__()
        self.conv1.register_forward_hook(lambda module, inputs, output: 1.5 * output)


def test_layers_that_are_wrong_are_told_from_those_that_inherit_an_error(verify_foreign):
    verification = verify_foreign(TanhAndScaledStem, LENGTHS_AND_IMAGES, replay=True)
    verdicts = {check.name: check.verdict for check in verification.checks}
    inherit = [name for name, verdict in verdicts.items() if verdict == "inherits"]
    assert inherit == ["poses 0", "activations", "total loss"]
    assert {verdict for name, verdict in verdicts.items() if name not in inherit} == {"DIFFERS"}
    assert verification.cause.startswith("a factor: JAX has 0.666667 times the values of PyTorch")
    said = describe(verification)
    assert "the layers below, these still differ: stem 0, reconstructions and 11 gradients; 3 others agree.\n" in said


def test_causes_are_sought_after_the_last_step_that_agrees(verify_foreign):
    verification = verify_foreign(Tanh, LENGTHS_AND_IMAGES)
    assert verification.first_divergence.name == "reconstructions"
    assert verification.cause.startswith("not seen without more [values] in the map, as one of these: in ")
    steps = [cause.partition(",")[0] for cause in verification.cause.partition("these: in ")[2].split("; in ")]
    assert steps == ["reconstructions", "decoder 0"]


class Frozen(Lengths):
    def __init__(self):
        super().__init__()
        self.primary.bias.requires_grad_(False)


class Detached(Lengths):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("build", "first"), [(Frozen, "encoder.image2primary_capsules.2.bias"), (Detached, VOTES)], ids=["one", "all"]
)
def test_weights_without_a_gradient_are_found(verify_foreign, build, first):
    assert verify_foreign(build, LENGTHS).first_divergence.name == f"gradient {first}"


class InFloat32(Lengths):
    def forward(self, x):
        return super().forward(x).float()


def test_a_cast_to_float32_is_named(verify_foreign):
    verification = verify_foreign(InFloat32, LENGTHS)
    assert verification.first_divergence.name == "activations"
    assert verification.cause == "a cast to float32 in PyTorch"


class ZeroBiases(Lengths):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.conv1.bias)
        nn.init.zeros_(self.primary.bias)


def test_weights_that_are_all_zero_are_compared_with_noise(verify_foreign):
    swapped = LENGTHS.replace("0.bias", "?").replace("2.bias", "0.bias").replace("?", "2.bias")
    assert verify_foreign(ZeroBiases, LENGTHS).status == 0
    assert verify_foreign(ZeroBiases, swapped).first_divergence.name == "stem 0"


def test_running_means_are_compared_in_evaluation_mode(verify_foreign):
    verification = verify_foreign(Normalized, NORM, NORMALIZED)
    assert names_of(verification)[:2] == ["poses", "poses with running means"]
    assert verification.status == 0
    swapped = NORM.replace('running_mean"\n', '?"\n').replace('running_var"\n', 'running_mean"\n')
    verification = verify_foreign(Normalized, swapped.replace("?", "running_var"), NORMALIZED)
    assert verification.first_divergence.name == "poses with running means"
    assert [check.name for check in verification.checks if check.verdict != "agrees"] == ["poses with running means"]


class Noisy(Lengths):
    always = False

    def forward(self, x):
        return super().forward(x) + (torch.rand(()) if self.training or self.always else 0)


class AlwaysNoisy(Noisy):
    always = True


def test_a_model_that_is_random_in_training_mode_runs_in_evaluation_mode(verify_foreign):
    verification = verify_foreign(Noisy, LENGTHS)
    assert verification.status == 0
    assert verification.notes == ["The torch model ran in evaluation mode, as its outputs are random in training mode."]
    with pytest.raises(UsageError, match="The outputs of the torch model are random; expected the same"):
        verify_foreign(AlwaysNoisy, LENGTHS)


class Dropped(Normalized):
    def forward(self, x):
        return super().forward(F.dropout(x, training=self.training))


def test_running_means_are_used_in_both_if_a_model_runs_in_evaluation_mode(verify_foreign):
    verification = verify_foreign(Dropped, NORM, NORMALIZED, replay=True)  # not the values of the test above
    assert verification.status == 0
    assert verification.notes[0].startswith("The torch model ran in evaluation mode")
