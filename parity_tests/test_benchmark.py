"""The benchmark of both sides, as a user runs it, in tiny sizes; and that both sides measure the same."""

import json

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

from capsnet_benchmark import jax_work
from capsnet_benchmark.flops import forward_flops
from capsnet_benchmark.measurements import GEMM_SIZES, MEASUREMENTS
from capsnet_jax.cli.main import main
from capsnet_jax.config import Config, TrainingConfig
from capsnet_torch import CapsNet, benchmark
from capsnet_torch.augmentation import random_shift
from capsnet_verify.subjects import SMALL, SMALL_CLASSES, SMALL_IMAGES

TINY = ["--preset", "digits", "--image-shape", "8", "9", "2", "--batch-size", "3", "--num-classes", "4"]


def run(path, *options: str):
    assert main(["benchmark", *TINY, "--rounds", "2", *options, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(GEMM_SIZES, "cpu", 64)
    names = ["step", "routing", "epoch", "gemm"]
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
    assert f"An epoch of JAX takes {results['ratios']['epoch_vs_eager']:.2f} of the time of torch-eager." in printed


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_compiled_twin(tmp_path):
    options = ["--rows", "torch-compile", "--measure", "step", "inference", "routing", "--precision", "bfloat16"]
    results = run(tmp_path / "results.json", *options)
    assert results["left_out"] == {}
    assert results["samples_seconds"]["torch-compile"].keys() == {"step", "inference", "routing"}


def test_both_sides_measure_the_same():
    config = Config(model=SMALL, training=TrainingConfig(batch_size=3, reconstruction_weight=3.0))
    arguments = {"config": config.to_json(), "shift": 0.1}
    arguments |= {"train_images": 12, "test_images": 20, "evaluation_batch": 4, "gemm_sizes": {"cpu": 16, "gpu": 16}}
    ours, theirs = jax_work.Work(**arguments), benchmark.Work(**arguments, compile_mode="eager")
    for name in MEASUREMENTS:
        their_calls = theirs.prepare(name)
        # As in tests/benchmark/test_benchmark.py of the JAX model.
        assert [times for _, times in their_calls] == ([4, 5] if name == "epoch" else [1])
        their_call, _ = their_calls[0]
        if name in ("step", "optimizer", "dispatch", "epoch"):
            before = theirs._model.decoder[2].weight.detach().clone()
            their_call()
            assert ((before - theirs._model.decoder[2].weight).abs() > 1e-4).any()
            continue
        expected = jax.eval_shape(ours.prepare(name)[0][0])  # without compiling it
        if name in ("stem", "primary", "votes", "routing", "decoder"):
            sizes = [leaf.size for leaf in jax.tree.leaves(expected[1])]
            assert sorted(sizes) == sorted(gradient.numel() for gradient in their_call())
        elif name == "inference":
            assert expected.poses.shape == their_call().poses.shape
        elif name == "augmentation":
            assert expected.shape == rearrange(their_call(), "b c h w -> b h w c").shape
        else:
            assert expected.shape == their_call().shape == (16, 16)
    (_, _), (evaluate, _) = theirs.prepare("epoch")
    assert 0 <= evaluate() <= 4


def test_without_a_compiler_its_row_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    results = run(tmp_path / "results.json", "--rows", "torch-compile", "--measure", "inference")
    assert results["samples_seconds"] == {"torch-compile": {}}
    assert "no-such-compiler" in results["left_out"]["torch-compile"]
    assert "torch-compile was left out: torch-compile failed at measuring inference" in capsys.readouterr().out


def test_operations_are_those_that_torch_counts():
    model = CapsNet.from_config(vars(SMALL) | {"routing": "uniform"})
    images = torch.rand(1, SMALL_IMAGES[2], *SMALL_IMAGES[:2])
    with FlopCounterMode(display=False) as counted:
        model.decode(model.encode(images).poses, torch.tensor([1]))
    capsules = 3 * 8 * 9  # groups and positions; uniform routing sums their votes
    routing = 2 * capsules * SMALL_CLASSES * SMALL.class_dim
    total = sum(forward_flops(SMALL))
    assert counted.get_total_flops() - total in (0, routing)


def test_images_are_shifted_as_often_as_far_as_by_jax():
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
