"""The newest release of each package that trimkv was tested with."""

from __future__ import annotations

import re

# Those of constraints.txt that a run imports.
NEWEST = {
    "bitsandbytes": "0.50.2",
    "filelock": "4.2.12",
    "gguf": "0.19.0",
    "huggingface_hub": "2.4.0",
    "jinja2": "3.1.6",
    "llguidance": "1.9.1",
    "orjson": "3.13.0",
    "platformdirs": "4.14.7",
    "prompt_toolkit": "3.0.53",
    "psutil": "7.2.2",
    "pydantic": "2.14.3",
    "pypdfium2": "5.15.2",
    "rich": "15.0.0",
    "python-multipart": "0.0.34",
    "safetensors": "0.8.0",
    "starlette": "1.10.0",
    "tokenizers": "0.23.3",
    "tomli": "2.5.0",
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "triton": "3.7.1",
    "typer": "0.29.2",
    "uvicorn": "0.54.0",
    "zstandard": "0.25.0",
}

OLDEST_TRANSFORMERS = "5.18.0"


def installed_version(package: str) -> str | None:
    """Return the version of a package that is installed, or None."""
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def untested(package: str) -> bool:
    """Tell whether a package is newer than the newest that was tested."""
    installed = installed_version(package)
    return installed is not None and _release(installed) > _release(NEWEST[package])


def _release(version: str) -> tuple[int, ...]:
    """Return a version's numbers: "5.25.0.dev0+cpu" → (5, 25, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()
