"""What packed weights lose: KL and agreement with the unpacked model in fp32, and perplexity, on English text.

python -m bench.packed_quality MODEL.gguf --text FILE --out kernels/bench/results/packed-quality-NAME-cpu.json

Beside the file as it is stored stand plain bf16, and the unpacked model, saved in bf16, as int8, int4 and nf4. Every
window of 1,024 tokens is read as a whole, so that nothing is evicted. Rows are printed, and kept, as they are made.

The weights of a file of 4 bits lie on levels, also when they are saved in bf16, and int4 finds most of these again: it
loses more of a model that was never rounded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from bench.record import write_record
from trimkv_cli.loading.gguf import gguf_tokenizer
from trimkv_cli.loading.loader import TORCH_DTYPES, load_model, plan_for
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.model.spec import Dtype, Quantisation

_WINDOW = 1024
_CPU = torch.device("cpu")
# name, whether from the folder of bf16, dtype, form
ROWS: tuple[tuple[str, bool, Dtype, Quantisation], ...] = (
    ("stored", False, "fp32", "stored"),
    ("bf16", False, "bf16", "none"),
    ("int8 of bf16", True, "fp32", "int8"),
    ("int4 of bf16", True, "fp32", "int4"),
    ("nf4 of bf16", True, "fp32", "nf4"),
)


@dataclass
class Compared:
    """Sum, over windows, how far a model is from another; every token is predicted from those before it."""

    tokens: int = 0
    divergence: float = 0.0
    largest: float = 0.0
    agreed: int = 0
    loss: float = 0.0
    whole_loss: float = 0.0
    seconds: float = 0.0
    by_window: list[float] = field(default_factory=list)

    def add(self, ids: Tensor, logits: Tensor, whole: Tensor) -> None:
        """Take one window: ids `[T]`, and two models' logits `[T, V]`."""
        made, right, following = logits.log_softmax(-1)[:-1], whole.log_softmax(-1)[:-1], ids[1:, None]
        apart = (right.exp() * (right - made)).sum(-1)
        self.tokens += len(following)
        self.divergence += float(apart.sum())
        self.largest = max(self.largest, float(apart.max()))
        self.agreed += int((made.argmax(-1) == right.argmax(-1)).sum())
        self.loss -= float(made.gather(1, following).sum())
        self.whole_loss -= float(right.gather(1, following).sum())
        self.by_window.append(float(apart.mean()))

    def as_json(self) -> dict[str, Any]:
        """Return means over all tokens."""
        perplexity, whole = (float(torch.tensor(loss / self.tokens).exp()) for loss in (self.loss, self.whole_loss))
        return {
            "kl": self.divergence / self.tokens,
            "kl_largest": self.largest,
            "top1_agreement": self.agreed / self.tokens,
            "perplexity": perplexity,
            "perplexity_fp32": whole,
            "tokens": self.tokens,
            "prefill_tps": self.tokens / self.seconds if self.seconds else None,
            "kl_by_window": [round(mean, 6) for mean in self.by_window],
        }


def windows(file: Path, text: str, tokens: int) -> list[Tensor]:
    """Return the first tokens of a text, `_WINDOW` at a time."""
    ids = torch.tensor(gguf_tokenizer(file)(text).input_ids[:tokens])
    return [window for window in torch.split(ids, _WINDOW) if len(window) > 1]


def load(model: Path, dtype: Dtype, quantize: Quantisation) -> tuple[Any, float]:
    """Return a model, and how many bits a weight of it has."""
    options = EngineOptions(
        model=str(model), gates="streaming", device="cpu", offline=True, dtype=dtype, quantize=quantize, max_inflight=1
    )
    source = find_source(options, weights=True)
    run = plan_for(source, options, _CPU).run
    made = load_model(source, TORCH_DTYPES[dtype], _CPU, quantize=quantize, machine=run.machine)
    return made, run.bits_per_weight


@torch.inference_mode()
def compare(model: Any, whole: list[Path], texts: list[Tensor]) -> Compared:
    """Read every window, and compare with the logits that were kept of it."""
    made = Compared()
    for ids, kept in zip(texts, whole, strict=True):
        started = time.perf_counter()
        logits = model(input_ids=ids[None]).logits[0].float()
        made.seconds += time.perf_counter() - started
        made.add(ids, logits, torch.load(kept))
    return made


@torch.inference_mode()
def keep(model: Any, folder: Path, texts: list[Tensor]) -> list[Path]:
    """Write the logits of every window into a folder: together they are larger than a small machine's memory."""
    folder.mkdir()
    paths = [folder / f"{index}.pt" for index in range(len(texts))]
    for ids, path in zip(texts, paths, strict=True):
        torch.save(model(input_ids=ids[None]).logits[0].float(), path)
    return paths


def measure(file: Path, texts: list[Tensor], scratch: Path, only: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one row for each form."""
    whole, _ = load(file, "fp32", "none")
    logits = keep(whole, scratch / "logits", texts)
    folder = scratch / "bf16"
    whole.bfloat16().save_pretrained(folder)
    gguf_tokenizer(file).save_pretrained(folder)
    del whole
    for name, from_folder, dtype, quantize in ROWS:
        if not only or name.split()[0] in only:
            model, bits = load(folder if from_folder else file, dtype, quantize)
            made = compare(model, logits, texts).as_json()
            del model
            yield {"weights": name, "dtype": dtype, "quantize": quantize, "bits_per_weight": bits, **made}


def main() -> None:
    """Measure one file in every form and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a file of English")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--only", nargs="*", default=[], help="stored, bf16, int8, int4, nf4")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    texts = windows(arguments.model, arguments.text.read_text(encoding="utf-8"), arguments.tokens)
    about = {"model": arguments.model.name, "text": arguments.text.name, "window": _WINDOW, "threads": 1}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in measure(arguments.model, texts, Path(scratch), arguments.only):
            rows.append(row)
            shown = {key: value for key, value in row.items() if key != "kl_by_window"}
            print(json.dumps(shown), file=sys.stderr, flush=True)
            if arguments.out is not None:
                write_record("bench.packed_quality", {**about, "results": rows}, arguments.out)
    if arguments.out is None:
        write_record("bench.packed_quality", {**about, "results": rows}, None)


if __name__ == "__main__":
    main()
