#!/bin/sh
# Make .venv: this project, editable, with what serving, testing and developing need. Run through `make setup`.
# A second run does nothing, in an instant. PYTHON names the interpreter; without it an existing .venv is kept.
# usage: setup.sh [EXTRA]   with EXTRA, that extra's packages too: train, fr2en, gpt, bench, kernels, ray, cuda12, cuda13
set -eu
cd "$(dirname "$0")"

venv=.venv
stamp=$venv/.installed
extra=${1:-}
pip="$venv/bin/python -m pip --disable-pip-version-check -qq"
wanted_python=${PYTHON:-}
python=${wanted_python:-python3}

fail() {
    echo "make setup: $1" >&2
    exit 1
}

# One line naming what the interpreter lacks, or nothing. Triton's Python stub is linked against libpython,
# which Debian packages apart from python3.
missing_from_python() {
    "$1" - <<'PYTHON_END'
import ctypes, importlib.util, os, sys, sysconfig

name = "%d.%d" % sys.version_info[:2]
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    print(f"{sys.executable} is Python {name}; Python 3.10 to 3.13 is needed (choose one: make setup PYTHON=python3.11)")
elif not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
    print(f"Python {name} cannot make virtual environments: apt-get install python{name}-venv")
else:
    library = f"libpython{name}.so.1.0"
    for path in (os.path.join(sysconfig.get_config_var("LIBDIR") or "", library), library):
        try:
            ctypes.CDLL(path)
            break
        except OSError:
            pass
    else:
        print(f"{library}, which Triton's Python backend loads, is missing: apt-get install libpython{name}")
PYTHON_END
}

version_of() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || true
}

installed_as() { # what the stamp must say for .venv to be current
    echo "$(pwd) $(version_of "$venv/bin/python") $(cat pyproject.toml setup.sh | cksum)"
}

is_current() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(installed_as)" ] &&
        { [ -z "$wanted_python" ] || [ "$(version_of "$python")" = "$(version_of "$venv/bin/python")" ]; }
}

install_extra() { # stamped apart, so that the common targets neither wait for it nor undo it
    [ -z "$extra" ] && return
    extra_stamp=$venv/.installed-$extra
    [ -f "$extra_stamp" ] && [ "$(cat "$extra_stamp")" = "$(installed_as)" ] && return
    echo "installing the extra '$extra' into $venv"
    $pip install --editable ".[server,client,dev,$extra]" || fail "pip could not install it; its message is above"
    installed_as >"$extra_stamp"
}

if is_current; then
    install_extra
    exit 0
fi

command -v "$python" >/dev/null 2>&1 ||
    fail "$python was not found: apt-get install python3 python3-venv (or choose one: make setup PYTHON=...)"
missing=$(missing_from_python "$python") || fail "$python does not run"
[ -z "$missing" ] || fail "$missing"

if command -v flock >/dev/null 2>&1; then # two runs at once would break each other's .venv
    exec 9<setup.sh
    flock 9
    if is_current; then
        install_extra
        exit 0
    fi
fi

if [ -n "$wanted_python" ] || [ -z "$(version_of "$venv/bin/python")" ]; then
    if [ "$(version_of "$python")" != "$(version_of "$venv/bin/python")" ]; then
        rm -rf "$venv"
    fi
fi
rm -f "$stamp"
if [ ! -d "$venv" ]; then
    echo "making $venv with Python $(version_of "$python")"
    "$python" -m venv "$venv" || fail "could not make $venv"
fi

echo "installing into $venv (the first time takes a minute or two)"
$pip install --editable '.[server,client,dev]' || fail "pip could not install the project; its message is above"
if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 13))'; then
    # Only the server binary and the stub in this wheel are used; its own numpy<2 has no build here.
    $pip install --no-deps nvidia-pytriton==0.7.0 || fail "pip could not install Triton; its message is above"
fi

# mypy reads no editable install's import hook: show it the packages under the names they are imported by.
mkdir -p "$venv/first_party"
ln -sfn ../../lightseq_backend "$venv/first_party/lightseq_backend"
ln -sfn ../../client "$venv/first_party/lightseq_client"
ln -sfn ../../kernels "$venv/first_party/lightseq_kernels"

installed_as >"$stamp"
install_extra
echo "ready: Python $(version_of "$venv/bin/python") in $venv"
