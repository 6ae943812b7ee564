"""A GGUF file's exact values as a folder that transformers reads, for programs that take no GGUF file.

python -m bench.hf_folder MODEL.gguf FOLDER

Weights are unpacked to fp32; tokenizer, chat template and the tokens that end an answer come from the file as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from trimkv_cli.loading.gguf import gguf_tokenizer
from trimkv_cli.loading.loader import load_model
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source


def write_folder(gguf: Path, folder: Path) -> None:
    source = find_source(EngineOptions(model=str(gguf), gates="none"), weights=True)
    model = load_model(source, torch.float32, torch.device("cpu"))
    model.save_pretrained(folder)
    gguf_tokenizer(gguf).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, metavar="MODEL.gguf")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    write_folder(asked.gguf, asked.folder)


if __name__ == "__main__":
    main()
