# make demo: a real model, compressed, measured and drawn.    make test: the whole suite on a CPU.
# make docs: pages of the public functions, from their docstrings, in build/docs.
# make bench: what a training step costs, against LoRA on the dense model.    make gpu: tests and benchmarks on a GPU.
#
#   make demo MODEL=<hub name or directory> DATA=<file, directory or dataset name> ARGS="--minutes 30"
#   make test ARGS="-k sizing"

PYTHON ?= python3
VENV ?= .venv
# Before everything that depends on it, so that nothing else chooses a build of torch.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

# What the native extension is built from. Without a C++ compiler the package installs all the same.
NATIVE := setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/include/acip/*.h)
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
# Against the torch that is installed, not against one that pip would fetch for the build.
EDITABLE := $(INSTALL) --no-build-isolation --editable

.PHONY: demo test lint docs bench gpu gpu-cuda clean

demo: $(VENV)/with-demo
	$(BIN)/acip demo --output runs/demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(VENV)/with-test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: $(VENV)/with-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/with-docs
	$(BIN)/pdoc --output-directory build/docs --docformat google acip_kernels \
		acip_kernels.generation acip_kernels.plan acip_kernels.evaluate acip_kernels.data acip_kernels.report

bench: $(VENV)/with-test
	$(BIN)/python -m bench.training_step $(ARGS)

# Tests of the kernels, one shape of each under the memory checker where there is one, what they cost, a whole model, and
# the rest of the suite, in this order; what fails does not keep the rest from running. The CUDA C++ kernels too where
# there is nvcc. GPU_MINUTES: after so many the kernels' benchmark begins no further case.
NVCC := $(shell command -v nvcc)
SANITIZER := $(shell command -v compute-sanitizer)
GPU_MINUTES ?= 4
KERNEL_TESTS := tests/test_fused_linear_triton.py tests/test_masked_svd_triton.py tests/test_quantized_linear.py tests/test_tune.py \
  tests/test_triton_dropout.py tests/test_elementwise_triton.py tests/test_captured.py
gpu: $(VENV)/with-test $(if $(NVCC),$(VENV)/with-cuda)
	status=0; \
	$(BIN)/python -m pytest --numprocesses auto $(KERNEL_TESTS) tests/test_fused_linear_cuda.py || status=1; \
	$(if $(SANITIZER),compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest $(KERNEL_TESTS) \
	  -k "siblings_of_mixed or adapters_output or many_tokens_need_no or rows_of_a_longer" || status=1;,echo "no compute-sanitizer here";) \
	$(if $(NVCC),$(MAKE) gpu-cuda || status=1;) \
	$(BIN)/python -m bench.kernels_gpu --minutes $(GPU_MINUTES) || status=1; \
	$(BIN)/python -m bench.generate --device cuda || status=1; \
	$(BIN)/python -m pytest --numprocesses auto || status=1; \
	$(BIN)/python -m bench.training_step --device cuda --dtype bfloat16 --layer-tokens 4096 $(ARGS) || status=1; \
	exit $$status

# The CUDA C++ kernels' cases as a program for this GPU, the same that run on a CPU under the shim; a few of them under the
# checkers (of up to 128 mbarriers a block, more than they find by themselves); and what the kernels cost. No torch in it.
gpu-cuda: build/cuda-cases $(VENV)/with-test
	build/cuda-cases
	$(if $(SANITIZER),for tool in memcheck racecheck synccheck; do \
	  $(SANITIZER) --tool $$tool --num-cuda-barriers 128 --error-exitcode 1 build/cuda-cases quick || exit 1; done)
	$(BIN)/python -m bench.cuda_profile

build/cuda-cases: csrc/testing/cuda_decode.cpp csrc/include/acip/cuda_decode.h $(wildcard csrc/cuda/*)
	mkdir -p build
	nvcc -std=c++17 -O3 -lineinfo -I csrc/include -arch=native csrc/cuda/decode.cu -x cu $< -o $@

$(VENV)/with-torch:
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed: make PYTHON=...' if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) "setuptools>=77" "ninja>=1.11" "pybind11>=2.13"
	touch $@

$(VENV)/with-demo: pyproject.toml $(NATIVE) $(VENV)/with-torch
	$(EDITABLE) ".[demo,data]"
	touch $@

$(VENV)/with-docs: pyproject.toml $(NATIVE) $(VENV)/with-torch
	$(EDITABLE) ".[docs]"
	touch $@

$(VENV)/with-test: pyproject.toml $(NATIVE) $(VENV)/with-torch
	$(EDITABLE) ".[test]"
	touch $@

$(VENV)/with-cuda: $(wildcard csrc/cuda/*) $(VENV)/with-test
	ACIP_CUDA=1 $(EDITABLE) ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
