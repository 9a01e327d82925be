# Everything a newcomer needs: `make demo` and `make test`. Both install on first use and start at once afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The CPU build of torch lives on an index of its own; it is used where there is no NVIDIA GPU and the index answers.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || $(PYTHON) bench/torch_index.py)
SOURCES := $(wildcard csrc/*/*) setup.py pyproject.toml constraints.txt

.PHONY: install install-bench demo test test-process test-gpu prove check format clean
install: $(STAMP)

$(STAMP): $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "make: cannot create a virtual environment: install the python3-venv package of your system." >&2; exit 1; }
	@echo "Installing hetis and what it needs into $(VENV), once: a few minutes, without a word while all is well."
	@$(BIN)/pip install --quiet --upgrade pip setuptools wheel ninja
	@$(BIN)/pip install --quiet -c constraints.txt $(TORCH_INDEX) torch numpy
	@HETIS_REQUIRE_EXTENSIONS=1 PYTHONWARNINGS=ignore \
		$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,dev]' || \
		{ echo "make: hetis is not installed; the reason is above (its C++ extensions need g++ and must build here)." >&2; exit 1; }
	@touch $(STAMP)

# What the extra `bench` of setup.py names, without building hetis again.
install-bench: install
	$(BIN)/pip install --quiet -c constraints.txt matplotlib scipy

# The dispatcher would leave a model as small as the demo's on the primary: here every device gets its share.
demo: install
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 3 -m hetis generate --plan 1+2 --dispatch even

# Most tests use one core: two files at a time.
test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Whole fleets of processes, one test at a time: each uses both cores.
test-process: install
	$(BIN)/python -m pytest -m process

test-gpu: install
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

# Everything that is stated as time or throughput, in turn with the checkout BEFORE if that is given.
prove: install-bench
	$(BIN)/python bench/prove.py $(if $(BEFORE),--before $(BEFORE))

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/packages $(BIN)/mypy -p hetis -p hetis_kernels
	$(BIN)/python bench/size.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build kernels/*.so kernels/*.missing hetis/dispatcher/*.so hetis/dispatcher/*.missing
