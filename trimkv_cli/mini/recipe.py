"""Build the stand-in for the built-in model: a tiny Qwen3 with random weights, its tokenizer and its gates.

`python -m trimkv_cli.mini.recipe OUT` writes the folder that ships as `trimkv_cli/mini/model`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trimkv_cli.cache.gate_files import write_gates
from trimkv_cli.spec import GateSpec

SEED = 2512
VOCAB_SIZE = 512
GATE_HIDDEN = 32
FIRST_MERGE = 3 + 256  # ids below are special tokens and single bytes
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "dtype": "bfloat16",
}
GATE = GateSpec(
    variant="rg",
    id="mini",
    hidden=GATE_HIDDEN,
    memory_size=64,
    trained_context=CONFIG["max_position_embeddings"],
    base_model="mini",
    model_type="qwen3",
)
README = """\
# mini (stand-in)

**Random weights: this model talks nonsense.** It stands in for the trained mini model until that one is there, so that
every command runs offline and the tests have something to run on. Tokenizer, chat template and retention gates have the
real formats; the gates are random too, wide enough that the order in which tokens are evicted depends on the text.

Rebuild it with `python -m trimkv_cli.mini.recipe OUT`.
"""
_HERE = Path(__file__).parent


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCAB_SIZE` tokens on the primer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((_HERE / "primer.txt").read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (_HERE / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Draw every matrix from N(0, 1/fan_in).

    Sharpened queries let attention look at few tokens; hushed single bytes make the nonsense readable.
    """
    end, turn_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG, eos_token_id=turn_end, pad_token_id=end, bos_token_id=None))
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2:
            parameter.data = _normal(*parameter.shape, generator=generator)
        elif name.endswith("q_norm.weight"):
            parameter.data = torch.full_like(parameter, 2.0)
    hushed = [token for token in range(FIRST_MERGE) if token != turn_end]
    model.get_input_embeddings().weight.data[hushed] *= 0.3
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, eos_token_id=[turn_end, end], pad_token_id=end
    )
    return model.to(torch.bfloat16)


def build_gates() -> dict[str, Tensor]:
    """Draw one `rg` gate per layer under the released checkpoints' keys; half of all half-lives are 4 to 50 steps."""
    hidden, heads = CONFIG["hidden_size"], CONFIG["num_key_value_heads"]
    generator = torch.Generator().manual_seed(SEED + 1)
    gates = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn.retention_gate"
        gates[f"{prefix}.linear1.weight"] = _normal(GATE_HIDDEN, hidden, generator=generator)
        gates[f"{prefix}.linear1.bias"] = torch.zeros(GATE_HIDDEN)
        gates[f"{prefix}.linear2.weight"] = 3 * _normal(heads, GATE_HIDDEN, generator=generator)
        gates[f"{prefix}.bias"] = torch.full((heads,), 3.0)
    return {key: tensor.to(torch.bfloat16) for key, tensor in gates.items()}


def build(out: Path) -> None:
    """Write model, tokenizer, gates and README to `out`."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_gates(out / "gates", GATE, build_gates())
    (out / "README.md").write_text(README, encoding="utf-8")


def _normal(rows: int, columns: int, *, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
