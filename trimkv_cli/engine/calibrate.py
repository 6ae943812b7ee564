"""Measures what a process takes before a model is loaded, in a process of its own, for later plans."""

from __future__ import annotations

import json
import subprocess
import sys

from trimkv_cli.errors import TrimkvError
from trimkv_cli.machine import Machine

# Everything that a run imports, a model's classes and its tokenizer's included; on a GPU also what the first product
# allocates outside torch's own allocator.
_PROGRAM = """
import json
import torch, transformers
from transformers import Qwen3Config, Qwen3ForCausalLM
import trimkv_cli.engine.loader, trimkv_cli.jobs.job, trimkv_cli.commands.answers
from trimkv_cli.engine.memory import nvml_bytes, peak_rss
from trimkv_cli.engine.text import Text
try:
    import bitsandbytes
except ImportError:
    pass
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=32)
model = Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
found = {}
if torch.cuda.is_available():
    model = model.to("cuda", torch.bfloat16)
with torch.inference_mode():
    model(torch.arange(64, device=model.device)[None] % 64)
if torch.cuda.is_available():
    torch.cuda.synchronize()
    # Free memory does not tell: the context was there before one could look at it.
    own = nvml_bytes(model.device)
    if own:
        found["cuda_context_bytes"] = own - torch.cuda.memory_reserved()
found["cpu_runtime_bytes"] = peak_rss()
print(json.dumps(found))
"""


def measure_machine() -> Machine:
    """Start a process that loads everything but a model, and return what it took.

    Raises:
        TrimkvError: it failed.
    """
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise TrimkvError(f"the calibration failed: {last[0]}", hint="trimkv doctor shows what is missing")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return Machine(cpu_runtime_bytes=found.get("cpu_runtime_bytes"), cuda_context_bytes=found.get("cuda_context_bytes"))
