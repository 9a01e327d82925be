# Entry points: `make demo` to try it, `make test` and `make check` to change it. Each installs on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
# The CPU build of torch lives on an index of its own; it is used where there is no NVIDIA GPU and the index answers.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || $(PYTHON) bench/torch_index.py)
SOURCES := $(wildcard csrc/*/*) setup.py pyproject.toml constraints.txt

.PHONY: install install-bench install-clients demo serve test test-process test-clients test-gpu prove check format
.PHONY: clean soak
install: $(STAMP)

$(STAMP): $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "make: cannot create a virtual environment: install the python3-venv package of your system." >&2; exit 1; }
	@echo "Installing hetis and its dependencies into $(VENV): once, for a few minutes, silent unless it fails."
	@$(BIN)/pip install --quiet --upgrade pip setuptools wheel ninja
	@$(BIN)/pip install --quiet -c constraints.txt $(TORCH_INDEX) torch numpy
	@HETIS_REQUIRE_EXTENSIONS=1 PYTHONWARNINGS=ignore \
		$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,dev]' || \
		{ echo "make: hetis is not installed; the reason is above (its C++ extensions need g++ and must build here)." >&2; exit 1; }
	@touch $(STAMP)

# The packages of the extra `bench` in setup.py; hetis itself is not built again.
install-bench: install
	$(BIN)/pip install --quiet -c constraints.txt matplotlib scipy

# Outside clients, each in an environment of its own: their requirements exclude each other.
install-clients: $(patsubst bench/clients/%.txt,$(CLIENTS)/%/.installed,$(wildcard bench/clients/*.txt))

$(CLIENTS)/%/.installed: bench/clients/%.txt constraints.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt $(TORCH_INDEX) -r $<
	@touch $@

# `--dispatch even`, because the default policy leaves a model this small on the primary.
demo: install
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 3 -m hetis generate --plan 1+2 --dispatch even

# The small model over HTTP, until Ctrl-C; another terminal asks it with the command that the log shows.
serve: install
	$(BIN)/hetis serve

# Two test files at a time: most tests use one core.
test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Fleets of processes, one test at a time: each test uses both cores.
test-process: install
	$(BIN)/python -m pytest -m process

# Outside clients against a server with the small model; the results are kept in bench/results/clients.jsonl.
test-clients: install install-clients
	$(BIN)/python bench/outside_clients.py

# Twenty minutes of mixed requests after as many of warm-up: memory, descriptors and pages must stay flat.
soak: install-bench
	$(BIN)/python bench/soak_server.py

test-gpu: install
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

# All claims about time and throughput; with BEFORE=DIR in alternation with that checkout.
prove: install-bench
	$(BIN)/python bench/prove.py $(if $(BEFORE),--before $(BEFORE))

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/packages $(BIN)/mypy -p hetis -p hetis_kernels
	MYPYPATH=build/packages:bench $(BIN)/mypy --explicit-package-bases bench
	$(BIN)/python bench/size.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(CLIENTS) build kernels/*.so kernels/*.missing hetis/dispatcher/*.so hetis/dispatcher/*.missing
