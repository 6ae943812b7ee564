"""Questions as messages or as texts to continue, what counts as right, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from trimkv_cli.errors import InputError
from trimkv_cli.eval.rules import KINDS, LANGUAGES, Rule
from trimkv_cli.files import as_text

Match = Literal["exact", "contains"]

_ROLES = ("system", "user", "assistant")
_ANSWER = 'a line is {"id": "needle-0", "output": "..."}'
_EXAMPLE = 'a line is {"messages": [...], "answer": "..."}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What is asked, as messages or as a text to continue, and the one answer that counts as right.

    `value` is the part of a generated answer that `--match contains` looks for; "" = all of it; `also` are other ways
    to write it. Where `rules` or `points` are given, what counts is how many of them an answer keeps or says. Questions
    of one `document` ("" = its own) share all before the last message and `head` characters of that, or of the prompt;
    None = nothing. `max_tokens` is the most that is answered, 0 = by the expected answer. `id` is empty until the
    question is part of an exam, or where a file gives none; so are `task`, the row that it counts in, and `match`.
    """

    answer: str = ""
    value: str = ""
    also: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    prompt: str | None = None
    document: str = ""
    head: int | None = None
    rules: tuple[Rule, ...] = ()
    points: tuple[str, ...] = ()
    max_tokens: int = 0
    id: str = ""
    task: str = ""
    match: Match | None = None

    @property
    def last(self) -> str:
        """The text that ends with the question."""
        return self.messages[-1]["content"] if self.prompt is None else self.prompt

    def ending(self, question: str) -> Sample:
        """Return the same with another text after the first `head` characters."""
        return self._with_last(self.last[: self.head] + question)

    @property
    def text_to_summarize(self) -> str:
        """What the points are to be told of, "" where nothing but a single text is asked about."""
        alone = bool(self.points and self.head) and len(self.messages) <= 1
        return self.last[: self.head].strip() if alone else ""

    @property
    def question(self) -> str:
        return self.last[self.head or 0 :].strip()

    def about(self, text: str) -> Sample:
        """Ask the same of another text."""
        return self._with_last(f"{text}\n\n{self.question}")

    def _with_last(self, text: str) -> Sample:
        if self.prompt is not None:
            return replace(self, prompt=text)
        return replace(self, messages=(*self.messages[:-1], {**self.messages[-1], "content": text}))


def read_samples(path: str) -> list[Sample]:
    """Read JSON lines with `answer` and either `messages` or `prompt`; blank lines are passed over.

    Raises:
        InputError: a file that cannot be read or holds no line, or a bad line, by its number.
    """
    filled = _filled_lines(path)
    samples = [_read_line(line, f"{path}:{number}") for number, line in filled]
    if not samples:
        raise InputError(f"{path} holds no questions", hint=_EXAMPLE)
    return samples


def by_task(samples: Iterable[Sample], *, other: str) -> dict[str, list[Sample]]:
    """Sort questions by their tasks, in the order of the first of each; `other` is the name for those of none."""
    tasks: dict[str, list[Sample]] = {}
    for sample in samples:
        tasks.setdefault(sample.task or other, []).append(sample)
    return tasks


def _filled_lines(path: str) -> list[tuple[int, str]]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}", hint=f"iconv -t UTF-8 {path}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _read_line(line: str, where: str) -> Sample:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise _bad(where, f"invalid JSON: {error}") from None
    if not isinstance(data, dict):
        raise _bad(where, "not a JSON object")
    answer, messages, prompt = data.get("answer"), data.get("messages"), data.get("prompt")
    judged = any(data.get(name) for name in ("rules", "points"))
    if judged and answer is None:
        answer = ""
    if not isinstance(answer, str) or (not answer.strip() and not judged):
        raise _bad(where, "answer must be a text that is not empty")
    if (messages is None) == (prompt is None):
        raise _bad(where, "give either messages or prompt")
    more = _read_more(data, where)
    if prompt is None:
        return Sample(answer=as_text(answer, where), messages=_read_messages(messages, where), **more)
    if not isinstance(prompt, str) or not prompt:
        raise _bad(where, "prompt must be a text that is not empty")
    return Sample(answer=as_text(answer, where), prompt=as_text(prompt, where), **more)


