# Every target sets .venv up by itself. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
PY := .venv/bin/python
export HF_HUB_OFFLINE = 1
# Minutes of nvcc are spent where its kernels can run, or where they are asked for (spills).
export NVCC ?= $(if $(wildcard /dev/nvidia0),,absent)
export TOKENIZERS_PARALLELISM = false

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

.NOTPARALLEL:
.PHONY: help demo bench bench-smoke test test-cpu test-interpret test-gpu native ext check format aot spills sanitize \
  wheel test-wheel compare suite-dry clean
help:
	@sed -n 's/^## //p' Makefile

# An interrupted installation leaves no `complete`, and the next one starts from an empty .venv.
# Without isolation seqeval needs setuptools-scm, or is built as version 0.0.0 and passed over.
.venv/ready-%: pyproject.toml constraints.txt setup.py
	@test -e .venv/complete || $(PYTHON) -m venv --clear .venv
	@rm -f .venv/complete
	$(PY) -m pip install -q -c constraints.txt torch setuptools setuptools-scm
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[$*]'
	@touch .venv/complete $@

## demo      fine-tune MiniLM at a third of the FLOPs beside the dense model, into runs/demo
demo: .venv/ready-demo
	rm -rf runs/demo
	.venv/bin/sensikernels finetune --task demo --model minilm --method sensi-bert \
	  --flops 0.35 --compare-dense --output runs/demo --epochs 2 --max-train-samples 1536 \
	  --batch-size 16 --lr 1e-4 --method-option warmup=0.3

## test      the suite, then Triton's kernels in its interpreter
test: test-cpu test-interpret

# A worker a core, each with one thread.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PARALLEL = env OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

test-cpu: native
	$(PARALLEL)

# The interpreter is chosen when triton is imported, so it needs a process of its own.
test-interpret: .venv/ready-test
	TRITON_INTERPRET=1 $(PARALLEL) -m interpret

## test-gpu  what needs a CUDA device
test-gpu: native
	$(PY) -m pytest -m gpu

## ext       compile what changed in csrc; a failure is an error
ext:
	@test -e $(PY) || $(MAKE) .venv/ready-test
	$(PY) setup.py -q build_ext --inplace

# The tests run without a compiler too: then what is native is skipped, with the reason.
native: .venv/ready-test
	@if command -v $${CXX:-c++} >/dev/null; then $(PY) setup.py -q build_ext --inplace; \
	else echo 'no C++ compiler: testing without native kernels'; fi

## check     ruff and its format, mypy, clang-format
check: .venv/ready-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check -q .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)

## format    let the formatters have their way
format: .venv/ready-lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	.venv/bin/clang-format -i $(CXX_FILES)

## aot       compile every Triton kernel for the GPUs we name; no GPU needed
aot: .venv/ready-test
	$(PY) -m bench.aot

## spills    compile the CUDA kernels; a register spill is an error
spills: .venv/ready-test
	NVCC=$(filter-out absent,$(NVCC)) SENSIKERNELS_BUILD=cuda $(PY) setup.py -q build_ext --inplace
	@grep -c 'Compiling entry function' build/ptxas.log || { echo 'no CUDA kernel was compiled'; exit 1; }
	@! grep -B2 -E '(^|[^0-9])[1-9][0-9]* bytes spill' build/ptxas.log
	@echo 'no register spills'

## sanitize  the C++ kernels under ASan and UBSan (the CUDA kernels' CPU build always is: make test)
SANITIZE := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1
sanitize: .venv/ready-test
	rm -rf build/sanitize
	SENSIKERNELS_BUILD=cpu CXXFLAGS='$(SANITIZE)' $(PY) setup.py -q build --build-lib build/sanitize
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 SENSIKERNELS_BACKEND=native \
	  $(PARALLEL) -q -o 'pythonpath=build/sanitize .' -k 'native or malformed' tests/test_native.py \
	  tests/ops

## wheel     the release files in dist/, checked: a manylinux wheel (CUDA kernels where nvcc is), an sdist
NVCC_HERE = $(shell command -v nvcc || command -v $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc)
wheel: .venv/ready-release
	rm -rf dist build/release build/lib build/lib.* build/bdist.*
	NVCC=$(filter-out absent,$(NVCC)) SENSIKERNELS_BUILD=$(or $(SENSIKERNELS_BUILD),$(if $(NVCC_HERE),cuda,cpu)) \
	  $(PY) -m build -q --no-isolation --wheel --outdir build/release .
	$(PY) -m build -q --no-isolation --sdist --outdir dist .
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m auditwheel repair --only-plat --exclude 'libtorch*.so' \
	  --exclude 'libc10*.so' --wheel-dir dist build/release/*.whl
	$(PY) -m twine check --strict dist/*
	$(PY) .ci/wheel.py dist

## test-wheel install dist/'s wheel, then its sdist, into a fresh environment and run every op there
test-wheel:
	@test -e dist/*.whl || $(MAKE) wheel
	PYTHON=$(PYTHON) bash .ci/test_wheel dist

## bench     every operator against its baselines, under pytest-benchmark (BENCH='-k dropout --compiled')
bench: native .venv/ready-bench
	$(PY) -m pytest bench --benchmark-sort=name --benchmark-group-by=group $(BENCH)

## bench-smoke each benchmark once, checked against its baseline and not timed
bench-smoke: native .venv/ready-bench
	OMP_NUM_THREADS=1 $(PY) -m pytest bench -q -n $(WORKERS) --benchmark-disable

## compare   the newest benchmark results against the committed ones
compare: .venv/ready-test
	$(PY) -m bench.compare

## suite-dry the GPU suite on this CPU, end to end, in under three minutes
suite-dry: native
	PYTHON=$(PY) bash bench/gpu_suite.sh --device cpu --quick --output runs/suite-dry

## clean     remove what was built; .venv stays
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f sensikernels/libsensikernels.so sensikernels/_native_missing.txt
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
