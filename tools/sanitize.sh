#!/usr/bin/env bash
# Runs the kernels' tests under the compiler's sanitizers: the thread team under the thread sanitizer, then every level, wider ones
# emulated, under the address and undefined-behaviour sanitizers. Needs GCC or clang on Linux.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
compiler="${CXX:-c++}"

mkdir -p build
"$compiler" -std=c++17 -O1 -g -fsanitize=thread tests/kernels/team.cpp csrc/cpu/threads.cpp -o build/team -pthread
build/team

tools/native.sh build/sanitized -DGC_EMULATE=ON -DGC_SANITIZE=address,undefined
case "$("$compiler" --version)" in
    *clang*) runtime=$("$compiler" -print-file-name=libclang_rt.asan-x86_64.so) ;;
    *) runtime=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libstdc++.so) ;;
esac
# Python and torch leave memory to the end of the process, so leaks can't be told; what the library reads and writes can.
export LD_PRELOAD="$runtime" ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
export GEMCUTTER_NATIVE="$PWD/build/sanitized/_cpu.so" OMP_NUM_THREADS=1
"$python" -m pytest -q -n 2 tests/kernels/test_native_*.py tests/unit/test_native.py
