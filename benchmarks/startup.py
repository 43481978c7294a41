"""How long the light ends of the library take to start: `import inversion` and `p2p-subject --help`, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STARTUP = ("startup inversion", "startup help")
_IMPORT = """
import sys, time
{first}
before, began = set(sys.modules), time.perf_counter()
import inversion
seconds = time.perf_counter() - began
new = {{name.partition(".")[0] for name in set(sys.modules) - before}} - {{"inversion"}} - set(sys.stdlib_module_names)
print(seconds, *sorted(new))
"""
_HELP = """
import sys
from p2p_subject.cli import main
try:
    main(["--help"])
except SystemExit:
    print("torch" in sys.modules, file=sys.stderr)
"""


def startup(name: str) -> dict[str, Any]:
    """Seconds of `import inversion`, with and without torch's own, or of `p2p-subject --help`, in a fresh process."""
    if name == "startup help":
        began = time.perf_counter()
        heavy = _python(_HELP).stderr.split()[-1]
        return {"seconds": time.perf_counter() - began, "torch": heavy == "True"}
    whole, *_ = _python(_IMPORT.format(first="")).stdout.split()
    seconds, *others = _python(_IMPORT.format(first="import torch")).stdout.split()
    return {"seconds": float(seconds), "seconds_with_torch": float(whole), "beside_torch": others}


def _python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
