"""The checks of `trimkv doctor`: versions, device, number formats, folders, terminal and the built-in model."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import platformdirs
import psutil

from trimkv_cli import __version__
from trimkv_cli.errors import TrimkvError
from trimkv_cli.files import can_write
from trimkv_cli.model.machine import NEVER, Machine, memory_bytes, store
from trimkv_cli.tested import NEWEST, installed_version, untested
from trimkv_cli.units import format_size

Status = Literal["ok", "note", "fault"]
REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")
OPTIONAL = {
    "triton": "the torch reference runs instead of the kernels",
    "bitsandbytes": "no int8 or nf4 weights on a GPU",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at; a note is worth knowing, a fault keeps trimkv from working."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


def checkup() -> Iterator[Finding]:
    """Look at everything, cheapest first; a check that breaks becomes a fault of its own."""
    for check in (versions, processor, products, terminal, folders, device, kernels, dtypes, mini):
        yield from _guarded(check)


def versions() -> Iterator[Finding]:
    yield Finding(name="trimkv", status="ok", detail=__version__)
    yield Finding(name="python", status="ok", detail=f"{platform.python_version()} on {platform.platform(terse=True)}")
    for name in REQUIRED:
        version = installed_version(name)
        if version is None:
            yield Finding(name=name, status="fault", detail="not installed", hint=f"pip install {name}")
        else:
            yield Finding(name=name, status="ok", detail=version)
    for name, without in OPTIONAL.items():
        version = installed_version(name)
        yield Finding(name=name, status="ok" if version else "note", detail=version or f"not installed: {without}")
    yield from untested_versions()


def untested_versions() -> Iterator[Finding]:
    for name, newest in NEWEST.items():
        if untested(name):
            detail = f"{installed_version(name)} is newer than {newest}, the newest that trimkv was tested with"
            yield Finding(name=name, status="note", detail=detail, hint=f"pip install {name}=={newest}, if it fails")


def processor() -> Iterator[Finding]:
    import torch

    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    yield Finding(name="cpu", status="ok", detail=f"{torch.get_num_threads()} threads on {cores} cores")
    total, free = memory_bytes()
    detail = f"{format_size(free)} free of {format_size(total)}"
    yield Finding(name="memory", status="ok", detail=detail)


def products() -> Iterator[Finding]:
    """Say how fast this processor multiplies packed matrices, and what plans choose from that."""
    machine = Machine.here()
    if machine.products:
        times = ", ".join(f"{name} {microseconds:,.0f}" for name, microseconds in machine.products.items())
        detail = f"{times} µs for 1536 × 1536 weights: {_chosen(machine)}"
        yield Finding(name="packed weights", status="ok", detail=detail)
    else:
        detail = f"not measured; assumed: {_chosen(machine)}"
        yield Finding(name="packed weights", status="note", detail=detail, hint="trimkv doctor --measure")


def _chosen(machine: Machine) -> str:
    """Say what plans choose on a CPU."""
    kept = "GGUF files stay packed" if machine.packed_pays else "GGUF files are unpacked"
    passed = "" if machine.int8_pays else ", a budget takes int4 before int8"
    if machine.unpacks_from == NEVER:
        return f"{kept}{passed}, prompts are multiplied as they are packed"
    return f"{kept}{passed}, prompts of {machine.unpacks_from} tokens are multiplied in {machine.unpacks_to}"


def terminal() -> Iterator[Finding]:
    streams = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name).isatty()]
    size = shutil.get_terminal_size()
    detail = f"{size.columns}×{size.lines}, {os.environ.get('TERM', 'no TERM')}, on {', '.join(streams) or 'no stream'}"
    yield Finding(name="terminal", status="ok", detail=detail)
    encoding = (sys.stdout.encoding or "unknown").lower()
    if encoding.replace("-", "") == "utf8":
        yield Finding(name="encoding", status="ok", detail=encoding)
    else:
        yield Finding(name="encoding", status="note", detail=f"{encoding}, not utf-8", hint="export PYTHONUTF8=1")


def folders() -> Iterator[Finding]:
    """Report whether the folders that trimkv writes to can be written, without making any."""
    from huggingface_hub.constants import HF_HUB_CACHE

    own = platformdirs.PlatformDirs("trimkv")
    for name, folder in {
        "model cache": Path(HF_HUB_CACHE),
        "cache": own.user_cache_path,
        "data": own.user_data_path,
        "state": own.user_state_path,
    }.items():
        yield _writable(f"{name} folder", folder)
    yield Finding(name="config folder", status="ok", detail=str(own.user_config_path))  # only read


def device() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        memory = f"{format_size(free)} free of {format_size(total)}"
        software = f"CUDA {torch.version.cuda}{_driver()}"
        detail = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {memory}, {software}"
        yield Finding(name=f"cuda:{index}", status="ok", detail=detail)
    if torch.backends.mps.is_available():
        yield Finding(name="mps", status="ok", detail="the torch reference runs on it")
    elif not torch.cuda.is_available():
        yield _no_accelerator(cuda_build=torch.version.cuda)


def kernels() -> Iterator[Finding]:
    """Compile and run a trivial kernel on each GPU: Triton needs a C compiler and Python's headers."""
    import torch

    from trimkv_kernels import triton_obstacle

    for index in range(torch.cuda.device_count()):
        obstacle = triton_obstacle(torch.device("cuda", index))
        if obstacle is None:
            yield Finding(name=f"kernels on cuda:{index}", status="ok", detail="triton compiles and runs")
        else:
            detail = f"{obstacle.what}: the slower operations of torch run instead"
            yield Finding(name=f"kernels on cuda:{index}", status="note", detail=detail, hint=obstacle.remedy)


