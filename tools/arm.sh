#!/usr/bin/env bash
# Compiles the CPU kernels for 64-bit ARM and runs their tests on emulated processors: one with i8mm and bf16, one with the dot
# product alone, one with neither. `make arm` calls it; what it shows is that results are right, nothing about speed.
#
# On Debian: `apt-get install qemu-user g++-aarch64-linux-gnu`. A warning of the compiler is an error here.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
    command -v "$tool" >/dev/null || { echo "no $tool: apt-get install qemu-user g++-aarch64-linux-gnu" >&2; exit 1; }
done
python="${PYTHON:-.venv/bin/python}"
export GEMCUTTER_ARM="$PWD/build/arm"
tools/native.sh "$GEMCUTTER_ARM" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS=-Werror
aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -Werror tests/kernels/remote_calls.cpp -o "$GEMCUTTER_ARM/remote_calls" -rdynamic -ldl -pthread
"$python" -m pytest -q "$@" tests/kernels/test_arm.py
