"""The benchmark with PyTorch: the whole command in tiny sizes; both frameworks measure the same functions."""

import json

import jax
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from capsnet_benchmark import jax_work
from capsnet_benchmark.flops import forward_flops
from capsnet_benchmark.measurements import MEASUREMENTS, SIZES
from capsnet_jax.cli.main import main
from capsnet_jax.config import Config, TrainingConfig
from capsnet_jax.interchange.weights import to_torch
from capsnet_torch import CapsNet, benchmark
from capsnet_torch.augmentation import random_shift
from capsnet_verify.subjects import SMALL

TINY = ["--preset", "digits", "--image-shape", "8", "9", "2", "--batch-size", "3", "--num-classes", "4"]


def run(path, *options: str):
    assert main(["benchmark", *TINY, "--rounds", "2", *options, "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "names", [["step", "routing"], pytest.param([*MEASUREMENTS], marks=[pytest.mark.exhaustive, pytest.mark.slow])]
)
def test_the_whole_command(names, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES["gemm_sizes"], "cpu", 64)
    results = run(tmp_path / "results.json", "--rows", "jax", "torch-eager", "--measure", *names)
    assert results["left_out"] == {}
    for row in ("jax", "torch-eager"):
        assert list(results["samples_seconds"][row]) == names
        samples = np.array(list(results["samples_seconds"][row].values()))
        assert samples.shape == (len(names), 2)
        assert (samples > 0).all()
        assert 2**26 < results["peak_memory_bytes"][row] < 2**31
    assert results["ratios"].keys() == {f"{name}_vs_eager" for name in (*names, "memory")}
    assert results["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "| torch-eager |" in printed
    ratio = results["ratios"]["routing_vs_eager"]
    assert f"Routing by JAX, forward and backward, takes {ratio:.2f} of the time of torch-eager." in printed


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_compiled_twin(tmp_path):
    options = ["--rows", "torch-compile", "--measure", "step", "inference", "routing", "--precision", "bfloat16"]
    results = run(tmp_path / "results.json", *options)
    assert results["left_out"] == {}
    assert results["samples_seconds"]["torch-compile"].keys() == {"step", "inference", "routing"}


@pytest.fixture(scope="module")
def works():
    """Both sides of a small model, with the same weights and images."""
    training = TrainingConfig(batch_size=3, reconstruction_weight=3.0, precision="float32")
    sizes = {"train_images": 12, "test_images": 20, "evaluation_batch": 4, "gemm_sizes": {"cpu": 16, "gpu": 16}}
    arguments = {"config": Config(model=SMALL, training=training).to_json(), "shift": 0.1, **sizes}
    of_jax, of_torch = jax_work.Work(**arguments), benchmark.Work(**arguments, compile_mode="eager")
    state = {name: torch.from_numpy(np.array(array)) for name, array in to_torch(of_jax._new_model()).items()}
    of_torch._model.load_state_dict(state)
    of_torch._images = torch.from_numpy(np.array(of_jax._images)).permute(0, 3, 1, 2).contiguous()
    of_torch._labels = torch.from_numpy(np.array(of_jax._labels)).long()
    return of_jax, of_torch


def test_inference_computes_the_same(works):
    (of_jax, _), (of_torch, _) = (work.prepare("inference")[0] for work in works)
    np.testing.assert_allclose(of_jax().poses, of_torch().poses.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["stem", "primary", "votes", "routing", "decoder"])
def test_a_part_has_the_same_outputs_and_gradients(name, works, monkeypatch):
    of_jax, of_torch = works
    model = of_torch._model
    # JAX draws the input of a part at random, and PyTorch computes it; here PyTorch's is given to both.
    with torch.no_grad():
        features = model.encoder.stem(of_torch._images)
        capsules = model.encoder.primary_capsules(of_torch._images)
        class_poses = model.encode(of_torch._images).poses
    inputs = features.permute(0, 2, 3, 1).numpy(), (capsules.poses.numpy(), capsules.activations.numpy()), class_poses
    given = iter([jax.tree.map(np.asarray, inputs)])
    monkeypatch.setattr(jax_work, "random_like", lambda tree: fill(tree, next(given, None)))
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    (call, _), (torch_call, _) = of_jax.prepare(name)[0], of_torch.prepare(name)[0]
    outputs, (of_weights, of_inputs) = call()
    computed = [*jax.tree.leaves(outputs), *jax.tree.leaves(of_inputs), *jax.tree.leaves(of_weights)]
    expected = [result.numpy() for result in torch_call() if result is not None]
    computed = [np.asarray(leaf) for leaf in computed if np.asarray(leaf).any()]  # without unused activations
    assert sorted(leaf.size for leaf in computed) == sorted(leaf.size for leaf in expected)
    for statistic in (np.sum, np.linalg.norm):  # independent of the order of axes
        ours, theirs = (
            sorted((leaf.size, statistic(leaf.ravel())) for leaf in leaves) for leaves in (computed, expected)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def fill(tree, leaves):
    """The tree with these leaves; without them, with ones."""
    if leaves is None:
        return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), tree)
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(leaves))


