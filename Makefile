# Two commands: `make demo` and `make test`. Both set everything up in .venv first; a second run only redoes what changed.
# PYTHON picks the interpreter, CMAKE_ARGS reaches the build (CMAKE_ARGS="-DGGML_CUDA=on" make demo), ARGS kvarn demo or pytest
# (make test ARGS="-m 'not slow'").
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS   ?=
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := CMakeLists.txt pyproject.toml $(shell find ggml-kvarn python/kvarn -type f -not -path '*/__pycache__/*') \
           $(shell sed -n 's/^\([a-z].*[^ ]\) *->.*/\1/p' ggml-kvarn/overlay.txt)

.PHONY: demo test soak setup sdist check-tools clean

demo: .venv/installed
	@$(BIN)/kvarn demo $(ARGS)

test: .venv/tests-installed
	@$(BIN)/python -m pytest $(ARGS)

# half an hour of llama-server under a mixed load (tests/soak.py says what)
soak: .venv/tests-installed
	@$(BIN)/python tests/soak.py --minutes 30 --csv build/soak.csv $(ARGS)

setup: .venv/installed

# one line per missing tool, before anything is downloaded
check-tools:
	@missing=
	lack() { echo "missing: $$1; on Debian or Ubuntu: apt-get install $$2"; missing=1; }
	command -v g++ > /dev/null || lack g++ g++
	command -v cmake > /dev/null || lack cmake cmake
	if ! command -v "$(PYTHON)" > /dev/null; then lack "$(PYTHON)" python3-venv
	elif ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 9))'; then echo "too old: $(PYTHON); Python 3.9 is needed"; missing=1
	elif ! "$(PYTHON)" -c 'import venv, ensurepip' 2> /dev/null; then lack "the venv module of $(PYTHON)" python3-venv
	fi
	[ -z "$$missing" ]

# llama-cpp-python comes from the same archive as llama.cpp, without its own copy of the libraries. --no-cache-dir: pip must not
# keep that wheel, a later plain install of llama-cpp-python would pick it up and find no library.
.venv/tools: Makefile ggml-kvarn/upstream.txt | check-tools
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv
	echo "== python packages"
	$(PIP) install -q -U pip
	$(PIP) install -q "scikit-build-core>=0.10" ninja "cffi>=1.16" numpy "pytest>=8" gguf rich matplotlib pyyaml ruff mypy
	archive="$$($(BIN)/python python/kvarn/upstream.py --sdist)"
	echo "== llama-cpp-python, without libraries"
	CMAKE_ARGS="-DLLAMA_BUILD=OFF" $(PIP) install -q --no-cache-dir --no-build-isolation "$$archive"
	touch $@

define build
@echo "== llama.cpp with KVarN: the first build takes about ten minutes on two cores; everything it says goes to build/setup.log"
mkdir -p build
$(PIP) install -v --no-build-isolation --no-deps --force-reinstall $(1) . 2>&1 | $(BIN)/python -u python/kvarn/progress.py build/setup.log
touch $@
endef

.venv/installed: .venv/tools $(SOURCES)
	$(call build)

# llama-server's own page, built, to test it with our caches (tests/web_pages.py); a platform without this wheel skips that test
.venv/tests-installed: .venv/tools $(SOURCES)
	@$(PIP) install -q --no-deps --only-binary :all: xllamacpp==2026.10.11549 || echo "no xllamacpp: llama-server's own page is not tested"
	$(call build,--config-settings=cmake.define.KVARN_BUILD_TESTS=ON)
	touch .venv/installed

# our source archive, with the pinned llama.cpp inside: what it builds needs nothing from anywhere
sdist: .venv/tools
	@$(BIN)/python python/kvarn/upstream.py --pack vendor/llama.cpp.tar.gz
	$(BIN)/python -c 'import scikit_build_core.build as b; print("dist/" + b.build_sdist("dist"))'

clean:
	rm -rf .venv build vendor dist
