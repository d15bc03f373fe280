"""The command `capsnet report`: a table of runs side by side, and their learning curves."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from capsnet_jax.errors import UsageError
from capsnet_jax.figures import learning_curves_figure, save_figure
from capsnet_jax.runs.report import HEADINGS, History, differing_options, mean_cells, runs_of
from capsnet_jax.tables import markdown_table

PICTURE = "learning_curves.png"


@dataclass(frozen=True)
class Report:
    """Summarize runs: a table of their last epochs and of the options that differ, and a plot of learning curves.

    Errors are those after the last epoch, even if an earlier one was better. Images/s is the median over the epochs, of
    all seeds that trained side by side; memory is the peak."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs. A folder of several seeds stands for all of them, with a row of mean and deviation."""
    output: Path = Path(PICTURE)
    """File for the plot: .png, .pdf or .svg. Solid: test error; dashed: validation error; faint: loss of each chunk."""

    def run(self) -> None:
        if not self.run_dirs:
            raise UsageError("There are no runs to report; expected one run folder or more.")
        groups = {folder: [History.read(run) for run in runs_of(folder)] for folder in self.run_dirs}
        histories = list({run.folder: run for group in groups.values() for run in group}.values())
        rows: list[list[str]] = []
        options = differing_options(histories)
        for folder, group in groups.items():
            rows += [[*run.cells(), *map(run.option, options)] for run in group]
            if group[0].folder != folder:
                rows.append([*mean_cells(folder, group), *("" for _ in options)])
        print(markdown_table([[*HEADINGS, *options], *rows]))
        save_figure(learning_curves_figure({str(run.folder): run.curves() for run in histories}), self.output)
