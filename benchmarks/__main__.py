"""All benchmarks of this machine, one after another: `make bench`. Each is a program of its own, too."""

from __future__ import annotations

import subprocess
import sys

for name in ("models", "weights", "ops"):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
