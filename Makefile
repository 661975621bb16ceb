# make demo   install into .venv and run the main job: train, save, load, generate
# make test   install into .venv and run the tests
# make csrc-all  compile csrc/ for every architecture and look at the machine code; needs nvcc
# make gpu    on a machine with a GPU: self-tests, GPU tests and the bench, results in gpu-run/
# make sanitize  there: compute-sanitizer's memcheck and racecheck on small shapes of the Mamba-2 ops
# The first two work on a machine without a GPU and use one where there is one.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check -q
# The headers alone, for csrc/ on Blackwell: what the wheel depends on serves its Python code. Last
# where nothing is compiled while installing, as pip calls what is missing then an error.
CUTLASS := $(PIP) install -c constraints.txt --no-deps nvidia-cutlass
DATA ?=
ARGS ?=

.PHONY: demo test csrc-all gpu sanitize lint clean

demo: .venv/installed
	.venv/bin/nemokernels demo $(if $(DATA),--data $(DATA)) $(ARGS)

test: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal $(ARGS)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal tests/interpret

csrc-all: .venv/installed-test
	.venv/bin/nemokernels build --archs 90a 100a 120a
	.venv/bin/python -m pytest -q -m all_of_csrc

gpu: .venv/installed-test
	.ci/gpu gpu-run

# Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
sanitize: .venv/installed-test
	for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
	  --tool $$tool --error-exitcode 9 .venv/bin/python tests/sanitize.py $(ARGS) || exit 1; done

lint: .venv/installed-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build dist demo-run *.egg-info

# torch first, and on a machine without an NVIDIA driver its CPU build only: the default build pulls
# gigabytes of CUDA libraries. The configured index may offer that build; pytorch.org does.
.venv/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	if command -v nvidia-smi >/dev/null 2>&1; then $(PIP) install -c constraints.txt torch; \
	else v=$$(sed -n 's/^torch==//p' constraints.txt); \
	  $(PIP) install "torch==$$v+cpu" 2>/dev/null || \
	  $(PIP) install --index-url https://download.pytorch.org/whl/cpu "torch==$$v+cpu"; fi
	$(PIP) install -c constraints.txt "setuptools>=77" wheel
	if command -v nvidia-smi >/dev/null 2>&1; then $(CUTLASS); fi
	touch $@

.venv/installed: .venv/torch pyproject.toml setup.py
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[train]'
	touch $@

.venv/installed-test: .venv/torch pyproject.toml setup.py
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test]'
	$(CUTLASS)
	touch $@ .venv/installed
