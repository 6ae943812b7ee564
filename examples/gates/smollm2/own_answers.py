"""What the model itself says about texts when nothing is evicted, as conversations to learn from.

`requests PACKAGES OUT.jsonl` writes requests for `trimkv run`, `join REQUESTS ANSWERS OUT.jsonl` puts its answers to
them and adds the conversations to a file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from examples.gates.smollm2.conversations import CHARACTERS_PER_TOKEN, Message, insert
from examples.gates.smollm2.facts import draw_facts
from examples.gates.smollm2.texts import Passages, read_texts

COUNT = 128
LENGTHS = (300, 1500)  # tokens of a text
# fmt: off
REQUESTS = (
    "Summarize the text above.", "What is the text about?", "List the main points of the text.",
    "Who or what is mentioned?", "Explain the most important idea of the text.", "Summarize it in one sentence.",
    "Write a title for the text and say why it fits.", "What could be confusing about this text?",
    "Name three things that the text says.", "Rewrite the last paragraph in simpler words.",
    "What does the first paragraph say?", "Which names, numbers and dates does the text give?",
)
# fmt: on


def requests(folder: Path) -> Iterator[dict[str, Any]]:
    """Give texts with an open request behind or before them, half of them with facts put in; some ask for a fact."""
    passages = Passages(read_texts(folder))
    for index in range(COUNT):
        rng = Random(f"own answers {index}")
        passage = passages.draw(rng, round(rng.randint(*LENGTHS) * CHARACTERS_PER_TOKEN))
        facts = draw_facts(rng, rng.randint(2, 6)) if rng.random() < 0.5 else []
        text = insert(rng, passage, [fact.tell(rng) for fact in facts])
        asked = rng.choice(facts).ask(rng) if facts and rng.random() < 0.6 else rng.choice(REQUESTS)
        content = f"{asked}\n\n{text}" if rng.random() < 0.2 else f"{text}\n\n{asked}"
        yield {"custom_id": str(index), "messages": [{"role": "user", "content": content}]}


def join(asked: Path, answered: Path) -> Iterator[list[Message]]:
    """Give the conversations whose answers came to an end."""
    said = {
        record["custom_id"]: record["response"]["body"]["choices"][0]["message"]["content"]
        for record in _lines(answered)
        if record["response"] is not None and record["response"]["status_code"] == 200
    }
    for request in _lines(asked):
        answer = said.get(request["custom_id"], "")
        if answer.strip():
            yield [*request["messages"], {"role": "assistant", "content": answer}]


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def main() -> None:
    """Write requests, or add the answers to a file of conversations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    asking = steps.add_parser("requests")
    asking.add_argument("folder", type=Path)
    asking.add_argument("out", type=Path)
    joining = steps.add_parser("join")
    joining.add_argument("asked", type=Path)
    joining.add_argument("answered", type=Path)
    joining.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "requests":
        lines = [json.dumps(request, ensure_ascii=False) for request in requests(arguments.folder)]
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    with arguments.out.open("a", encoding="utf-8") as file:
        for messages in join(arguments.asked, arguments.answered):
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
