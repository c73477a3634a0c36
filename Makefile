# make demo: the whole pipeline on synthetic images.  make test: what CI runs.  make test-all: all matrices too.  make install: only the environment.
# make bench: all benchmarks, into docs/performance.md; half an hour.
# make twin: a cluster of several nodes on this machine, one of which is lost while it trains.
PYTHON ?= python3
BIN := .venv/bin
export RAY_AUTH_MODE ?= disabled

.PHONY: install demo test test-all bench twin lint

install: .venv/.installed

# The lock pins what was tried together; clinkd itself follows without asking for anything more.
.venv/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: install
	$(BIN)/clinkd run configs/tiny.yaml

test: KEEP := and not full
test-all: export CLINKD_FAULTS ?= 6
test-all: export CLINKD_CLONES ?= 1
test test-all: install .venv/.open-clip
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations=15 -m "not slow" -n 2 --dist worksteal
	$(BIN)/pytest --durations=40 -m "slow $(KEEP)" -n 2 --dist loadfile
	PYTHONPATH=.venv/open-clip $(BIN)/pytest tests/model/test_open_clip_guide.py tests/model/test_pil_pixels.py

# In a folder of its own, which only its tests see; the lock file says why.
.venv/.open-clip: requirements-open-clip.lock .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/open-clip -r $<
	touch $@

bench: install
	$(BIN)/python benchmarks/all.py --keep

twin: install
	$(BIN)/python cluster/twin.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