def _read_more(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read what an exported line says beside question and answer; of a user's own ids any may be a number."""
    more: dict[str, Any] = {"id": as_text(str(data.get("id", "")), where)}
    for name in ("value", "document", "task"):
        if not isinstance(data.get(name, ""), str):
            raise _bad(where, f"{name} must be a text")
        more[name] = as_text(data.get(name, ""), where)
    for name in ("also", "points"):
        if not isinstance(data.get(name, []), list) or not all(_is_said(one) for one in data.get(name, [])):
            raise _bad(where, f"{name} must be a list of texts")
        more[name] = tuple(data.get(name, []))
    for name, least in (("head", 0), ("max_tokens", 1)):
        number = data.get(name)
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < least):
            raise _bad(where, f"{name} must be a whole number, {least} or more")
    if data.get("match") not in (None, *get_args(Match)):
        raise _bad(where, f"match is {' or '.join(get_args(Match))}")
    more["match"] = data.get("match")
    return {**more, "head": data.get("head"), "max_tokens": data.get("max_tokens") or 0, "rules": _rules(data, where)}


def _is_said(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _rules(data: Mapping[str, Any], where: str) -> tuple[Rule, ...]:
    rules = data.get("rules", [])
    if not isinstance(rules, list):
        raise _bad(where, "rules must be a list")
    for rule in rules:
        if not isinstance(rule, dict) or rule.get("kind") not in KINDS or not isinstance(rule.get("value", ""), str):
            raise _bad(where, f"a rule has a kind ({', '.join(KINDS)}) and a text as its value")
        if rule["kind"] == "most-words" and not rule.get("value", "").isdecimal():
            raise _bad(where, "the value of most-words is a number")
        if rule["kind"] == "language" and rule.get("value") not in LANGUAGES:
            raise _bad(where, f"the value of language is one of {', '.join(LANGUAGES)}")
    return tuple(Rule(kind=rule["kind"], value=rule.get("value", "")) for rule in rules)


def export_line(sample: Sample, **more: object) -> str:
    """Return a sample as the line that `read_samples` reads; what is empty is left out."""
    data = {name: value for name, value in asdict(sample).items() if value not in ("", (), 0, None)}
    if sample.head is not None:
        data |= {"head": sample.head, "question": sample.question}
    return json.dumps(data | more, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherAnswers:
    """What another program, `policy` with `kv_budget` slots (None = all), answered, by the questions' ids."""

    policy: str
    kv_budget: int | None
    said: Mapping[str, str]


def read_answers(path: str) -> list[OtherAnswers]:
    """Read JSON lines with `id` and `output`, and where there are several tables in one file `policy` and `kv_budget`.

    Raises:
        InputError: a file that cannot be read, a bad line, or a question that is answered twice.
    """
    tables: dict[tuple[str, int | None], dict[str, str]] = {}
    for number, line in _filled_lines(path):
        where = f"{path}:{number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise _bad_answer(where, f"invalid JSON: {error}") from None
        if not isinstance(data, dict) or not all(isinstance(data.get(name), str) for name in ("id", "output")):
            raise _bad_answer(where, "id and output must be texts")
        policy, slots = data.get("policy", Path(path).stem), data.get("kv_budget")
        if not isinstance(policy, str) or not (slots is None or (isinstance(slots, int) and slots > 0)):
            raise _bad_answer(where, "policy must be a text, and kv_budget a number of slots")
        said = tables.setdefault((policy, slots), {})
        if data["id"] in said:
            raise _bad_answer(where, f"{data['id']} is answered twice under {policy}")
        said[data["id"]] = data["output"]
    if not tables:
        raise InputError(f"{path} holds no answers", hint=_ANSWER)
    return [OtherAnswers(policy=policy, kv_budget=slots, said=said) for (policy, slots), said in tables.items()]


def _bad_answer(where: str, what: str) -> InputError:
    return InputError(f"{where}: {what}", hint=_ANSWER)


def _read_messages(messages: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise _bad(where, "messages must be a list that is not empty")
    for number, message in enumerate(messages):
        plain = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not plain or message.get("role") not in _ROLES:
            raise _bad(where, f"messages[{number}] needs a role ({', '.join(_ROLES)}) and a text as content")
    if messages[-1]["role"] != "user":
        raise _bad(where, "the last message must be the user's")
    return tuple({"role": message["role"], "content": as_text(message["content"], where)} for message in messages)


def _bad(where: str, what: str) -> InputError:
    return InputError(f"{where}: {what}", hint=_EXAMPLE)
