# make demo   set up .venv, build, register a built-in pair of scans, write pictures to demo/
# make test   set up .venv, build, run the tests
#
# TORCH=torch==2.11.0   the torch to install (default below); TORCH=system uses the torch of $(PYTHON) as it is
# PYTHON=python3.12     the Python the environment is made from;  VENV=.venv  where it is
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEFAULT_TORCH := torch==2.13.0
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test lint format clean
demo: $(BIN)/.built
	$(BIN)/fastreg demo -o demo --force

test: $(BIN)/.built
	$(BIN)/python -m pytest

lint: $(BIN)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(BIN)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# A torch that is already in the environment stays unless TORCH names another.
$(BIN)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja pybind11 numpy
	$(if $(filter system,$(TORCH)),,$(if $(TORCH),$(BIN)/python -m pip install "$(TORCH)",$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(DEFAULT_TORCH)"))
	@$(BIN)/python -c "import torch; print('torch', torch.__version__)"
	@touch $@

$(BIN)/.built: $(BIN)/.torch $(SOURCES)
	@echo "Building fastreg with the torch above: a few minutes on two cores"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[all]"
	@touch $@

clean:
	rm -rf build dist demo *.egg-info fastreg/_C*.so $(BIN)/.built
