# make demo   set up .venv, build, register a built-in pair of scans, write pictures to demo/
# make test   set up .venv, build, run the tests
#
# TORCH=torch==2.11.0   the torch to install (default below); TORCH=system uses the torch of $(PYTHON) as it is
# PYTHON=python3.12     the Python the environment is made from;  VENV=.venv  where it is
# JOBS=2                processes that run the tests;  PYTEST=...  more options of pytest
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
DEFAULT_TORCH := torch==2.13.0
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo build test test-slow lint format docs clean gpu-bundle
demo: $(BIN)/.built
	$(BIN)/fastreg demo -o demo --force

build: $(BIN)/.built

test: $(BIN)/.built
	@echo "The tests: about 3 minutes on two free cores"
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST)

# What starts processes, waits, or trains.
test-slow: $(BIN)/.built
	$(BIN)/python -m pytest -n $(JOBS) -m slow $(PYTEST)

lint: $(BIN)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(BIN)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The site, in docs/_build/html; a warning fails it.
docs: $(BIN)/.built
	$(BIN)/python -c "import furo, myst_parser" 2>/dev/null || $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[docs]"
	$(BIN)/python -m sphinx --quiet -W --keep-going -j auto -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# The peers' wheels for a GPU machine without a network (Python $(GPU_PYTHON)), and scans from FASTREG_DATA: .ci/gpu build.
GPU_PYTHON ?= 3.12
PEERS := monai==1.6.1 voxelmorph==0.3.4 neurite==0.3.4 convexAdam==0.2.0 nibabel pystrum einops six ninja
gpu-bundle: $(BIN)/.torch
	rm -rf build/gpu-bundle && mkdir -p build/gpu-bundle/wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) -d build/gpu-bundle/wheels $(PEERS)
	# Its setup.py wants to know where CUDA is even to name itself, which a torch without CUDA denies; nothing is compiled here.
	mkdir build/gpu-bundle/site
	echo "import torch.utils.cpp_extension as e; e.CUDA_HOME = e.CUDA_HOME or '/usr/local/cuda'" > build/gpu-bundle/site/sitecustomize.py
	PYTHONPATH=$(CURDIR)/build/gpu-bundle/site $(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary=:all: -d build/gpu-bundle/wheels fused_lncc==0.1.0
	rm -r build/gpu-bundle/site
	test -z "$(FASTREG_DATA)" || cp "$(FASTREG_DATA)"/*.npz build/gpu-bundle/
	test $$(du -sm build/gpu-bundle | cut -f1) -lt 50
	du -sh build/gpu-bundle

# A torch that is already in the environment stays unless TORCH names another.
$(BIN)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel numpy
	$(if $(filter system,$(TORCH)),,$(if $(TORCH),$(BIN)/python -m pip install "$(TORCH)",$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(DEFAULT_TORCH)"))
	@$(BIN)/python -c "import torch; print('torch', torch.__version__)"
	@touch $@

$(BIN)/.built: $(BIN)/.torch $(SOURCES)
	@# pip says nothing of the objects as they are compiled: it finds them current.
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[all]"
	@touch $@

clean:
	rm -rf build dist demo docs/_build *.egg-info fastreg/_C*.so $(BIN)/.built
