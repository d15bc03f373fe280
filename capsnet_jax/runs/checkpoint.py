"""Checkpoints with Orbax: written in the background, atomically, and verified by checksums when they are read."""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from capsnet_jax.config import differences
from capsnet_jax.errors import UsageError
from capsnet_jax.train.loop import Snapshot
from capsnet_jax.train.sharding import wait_for_all

LONGEST = 200  # characters of the text of an error
FORMAT = 2  # of checkpoints: the state of every seed, stacked. Those of 0.1.0 have no number.
UNKNOWN = -1.0  # validation accuracy of a checkpoint that was not evaluated; below all others


class Checkpoints:
    """Checkpoints of a run. The latest ones and the one that is best on validation images are kept.

    Args:
        folder: folder of the checkpoints, which is created if needed.
        keep: number of latest checkpoints to keep.
        depends_on: values that must not change on resume, of JSON types.
        warn: called with a sentence about each checkpoint that cannot be used.
    """

    def __init__(self, folder: Path, *, keep: int, depends_on: Mapping[str, Any], warn: Callable[[str], None] = print):
        self.folder, self._depends_on, self._warn = folder.absolute(), dict(depends_on), warn
        self._saved: int | None = None  # step of the last complete checkpoint; `_saving`: of the one being written
        self._saving: int | None = None
        # LatestN and BestN combined, because max_to_keep with best_fn would delete the latest in favour of the best.
        policy = AnyPreservationPolicy(
            [LatestN(keep), BestN(get_metric_fn=_validation, n=1, keep_checkpoints_without_metrics=False)]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_validation, preservation_policy=policy, cleanup_tmp_directories=True, create=True
        )
        self._unusable: dict[int, str] = {}  # reasons, by step
        for step in _steps_of_unreadable_metrics(self.folder):  # Orbax would refuse to open the folder
            self._unusable[step] = "its metrics cannot be read"
            self._set_aside(step)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise UsageError(f"The folder {self.folder} of checkpoints cannot be used: {error}.") from error

    def save(self, snapshot: Snapshot, *, validation: float | None = None) -> None:
        """Start to write a checkpoint in the background. The arrays are copied first, so training can continue.

        Args:
            snapshot: state of the training.
            validation: accuracy on validation images, mean over the seeds, if it was evaluated at this step.

        Raises:
            UsageError: this checkpoint or the one before cannot be written.
        """
        arrays = _named_arrays(snapshot)
        step = int(arrays["step"][0])
        record = {
            "format": FORMAT,
            "sums": snapshot.sums.tolist(),
            "depends_on": self._depends_on,
            "checksums": {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()},
        }
        self.wait()
        self._saving = step
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    record=ocp.args.JsonSave({"text": _text(record), "checksum": _checksum(record)}),
                ),
                metrics={"validation": UNKNOWN if validation is None else validation},
            )

    def wait(self) -> None:
        """Wait until the checkpoint in the background is complete.

        Raises:
            UsageError: it cannot be written.
        """
        with self._explained():
            self._manager.wait_until_finished()
        self._saved, self._saving = self._saving or self._saved, None

    def restore(self, like: Snapshot) -> Snapshot | None:
        """Read the latest complete checkpoint; None if there are none. Damaged ones after it are renamed.

        Args:
            like: any snapshot of the same training, for shapes and dtypes.

        Raises:
            UsageError: a checkpoint is of another config or version; or there are some and none can be used, and then
                none is renamed.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                snapshot = self._read(step, like)
            except UsageError:
                raise
            except Exception as error:  # Orbax raises many kinds, from KeyError to ValueError of tensorstore
                self._unusable[step] = _first_line(error)
            else:
                # Otherwise they would block new checkpoints of the same steps.
                for later in self._unusable.keys() & set(self._manager.all_steps()):
                    self._set_aside(later)
                self._manager.reload()
                self._saved = step
                return snapshot
        if self._unusable:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in self._unusable.items())
            raise UsageError(
                f"None of the checkpoints in {self.folder} can be used; repair the folder, or move it away: {reasons}."
            )
        return None

    def close(self) -> None:
        """Wait for the checkpoint in the background, and release the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _read(self, step: int, like: Snapshot) -> Snapshot:
        restored = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        record = json.loads(restored.record["text"])
        if _checksum(record) != restored.record["checksum"]:
            raise ValueError("the checksum of its record is wrong")
        if record.get("format") != FORMAT:
            version = "a later version of capsnet-jax" if "format" in record else "capsnet-jax 0.1.0"
            raise UsageError(
                f"The checkpoint {self.folder / str(step)} was written by {version} and cannot be resumed; start a new "
                "run to train on (evaluate, predict, convert and capsnet_jax.load still read model.safetensors)."
            )
        changes = differences(record["depends_on"], self._depends_on)
        if changes:
            raise UsageError(f"The checkpoint {self.folder / str(step)} is of another config: {'; '.join(changes)}.")
        template = {name: np.empty(array.shape, array.dtype) for name, array in _named_arrays(like).items()}
        if template.keys() != record["checksums"].keys():
            raise ValueError(f"it lacks or adds {sorted(template.keys() ^ record['checksums'].keys())}")
        state = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        arrays = self._manager.restore(step, args=state).state
        for name, checksum in record["checksums"].items():
            if zlib.crc32(arrays[name].tobytes()) != checksum:
                raise ValueError(f"the checksum of {name} is wrong")
        structure = jax.tree.structure(like.state)
        return Snapshot(jax.tree.unflatten(structure, [arrays[name] for name in template]), np.array(record["sums"]))

    def _set_aside(self, step: int) -> None:
        """Rename a checkpoint that cannot be used, and warn."""
        place = self.folder / str(step)
        aside = next(
            path for number in range(1000) if not (path := self.folder / f"unreadable-{step}-{number}").exists()
        )
        wait_for_all(f"unreadable-{step}")
        if jax.process_index() == 0:
            place.rename(aside)
            self._warn(f"The checkpoint {place} cannot be used and is now {aside.name}: {self._unusable[step]}")
        wait_for_all(f"aside-{step}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn any error while writing into a `UsageError` of one sentence."""
        try:
            yield
        except Exception as error:  # Orbax raises many kinds
            saved = "there is none before it" if self._saved is None else f"the one of step {self._saved} is complete"
            raise UsageError(
                f"The checkpoint {self.folder / str(self._saving)} cannot be written, and {saved}; "
                f"fix this, then --resume: {_first_line(error)}"
            ) from error


def _named_arrays(snapshot: Snapshot) -> dict[str, np.ndarray]:
    """Copy the arrays of the state to host memory, named by their paths in it."""
    leaves = jax.tree.leaves_with_path(jax.device_get(snapshot.state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf, order="C") for path, leaf in leaves}


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # In a long message, the last clause comes from the operating system.
    return line if len(line) <= LONGEST else line.rsplit(": ", 1)[-1]


def _validation(metrics: Mapping[str, float]) -> float:
    return metrics["validation"]


def _steps_of_unreadable_metrics(folder: Path) -> list[int]:
    steps = []
    for path in folder.glob("[0-9]*/metrics/metrics"):
        if not path.parents[1].name.isdigit():  # an incomplete checkpoint
            continue
        try:
            float(json.loads(path.read_text())["validation"])
        except (ValueError, KeyError, TypeError):  # ValueError includes wrong JSON and wrong Unicode
            steps.append(int(path.parents[1].name))
    return steps


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(_text(record).encode())
