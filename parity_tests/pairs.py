"""The small model in both frameworks, with its initial weights, which are not scaled."""

from dataclasses import replace
from typing import Any

from capsnet_verify.pair import Pair, new_pair
from capsnet_verify.subjects import SMALL, Settings, of_model


def make_pair(dtype: str, *, batch_size: int = 3, **options: Any) -> Pair:
    """The small model with these options, in both frameworks, and a batch."""
    return new_pair(of_model("small", replace(SMALL, **options)), Settings(dtype, batch_size=batch_size, seed=1))
