"""docs/routing.md: the example runs as written, the output is the command's, and the tables are complete."""

import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import Capsules, UsageError
from capsnet_jax.cli.main import main
from capsnet_jax.nn.layers import CapsuleLayer
from capsnet_jax.routing import ROUTINGS, get_routing
from capsnet_jax.routing.arguments import GIVEN
from capsnet_jax.routing.registry import describe_options

DOCUMENT = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()
DECLARATION, EXAMPLE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
NAME = "my_routing:sharpened"


@pytest.fixture
def example(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_routing", raising=False)  # of another test in this process
    (tmp_path / "my_routing.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_example_is_under_20_lines():
    assert 10 < len(EXAMPLE.splitlines()) < 20


def test_the_declaration_has_the_documented_weights(tmp_path, monkeypatch):
    (tmp_path / "declared_routing.py").write_text(DECLARATION)
    monkeypatch.syspath_prepend(tmp_path)
    found = get_routing("declared_routing:my_routing").weights
    assert found == {"gain": (("i", "o"), 1.0), "sharpness": ((), 1.0)}
    assert get_routing("declared_routing:my_routing,offset=0.5").weights == found | {"offset": (("o", "h"), 0.5)}


def test_the_error_of_a_routing_is_as_documented(tmp_path, monkeypatch):
    (tmp_path / "my_routing.py").write_text("def sharpened(votes, activations):\n    return 1 / 0\n")
    monkeypatch.delitem(sys.modules, "my_routing", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    told = re.search(r"`(Routing my_routing:sharpened raises .*?)`", DOCUMENT, re.DOTALL)[1].replace("\n", " ")
    with pytest.raises(UsageError) as caught:
        get_routing(NAME)(jnp.ones((2, 3, 4)), jnp.ones(2))
    assert str(caught.value) == told.replace("line 12", "line 2")


def test_the_output_of_the_check_is_as_documented(example, capsys):
    shown = re.search(rf"```console\n\$ capsnet check-routing {NAME}\n(.*?)```", DOCUMENT, re.DOTALL)[1]
    assert main(["check-routing", NAME]) == 0
    assert capsys.readouterr().out == shown


def test_the_report_of_the_mistake_is_as_documented(tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong_routing.py").write_text(EXAMPLE.replace("axis=1", "axis=0"))
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check-routing", "wrong_routing:sharpened"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert failed == re.findall("^FAILED .*", DOCUMENT, re.MULTILINE)


def test_a_layer_learns_the_weight_of_the_example(example):
    layer = CapsuleLayer(11, 4, 5, 6, routing=f"{NAME},sharpness=2", rngs=nnx.Rngs(0))
    assert layer.routing_weights["sharpness"][...] == 2
    poses = jnp.asarray(np.random.default_rng(0).normal(size=(3, 11, 4)), jnp.float32)
    capsules = Capsules(poses, jnp.ones((3, 11)))

    def loss(layer):
        return jnp.sum(layer(capsules).activations ** 2)

    before, grads = nnx.value_and_grad(loss)(layer)
    slope = grads["routing_weights"]["sharpness"][...]
    assert slope > 0.01
    layer.routing_weights["sharpness"][...] += 0.1
    after = loss(layer)
    np.testing.assert_allclose(after - before, 0.1 * slope, rtol=0.1)


def test_the_tables_list_every_routing_with_its_weights_and_options():
    for name, function in ROUTINGS.items():
        source, facts = re.findall(rf"^\| `{name}` \|.*", DOCUMENT, re.MULTILINE)
        assert source != facts
        _, iterates, activations, learned, options, _ = (cell.strip() for cell in facts.strip("|").split("|"))
        routing = get_routing(name)
        assert iterates == ("yes" if routing.takes("num_iterations") else "no")
        for weight in routing.weights:
            assert f"`{weight}`" in learned
        settable = set(re.findall(r"(\w+) \(", describe_options(function))) - set(GIVEN)
        assert settable == set(re.findall(r"`(\w+)`", f"{learned} {options}"))
        uses = [np.random.default_rng(seed).uniform(0.1, 0.9, 11) for seed in (0, 1)]
        votes = jnp.asarray(np.random.default_rng(2).normal(size=(11, 5, 6)), jnp.float32)
        poses = jnp.asarray(np.random.default_rng(3).normal(size=(11, 4)), jnp.float32)
        one, two = (routing(votes, jnp.asarray(value, jnp.float32), poses=poses).poses for value in uses)
        assert activations.startswith("no" if np.array_equal(one, two) else "yes")
