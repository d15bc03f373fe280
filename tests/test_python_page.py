"""The code of docs/python.md runs as one program, and computes what the page says."""

import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from capsnet_jax.runs.folder import read_run

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text()


def test_the_code_of_the_page_runs_as_one_program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), values)
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[1:3]] == ["epoch 1", "epoch 2"]
    evaluation, dataset = values["evaluation"], values["dataset"]
    assert evaluation.accuracy > 0.9
    assert f"test accuracy {evaluation.accuracy:.4f}\n" in printed  # of the last epoch
    assert np.mean(values["predicted"] == dataset.test_labels) == evaluation.accuracy
    couplings = values["routed"].couplings
    assert couplings.shape == (8, 2 * 2 * 4, 10)
    np.testing.assert_allclose(values["routed"].activations, values["activations"][:8], rtol=1e-4)
    assert values["heat"].shape == (8, 2, 2, 10)
    np.testing.assert_allclose(values["heat"][:, 1, 0], couplings[:, 8:12].mean(axis=1), rtol=1e-5)
    assert values["losses"][-1] < 0.5 * values["losses"][0]
    weights, loaded = (jax.tree.leaves(nnx.state(values[name], nnx.Param)) for name in ("model", "loaded"))
    assert all(np.array_equal(one, other) for one, other in zip(weights, loaded, strict=True))
    assert read_run(tmp_path / "runs/mine").config.training == values["config"]
