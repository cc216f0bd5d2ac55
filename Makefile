# What can be done here: make help

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo demo-clean test test-browser test-systemd test-docker chaos bench lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo        see regd register a recording, with a stand-in for Alyx; keeps ./demo"
	@echo "make demo-clean  remove ./demo"
	@echo "make test        ruff, mypy, bandit and pytest"
	@echo "make test-browser"
	@echo "                 the status page in Chromium (apt install chromium chromium-driver); make test"
	@echo "                 does that, too, where these are; SHOTS=folder keeps pictures"
	@echo "make test-systemd"
	@echo "                 the service under a systemd that boots in a container (as root; apt install"
	@echo "                 debootstrap systemd-container); SUITE=trixie names another Debian"
	@echo "make chaos       the tests of crashes, faults and bad input at full length; N=1000 sets how"
	@echo "                 often each random part runs, SEED=1 what is random, PART=crashes which"
	@echo "make bench       how fast regd is, beside what else does the same: ONLY=matching,scan names"
	@echo "                 parts, QUICK=1 tries it with small sizes; bench/RESULTS.md keeps the table"
	@echo "make test-docker build the image without Docker, and run it; as root, with buildah, crun and"
	@echo "                 debootstrap"
	@echo "make lint        ruff, mypy and bandit alone"
	@echo "make clean       remove ./demo, the virtual environment and caches"
	@echo
	@echo "Each sets up what it needs in $(VENV). PYTHON=python3.12 names another Python (3.11 or newer)."

demo: $(READY)
	@$(BIN)/regd demo

demo-clean: $(READY)
	@$(BIN)/regd demo --clean

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r regd

test: lint
	$(BIN)/pytest

test-browser: $(READY)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  echo "make: there is no Chromium: on Debian, apt install chromium chromium-driver" >&2; exit 1; }
	$(if $(SHOTS),mkdir -p $(SHOTS) && REGD_TEST_SHOTS=$(SHOTS)) $(BIN)/pytest tests/test_page.py -v

SUITE ?= bookworm

test-systemd: $(READY)
	@PYTHONPATH=. $(BIN)/python -m tests.systemd.container
	SUITE=$(SUITE) $(BIN)/pytest -p no:cacheprovider -v --durations=5 tests/systemd/boot.py tests/systemd/install.py

test-docker: $(READY)
	$(BIN)/python -m tests.container

N    ?= 1000
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
PART ?= *

chaos: $(READY)
	$(BIN)/pytest tests/chaos/test_$(PART).py --times=$(N) --hypothesis-seed=$(SEED) -v

bench: $(READY)
	$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)

clean:
	@if [ -d demo ] && [ -x $(BIN)/regd ]; then $(BIN)/regd demo --clean; fi
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find regd tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an installation that was interrupted is done again. -qq leaves
# pip its errors alone.
$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no $(PYTHON): install Python 3.11 or newer, or name it: make PYTHON=..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $$($(PYTHON) --version) is too old: regd needs 3.11 or newer; name one: make PYTHON=..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments: on Debian, apt install python3-venv" >&2; \
	  exit 1; }
	@echo "setting up $(VENV) (a minute or two, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@
