# Everything runs in .venv of this checkout; the first command that needs it makes it.
PYTHON ?= python3
TORCH ?= 2.14.1
# The newest of the hosts that the tests have seen; the package itself takes any that its recipes fit.
TRANSFORMERS ?= 5.24.0
DIFFUSERS ?= 0.42.1
BIN := .venv/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml MANIFEST.in
PLUGINS := $(shell find plugins -name build -prune -o -name '*.egg-info' -prune -o -type f -print)
CXX_FILES := $(shell find csrc tests/cuda_emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
OP_TESTS := tests/linear tests/moe tests/ssm
PY_FILES := layerzoo tests plugins tools benchmarks setup.py
# Both sides of every benchmark at AVX2, so that figures of different machines can be compared.
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 LAYERZOO_CPU=avx2
export LAYERZOO_CUDA ?= 0

.PHONY: demo test bench growth bench-smoke peers readme-table lint build cuda test-full test-oldest catalogue hosts clean types tests-modes

demo: .venv/.ready
	$(BIN)/layerzoo demo

test: lint types tests-modes bench-smoke
	$(BIN)/pytest
	$(BIN)/pytest plugins/layerzoo-language/tests

bench: .venv/.ready
	$(AVX2) $(BIN)/layerzoo bench $(ARGS)

# How time and memory of the ops over sequences grow with the length, and those of experts with the number of tokens, of
# experts and of experts of a token, as plots in growth.html, growth-T.html, growth-E.html and growth-K.html.
growth: .venv/.ready
	$(AVX2) $(BIN)/layerzoo bench "ssm.*_scan/channel-last,ssm.ssd_chunk_scan,ssm.causal_conv1d/channel-last" \
		--sweep L=256:65536:x4 --json growth.json --html growth.html --force $(ARGS)
	for sweep in T=1:4096:x4 E=8:128:x2 K=1:16:x2; do \
		$(AVX2) $(BIN)/layerzoo bench "moe.experts/fp32-T512/forward,moe.experts/dense/forward" --sweep $$sweep \
			--json growth-$${sweep%%=*}.json --html growth-$${sweep%%=*}.html --force $(ARGS) || exit 1; \
	done

# Each candidate of each case once, against the reference; nothing is timed.
bench-smoke: .venv/.ready
	$(BIN)/pytest -q benchmarks --benchmark-disable

# The packages that the benchmarks compare with.
peers: .venv/.ready
	$(BIN)/pip install -q -e .[peers] transformers==$(TRANSFORMERS) --no-build-isolation

# The measured part of the README, from benchmarks/baselines.
readme-table: .venv/.ready
	$(BIN)/python tools/readme_table.py

lint: .venv/.ready
	$(BIN)/ruff check $(PY_FILES)
	$(BIN)/ruff format --check $(PY_FILES)
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/lint-imports

types: .venv/.ready
	$(BIN)/mypy

# The op tests again without the native library, and with each instruction set but the best.
tests-modes: .venv/.ready
	LAYERZOO_NATIVE=0 $(BIN)/pytest -q $(OP_TESTS) -m "not slow"
	LAYERZOO_CPU=default $(BIN)/pytest -q $(OP_TESTS) -m "not slow"

build: .venv/.ready

cuda: .venv/.ready
	LAYERZOO_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace

# What takes too long for every change: nvcc, the emulator's long schedules, long hypothesis runs, the oldest torch.
test-full: test cuda
	HYPOTHESIS_PROFILE=long $(BIN)/pytest $(OP_TESTS)
	$(MAKE) test-oldest catalogue hosts

# One library for every torch from 2.10 on: the wheel built here, under torch 2.10.0.
test-oldest: .venv/.ready
	rm -rf build/oldest
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/oldest .
	test -d .venv-oldest || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q torch==2.10.0 numpy pytest hypothesis packaging rich typer
	.venv-oldest/bin/pip install -q --no-deps --force-reinstall build/oldest/*.whl
	cd build/oldest && ../../.venv-oldest/bin/pytest -q -c ../../pyproject.toml --rootdir ../.. -p no:cacheprovider $(addprefix ../../,$(OP_TESTS)) -m "not slow"

# Of every family of transformers with a recipe: equal or not, and how much faster, as a table.
hosts: .venv/.ready
	$(BIN)/python tools/hosts_table.py

catalogue: .venv/.ready
	$(BIN)/python tools/catalogue.py

clean:
	rm -rf .venv .venv-oldest build dist demo layerzoo/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==$(TORCH)
	$(BIN)/pip install -q "setuptools>=77" wheel ninja pybind11
	touch $@

.venv/.installed: .venv/.torch pyproject.toml setup.py
	LAYERZOO_NATIVE=0 $(BIN)/pip install -q --no-build-isolation -e .[dev,transformers,vision,diffusion,bench] \
		transformers==$(TRANSFORMERS) diffusers==$(DIFFUSERS)
	touch $@

.venv/.built: .venv/.installed $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace > .venv/build.log 2>&1 || (tail -n 40 .venv/build.log; exit 1)
	touch $@

.venv/.ready: .venv/.built $(PLUGINS)
	$(BIN)/pip install -q --no-deps --no-build-isolation --force-reinstall ./plugins/layerzoo-language
	touch $@
