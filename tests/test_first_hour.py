"""The script docs/first_hour.py runs on a trained model."""

import re
import runpy
import sys
from pathlib import Path

DOCS, RUN = Path(__file__).parents[1] / "docs", Path(__file__).parent / "written_by_0_1_0" / "run"


def test_the_first_hour_runs(monkeypatch, capsys):
    script = DOCS / "first_hour.py"
    assert len(script.read_text().splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(script), str(RUN)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Total Parameters: 840,088" in printed
    assert "routing 0: votes, because routing my_routing has no other implementation" in printed
    first, last = map(float, re.search(r"loss (\S+) -> (\S+)", printed).groups())
    assert last < 0.5 * first
    assert "couplings (64, 72, 10) captured ['couplings', 'votes']" in printed
    assert re.search(r"test accuracy of .*run: 0\.1014", printed)  # as `capsnet train` printed it
