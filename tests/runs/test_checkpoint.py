"""Checkpoints: restored exactly or not at all. A damaged one is reported, and the one before it is used."""

import dataclasses
import json
import re
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet, UsageError
from capsnet_jax.cli.main import main
from capsnet_jax.config import TrainingConfig
from capsnet_jax.runs import checkpoint
from capsnet_jax.runs.checkpoint import Checkpoints
from capsnet_jax.runs.folder import read_run
from capsnet_jax.train.loop import Snapshot, Trainer
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset, write_idx_folder
from tests.tiny_run import contents, train

CONFIG = TrainingConfig(epochs=2, batch_size=8, ema_decay=0.9, clip_norm=0.5)
DEPENDS_ON = {"model": {"routing": "dynamic"}, "seeds": [3]}
# Orbax does not close all files after an error.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def checkpoints(
    folder: Path, *, keep: int = 9, depends_on=DEPENDS_ON, warnings: list[str] | None = None
) -> Checkpoints:
    warn = print if warnings is None else warnings.append
    return Checkpoints(folder, keep=keep, depends_on=depends_on, warn=warn)


def assert_same(one: Snapshot, other: Snapshot) -> None:
    leaves = [jax.tree.leaves_with_path(snapshot.state) for snapshot in (one, other)]
    assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
    for (path, leaf), (_, other_leaf) in zip(*leaves, strict=True):
        assert leaf.dtype == other_leaf.dtype, path
        np.testing.assert_array_equal(leaf, other_leaf, err_msg=str(path))
    np.testing.assert_array_equal(one.sums, other.sums)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2; the trainer; and the two snapshots."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    trainer = Trainer(
        lambda seed: CapsNet(IMAGE_SHAPE, 10, **SMALL, routing="uniform", batch_norm=True, rngs=nnx.Rngs(seed)),
        make_small_dataset(),
        CONFIG,
    )
    snapshots, store = [], checkpoints(folder)
    for _, _ in zip(range(2), trainer.run(), strict=False):
        store.save(trainer.snapshot)
        snapshots.append(jax.device_get(trainer.snapshot))
    store.close()
    return folder, trainer, snapshots


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(saved[0], tmp_path / "checkpoints")


def test_the_last_checkpoint_is_restored_to_the_last_bit(saved, folder):
    _, trainer, snapshots = saved
    restored = checkpoints(folder).restore(trainer.snapshot)
    assert_same(restored, snapshots[1])
    assert restored.state.step == 2
    assert np.abs(restored.sums).min() > 0
    with pytest.raises(AssertionError):
        assert_same(restored, snapshots[0])


