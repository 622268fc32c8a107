# make reproduce                 every table and figure, on the embedded stand-ins
# make reproduce PROFILE=paper   the same on the four real checkpoints
# make test | test-slow | lint | clean

PROFILE ?= standin
CORES ?= 8
PYTHON ?= python3

# No more jobs side by side than fit nine tenths of the memory, by what their rules say that they need.
MEMORY := $(shell awk '/MemTotal/ {print int($$2 * 0.9 / 1000)}' /proc/meminfo 2>/dev/null)
# Rules and tests call `romer`, `snakemake` and friends by name. One BLAS thread a process: Snakemake runs CORES of them.
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1
INSTALLED := .venv/.installed

.PHONY: reproduce test test-slow lint clean

reproduce: $(INSTALLED)
	$(RUN) .venv/bin/snakemake --cores $(CORES) $(if $(MEMORY),--resources mem_mb=$(MEMORY)) --config profile=$(PROFILE) -- all

test: $(INSTALLED)
	$(RUN) .venv/bin/pytest -n 2 --no-loadscope-reorder -m "not slow" -q --durations=15

# pytest exits 5 when it selects no test, which is no failure here.
test-slow: $(INSTALLED)
	$(RUN) .venv/bin/pytest -m slow -q --durations=15 || [ $$? -eq 5 ]

# Formatting and linting are tests like any other.
lint: $(INSTALLED)
	$(RUN) .venv/bin/pytest -q tests/test_ground.py

clean:
	@case "$(PROFILE)" in \
	""|reference|.*|*/*|*[[:space:]]*) echo "make clean: PROFILE='$(PROFILE)' is not the name of a profile" >&2; exit 2;; esac
	rm -rf "results/$(PROFILE)"

# torch goes first and alone: it is by far the largest download, and no other requirement may choose its version.
$(INSTALLED): requirements.txt requirements-dev.txt pyproject.toml
	@test -x .venv/bin/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "romer needs Python 3.11 or newer; found '$(PYTHON)': $$($(PYTHON) --version 2>&1)." \
	"Name another one: make PYTHON=python3.11" >&2; exit 2; }
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install "$$(grep '^torch==' requirements.txt)"
	.venv/bin/pip install -r requirements-dev.txt
	.venv/bin/pip install --no-deps -e .
	touch $@
