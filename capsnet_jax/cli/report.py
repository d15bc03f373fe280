"""The command `capsnet report`: how runs went, side by side, as a table and as learning curves."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from capsnet_jax.errors import UsageError
from capsnet_jax.figures import learning_curves_figure, save_figure
from capsnet_jax.runs.report import HEADINGS, History, cells, differing_options, mean_cells, option, runs_of
from capsnet_jax.tables import markdown_table

PICTURE = "learning_curves.png"


@dataclass(frozen=True)
class Report:
    """Tells how runs went: a table of their last epochs and of the options that differ, and learning curves.

    Errors are those after the last epoch, whatever was best on the way. Images/s is the median of the epochs, of all
    seeds together where they were trained side by side, and memory the most that was in use."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs. One that holds the runs seed-0, seed-1 ... stands for all of them, and for a line of their mean
    and sample deviation."""
    output: Path = Path(PICTURE)
    """File that the curves are drawn into, as PNG, PDF or SVG by its ending: solid over epochs, the test error; dashed,
    the validation error; faint over steps, the loss of each chunk of them."""

    def run(self) -> None:
        """Prints the table and draws the curves.

        Raises:
            UsageError: a folder has no run or no metrics, they cannot be read, or the picture cannot be written.
        """
        if not self.run_dirs:
            raise UsageError("There are no runs to report; expected one run folder or more.")
        groups = {folder: [History.read(run) for run in runs_of(folder)] for folder in self.run_dirs}
        histories = list({run.folder: run for group in groups.values() for run in group}.values())
        rows: list[list[str]] = []
        options = differing_options(histories)
        for folder, group in groups.items():
            rows += [[*cells(run), *(option(run, name) for name in options)] for run in group]
            if group[0].folder != folder:
                rows.append([*mean_cells(folder, group), *("" for _ in options)])
        print(markdown_table([[*HEADINGS, *options], *rows]))
        save_figure(learning_curves_figure({str(run.folder): run.curves() for run in histories}), self.output)