def dtypes() -> Iterator[Finding]:
    """Multiply two small matrices in each dtype on the device that `--device auto` takes."""
    import torch

    where = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        try:
            product = torch.ones(8, 8, dtype=dtype, device=where) @ torch.ones(8, 8, dtype=dtype, device=where)
        except (RuntimeError, TypeError) as error:
            yield Finding(name=name, status="note", detail=f"not on {where}: {_first_line(error)}")
            continue
        if bool((product == 8).all()):
            yield Finding(name=name, status="ok", detail=where)
        else:
            yield Finding(name=name, status="fault", detail=f"wrong sums on {where}", hint="update driver and torch")


def mini() -> Iterator[Finding]:
    """Load the built-in model with its gates and answer one request that is longer than its cache."""
    from trimkv_cli.loading.loader import load_engine
    from trimkv_cli.loading.options import EngineOptions
    from trimkv_cli.request import Request, SamplingParams

    engine = load_engine(EngineOptions(model="mini", offline=True, kv_budget="8", max_inflight=1))
    gate = engine.facts.gate
    yield Finding(name="mini gates", status="ok", detail=f"{gate.variant}, for {gate.memory_size} slots per head")
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    last = list(engine.generate([Request(id="doctor", prompt_token_ids=(1, 2, 3, 4), params=params)]))[-1]
    assert last.stats is not None, "the last event of a request carries its stats"
    right = last.finish_reason == "length" and last.stats.completion_tokens == params.max_tokens
    detail = f"{last.stats.completion_tokens} tokens in a cache of 8 slots per head"
    yield Finding(name="mini model", status="ok" if right else "fault", detail=detail)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except (TrimkvError, ImportError, OSError, RuntimeError, ValueError) as error:
        hint = error.hint if isinstance(error, TrimkvError) else "pip install --force-reinstall trimkv-cli"
        yield Finding(name=check.__name__, status="fault", detail=_first_line(error), hint=hint)


def _writable(name: str, folder: Path) -> Finding:
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if can_write(folder):
        free = format_size(shutil.disk_usage(nearest).free)
        return Finding(name=name, status="ok", detail=f"{folder}, {free} free")
    if not nearest.is_dir():
        return Finding(
            name=name, status="fault", detail=f"{nearest} is a file", hint=f"name another folder than {folder}"
        )
    return Finding(name=name, status="note", detail=f"{nearest} cannot be written", hint=f"chmod u+wx {nearest}")


