"""Random architectures agree in JAX and PyTorch, values and gradients. All but one are exhaustive tests."""

import pytest

from capsnet_verify.checks import AGREES
from capsnet_verify.random_models import random_subject
from capsnet_verify.report import sentence
from capsnet_verify.subjects import Settings
from capsnet_verify.verification import verify


def check(seed: int) -> None:
    verification = verify(random_subject(seed), Settings(steps=0, batch_size=3))
    repeat = f"capsnet verify --random-model {seed} --steps 0"
    assert verification.first_divergence is None, f"{sentence(verification)}\n{repeat}"
    # Weights that nothing depends on have no gradient, such as a readout of hidden capsules by some routings.
    seen = sum(found.verdict == AGREES for found in verification.checks)
    assert seen >= 0.7 * len(verification.checks), f"{sentence(verification)}\n{repeat}"


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_random_architecture_agrees(seed):
    check(seed)


def test_architectures_are_of_every_kind():
    models = [random_subject(seed).run for seed in range(200)]
    configs = [run.config.model for run in models]
    for name in (
        "batch_norm",
        "matrix_poses",
        "primary_depthwise",
        "decoder_hidden",
        "conv_capsules",
        "hidden_capsules",
    ):
        assert 20 < sum(bool(getattr(config, name)) for config in configs) < 180, name
    assert len({config.routing.split(",")[0] for config in configs}) == 9
    assert {config.num_iterations for config in configs} == {1, 2, 3, 4}
    assert len({config.image_shape for config in configs}) > 150
    assert random_subject(7) == random_subject(7)


def test_one_agrees_and_a_failure_prints_the_command_that_repeats_it(verify_command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("capsnet_verify.pair.to_torch", lambda model: {})  # the twin keeps weights of its own
        with pytest.raises(AssertionError, match=r"first in couplings 0(.|\n)*--random-model 17 --steps 0"):
            check(17)
    status, printed, _ = verify_command("--random-model", 17, "--steps", 0, "--batch-size", 3)
    assert status == 0
    assert "of random model 17: values within" in printed
