# Each goal makes .venv on first use and needs nothing else than Python >= 3.11, a C++17 compiler and a package index.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard csrc/* kernels/gpu/*.cu kernels/gpu/*.cuh) setup.py pyproject.toml

.PHONY: demo test check bench bench-compare clean
.DELETE_ON_ERROR:

.venv/.packages: pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

# The demo needs no CUDA kernels, which take minutes to compile where nvcc is found; what is compiled is kept for the rest.
.venv/.built-cpu: export IGPO_BUILD = cpu
.venv/.built .venv/.built-cpu: .venv/.packages $(NATIVE)
	$(BIN)/python -m pip install -v --no-build-isolation --no-deps -e . >.venv/build.log 2>&1 || { cat .venv/build.log; exit 1; }
	@grep -h "igpo: building" .venv/build.log
	touch $@

demo: $(if $(wildcard .venv/.built),.venv/.built,.venv/.built-cpu)
	$(BIN)/igpo demo --out demo-out

check: .venv/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell igpo kernels csrc tests benchmarks docs README.md CHANGELOG.md
	$(BIN)/basedpyright --level error

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

bench: .venv/.built
	$(BIN)/python benchmarks/run.py

bench-compare: .venv/.built
	$(BIN)/python benchmarks/compare.py

clean:
	rm -rf .venv build *.egg-info igpo/_C*.so
