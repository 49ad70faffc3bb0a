#!/usr/bin/env bash
# Makes .venv and installs gemcutter into it: `tools/install.sh [extras]`, for instance `tools/install.sh dev`.
#
# Where no NVIDIA GPU is found, torch comes from PyTorch's CPU wheels, so that no CUDA packages are pulled; where that
# index can't be reached, the pinned plain release is the fallback. A torch that is already there is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
torch="torch==2.13.0"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gemcutter needs Python 3.11 or newer; set PYTHON=/path/to/it" >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv || { echo "python3 -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        pip install -q "$torch"
    else
        pip install -q --timeout 15 --retries 0 --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null ||
            pip install -q "$torch"
    fi
fi
# Imports come straight from this folder (inplace), so that files may move. The kernels are built in place by tools/native.sh,
# which builds only what has changed.
# The tools of developers are many, and most of their modules are never imported: those that are get compiled then.
compile=--compile
if [ "$extras" = dev ]; then compile=--no-compile; fi
pip install -q "$compile" -C wheel.cmake=false -C editable.mode=inplace -e ".${extras:+[$extras]}"
touch ".venv/.installed${extras:+-$extras}"
