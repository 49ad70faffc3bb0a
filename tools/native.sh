#!/usr/bin/env bash
# Builds the CPU kernels, only what has changed: `tools/native.sh` makes gemcutter/_cpu.so, and
# `tools/native.sh FOLDER [CMAKE OPTION...]` makes FOLDER/_cpu.so, for instance `tools/native.sh build/emulated -DGC_EMULATE=ON`.
#
# cmake and ninja come from the package index where they are absent. Prints no more than warnings and errors; without a compiler
# nothing is built, which is no error: everything works without the kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-build/native}"
PATH="$PATH:$PWD/.venv/bin"
if ! command -v "${CXX:-c++}" g++ clang++ >/dev/null; then
    echo "no C++ compiler: gemcutter goes without its CPU kernels and is several times slower" >&2
    exit 0
fi
for tool in cmake ninja; do
    command -v "$tool" >/dev/null || "${PYTHON:-.venv/bin/python}" -m pip --disable-pip-version-check install -q "$tool"
done

mkdir -p "$folder"
exec 9>"$folder/.lock"
if command -v flock >/dev/null; then flock 9; fi # two test processes may want the same one
cmake -S . -B "$folder" -G Ninja --log-level=WARNING "${@:2}" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
cmake --build "$folder" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
if [ $# = 0 ]; then cmake --install "$folder" --prefix . >/dev/null; fi
