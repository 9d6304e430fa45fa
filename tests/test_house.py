"""The house itself: set-up, make targets, imports that point one way, and what the documentation must name."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_triton import inside_triton

from lightseq_backend.options import OPTION_TYPES
from lightseq_backend.serving.control import CONTROLS
from lightseq_backend.serving.settings import PARAMETERS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"lightseq_backend": ROOT / "lightseq_backend", "lightseq_client": ROOT / "client"}

# A module may import from its own layer and from those below it.
LAYERS = [
    {
        "lightseq_backend.errors",
        "lightseq_backend.small",
        "lightseq_backend.config",
        "lightseq_backend.options",
        "lightseq_backend.request",
        "lightseq_backend.quantised",
    },
    {"lightseq_kernels"},
    {"lightseq_backend.ops"},
    {"lightseq_backend.models", "lightseq_backend.decoding"},
    {"lightseq_backend.engine"},
    {
        *("lightseq_backend.serving", "lightseq_backend.local", "lightseq_backend.proof", "lightseq_backend.loaded"),
        *("lightseq_backend.answers", "lightseq_backend.streams", "lightseq_backend.inference"),
        *("lightseq_backend.lines", "lightseq_backend.bulk", "lightseq_backend.progress"),
        *("lightseq_backend.written", "lightseq_backend.workers", "lightseq_backend.conversion"),
    },
    {"lightseq_backend.__main__"},
]
# Beside them: they know the ground layer, and serving and the command line know them.
BESIDE = {"lightseq_backend.weights", "lightseq_backend.export", "lightseq_backend.text"}
# Who may import what comes from outside, by the first word of its name.
ONLY_IN = {
    "fairseq": ("lightseq_backend.export",),
    "cupy": tuple(f"lightseq_backend.ops.{name}" for name in ("cuda", "launch", "quickest", "transfer")),
    "h5py": ("lightseq_backend.weights",),
    "torch": ("lightseq_backend.export",),
    "transformers": ("lightseq_backend.export",),
    "triton_python_backend_utils": ("lightseq_backend.serving",),
    "ray": ("lightseq_backend.workers",),
    "sentencepiece": ("lightseq_backend.text",),
    "subword_nmt": ("lightseq_backend.text",),
    "tokenizers": ("lightseq_backend.text",),
    "tritonclient": ("lightseq_client",),
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, directory in PACKAGES.items():
        for path in sorted(directory.rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            yield ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts))), path


def imports_of(path: Path) -> list[str]:
    """Full names of everything a module imports, also inside functions and for type checking.

    `from package import name` counts as package.name, which may be one of its modules.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def within(name: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer_of(name: str) -> int | None:
    return next((height for height, layer in enumerate(LAYERS) if within(name, layer)), None)


@pytest.mark.parametrize(("name", "path"), [pytest.param(*module, id=module[0]) for module in modules()])
def test_imports_point_one_way(name: str, path: Path) -> None:
    wrong = [imported for imported in imports_of(path) if not may_import(name, imported)]
    assert wrong == []


def may_import(name: str, imported: str) -> bool:
    outside = ONLY_IN.get(imported.split(".")[0])
    if outside is not None:
        return within(name, outside)
    if not imported.startswith("lightseq_"):
        return True
    if within(name, ("lightseq_client",)) or within(imported, ("lightseq_client",)):
        return within(name, ("lightseq_client",)) and within(imported, ("lightseq_client",))
    if name == "lightseq_backend":  # inside the function that needs it: see test_package_imports_nothing_by_itself
        return within(imported, ("lightseq_backend.loaded",))
    if within(name, BESIDE):
        return within(imported, LAYERS[0] | BESIDE)
    if within(imported, BESIDE):
        return within(name, LAYERS[-1] | LAYERS[-2])
    # What is built with an ops module given to it must not choose one.
    if within(name, ("lightseq_backend.models", "lightseq_backend.decoding", "lightseq_backend.engine")) and within(
        imported, ("lightseq_backend.ops.cpu", "lightseq_backend.ops.cuda", "lightseq_backend.ops.load")
    ):
        return False
    importer, below = layer_of(name), layer_of(imported)
    assert importer is not None, f"{name} is in no layer of this test"
    assert below is not None, f"{imported} is in no layer of this test"
    return below <= importer


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("lightseq_backend.ops.cpu", "lightseq_backend.models.gpt"),
        ("lightseq_backend.models.gpt", "lightseq_backend.ops.cpu"),
        ("lightseq_backend.engine.engine", "lightseq_backend.serving.wire"),
        ("lightseq_backend.engine.engine", "triton_python_backend_utils"),
        ("lightseq_backend.weights.protobuf", "lightseq_backend.engine"),
        ("lightseq_backend.decoding.beam", "cupy"),
        ("lightseq_client.client", "lightseq_backend.config"),
    ],
)
def test_import_rule_refuses(name: str, imported: str) -> None:
    assert not may_import(name, imported)


