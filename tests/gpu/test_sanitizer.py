"""Every kernel under NVIDIA's compute-sanitizer: no access out of bounds or unaligned, no race in shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sanitized_ops.py")
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
MOST = {"memcheck": 1_250_000, "racecheck": 300_000}  # bytes of a case; races cost more to look for
LIMIT = 300.0  # seconds

pytestmark = [
    pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer: it comes with the CUDA toolkit"),
    pytest.mark.timeout(LIMIT + 30),
]


def kernels() -> set[str]:
    """The names of all __global__ functions."""
    pattern = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")
    sources = [path for path in resources.files("lightseq_kernels").iterdir() if path.name.endswith(".cu")]
    return {name for path in sources for name in pattern.findall(path.read_text())}


def run(*command: str) -> str:
    """What a command prints; a device that the tool cannot look at is no fault of ours."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
    if re.search(r"Device not supported|not supported on this (device|platform)", done.stdout):
        pytest.skip(f"compute-sanitizer: {done.stdout.strip().splitlines()[0]}")
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[:60])
    return done.stdout


def test_cases_launch_every_kernel() -> None:
    """Without the sanitizer; it also fills CuPy's cache of compiled kernels for the tests that follow."""
    for most in MOST.values():
        output = run(sys.executable, str(PROGRAM), str(most))
        (line,) = [line for line in output.splitlines() if line.startswith("launched ")]
        print(output.splitlines()[0])
        assert kernels() - set(line.split()[1:]) == set()


@pytest.mark.parametrize("tool", MOST)
def test_sanitizer_finds_nothing(tool: str) -> None:
    """CuPy asks CUDA things that are refused, and expects that: refused calls are not counted, ours raise anyway."""
    assert SANITIZER is not None
    options = ["--tool", tool, "--error-exitcode", "99", "--report-api-errors", "no", "--print-limit", "20"]
    options += ["--target-processes", "application-only"]
    output = run(SANITIZER, *options, sys.executable, str(PROGRAM), str(MOST[tool]))
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    print(*[line for line in output.splitlines() if "cases in" in line], *summary, sep="\n")
    assert "launched " in output
    wanted = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "0 hazards displayed (0 errors, 0 warnings)"}
    assert summary
    assert [line for line in summary if wanted[tool] not in line] == []
