# make demo       set up, then JPEG files -> FFCV -> ResNet-50 with DeepSpeed -> error, log, checkpoint, curves
# make test       set up, then the tests (at most 20 minutes on 2 cores)
# make test-slow  the long ones; make test-gpu those that need a GPU
# make docs       the API reference in docs/api
# make setup      system packages and .venv only
# make clean      removes what make demo made; make distclean also .venv

PYTHON ?= python3

.PHONY: setup demo test test-slow test-gpu docs clean distclean

setup: .venv/.complete

.venv/.complete: tools/setup.sh setup.cfg setup.py constraints.txt $(wildcard lbsgd/data/native/*.[ch])
	PYTHON=$(PYTHON) tools/setup.sh

demo: setup
	.venv/bin/python tools/demo.py

test: setup
	tests/cluster/setup.sh
	.venv/bin/python -m lbsgd check ds_configs
	.venv/bin/python -m pytest -m "not slow and not gpu"

test-slow: setup
	.venv/bin/python -m pytest -m slow

test-gpu: setup
	LBSGD_TEST_ON_GPU=1 .venv/bin/python -m pytest -m gpu

docs: setup
	.venv/bin/python tools/reference.py

clean:
	rm -rf data/digits data/digits_ffcv runs/digits*

distclean: clean
	rm -rf .venv build *.egg-info
