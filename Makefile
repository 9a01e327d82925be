# Everything a newcomer needs: `make demo` and `make test`. Both install on first use and start at once afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The CPU build of torch lives on an index of its own; it is used where there is no NVIDIA GPU and the index answers.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || $(PYTHON) bench/torch_index.py)
SOURCES := $(wildcard csrc/*/*) setup.py constraints.txt

.PHONY: install demo test test-all test-gpu check format clean
install: $(STAMP)

$(STAMP): $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "make: cannot create a virtual environment: install the python3-venv package of your system." >&2; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH_INDEX) torch numpy
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,dev]'
	@touch $(STAMP)

# The dispatcher would leave a model as small as the demo's on the primary: here every device gets its share.
demo: install
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 3 -m hetis generate --plan 1+2 --dispatch even

# Most tests use one core: two files at a time.
TEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: install
	$(TEST)

test-all: install
	$(TEST) -m 'not gpu'

test-gpu: install
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/typed && ln -sfn ../../kernels build/typed/hetis_kernels # kernels/ under its import name
	MYPYPATH=build/typed $(BIN)/mypy -p hetis -p hetis_kernels

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info kernels/*.so hetis/dispatcher/*.so
