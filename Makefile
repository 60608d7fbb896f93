# Two commands for a fresh machine with Python 3.11 or later: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
JOBS ?= 2
# One thread per test process: the tests' matrices are tiny, and thread pools only get in each other's way.
THREADS = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: demo demo-quick test coverage lint docs tutorials wheel clean

$(VENV)/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev: $(VENV)/run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[io,tracks,motifs,dask,tensorboard,dev,docs]"
	touch $@

demo: $(VENV)/run ## everything on simulated cells, under cisformer_demo/
	$(BIN)/cisformer demo --force

demo-quick: $(VENV)/run
	$(BIN)/cisformer demo --quick --force

test: $(VENV)/dev ## all tests
	$(THREADS) $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

coverage: $(VENV)/dev ## all tests, and which lines they leave out
	$(THREADS) $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --cov --cov-report=term

lint: $(VENV)/dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/dev ## HTML pages in docs/_build
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

tutorials: $(VENV)/dev ## run the tutorials and write their outputs and figures anew
	$(THREADS) $(BIN)/python docs/run_tutorials.py --refresh docs/tutorials/*.md
	$(BIN)/python docs/draw_model.py

wheel: $(VENV)/dev ## the package, in dist
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) dist docs/_build cisformer_demo