def test_pytorch_measures_training_epochs_and_the_rest(works):
    _, work = works
    for name in ("step", "optimizer", "dispatch", "epoch"):
        calls = work.prepare(name)
        assert [weight for _, weight in calls] == ([4, 5] if name == "epoch" else [1])
        before = work._model.decoder[2].weight.detach().clone()
        calls[0][0]()
        assert ((before - work._model.decoder[2].weight).abs() > 1e-4).any()
    assert 0 <= calls[1][0]() <= 4
    ((augmented, _),), ((product, _),) = work.prepare("augmentation"), work.prepare("gemm")
    assert augmented().shape == work._images.shape
    assert product().shape == (16, 16)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_without_a_compiler_its_row_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    results = run(tmp_path / "results.json", "--rows", "torch-compile", "--measure", "inference")
    assert results["samples_seconds"] == {"torch-compile": {}}
    assert "no-such-compiler" in results["left_out"]["torch-compile"]
    assert "torch-compile was left out: torch-compile failed while measuring inference" in capsys.readouterr().out


def test_flops_equal_the_count_of_pytorch():
    model = CapsNet.from_config(vars(SMALL) | {"routing": "uniform"})
    images = torch.rand(1, SMALL.image_shape[2], *SMALL.image_shape[:2])
    with FlopCounterMode(display=False) as counted:
        model.decode(model.encode(images).poses, torch.tensor([1]))
    capsules = 3 * 8 * 9  # groups and positions; uniform routing sums their votes
    routing = 2 * capsules * SMALL.num_classes * SMALL.class_dim
    total = sum(map(sum, forward_flops(SMALL).values()))
    assert counted.get_total_flops() - total in (0, routing)


def test_random_shifts_have_the_same_distribution_as_in_jax():
    torch.manual_seed(0)
    images = torch.zeros(4000, 2, 13, 14)
    images[:, :, 6, 7] = torch.tensor([1.0, 2.0])
    shifted = random_shift(images, fraction=0.16)
    assert torch.equal(shifted.sum(dim=(2, 3)), torch.tensor([[1.0, 2.0]]).expand(4000, 2))
    _, down, across = (shifted[:, 0] == 1).nonzero(as_tuple=True)
    for offsets, size in ((down - 6, 13), (across - 7, 14)):
        share = torch.bincount(offsets + 2, minlength=5) / 4000
        # Uniform in +-0.16 of the size, then rounded.
        limit = 0.16 * size
        edge = (limit - 1.5) / (2 * limit)
        expected = torch.tensor([edge, 1 / (2 * limit), 1 / (2 * limit), 1 / (2 * limit), edge])
        assert torch.allclose(share, expected, atol=0.03)
    assert abs(np.corrcoef(down, across)[0, 1]) < 0.1
