# make report   set up, run reports/quick.toml where results are missing, write reports/build/quick/index.html
# make test     set up, lint, types, tests
# make readme   run reports/readme.toml anew, write results/reference/readme.csv and the README's table
# make seeds    60 seeds of each workload on one process, into results/seeds/runs.csv
# make gpu-check  measure on a machine with a GPU; installs nothing
PYTHON ?= python3
REPORT ?= quick
# CPU builds of torch, for a machine without an NVIDIA GPU; empty: pip's default index
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.benchsuite-installed

.PHONY: setup report test lint pytest processes others reference readme seeds gpu-check clean

setup: $(STAMP)

# pip compiles on one core, this on all (ranks write no byte code of their own; files for other Pythons fail).
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python .ci/setup_torch.py --index '$(TORCH_INDEX)'
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --no-build-isolation -e '.[dev,asv]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib/python3*/site-packages || true
	touch $@

report: $(STAMP)
	@status=0; $(BIN)/benchsuite run $(REPORT) || status=$$?; \
	test $$status = 0 || test $$status = 4 || exit $$status; \
	$(BIN)/benchsuite report $(REPORT) && exit $$status # 4: some runs failed, the page says which

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two halves at once: tests that launch processes mostly wait, the others keep two processes busy (most of them laws).
# Two files of process tests at once would miss their deadlines.
# Each half's output comes in one piece when it is done.
test: $(STAMP)
	$(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),-O) processes others

processes: $(STAMP)
	$(BIN)/python -m pytest -m procs $(PYTEST_ARGS) $(shell grep -l 'mark\.procs' tests/test_*.py)

others: lint
	$(BIN)/python -m pytest -m 'not procs' -n 2 --dist worksteal $(PYTEST_ARGS)

pytest: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The runs that CI compares against. Commit them with the change that moved the numbers, and say why. What `gpu-check`
# found stays, and so do the runs of the README's table.
reference: $(STAMP)
	mkdir -p results/reference
	find results/reference -mindepth 1 -maxdepth 1 ! -name gpu ! -name readme.csv -exec rm -rf {} +
	$(BIN)/benchsuite run reference --results results/reference
	rm -f results/reference/.frame-cache.json

# The table of the README: a row per run, and then all generated parts of the documentation.
readme: $(STAMP)
	rm -rf results/readme-runs
	$(BIN)/benchsuite run readme --results results/readme-runs
	$(BIN)/benchsuite export csv --results results/readme-runs --out results/reference/readme.csv
	$(BIN)/python docs/generate.py

# The reference of every workload: 60 seeds on one process, a row per run. A quarter of an hour on one idle core.
seeds: $(STAMP)
	$(BIN)/benchsuite run seeds --results results/seeds-runs
	mkdir -p results/seeds
	$(BIN)/benchsuite export csv --results results/seeds-runs --out results/seeds/runs.csv

# On a machine with a CUDA device, under the Python and torch (>= 2.8) that are there: installs nothing.
# GPU_CHECK_ARGS=--cpu-dry-run goes the same way on the CPU.
gpu-check:
	PYTHONPATH="$(CURDIR)" $(PYTHON) -P -m benchsuite.gpu_check --out $(or $(GPU_OUT),results/gpu) $(GPU_CHECK_ARGS)

clean:
	rm -rf build dist reports/build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
