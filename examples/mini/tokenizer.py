"""The tokenizer of the built-in model, a byte-level BPE of 1,536 tokens, and a ChatML template.

Every word of the language that is not drawn at random is one token, and so is every number below 100: what comes in
pieces is harder to find again.
"""

from __future__ import annotations

from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.mini import texts
from trimkv_cli.mini import MODEL_FOLDER, language, words

VOCAB_SIZE = 1536
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PIECES = r" ?\p{L}+| ?\p{N}{1,2}|\n| ?[^\s\p{L}\p{N}]+|\s+"  # two digits at most, so that any number can be copied
_TEMPLATE = MODEL_FOLDER / "chat_template.jinja"


def build_tokenizer(*, seed: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train the merges on generated text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(Random(seed)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def _sample(rng: Random) -> list[str]:
    conversations = [
        conversation
        for _ in range(300)
        for conversation in (
            language.make_multi_turn(rng, facts=8, length=200),
            texts.summarize_notes(rng, texts.make_notes(rng, points=3, length=60)),
            texts.make_table(rng),
            language.make_steps(rng),
            texts.make_list(rng),
        )
    ]
    roles = ["system\n", "user\n", "assistant\n"] * 500
    numbers = [f"{start}{number:02}" for start in ("", " ") for number in range(100)] * 500
    numbers += [f" {digit}" for digit in range(10)] * 500
    common = [f" {word}" for word in words.COMMON] * 200
    return [message.content for conversation in conversations for message in conversation.messages] + [
        *roles,
        *numbers,
        *common,
    ]
