"""One token by llama.cpp in a process that imports nothing else: what `trimkv ask -n 1` is compared with.

python -m bench.llama_start MODEL.gguf THREADS PROMPT

Prints a line of JSON when the token is there. Without the pass that warms up, which a single answer need not wait for.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import xllamacpp

_POSITIONS = 512


def main() -> None:
    """Load, answer, and say how long each took."""
    file, threads, prompt = sys.argv[1:]
    started = time.perf_counter()
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_parallel, params.n_ctx, params.n_gpu_layers = 1, _POSITIONS, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.warmup, params.verbosity = False, -1
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - started

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps({"load_s": load_s, "prompt_tokens": answer["timings"]["prompt_n"], "text": _text(answer)}))
        sys.stdout.flush()

    asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "ignore_eos": True, "stream": False}
    server.handle_completions(asked, say)


def _text(answer: dict[str, Any]) -> str:
    said: str = answer["choices"][0]["text"]
    return said


if __name__ == "__main__":
    main()
