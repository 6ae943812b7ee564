"""A prompt answered by a running server that means the same as this command: found, asked, recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any

from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.request import SamplingParams
from trimkv_cli.serve.about import About
from trimkv_cli.serve.client import Client, NoAnswer
from trimkv_cli.serve.notes import running
from trimkv_cli.ui.cost import print_cost, say_cut
from trimkv_cli.ui.plain import print_note, print_warning
from trimkv_cli.units import format_size, format_sizes

_READ_ALL = {"x-trimkv-cache": "read"}  # what one question leaves is nobody's to go on from


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt, and how it is meant to be read."""

    user: str
    system: str | None
    raw: bool
    think: bool | None
    special_tokens: bool

    def body(self, params: SamplingParams, *, max_tokens: bool) -> dict[str, Any]:
        """Return a request that leaves nothing to the server's own defaults."""
        if self.raw:
            sent = request_body(params, max_tokens=max_tokens)
            return {**sent, "prompt": self.user, "special_tokens": self.special_tokens}
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages = [*first, {"role": "user", "content": self.user}]
        return {**request_body(params, max_tokens=max_tokens, think=self.think), "messages": messages}

    @property
    def path(self) -> str:
        """Return where such a request goes."""
        return "/v1/completions" if self.raw else "/v1/chat/completions"


def request_body(params: SamplingParams, *, max_tokens: bool, think: bool | None = None) -> dict[str, Any]:
    """Return what a streamed request says beside its prompt; `max_tokens` only where that is not a default."""
    sent: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    names = ["temperature", "top_p", "top_k", "min_p", "ignore_eos", "seed"]
    names += ["repetition_penalty", "presence_penalty", "frequency_penalty"]
    names += ["max_tokens"] if max_tokens else []
    names += ["top_h"] if params.top_h is not None else []
    sent |= {name: getattr(params, name) for name in names}
    if params.think_budget is not None:
        sent["reasoning_budget"] = params.think_budget
    if think is not None:
        sent["chat_template_kwargs"] = {"enable_thinking": think}
    return {**sent, "stop": list(params.stop)}


