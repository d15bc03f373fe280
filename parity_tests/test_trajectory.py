"""Training from shared weights on shared batches; wrong optimizers are among the mutants."""

import numpy as np
import pytest

from capsnet_verify.checks import STEPS
from capsnet_verify.mutants.models import PLAIN
from capsnet_verify.trajectory import _worst
from capsnet_verify.verification import Settings, verify


@pytest.mark.parametrize(("dtype", "compared"), [("float64", 50), ("float32", 5), ("bfloat16", 5)])
def test_fifty_steps_agree(dtype, compared):
    """In float64 the weights after each step, too; in float32 only losses, and only of the first steps."""
    verification = verify(PLAIN, Settings(dtype, steps=50))
    steps = [check for check in verification.checks if check.name.startswith("step")]
    assert [check.name for check in steps] == [f"step {number}" for number in range(1, compared + 1)]
    assert all(check.error <= STEPS[dtype] for check in steps)
    assert verification.status == 0


def test_the_worst_of_a_step_is_what_differs_even_if_something_cold_is_off_by_more():
    cold, off = (np.full(3, 3e-8), np.full(3, 1e-8)), (np.array(1.0), np.array(1.5))
    worst = _worst("step 4", {"bias": cold, "loss": off}, 1e-9)
    assert (worst.name, worst.verdict, worst.reason.partition(":")[0]) == ("step 4", "DIFFERS", "loss")
    worst = _worst("step 4", {"bias": cold, "loss": (off[0], off[0])}, 1e-9)
    assert (worst.verdict, worst.reason.partition(",")[0]) == ("no power", "bias: cold")
