# Every target sets up what it needs: .venv with the versions of constraints.txt, once.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help demo mini smollm2-gates smollm2-gates-longer bench-mini bench-run bench-memory test test-fast lint format pictures bench-stream bench-speed bench-llama bench-kvpress bench-gpu rehearse-gpu clean

help:
	@echo "make demo          fetch SmolLM2 (94 MiB) and run a batch, a question and a summary with it; without it mini"
	@echo "make mini          train the built-in model and its gates from nothing into build/mini (about an hour on two cores)"
	@echo "make smollm2-gates train the gates of SmolLM2 from nothing into build/gates/smollm2 (an hour and a quarter on two cores)"
	@echo "make bench-mini    record what MODEL=mini (or a folder) remembers, and write it into the README"
	@echo "make bench-run     record what batches cost and survive, and write it into the README (about 15 minutes)"
	@echo "make test          run the tests"
	@echo "make test-fast     run the tests that start no processes and are not slow (under a minute on two cores)"
	@echo "make lint          ruff, mypy --strict, import directions"
	@echo "make format        let ruff rewrite the code"
	@echo "make pictures      draw the README's pictures anew with the built-in model"
	@echo "make bench-speed   record decode speed beside transformers, and write it into the README (quiet machine, 15 minutes)"
	@echo "make bench-llama   record speed beside llama.cpp: GGUF=FILE.gguf NAME=smollm2 (quiet machine, an hour)"
	@echo "make bench-kvpress record answers beside kvpress's presses: GGUF=FILE.gguf GATES=FOLDER NAME=smollm2 (an hour)"
	@echo "make bench-memory  record what is allocated, and what the process takes, against the plan"
	@echo "make bench-stream  a long stream through a small cache: bytes, RSS and time per token stay flat"
	@echo "make bench-gpu     what a GPU is to show, in ten minutes: kernels/bench/gpu_run.py"
	@echo "make rehearse-gpu  its stages on a CPU, small (about a minute on two cores)"
	@echo "make clean         remove .venv and everything that was built"

$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv, once; this downloads torch" >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' >&2
	@touch $(READY)

demo: $(READY)
	@model=smollm2-135m-instruct; \
	$(BIN)/trimkv models pull $$model >/dev/null || { model=mini; echo "without it the built-in mini runs" >&2; }; \
	$(BIN)/trimkv run examples/demo.jsonl -m $$model && \
	$(BIN)/trimkv ask -m $$model "What is the capital of France?" && \
	$(BIN)/trimkv summarize -m $$model -n 120 --kv-budget 512 LICENSE

# Some steps ask for lists that no slots can hold, and have a hundred times the gradient: clipped, most steps count alike.
mini: $(READY)
	$(BIN)/python -m examples.mini.recipe build/mini
	$(BIN)/python -m examples.mini.conversations build/mini/conversations.jsonl
	$(BIN)/trimkv gates train build/mini/model --data build/mini/conversations.jsonl -o build/mini/model/gates \
		--student evicting --memory-size 64 --context 2048 --position-gap 60000 --steps 1800 --batch 1 --accumulate 1 \
		--hidden 64 --lr 6e-3 --warmup 50 --schedule cosine --clip 0.05

# First attention alone, then distillation; then again from there, with longer texts and the model's own answers among them.
LEARN := --student evicting --memory-size 128 --attention-weight 0.3 --batch 1 --accumulate 1 --hidden 128 --schedule cosine --clip 0.1
smollm2-gates: $(READY)
	$(BIN)/trimkv models pull smollm2-135m-instruct
	mkdir -p build/gates
	$(BIN)/python -m examples.gates.smollm2.conversations build/gates/packages build/gates/first.jsonl
	$(BIN)/trimkv gates train smollm2-135m-instruct --data build/gates/first.jsonl -o build/gates/smollm2 $(LEARN) \
		--context 2048 --steps 600 --attention-steps 180 --lr 3e-3 --warmup 25 --export bf16

# Longer texts, and answers of the model's own: at 256 slots as good as the first part alone, at 128 worse.
smollm2-gates-longer: smollm2-gates
	$(BIN)/python -m examples.gates.smollm2.own_answers requests build/gates/packages build/gates/requests.jsonl
	$(BIN)/trimkv run build/gates/requests.jsonl -o build/gates/answers.jsonl -m smollm2-135m-instruct --gates none \
		--kv-budget 2048 --greedy -n 120
	$(BIN)/python -m examples.gates.smollm2.conversations build/gates/packages build/gates/second.jsonl --count 3000 --seed 1 --long
	$(BIN)/python -m examples.gates.smollm2.own_answers join build/gates/requests.jsonl build/gates/answers.jsonl build/gates/second.jsonl
	$(BIN)/trimkv gates train smollm2-135m-instruct --data build/gates/second.jsonl -o build/gates/longer $(LEARN) \
		--begin-with build/gates/smollm2 --context 3072 --steps 320 --lr 2e-3 --warmup 20 --export bf16

MODEL ?= mini
RESULTS := kernels/bench/results

