"""Training from several seeds: as many side by side as fit in memory, one group after the other."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.interchange.state_files import CONFIG
from capsnet_jax.runs.folder import CHECKPOINTS, Run, read_run
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.memory import available_memory
from capsnet_jax.train.sharding import any_process

SEEDS = "seeds.json"  # in the folder of several runs: their seeds, and how many of them are trained side by side


def groups_of_seeds(trainer: Trainer, seeds: Sequence[int], *, at_once: int = 0) -> Iterator[Trainer]:
    """Trainers of all seeds, each of as many as are trained side by side; the program is compiled once.

    Args:
        trainer: of any seeds.
        seeds: to train from.
        at_once: number of seeds in a group; 0 for as many as fit in memory.
    """
    # The more the better on CPU, too: three seeds of 144 capsules took 0.45 s a step side by side and 0.53 s one after
    # the other with dynamic routing, 0.90 and 1.21 s with variational; medians on 2 shared cores.
    size = min(at_once or len(seeds), len(seeds))
    trainer = trainer.with_seeds(seeds[:size])
    # All processes of a run must find the same, and memory that is free is not the same on all hosts.
    while size > 1 and not at_once and any_process(trainer.memory() > available_memory())[0]:
        size //= 2
        trainer = trainer.with_seeds(seeds[:size])
    for start in range(0, len(seeds), size):
        yield trainer.with_seeds(seeds[start : start + size])


class SeedFolders:
    """Where runs from several seeds are kept: a folder for each in one for all; a single one has that for itself.

    Args:
        run: in the folder for all.
        seeds: of the runs.

    Attributes:
        seeds: of the runs.
        at_once: number of seeds that are trained side by side, as was found when the runs began; 0 if that is not
            known yet. It stays what it is, as they share their checkpoints.
    """

    def __init__(self, run: Run, seeds: Sequence[int]):
        self._run, self.seeds = run, list(seeds)
        self.at_once = 1 if len(self.seeds) == 1 else 0

    def run(self, seed: int) -> Run:
        """The run of a seed."""
        if len(self.seeds) == 1:
            return self._run
        training = replace(self._run.config.training, seed=seed)
        config = replace(self._run.config, training=training)
        return self._run._replace(folder=self._run.folder / folder_of_seed(seed), config=config)

    def checkpoints(self, seeds: Sequence[int]) -> Path:
        """The folder of the checkpoints of seeds that are trained side by side."""
        folder = self._run.folder / CHECKPOINTS
        return folder if len(self.seeds) == 1 else folder / f"seeds-{seeds[0]}-{seeds[-1]}"

    def delete_checkpoints(self) -> None:
        """Free their place on the disk, once training has finished; weights, configs and metrics stay."""
        shutil.rmtree(self._run.folder / CHECKPOINTS, ignore_errors=True)

    def check(self, *, resume: bool) -> None:
        """Makes sure that the folder is free for these runs or, if they may be resumed, holds these very ones.

        Raises:
            UsageError: it holds others, or cannot be read.
        """
        folder = self._run.folder
        parent = read_seeds(folder.parent)
        if parent is not None and folder.name in map(folder_of_seed, parent[0]):
            raise UsageError(f"{folder} is one of the runs in {folder.parent}; expected that as --run-dir.")
        before = read_seeds(folder)
        if before is None:
            if len(self.seeds) > 1 and (folder / CONFIG).exists():
                raise UsageError(f"The run folder {folder} holds a run from one seed; give a new one.")
        elif not resume:
            raise UsageError(f"The run folder {folder} holds runs already; give a new one, or --resume, too.")
        else:
            seeds, self.at_once = before
            if seeds != self.seeds:
                raise UsageError(
                    f"The runs in {folder} are from seeds {_listed(seeds)}, and not {_listed(self.seeds)}."
                )
        for run in map(self.run, self.seeds):
            run.check_folder(resume=resume)

    def create(self) -> None:
        """Makes the folders and writes their configs, where there are none.

        Raises:
            UsageError: they cannot be written.
        """
        if len(self.seeds) > 1 and not self.at_once:
            self.keep_together(0)
        for run in map(self.run, self.seeds):
            if not (run.folder / CONFIG).exists():
                run.write_config()

    def keep_together(self, at_once: int) -> None:
        """Remembers how many seeds are trained side by side; 0 if that is not known yet.

        Raises:
            UsageError: the folder cannot be written.
        """
        self.at_once = at_once
        if len(self.seeds) > 1:
            path = self._run.folder / SEEDS
            try:
                self._run.folder.mkdir(parents=True, exist_ok=True)
                replace_file(path, json.dumps({"seeds": self.seeds, "at_once": at_once}) + "\n")
            except OSError as error:
                raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def folder_of_seed(seed: int) -> str:
    """The name of its folder in that of several runs."""
    return f"seed-{seed}"


def read_seeds(folder: Path) -> tuple[list[int], int] | None:
    """The seeds of the runs in a folder, and how many are trained side by side; None if it is not one of several.

    Raises:
        UsageError: its file cannot be read.
    """
    path = folder / SEEDS
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
        return list(fields["seeds"]), int(fields["at_once"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error!r}.") from error


def saved_options(folder: Path) -> dict[str, Any] | None:
    """Config and number of seeds of the run or runs in a folder, as options of `capsnet train`; None if there are none.

    Raises:
        UsageError: they cannot be read.
    """
    before = read_seeds(folder)
    if before is not None:
        seeds, _ = before
        return {"config": read_run(folder / folder_of_seed(seeds[0])).config, "seeds": len(seeds)}
    return {"config": read_run(folder).config} if (folder / CONFIG).exists() else None


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