def test_package_imports_nothing_by_itself() -> None:
    program = "import sys; before = set(sys.modules); import lightseq_backend; print(set(sys.modules) - before)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"numpy", "lightseq_backend.loaded", "lightseq_backend.config"} & ast.literal_eval(shown)


def test_packages_are_all_installed() -> None:
    """A package that pyproject.toml does not list works here, where the installation is editable, and nowhere else."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(text.split("\npackages = ", 1)[1].split("]", 1)[0] + "]")
    present = {name for name, path in modules() if path.name == "__init__.py"} | {"lightseq_kernels"}
    assert sorted(listed) == sorted(present)


def test_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for line in text.splitlines() if line.startswith(".PHONY:")}
    shown = subprocess.run(["make", "-C", ROOT, "-s", "help"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} == targets
    assert {"setup", "demo", "serve", "test", "lint", "bench", "perf", "train", "clean"} < targets


@pytest.mark.parametrize("model", sorted(path.parent for path in (ROOT / "model_repository").glob("*/config.pbtxt")))
def test_cpu_configuration_differs_in_its_kind_alone(model: Path) -> None:
    def settings(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if not line.startswith("#")]

    for_gpu = settings(model / "config.pbtxt")
    assert sum(line.count("KIND_GPU") for line in for_gpu) == 1
    for_cpu = settings(model / "configs" / "cpu.pbtxt")
    assert for_cpu == [line.replace("KIND_GPU", "KIND_CPU") for line in for_gpu]


@pytest.mark.parametrize("script", ["setup.sh", ".ci/run"])
def test_script_is_executable_and_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    shell = (ROOT / script).read_text().split("\n", 1)[0].split()[-1].rpartition("/")[2]
    assert subprocess.run([shell, "-n", ROOT / script]).returncode == 0


# A stand-in for python3: it makes a .venv of itself, keeps a log of what pip was asked, and answers programs
# given on standard input as the real interpreter would after running BEFORE.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") echo "$@" >>"{log}" ;;
"- ") { printf '%s\\n' "{before}"; cat; } | "{real}" - ;;
*) exec "{real}" "$@" ;;
esac
"""
TOOLS = ("sh", "dirname", "cat", "cksum", "rm", "mkdir", "ln", "cp", "flock")


class Checkout:
    """The set-up files alone, in a directory and with a PATH of their own."""

    def __init__(self, directory: Path):
        self.root = directory / "project"
        self.bin = directory / "bin"
        self.log = directory / "pip.log"
        self.root.mkdir()
        self.bin.mkdir()
        for name in ("setup.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))

    def add_python(self, name: str = "python3", before: str = "") -> None:
        script = FAKE_PYTHON.replace("{log}", str(self.log)).replace("{real}", sys.executable)
        (self.bin / name).write_text(script.replace("{before}", before))
        (self.bin / name).chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.root / "setup.sh", *arguments],
            env={"PATH": str(self.bin), **environment},
            capture_output=True,
            text=True,
            timeout=30,
        )

    def pip_calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_setup_installs_the_project(checkout: Checkout) -> None:
    checkout.add_python()
    done = checkout.setup()
    assert (done.returncode, done.stderr) == (0, "")
    assert checkout.pip_calls()[0].endswith("install --editable .[server,client,dev]")