def test_an_empty_folder_has_none(saved, tmp_path):
    assert checkpoints(tmp_path / "new").restore(saved[1].snapshot) is None


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 4]) + content[middle + 4 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_the_checkpoint_is_exact_or_the_one_before_it_is_taken(damage, saved, tmp_path):
    original, trainer, snapshots = saved
    files = sorted(path.relative_to(original) for path in (original / "2").rglob("*") if path.is_file())
    fallen_back = 0
    for number, file in enumerate(files):
        folder = shutil.copytree(original, tmp_path / str(number))
        DAMAGES[damage](folder / file)
        warnings: list[str] = []
        restored = checkpoints(folder, warnings=warnings).restore(trainer.snapshot)
        # Some files are not needed. No damage leads to a wrong state.
        assert_same(restored, snapshots[0 if warnings else 1])
        if warnings:
            fallen_back += 1
            assert f"The checkpoint {folder / '2'} cannot be used and is now unreadable-2-0: " in warnings[0]
            assert sorted(path.name for path in folder.iterdir()) == ["1", "unreadable-2-0"]
    assert fallen_back >= 3


def test_flipped_bytes_of_weights_are_noticed_by_their_checksum(saved, folder):
    """Orbax itself would return them."""
    largest = max(
        (path for path in (folder / "2" / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 3] ^= 1
    largest.write_bytes(content)
    warnings: list[str] = []
    assert checkpoints(folder, warnings=warnings).restore(saved[1].snapshot).state.step == 1
    # The decompressor notices it if the byte belongs to a header and not to a weight.
    assert "the checksum of " in warnings[0] or "corruption" in warnings[0]


def test_if_none_can_be_used_none_is_touched(saved, folder):
    """The cause may be the disk, and not the files."""
    for step in "12":
        shutil.rmtree(folder / step / "state")
    with pytest.raises(UsageError, match=r"None of the checkpoints in .* can be used; .*: 2: .*; 1: "):
        checkpoints(folder).restore(saved[1].snapshot)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_an_empty_checkpoint_is_skipped(saved, folder):
    (folder / "7").mkdir()
    warnings: list[str] = []
    assert_same(checkpoints(folder, warnings=warnings).restore(saved[1].snapshot), saved[2][1])
    assert f"The checkpoint {folder / '7'} cannot be used" in warnings[0]


def test_a_half_written_checkpoint_is_not_seen(saved, folder):
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    warnings: list[str] = []
    assert_same(checkpoints(folder, warnings=warnings).restore(saved[1].snapshot), saved[2][1])
    assert warnings == []


def test_training_continues_past_a_damaged_checkpoint(saved, folder):
    """The step of that checkpoint is trained and saved again."""
    shutil.rmtree(folder / "2" / "state")
    _, trainer, snapshots = saved
    store = checkpoints(folder, warnings=[])
    trainer = trainer.with_seeds(trainer.seeds)
    trainer.snapshot = trainer.on_devices(store.restore(trainer.snapshot))
    next(trainer.run())
    store.save(trainer.snapshot)
    store.close()
    assert_same(checkpoints(folder).restore(trainer.snapshot), snapshots[1])


def test_a_checkpoint_of_another_config_is_refused_by_name(saved, folder):
    other = {"model": {"routing": "em"}, "seeds": [3]}
    with pytest.raises(UsageError, match=r"checkpoints/2 is of another config: routing was dynamic and is em\."):
        checkpoints(folder, depends_on=other).restore(saved[1].snapshot)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_checkpoint_of_an_earlier_version_is_refused_and_left_alone(saved, folder):
    """Its record has no number of a format; one with another number is of a later version."""
    for record, version in ((without_format, r"capsnet-jax 0\.1\.0"), (of_format_3, "a later version of capsnet-jax")):
        (path,) = (path for path in (folder / "2" / "record").iterdir() if "checksum" in path.read_text())
        fields = record(json.loads(json.loads(path.read_text())["text"]))
        path.write_text(json.dumps({"text": checkpoint._text(fields), "checksum": checkpoint._checksum(fields)}))
        before = contents(folder)
        message = f"checkpoints/2 was written by {version} and cannot be resumed; start a new run to train on"
        warnings: list[str] = []
        with pytest.raises(UsageError, match=message):
            checkpoints(folder, warnings=warnings).restore(saved[1].snapshot)
        assert (contents(folder), warnings) == (before, [])


def without_format(record: dict) -> dict:
    return {name: value for name, value in record.items() if name != "format"}


def of_format_3(record: dict) -> dict:
    return record | {"format": 3}


def test_a_single_seed_has_an_axis_in_checkpoints_too(saved):
    leaves = jax.tree.leaves(saved[2][1].state)
    assert {leaf.shape[0] for leaf in leaves} == {1}
    assert saved[2][1].sums.shape == (1, 5)


def test_the_last_ones_and_the_best_are_kept(saved, tmp_path):
    trainer, store = saved[1], checkpoints(tmp_path / "kept", keep=2)
    trainer = trainer.with_seeds(trainer.seeds)
    accuracies = {2: 0.5, 3: 0.9, 5: 0.7}
    for progress in trainer.run():
        store.save(trainer.snapshot, validation=accuracies.get(progress.step))
        if progress.step == 4:  # the process ends, and another one continues
            store.close()
            store = checkpoints(tmp_path / "kept", keep=2)
        if progress.step == 6:
            break
    store.close()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["3", "5", "6"]


def test_a_full_disk_is_one_sentence_and_earlier_checkpoints_stay(saved, folder):
    """Simulated by a limit on the size of files."""
    trainer, store = saved[1], checkpoints(folder)
    assert store.restore(trainer.snapshot).state.step == 2
    later = trainer.with_seeds(trainer.seeds)
    for progress in later.run():
        if progress.step == 3:
            break
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        store.save(later.snapshot)
        with pytest.raises(UsageError) as error:
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{folder / '3'} cannot be written, and the one of step 2 is complete; fix this, then --resume" in str(
        error.value
    )
    assert str(error.value).count("\n") == 0
    assert_same(checkpoints(folder).restore(trainer.snapshot), saved[2][1])


def resume(run_dir: Path, *more: str) -> int:
    return main(["train", "--resume", "--run-dir", str(run_dir), *more])


def test_a_run_is_resumed_with_its_own_options_only(tiny_run, tmp_path, capsys):
    """More epochs are the same run; so are the same images in another folder, but not other images."""
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    assert resume(run, "--learning-rate", "0.02", "--num-iterations", "2") == 2
    message = "cannot be resumed, as learning_rate was 0.01 and is 0.02; num_iterations was 3 and is 2; expected"
    assert message in capsys.readouterr().err
    moved = shutil.copytree(tiny_run.data_dir, tmp_path / "moved")
    assert resume(run, "--epochs", "3", "--data-dir", str(moved)) == 0
    assert "Resuming after step 12 of 18" in capsys.readouterr().out
    assert resume(run) == 0
    assert "Resuming after step 18 of 18" in capsys.readouterr().out
    assert train(moved, run, "--resume") == 2
    assert "epochs is 2, 12 steps, with 18 steps done; expected more epochs." in capsys.readouterr().err
    assert read_run(run).config.training.epochs == 3

    dataset = make_small_dataset()
    labels = dataset.train_labels.copy()
    labels[3] = (labels[3] + 1) % 10
    other = write_idx_folder(tmp_path / "other", dataset._replace(train_labels=labels))
    assert resume(run, "--data-dir", str(other)) == 2
    assert re.search(r"cannot be resumed, as data_checksum was \d+ and is \d+;", capsys.readouterr().err)


def test_checkpoints_of_another_config_are_refused_and_kept(tiny_run, tmp_path, capsys):
    """Checkpoints of one run are copied into the folder of another run that has none."""
    run = read_run(tiny_run.folder)._replace(folder=tmp_path / "run")
    model = dataclasses.replace(run.config.model, class_dim=6)
    run._replace(config=dataclasses.replace(run.config, model=model)).write_config()
    shutil.copytree(tiny_run.folder / "checkpoints", run.folder / "checkpoints")
    assert resume(run.folder) == 2
    assert "checkpoints/12 is of another config: class_dim was 5 and is 6." in capsys.readouterr().err
    assert (run.folder / "checkpoints" / "12").exists()


def test_a_cosine_schedule_cannot_be_extended(tiny_run, tmp_path, capsys):
    run = read_run(tiny_run.folder)._replace(folder=tmp_path / "run")
    training = dataclasses.replace(run.config.training, schedule="cosine")
    run._replace(config=dataclasses.replace(run.config, training=training)).write_config()
    assert resume(run.folder, "--epochs", "3") == 2
    assert "epochs was 2 and is 3" in capsys.readouterr().err
