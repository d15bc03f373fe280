"""Training from several seeds: as many side by side as fit in memory, one group after the other."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from capsnet_jax.config import Config
from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.interchange.state_files import CONFIG
from capsnet_jax.runs.folder import CHECKPOINTS, Run, read_run
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.memory import available_memory
from capsnet_jax.train.sharding import any_process

SEEDS = "seeds.json"  # in the folder of several runs: their seeds, and how many of them train side by side


def groups_of_seeds(trainer: Trainer, seeds: Sequence[int], *, at_once: int = 0) -> Iterator[Trainer]:
    """Yield trainers for groups of seeds that train side by side. They share one compiled program.

    Args:
        trainer: A trainer of any seeds.
        seeds: All seeds.
        at_once: Number of seeds in a group; 0 for as many as fit in memory.
    """
    # More is faster on CPU, too: three seeds of 144 capsules took 0.45 s per step side by side and 0.53 s one after
    # the other with dynamic routing, 0.90 and 1.21 s with variational; medians on 2 shared cores.
    size = min(at_once or len(seeds), len(seeds))
    trainer = trainer.with_seeds(seeds[:size])
    # All processes must choose the same size, although free memory differs between hosts.
    while size > 1 and not at_once and any_process(trainer.memory() > available_memory())[0]:
        size //= 2
        trainer = trainer.with_seeds(seeds[:size])
    for start in range(0, len(seeds), size):
        yield trainer.with_seeds(seeds[start : start + size])


class SeedFolders:
    """Folders of runs from several seeds: `seed-0`, `seed-1` ... in one folder. A single seed has that for itself.

    Args:
        run: A run in the folder of all.
        seeds: Seeds of the runs.

    Attributes:
        seeds: Seeds of the runs.
        at_once: Number of seeds that train side by side; 0 if not known yet. Fixed once the runs have started, because
            these seeds share their checkpoints.
    """

    def __init__(self, run: Run, seeds: Sequence[int]):
        self._run, self.seeds = run, list(seeds)
        self.at_once = 1 if len(self.seeds) == 1 else 0

    def run(self, seed: int) -> Run:
        """Return the run of a seed."""
        if len(self.seeds) == 1:
            return self._run
        config = replace(self._run.config, training=replace(self._run.config.training, seed=seed))
        return self._run._replace(folder=self._run.folder / folder_of_seed(seed), config=config)

    def checkpoints(self, seeds: Sequence[int]) -> Path:
        """Return the folder of the checkpoints of seeds that train side by side."""
        folder = self._run.folder / CHECKPOINTS
        return folder if len(self.seeds) == 1 else folder / f"seeds-{seeds[0]}-{seeds[-1]}"

    def delete_checkpoints(self) -> None:
        """Delete the checkpoints of runs that have finished. Weights, configs and metrics stay."""
        shutil.rmtree(self._run.folder / CHECKPOINTS, ignore_errors=True)

    def check(self, *, resume: bool) -> None:
        """Check that the folder has no runs yet or, if they may be resumed, has these.

        Raises:
            UsageError: It has other runs, or cannot be read.
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
                was, now = (", ".join(map(str, numbers)) for numbers in (seeds, self.seeds))
                raise UsageError(f"The runs in {folder} are from seeds {was}, and not {now}; give a new folder.")
        for run in map(self.run, self.seeds):
            run.check_folder(resume=resume)

    def create(self) -> None:
        """Create the folders and write configs where there are none.

        Raises:
            UsageError: They cannot be written.
        """
        if len(self.seeds) > 1 and not self.at_once:
            self.keep_together(0)
        for run in map(self.run, self.seeds):
            if not (run.folder / CONFIG).exists():
                run.write_config()

    def keep_together(self, at_once: int) -> None:
        """Save how many seeds train side by side; 0 if not known yet.

        Raises:
            UsageError: The folder cannot be written.
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
    return f"seed-{seed}"


def read_seeds(folder: Path) -> tuple[list[int], int] | None:
    """Read the seeds of the runs in a folder, and how many train side by side; None if it is not a folder of several.

    Raises:
        UsageError: The file cannot be read.
    """
    path = folder / SEEDS
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
        return list(fields["seeds"]), int(fields["at_once"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error!r}.") from error


def saved_options(folder: Path) -> tuple[Config, int] | None:
    """Read config and number of seeds of the run or runs in a folder; None if there are none.

    Raises:
        UsageError: They cannot be read.
    """
    before = read_seeds(folder)
    if before is not None:
        seeds, _ = before
        return read_run(folder / folder_of_seed(seeds[0])).config, len(seeds)
    return (read_run(folder).config, 1) if (folder / CONFIG).exists() else None