bench-mini: $(READY)
	$(BIN)/python -m bench.recall --model $(MODEL) --out $(RESULTS)/recall-mini.json
	$(BIN)/python -m bench.stories --model $(MODEL) --out $(RESULTS)/stories-mini.json
	$(BIN)/python -m bench.points --model $(MODEL) --out $(RESULTS)/points-mini.json
	$(BIN)/python -m bench.long_chat --model $(MODEL) --out $(RESULTS)/long-chat-mini.json
	$(BIN)/python -m bench.readme

bench-run: $(READY)
	$(BIN)/python -m bench.batching --out $(RESULTS)/batching-mini.json
	$(BIN)/python -m bench.shared_prefix --out $(RESULTS)/shared-prefix-mini.json
	$(BIN)/python -m bench.kills --out $(RESULTS)/kills-mini.json
	$(BIN)/python -m bench.scan --out $(RESULTS)/scan.json
	$(BIN)/python -m bench.ray_flips --out $(RESULTS)/flips-ray.json
	$(BIN)/python -m bench.readme

test: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist worksteal --durations=20

FAST = $(addprefix tests/,chat eval kernel train ui unit)

test-fast: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m 'not slow' $(FAST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pictures: $(READY)
	$(BIN)/trimkv inspect -f examples/story.txt "What is my dog called?" --kv-budget 64 --greedy \
		--svg examples/inspect.svg --png examples/retention.png

bench-memory: $(READY)
	$(BIN)/python -m bench.memory --out kernels/bench/results/memory-cpu.json
	$(BIN)/python -m bench.held --out kernels/bench/results/held-cpu.json

bench-stream: $(READY)
	$(BIN)/python -m bench.stream

# Beside llama.cpp, on a quiet machine: GGUF=FILE.gguf NAME=smollm2, about an hour.
bench-llama: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt '.[compare,plot]'
	$(BIN)/python -m bench.against_llama $(GGUF) --threads 1 --out $(RESULTS)/against-llama-$(NAME)-1-thread.json
	$(BIN)/python -m bench.against_llama $(GGUF) --threads 2 --out $(RESULTS)/against-llama-$(NAME)-2-threads.json
	$(BIN)/trimkv bench $(GGUF) --quantize none --compare hf --contexts 512,2048,7500 --threads 1 --json \
		> $(RESULTS)/$(NAME)-unpacked-cpu.json
	$(BIN)/python -m bench.llama_table
	$(BIN)/python -m bench.readme

# Beside kvpress, in an environment of its own: GGUF=FILE.gguf GATES=FOLDER NAME=smollm2 [TEXT=FILE], about an hour.
KVPRESS := build/kvpress
ASKED = build/kvpress-$(NAME)

bench-kvpress: $(READY)
	$(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/pip install --quiet kvpress==0.5.5 'transformers<5.3' torch==2.13.0
	$(KVPRESS)/bin/python kernels/bench/kvpress_scores.py write build/scores
	$(BIN)/python -m bench.kvpress_scores compare build/scores --out $(RESULTS)/kvpress-scores.json
	$(BIN)/python -m bench.hf_folder $(GGUF) $(ASKED)
	$(BIN)/trimkv eval $(ASKED) --gates none --tasks needle --context 700 --samples 100 $(addprefix --text ,$(TEXT)) \
		--export $(ASKED).jsonl
	$(KVPRESS)/bin/python kernels/bench/kvpress_answers.py $(ASKED).jsonl --model $(ASKED) --out $(ASKED)-said.jsonl
	$(BIN)/trimkv eval --data $(ASKED).jsonl --answers $(ASKED)-said.jsonl --json > $(RESULTS)/kvpress-$(NAME).json
	$(BIN)/trimkv eval $(ASKED) --gates $(GATES) --data $(ASKED).jsonl --match contains --prefill-chunk 64 --json \
		> $(RESULTS)/beside-kvpress-$(NAME).json

TEN = --shape 10m --random-weights --kv-budget 256 --compare hf --device cpu --dtype fp32 --json

bench-speed: $(READY)
	$(BIN)/trimkv bench $(TEN) --contexts 1024,8192,32768 > $(RESULTS)/speed-10m-cpu.json
	$(BIN)/trimkv bench $(TEN) --contexts 8192 --rows 8 > $(RESULTS)/speed-10m-cpu-8-rows.json
	$(BIN)/trimkv bench $(TEN) --contexts 1024,8192,32768 --quantize int4 > $(RESULTS)/speed-10m-cpu-int4.json
	$(BIN)/python -m bench.overheads --out $(RESULTS)/overheads-10m-cpu.json
	$(BIN)/python -m bench.readme

# Halves of about the same length, at the same time.
REHEARSE = $(BIN)/python kernels/bench/gpu_run.py --device cpu --tiny --out build/gpu-rehearsal

rehearse-gpu: $(READY)
	@$(REHEARSE)/one --stages 0-2,4,6,9 & one=$$!; \
	$(REHEARSE)/two --stages 3,5,7,8; two=$$?; \
	wait $$one && exit $$two

# On a bare machine there is no .venv and no network: the python that is there runs it.
GPU_PYTHON = $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))

bench-gpu:
	$(GPU_PYTHON) kernels/bench/gpu_run.py --out build/gpu --commit "$$(git rev-parse HEAD 2>/dev/null)"; code=$$?; \
	cp build/gpu/rows.jsonl $(RESULTS)/gpu.jsonl && exit $$code

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