def test_setup_twice_does_nothing_the_second_time(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.setup()
    calls = checkout.pip_calls()
    done = checkout.setup()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert checkout.pip_calls() == calls


def test_setup_installs_anew_after_a_change(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.setup()
    calls = checkout.pip_calls()
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert checkout.setup().returncode == 0
    assert checkout.pip_calls() == calls * 2


def test_setup_of_an_extra_leaves_the_rest(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.setup()
    before = len(checkout.pip_calls())
    checkout.setup("bench")
    checkout.setup("bench")
    assert [call.rpartition(" ")[2] for call in checkout.pip_calls()[before:]] == [".[server,client,dev,bench]"]


def test_setup_takes_the_python_it_is_given(checkout: Checkout) -> None:
    checkout.add_python("python3.x")
    assert checkout.setup(PYTHON="python3.x").returncode == 0
    assert (checkout.root / ".venv" / "bin" / "python").exists()


def test_setup_interrupted_starts_again(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.setup()
    calls = checkout.pip_calls()
    (checkout.root / ".venv" / ".installed").unlink()
    assert checkout.setup().returncode == 0
    assert checkout.pip_calls() == calls * 2


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("import sys; sys.version_info = (3, 9, 2)", "is Python 3.9; Python 3.10 to 3.13 is needed"),
        ("import sys; sys.version_info = (3, 14, 0)", "is Python 3.14; Python 3.10 to 3.13 is needed"),
        (
            "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: n != 'ensurepip' and find(n)",
            "apt-get install python{version}-venv",
        ),
        (
            "import ctypes, os; ctypes.CDLL = lambda path: os.stat('/nowhere')",
            "libpython{version}.so.1.0, which Triton's Python backend loads, is missing: "
            "apt-get install libpython{version}",
        ),
    ],
    ids=["old", "new", "venv", "libpython"],
)
def test_setup_says_in_one_line_what_is_missing(checkout: Checkout, before: str, message: str) -> None:
    checkout.add_python(before=before)
    done = checkout.setup()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert message.format(version="{}.{}".format(*sys.version_info)) in done.stderr
    assert not (checkout.root / ".venv").exists()


def test_setup_without_python_names_the_package(checkout: Checkout) -> None:
    done = checkout.setup()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "python3 was not found: apt-get install python3 python3-venv" in done.stderr


# What the documentation must name ------------------------------------------------------------------------------------


def documented(*names: str) -> set[str]:
    """The words in backquotes of those files of docs/; of a list of metrics that share a beginning, each in full."""
    words: set[str] = set()
    for name in names:
        for line in (ROOT / "docs" / name).read_text().splitlines():
            found = re.findall(r"`([\w.]+)(?:\{\w+\})?`", line)
            words |= {f"lightseq{word}" if word.startswith("_") else word for word in found}
    return words


def test_every_parameter_of_a_request_is_documented() -> None:
    assert {*OPTION_TYPES, *CONTROLS, "queue_priority"} - documented("protocol.md") == set()


def test_every_parameter_of_a_model_is_documented() -> None:
    assert set(PARAMETERS) - documented("serving.md") == set()


def test_every_metric_and_outcome_is_documented() -> None:
    with inside_triton("metrics", "replies") as (metrics, replies):
        exported = {*metrics.GAUGES, *metrics.COUNTERS, *metrics.HISTOGRAMS, metrics.REQUESTS[0], *replies.OUTCOMES}
    assert exported - documented("operate.md") == set()


def test_every_error_code_is_documented() -> None:
    codes = set(re.findall(r"TritonError\.(\w+)", (ROOT / "lightseq_backend/serving/replies.py").read_text()))
    table = (ROOT / "docs/protocol.md").read_text().partition("## Errors")[2]
    names = {"INVALID_ARG": "INVALID_ARGUMENT"}
    assert len(codes) > 4
    assert {code for code in codes if f"| {names.get(code, code)} |" not in table} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_files_that_documentation_names_are_there(path: Path) -> None:
    named = {name.removeprefix("docs/") for name in re.findall(r"[\w/]+\.md\b", path.read_text())}
    assert {name for name in named if not (ROOT / "docs" / name).exists() and not (ROOT / name).exists()} == set()
