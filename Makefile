# make demo | serve | test | check | bench
#
# Everything runs from this folder, and nothing is installed outside $(VENV). Choose another interpreter with
# `make test PYTHON=/path/to/python3.12`. pip's own settings apply, such as PIP_FIND_LINKS for a folder of wheels.

VENV ?= .venv
PYTHON ?= python3.13 python3.12 python3.11 python3 python
PYTEST_ARGS ?=

py := $(VENV)/bin/python
run_stamp := $(VENV)/.installed-run
dev_stamp := $(VENV)/.installed-dev
# An open range would fetch gigabytes of CUDA libraries even where a CPU wheel of this very version is at hand.
torch := $(shell grep '^torch==' constraints.txt)
needed_kb := 3000000

.PHONY: help demo serve test check bench venv
.DELETE_ON_ERROR:

help:
	@sed -n 1p Makefile

demo: $(run_stamp)
	@$(py) -m examples.demo.run_demo

serve: $(run_stamp)
	@$(py) -m jobs.serve

check: $(dev_stamp)
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(py) -m pyright --pythonpath $(py)
	$(VENV)/bin/lint-imports

# Small operations are quicker on one thread than on two that wait for each other: a process per core, each on one. What starts
# services and kills them comes after the rest, three files at a time, for it mostly waits. Exit code 5: nothing was selected.
test: check
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(py) -m pytest --numprocesses auto --dist worksteal \
		--ignore tests/worker --ignore tests/end_to_end --ignore tests/faults/test_history.py $(PYTEST_ARGS) || [ $$? -eq 5 ]
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(py) -m pytest --numprocesses 3 --dist loadfile \
		tests/worker tests/faults/test_history.py tests/end_to_end $(PYTEST_ARGS) || [ $$? -eq 5 ]

bench: $(run_stamp)
	@for file in bench/[a-z]*.py; do \
	    name=$$(basename $$file .py); echo "== bench.$$name"; $(py) -m bench.$$name || exit 1; \
	done

venv: $(py)

# The stamps make a second call instant; a changed list of requirements installs again.
$(run_stamp): requirements.txt constraints.txt client/pyproject.toml | $(py)
	@echo "installing $(torch) and requirements.txt into $(VENV)"
	@$(py) -m pip install --quiet --disable-pip-version-check $(torch) \
	    || { echo "pip could not install $(torch); see its message above. README.md says which builds there are." >&2; exit 1; }
	@$(py) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@$(py) -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt --editable ./client
	@touch $@

$(dev_stamp): $(run_stamp) requirements-dev.txt
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(py) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

# A candidate counts only if it runs: version managers leave commands behind that do nothing but complain.
$(py):
	@free_kb=$$(df -Pk . | awk 'NR == 2 {print $$4}'); \
	if [ "$$free_kb" -lt $(needed_kb) ]; then \
	    echo "$$((free_kb / 1000)) MB are free on this disk; $(VENV) needs $$(($(needed_kb) / 1000)) MB. Free some, or name another" \
	         "disk: make VENV=/other/disk/venv ..." >&2; exit 1; \
	fi; \
	seen=""; \
	for candidate in $(PYTHON); do \
	    version=$$($$candidate -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	    case $$version in \
	        3.11|3.12|3.13) ;; \
	        *) seen="$$seen; $$candidate is $$version"; continue ;; \
	    esac; \
	    if ! $$candidate -c 'import ensurepip, venv' 2>/dev/null; then \
	        seen="$$seen; $$candidate cannot make virtual environments: install python$$version-venv"; continue; \
	    fi; \
	    echo "making $(VENV) with $$candidate (Python $$version)"; \
	    $$candidate -m venv --clear $(VENV) && exit 0; \
	    echo "$$candidate -m venv $(VENV) failed; see above" >&2; exit 1; \
	done; \
	echo "slimtrim runs on Python 3.11, 3.12 and 3.13, and none of these does: $(PYTHON)$$seen." \
	     "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name one: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1
