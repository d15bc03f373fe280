"""Python processes in which some packages cannot be imported."""

import subprocess
import sys


def run_without(forbidden: list[str], statement: str) -> subprocess.CompletedProcess[str]:
    """Run a statement in a process in which the forbidden packages cannot be imported."""
    program = f"import sys\nfor name in {forbidden}: sys.modules[name] = None\n{statement}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