def _no_accelerator(*, cuda_build: str | None) -> Finding:
    on_cpu = "models run on the CPU in fp32"
    if shutil.which("nvidia-smi") is None:
        return Finding(name="device", status="note", detail=f"no accelerator: {on_cpu}")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return Finding(name="device", status="note", detail=f"CUDA_VISIBLE_DEVICES hides the GPU: {on_cpu}")
    if cuda_build is None:
        detail, hint = "this build of torch has no CUDA", "pip install --force-reinstall torch"
    else:
        detail, hint = f"the driver does not serve CUDA {cuda_build}", "nvidia-smi, then update the driver"
    return Finding(name="device", status="fault", detail=f"there is an NVIDIA GPU, but {detail}", hint=hint)


def _driver() -> str:
    try:
        import pynvml
    except ImportError:
        return ""
    try:
        pynvml.nvmlInit()
        return f", driver {pynvml.nvmlSystemGetDriverVersion()}"
    except pynvml.NVMLError:
        return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# Everything that a run imports, a model's classes and its tokenizer's included; on a GPU also what the first product
# allocates outside torch's own allocator.
_PROGRAM = """
import json, sys
import torch, transformers
from transformers import Qwen3Config, Qwen3ForCausalLM
import trimkv_cli.loading.loader, trimkv_cli.jobs.job, trimkv_cli.commands.answers
import trimkv_cli.serve.app, trimkv_cli.serve.server
from trimkv_cli.engine.devices import nvml_bytes, peak_rss
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
    found["reserved_bytes"] = torch.cuda.memory_reserved()
    own = nvml_bytes(model.device)
    if own:
        found["cuda_context_bytes"] = own - found["reserved_bytes"]
found["cpu_runtime_bytes"] = peak_rss()
print(json.dumps(found), flush=True)
sys.stdin.read()  # until the other process has seen how much memory is free beside this one
"""


def calibrate() -> Iterator[Finding]:
    """Measure this machine, keep the numbers, and report them; of a GPU also that its driver did not tell."""
    import torch

    from trimkv_cli.loading.measuring import measured

    machine = measured(measure_machine())
    kept = store(machine)
    for name, size in {"cpu runtime": machine.cpu_runtime_bytes, "cuda context": machine.cuda_context_bytes}.items():
        if size is not None:
            yield Finding(name=name, status="ok", detail=f"{format_size(size)}, kept in {kept}")
    if machine.products:
        yield Finding(name="products", status="ok", detail=f"{_chosen(Machine.here())}; kept in {kept}")
    if machine.cuda_context_bytes is None and torch.cuda.is_available():
        detail = "not measured: NVML does not say what a process holds, and other processes changed what is free"
        yield Finding(name="cuda context", status="note", detail=detail, hint="end them, or pip install nvidia-ml-py")


def measure_machine() -> Machine:
    """Start a process that loads everything but a model, and return what it took.

    Where NVML does not say what it holds of a GPU (in containers), what is free beside it tells.

    Raises:
        TrimkvError: it failed.
    """
    free = _free_on_gpu()
    with TemporaryFile("w+") as errors:
        command = [sys.executable, "-c", _PROGRAM]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdout is not None, "it is a pipe"
            said = next((line for line in process.stdout if line.startswith("{")), None)
            lost = free - _free_on_gpu()
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:] or ["no output"]
    if said is None or process.returncode != 0:
        raise TrimkvError(f"the calibration failed: {last[0]}", hint="trimkv doctor shows what is missing")
    found: dict[str, int] = json.loads(said)
    context = found.get("cuda_context_bytes")
    if context is None and lost > found.get("reserved_bytes", lost):
        context = lost - found["reserved_bytes"]
    return Machine(cpu_runtime_bytes=found.get("cpu_runtime_bytes"), cuda_context_bytes=context)


def _free_on_gpu() -> int:
    """Return the free bytes of the first GPU, 0 where there is none."""
    import torch

    return int(torch.cuda.mem_get_info(0)[0]) if torch.cuda.is_available() else 0
