# Two commands are all a newcomer needs: `make serve` and `make test`. Both set up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.c' 'csrc/*.cpp' 'csrc/*.inl' 'tests/*.cpp' 2>/dev/null)
MODEL ?= smollm2-135m

.PHONY: setup build serve demo test test-all check check-control fuzz format bench bench-peers gateway-plugin gpu-check clean

setup: $(VENV)/.installed

# The compiler works while packages are fetched and unpacked.
NEEDED := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.11" "nanobind>=2.4" "cmake>=3.24" ninja
	$(BIN)/python -c '$(NEEDED)' >$(VENV)/needed.txt
	set -e; $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . & built=$$!; \
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/needed.txt; wait $$built
	touch $@

# A C++ edit rebuilds only what it touches; a Python edit needs no build at all.
build: setup
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .

serve: setup
	$(BIN)/tokenspeed serve $(MODEL) --curl

demo: setup
	$(BIN)/python examples/coding_session.py

test: setup
	$(BIN)/python -m pytest -m "not slow"

# TESTS=... names some of them.
test-all: setup
	$(BIN)/python -m pytest $(TESTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# The control plane's proof: misuses, every order of events of small worlds, random runs, sown bugs,
# sanitizers, fuzzing. QUICK=1 makes it short.
check-control: setup
	$(BIN)/python -m tests.proof.check $(if $(QUICK),--quick)

# Random calls to the servicer and random HTTP requests to the gateway of a served model.
fuzz: setup
	$(BIN)/python -m tests.fuzz.servicer
	$(BIN)/python -m tests.fuzz.gateway

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The standard set: under ten minutes, wants a quiet machine; redraws the README's picture and table.
bench: setup
	$(BIN)/python benchmarks/standard.py

# Engine against engine: installs the others (10 GB) below ~/.cache/tokenspeed/peers, takes hours, wants a quiet machine.
bench-peers: setup
	$(BIN)/python benchmarks/peers.py
	$(BIN)/tokenspeed bench peers --output build/bench-peers

# The gateway's plugin, which is part of the checkout: after an edit in csrc/gateway.
gateway-plugin: setup
	$(BIN)/python -m pip install --quiet ziglang==0.17.1 wasmtime==50.0.1
	$(BIN)/python csrc/gateway/build.py

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# On a GPU: builds with what is installed, tests and measures within nine minutes, and writes
# build/gpu-check.json. Without a GPU it says so and fails.
gpu-check:
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-check: PyTorch finds no GPU here")'
	started=$$(date +%s) && \
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps . && \
	$(PYTHON) -m benchmarks.gpu_check --started $$started
