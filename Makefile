# Two commands do everything: `make demo` (install, then text from the packaged model) and `make check` (lint, types, tests).
# While you work, `make quick` takes less than a minute; CONTRIBUTING.md says which tests belong to which change.
.PHONY: ranks serve load clients demo quick check check-peers native sanitize arm fuzz soak kills wheel docs lint types test test-rest clean
SOURCES := gemcutter tests bench examples tools
CPP_SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp tests/kernels/*.cpp)

# What catches most mistakes in least time: import rules, the plan, configs, block tables, the scheduler, sampling.
QUICK := tests/rules $(addprefix tests/unit/test_,plan.py config.py table.py prefix.py scheduler.py sampling.py sampler.py shard.py registry.py step.py)
# Tests start hundreds of processes, which would compile each module anew where bytecode may not be written.
export PYTHONDONTWRITEBYTECODE :=
# One thread a process: two test processes share two cores, and threads of both would get in each other's way.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

demo: .venv/.installed
	tools/native.sh || echo "the CPU kernels were not built (above); everything works without them, several times slower" >&2
	.venv/bin/gemcutter run demo "What is a lantern?" -n 48

# Quick tests come first, so that most mistakes show within a minute; the last step runs all the others.
check: quick lint types test-rest

quick: native
	$(PYTEST) --dist load $(QUICK)

lint: .venv/.installed-dev
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/clang-format --dry-run -Werror $(CPP_SOURCES)
	.venv/bin/python tools/make_docs.py --check

# docs/cli.md and docs/api.md, from the command line's help and the public names' docstrings.
docs: .venv/.installed-dev
	.venv/bin/python tools/make_docs.py

types: .venv/.installed-dev
	.venv/bin/mypy

test: native
	$(PYTEST) --dist loadfile --no-loadscope-reorder tests

test-rest: native
	$(PYTEST) --dist loadfile --no-loadscope-reorder tests $(addprefix --ignore=,$(QUICK))

# gemcutter/_cpu.so, from what has changed in csrc/ since the last time.
native: .venv/.installed-dev
	tools/native.sh

# The kernels' tests once more under the compiler's address, undefined-behaviour and thread sanitizers.
sanitize: .venv/.installed-dev
	tools/sanitize.sh

# The kernels' tests once more on emulated ARM processors; needs qemu-user and g++-aarch64-linux-gnu.
arm: .venv/.installed-dev
	tools/arm.sh

# Mutated files against every parser, in forked workers with limits; FUZZ="--headers 1000000 --texts 20000" takes half an hour.
FUZZ ?= --headers 4000 --texts 300 --values 30 --media 3000
fuzz: native
	OMP_NUM_THREADS=1 .venv/bin/python tools/fuzz.py $(FUZZ)

# The server's tests once more, over models on two tensor-parallel ranks, and in two stages of a pipeline.
ranks: native
	GEMCUTTER_TEST_RANKS=2 $(PYTEST) --dist loadfile tests/server
	GEMCUTTER_TEST_STAGES=2 $(PYTEST) --dist loadfile tests/server

# Random requests, cancels, interrupts and adapters on a tiny model for so many minutes; pages, handles, threads, memory watched.
MINUTES ?= 2
soak: native
	OMP_NUM_THREADS=1 .venv/bin/python tools/soak.py --minutes $(MINUTES)

# Everything that writes files, killed at random instants: what is left must be absent or whole.
KILLS ?= 60
kills: native
	OMP_NUM_THREADS=1 .venv/bin/python tools/kill_writers.py --kills $(KILLS)

# Many clients on a server, some of which leave, read slowly or send nonsense, for so many minutes.
load: native
	OMP_NUM_THREADS=1 .venv/bin/python tools/load_test.py --minutes $(MINUTES)

# Clients in environments of their own (made at the first time, about a gigabyte) against a server: openai 1.x, LangChain, and others.
clients: native
	tools/clients.sh
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/server/test_outside_clients.py tests/server/test_openapi.py

# Serves the packaged model on loopback, and prints what to ask it with.
serve: native
	.venv/bin/gemcutter serve demo

# Builds the wheel and runs the demo from it in an empty environment without a compiler.
wheel: .venv/.installed-dev
	.venv/bin/python tools/check_wheel.py

# Builds llama.cpp, which takes minutes; its own processor tuning stays off, and so do AMX units, which GCC 12 miscompiles.
check-peers: .venv/.installed-dev
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" .venv/bin/python -m pip install -q "llama-cpp-python>=0.3.36"
	.venv/bin/python -m pytest tests/formats/test_llama_cpp.py

.venv/.installed: pyproject.toml tools/install.sh
	tools/install.sh

.venv/.installed-dev: pyproject.toml tools/install.sh
	tools/install.sh dev

clean:
	rm -rf .venv build dist *.egg-info gemcutter/_cpu.so