@dataclass(slots=True)
class Said:
    """An answer from a server, as its chunks come."""

    url: str
    about: About
    params: SamplingParams
    model: str = ""
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def take(self, chunk: Mapping[str, Any]) -> str:
        """Take what a chunk brings; return its text."""
        self.model = chunk.get("model", self.model)
        self.usage, self.extra = chunk.get("usage") or self.usage, chunk.get("trimkv") or self.extra
        piece = ""
        for choice in chunk.get("choices", ()):
            piece += choice.get("text") or choice.get("delta", {}).get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.pieces.append(piece)
        return piece

    def to_completion(self, request_id: str) -> dict[str, Any]:
        """Return what an answer without a server is recorded as, as far as this one says it."""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        usage = {name: value for name, value in self.usage.items() if name != "prompt_tokens_details"}
        return {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model,
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}],
            "usage": usage,
            "trimkv": {
                "model": self.model,
                "gates": dict(self.about.gates),
                "budget": self.extra.get("budget"),
                "memory": self.extra.get("memory"),
                "cache": {**self.extra.get("cache", {}), "horizon_p50": None, "horizon_p95": None},
                "timing": self.timing(),
                "sampling": asdict(self.params),
                "warnings": [*self.about.warnings, *self.extra.get("warnings", ())],
                "server": self.url,
            },
        }

    def timing(self) -> dict[str, Any]:
        """Return times and speeds; those of the server count from when it got a row for the request."""
        said = self.extra.get("timing", {})
        total, first, queued = (said.get(name) or 0.0 for name in ("total_s", "ttft_s", "queue_s"))
        reading, writing = first - queued, total - first
        decoded = max(0, self.usage.get("completion_tokens", 0) - 1)
        return {
            "load_s": 0.0,
            "queue_s": queued,
            "ttft_s": said.get("ttft_s"),
            "prefill_tps": self.usage.get("prompt_tokens", 0) / reading if reading > 0 else 0.0,
            "decode_tps": decoded / writing if writing > 0 and decoded else 0.0,
            "total_s": said.get("total_s"),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """A server that will answer: what it is, and the chunks of its answer, of which the first is there."""

    said: Said
    chunks: Iterator[dict[str, Any]]

    def answer(self, take: Callable[[str], None]) -> Said:
        """Hear the answer to its end; `take` gets each piece of text as it comes."""
        for chunk in self.chunks:
            if piece := self.said.take(chunk):
                take(piece)
        return self.said


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server that means the same as a command."""

    url: str
    api_key: str | None
    about: About

    def client(self) -> Client:
        """Return a connection of its own to it."""
        return Client(self.url, self.api_key)


def ask_server(
    question: Question, server: str, api_key: str | None, *, engine: EngineOptions, sampling: SamplingOptions
) -> Warm | None:
    """Put a question to a running server; None = answer it here: none is there, or none that means the same.

    Raises:
        UsageError: the server that `server` names runs something else than these options say.
        NoAnswer: it does not answer.
        TrimkvError: what a server says of the question.
    """
    found = find_servers(
        server, api_key, think=question.think, chats=not question.raw, engine=engine, sampling=sampling
    )
    for each in found:
        with suppress(NoAnswer) if server == "auto" else nullcontext():
            return put(each, each.client(), question, sampling)
    return None


def find_servers(
    server: str,
    api_key: str | None,
    *,
    think: bool | None,
    chats: bool,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> Iterator[Server]:
    """Yield the server that `server` names, or with `auto` those that are there and would answer the same.

    With `chats` it is sent messages, for which its model needs a template.

    Raises:
        UsageError: the one that it names runs something else than these options say.
        NoAnswer: it does not answer.
    """
    if server == "off":
        return
    if server != "auto":
        key = api_key or next((note.api_key for note in running() if note.url == server.rstrip("/")), None)
        client = Client(server, key)
        about = client.about()
        client.close()
        said = {each.name for each in fields(engine) if getattr(engine, each.name) != each.default}
        contradicted = (what for flag, what in about.differences(engine) if flag in said)
        if (first := next(contradicted, None)) is not None:
            raise UsageError(f"{client.url}: {first}", hint="leave it out, or --server off")
        if sampling.think_budget is not None and not about.thinks:
            raise UsageError(f"{about.model} knows no reasoning", hint="leave out --think-budget")
        if chats and not about.in_thought:
            raise UsageError(f"{about.model} has no chat template", hint="--raw, where a command has it")
        yield Server(url=client.url, api_key=key, about=about)
        return
    for note in running():
        if chats and not note.about.in_thought:
            continue
        if _same(note.about, think, engine, sampling) and _is_there(Client(note.url, note.api_key)):
            yield Server(url=note.url, api_key=note.api_key, about=note.about)


def _same(about: About, think: bool | None, engine: EngineOptions, sampling: SamplingOptions) -> bool:
    """Say whether a server would answer as this command does by itself."""
    fixed = about.fixed
    if think is None and "think" in fixed:
        return False
    if sampling.max_tokens is None and "max_tokens" in fixed:
        return False
    if sampling.think_budget is not None and not about.thinks:
        return False
    params = sampling.resolve(about.defaults)
    if unsaid(params, fixed):
        return False
    return next(about.differences(engine), None) is None


def unsaid(params: SamplingParams, fixed: Mapping[str, Any]) -> list[str]:
    """Name what a server was started with and a request does not say."""
    return [name for name in ("top_h", "think_budget") if name in fixed and getattr(params, name) is None]


def _is_there(client: Client) -> bool:
    """Say whether a server takes requests, and the key; a process that hangs is not asked for an answer."""
    try:
        client.get("/v1/models")
    except TrimkvError:
        return False
    finally:
        client.close()
    return True


def put(server: Server, client: Client, question: Question, sampling: SamplingOptions) -> Warm:
    """Send the question and wait for the first piece of its answer."""
    about, params = server.about, sampling.resolve(server.about.defaults)
    body = question.body(params, max_tokens=sampling.max_tokens is not None)
    chunks = client.stream(question.path, body, headers=_READ_ALL)
    first = []
    for chunk in chunks:
        first.append(chunk)
        if Said(server.url, about, params).take(chunk):
            break
    return Warm(said=Said(server.url, about, params), chunks=chain(first, chunks))


def say_before(about: About, *, notes: bool, quiet: bool) -> None:
    """Say what loading the model would have said: of its own `notes` only what this command's user should know."""
    for note in about.notes if notes and not quiet else ():
        print_note(note)
    for warning in about.warnings:
        print_warning(str(warning.get("message")))


def say_after(said: Said, *, quiet: bool, stats: bool) -> None:
    """Say what a user should know of an answer, and with `stats` what it cost."""
    for warning in said.extra.get("warnings", ()):
        if warning.get("code") == "max_tokens_reduced":
            if not quiet:
                print_note(str(warning.get("message")))
        else:
            print_warning(str(warning.get("message")))
    if not quiet:
        say_cut(said.finish_reason, said.usage.get("completion_tokens", 0))
    if stats:
        _print_stats(said)


def check_server_budget(extra: Mapping[str, Any]) -> None:
    """Raise a TrimkvError when the server's process has used more than its budget, as an answer's `extra` says."""
    budget = extra.get("budget") or {}
    if budget.get("honoured") is False:
        peak, allowed = format_sizes(extra["memory"]["peak_bytes"], budget["bytes"])
        raise TrimkvError(f"the server did not hold its budget: {peak} at the peak, of {allowed}", hint="trimkv stop")


def _print_stats(said: Said) -> None:
    """Print what an answer cost, and the server's memory."""
    cache, memory = said.extra.get("cache", {}), said.extra.get("memory") or {}
    read, written = (said.usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens"))
    if cache:
        print_cost(read=read, written=written, cache=cache, timing=said.timing())
    if memory:
        peak = format_size(memory["peak_bytes"])
        allowed = (said.extra.get("budget") or {}).get("bytes")
        held = "" if allowed is None else f", budget {format_size(allowed)}"
        print_note(f"memory   {memory['kv_bytes']:,} bytes of cache, {peak} at the server's peak{held}")
    print_note(f"server   {said.url}")
