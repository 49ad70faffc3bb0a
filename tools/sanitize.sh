#!/usr/bin/env bash
# Runs the kernels' tests under GCC's sanitizers: the thread pool under the thread sanitizer, then every level, wider ones
# emulated, under the address and undefined-behaviour sanitizers. `make sanitize` calls it, and so does continuous integration.
set -euo pipefail
cd "$(dirname "$0")/.."
export CXX=g++
mkdir -p build
if ! echo 'int main() {}' | "$CXX" -x c++ -fsanitize=address,undefined - -o build/probe 2>/dev/null || ! build/probe; then
    echo "no sanitizers: this needs GCC with its address sanitizer" >&2
    exit 0
fi

"$CXX" -std=c++17 -O1 -g -Wall -Wextra -fsanitize=thread tests/kernels/thread_pool.cpp csrc/cpu/{thread_pool,signal,team_size}.cpp -o build/thread_pool -pthread
build/thread_pool

tools/native.sh build/sanitized -DGC_EMULATE=ON -DGC_SANITIZE=address,undefined
# Python itself is not built with them, so their runtime comes first by hand; it leaves memory to the process's end, so leaks
# can't be told. What the library reads and writes beyond its memory can, and what C++ leaves undefined. Tests that run whole
# texts are left out: slow. The level avx512_bf16 has but products and vision layers of its own.
export LD_PRELOAD="$("$CXX" -print-file-name=libasan.so):$("$CXX" -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0
export GEMCUTTER_NATIVE="$PWD/build/sanitized/_cpu.so" OMP_NUM_THREADS=1
.venv/bin/python -m pytest -q -n 2 tests/kernels/test_native_*.py tests/unit/test_native.py -k "not nll and not continues and not decoders and not 20000 and (not avx512_bf16 or native_dense or native_vision)"
# And whole models whose packed weights are random in places.
.venv/bin/python tools/fuzz.py --values 25 --unlimited
