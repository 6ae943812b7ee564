"""Ten system messages of four rules each, and what brings every rule into play.

The rules are those that a model of 135 million parameters can keep: some seventy were tried on SmolLM2-135M-Instruct
with a full cache and some 60 tokens of text between rule and question, a few answers each. How to write (to begin or
end with a word, in capitals, as a list, in one sentence) it hardly ever heeded; a language it did, but then forgot the
other rules. What it kept at least a third of the time are rules of what to say to whom, so these are asked for here.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimkv_cli.eval.rules import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """A rule as the system message says it, the question whose answer it decides, and how that is checked."""

    said: str
    asked: str
    rule: Rule


_KINDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Your name is {v}.", "What is your name?", ("Max", "Olivia", "Robin", "Clara")),
    ("You have a cat called {v}.", "What is your cat called?", ("Biscuit", "Pepper", "Shadow", "Ginger")),
    (
        "Hungry visitors are sent to {v}.",
        "Where are hungry visitors sent?",
        ("the Green Kitchen", "the Silver Spoon", "the Old Mill", "the blue tent"),
    ),
    (
        "Whoever asks for the price is told {v}.",
        "What is the price?",
        ("40 dollars", "19 dollars", "75 dollars", "12 dollars"),
    ),
    (
        "The door is opened at {v}.",
        "When is the door opened?",
        ("nine o'clock", "half past ten", "seven o'clock", "noon"),
    ),
    (
        "Whoever asks for the phone number is told {v}.",
        "What is the phone number?",
        ("5512", "4470", "8031", "2964"),
    ),
    ("Whoever asks for the date is told {v}.", "What is the date?", ("3 May", "9 June", "21 August", "14 October")),
    (
        "The key is kept under {v}.",
        "Where is the key kept?",
        ("the red box", "the yellow chair", "the flower pot", "the carpet"),
    ),
    (
        "The meeting is held in {v}.",
        "Where is the meeting held?",
        ("the library", "Oslo", "the garden", "the White Room"),
    ),
    (
        "Your favourite colour is {v}.",
        "What is your favourite colour?",
        ("violet", "orange", "crimson", "turquoise"),
    ),
)


def _messages() -> tuple[tuple[Instruction, ...], ...]:
    values = [iter(values) for _, _, values in _KINDS]
    messages = []
    for number in range(10):
        kinds = [(number + step) % len(_KINDS) for step in (0, 1, 3, 6)]
        drawn = [(_KINDS[kind], next(values[kind])) for kind in kinds]
        messages.append(
            tuple(
                Instruction(said=said.format(v=value), asked=asked, rule=Rule(kind="says", value=value))
                for (said, asked, _), value in drawn
            )
        )
    return tuple(messages)


SYSTEMS = _messages()
