#!/bin/sh
# Makes .venv ready for everything in this repository. `make` calls it; by hand: sh tools/setup.sh
#   PYTHON=python3.12         the Python to build on; without it, one is looked for
#   TORCH=auto|cpu|default    which build of PyTorch: auto takes the small CPU build on Linux without
#                             an NVIDIA GPU, and PyPI's own build everywhere else
# Both count when .venv is made. Returns at once if all is ready; after an interruption, run it again.
set -eu
cd "$(dirname "$0")/.."
venv=.venv
python=$venv/bin/python
unfinished=$venv/unfinished # there from the first moment until a new environment is complete
ready=$venv/ready           # what the complete environment was made from

say() { printf '\n==> %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

state() { # changes when the environment must be brought up to date
    { pwd; "$python" --version; cat settings.ini setup.py pyproject.toml constraints.txt "tools/setup.sh"; } 2>/dev/null | cksum
}

find_python() { # sets $base
    lacking=
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python3.14 python; fi
    for base; do
        "$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1 || continue
        "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 && return
        lacking=${lacking:-$base}
    done
    [ -z "$lacking" ] || fail "$lacking cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv"
    fail "no Python 3.11 to 3.14 among: $*. Install one (https://www.python.org/downloads), or name yours: PYTHON=/path/to/python3"
}

install_torch() { # the CPU build where it is wanted and can be had; otherwise the last step takes PyPI's
    version=$(sed -n 's/^torch==//p' constraints.txt)
    "$python" -c "from importlib.metadata import version as v; assert v('torch').split('+')[0] == '$version'" 2>/dev/null && return
    if [ "$system" != Linux ]; then say "PyTorch $version will be PyPI's build: about 110 MB"; return; fi
    if [ "$torch" = auto ] && { command -v nvidia-smi || [ -e /proc/driver/nvidia ]; } >/dev/null; then torch=default; fi
    if [ "$torch" != default ]; then
        index=https://download.pytorch.org/whl/cpu
        say "PyTorch $version for CPUs: about 200 MB (TORCH=default takes the build for NVIDIA GPUs)"
        if pip install --quiet --dry-run --no-deps "torch==$version+cpu" >/dev/null 2>&1; then
            pip install --no-deps "torch==$version+cpu" && return
        fi
        pip install --no-deps --index-url "$index" --timeout 10 --retries 1 "torch==$version+cpu" && return
        say "No CPU build to be had from $index"
    fi
    say "PyTorch $version will be PyPI's build for NVIDIA GPUs: about 2.8 GB with its CUDA libraries. Ctrl-C stops it"
}

torch=${TORCH:-auto}
case $torch in auto | cpu | default) ;; *) fail "TORCH is '$torch'; expected auto, cpu or default" ;; esac
system=$(uname -s)

if [ -f "$ready" ] && [ "$(cat "$ready")" = "$(state)" ]; then exit 0; fi
if [ -e "$venv" ] && { [ -e "$unfinished" ] || ! pip --version >/dev/null 2>&1; }; then
    say "$venv is unfinished or damaged: starting again (downloads are still in pip's cache)"
    rm -rf "$venv"
fi
rm -f "$ready"
if [ ! -e "$venv" ]; then
    find_python
    say "1 of 3: a virtual environment in $venv, with $("$base" --version)"
    mkdir "$venv" && touch "$unfinished"
    "$base" -m venv "$venv"
fi
say "2 of 3: PyTorch"
install_torch
say "3 of 3: bigmodel and what its lessons, server and tests use (about 390 MB)"
pip install --constraint constraints.txt --editable ".[all]"
"$python" -c "import bigmodel, torch, transformers, jupyterlab" || fail "the installation is not whole; run the same command again"
rm -f "$unfinished"
state > "$ready"
say "$venv is ready"
