# demo and test are the two commands of a fresh machine: each makes .venv from pinned versions and runs.
#
# The constraints name torch without a build. Where the default index serves a CUDA build and none is wanted, name an
# index of CPU builds in PIP_EXTRA_INDEX_URL: its `+cpu` version satisfies the pin and is preferred.

VENV := .venv
ORT_WEB := onnxruntime-web-1.30.0
ARGS ?=
PYTHONS := $(PYTHON) python3.12 python3.11 python3.13 python3

.PHONY: demo test lint docs site gpu clean browser
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(VENV)/bin/refine-control demo $(ARGS)

test: $(VENV)/.installed-dev browser
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# The drawings, and tables between `<!-- table: NAME -->` and `<!-- end -->`, computed from results/ without training.
docs: $(VENV)/.installed
	$(VENV)/bin/python docs/drawings.py
	$(VENV)/bin/python -m refine_control.study.docs_tables README.md docs/*.md

# What needs a GPU, with random weights, in 10 minutes: a table, and runs/bench_gpu/bench_gpu.json.
gpu: $(VENV)/.installed
	$(VENV)/bin/refine-control bench gpu $(ARGS)

# The site of README and docs/, as files in build/site that load nothing from elsewhere.
site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# Pages are tested in a real browser, and the exported one with onnxruntime-web; neither is a Python package.
browser: | $(VENV)/bin/pip
	@command -v chromium >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing chromium"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else echo "chromium is missing: the tests in a browser will fail; install it (Debian: apt-get install chromium)" >&2; fi
	@[ -e $(VENV)/$(ORT_WEB).tgz ] || npm pack --silent --pack-destination $(VENV) $(subst web-,web@,$(ORT_WEB)) >/dev/null \
	|| echo "npm cannot fetch onnxruntime-web: the test of the exported page in a browser will be skipped" >&2

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A name on PATH may be a shim without its Python, or a Python without ensurepip: each is tried, not only found.
$(VENV)/bin/pip:
	@for python in $(PYTHONS); do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	echo "No Python 3.11 or newer with the venv module was found on PATH; install one (Debian: python3-venv)," \
	     "or name it: make PYTHON=/path/to/python3.12" >&2; exit 1

# torch comes first and by the pin: left to a dependency's resolution it may come as another version or build.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed
