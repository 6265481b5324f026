# make demo       set up, then JPEG files -> FFCV -> ResNet-50 with DeepSpeed -> error, log, checkpoint, curves
# make test       set up, lint, then the tests (9 to 21 minutes on 2 cores)
# make test-slow  the tests that take minutes each; make test-gpu those that need a GPU
# make lint       ruff and mypy, as set in pyproject.toml; make format lets ruff rewrite what it can
# make docs       the API reference in docs/api
# make setup      system packages and .venv only; with CUDA=12 torch's build for drivers before 580, and for V100
# make clean      remove what make demo made; make distclean also .venv

PYTHON ?= python3

.PHONY: setup demo lint format test test-slow test-gpu docs clean distclean

setup: .venv/.complete

# For another CUDA than .venv has, setup.sh makes it anew.
ifneq ($(filter-out $(shell cat .venv/.complete 2> /dev/null),$(CUDA)),)
.PHONY: .venv/.complete
endif

.venv/.complete: tools/setup.sh setup.cfg setup.py constraints.txt $(wildcard lbsgd/data/native/*.[ch])
	PYTHON=$(PYTHON) tools/setup.sh

demo: setup
	.venv/bin/python tools/demo.py

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# A test that takes five minutes has failed. One that no exception ends is cut off with its process.
HANGS = --timeout 300 --max-worker-restart 1 -o faulthandler_timeout=330 -o faulthandler_exit_on_timeout=true

# Three processes for two cores, because a test that waits leaves one idle. Files in the order of their names, because
# xdist's own order, by the number of tests, ends with the few that take longest.
WORKERS = -n 3 --dist loadfile --no-loadscope-reorder

test: lint
	tests/cluster/setup.sh
	tests/browser/setup.sh
	.venv/bin/python -m lbsgd check ds_configs
	.venv/bin/python -m pytest $(WORKERS) $(HANGS) -m "not slow and not gpu"

test-slow: setup
	.venv/bin/python -m pytest -m slow

test-gpu: setup
	LBSGD_TEST_ON_GPU=1 .venv/bin/python -m pytest -m gpu

docs: setup
	.venv/bin/python tools/reference.py

clean:
	rm -rf data/digits data/digits_ffcv runs/demo runs/demo_seed*

distclean: clean
	rm -rf .venv build *.egg-info
