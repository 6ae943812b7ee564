"""`trimkv serve`: the model kept warm behind OpenAI's HTTP interface, inside the same budget."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_cli.commands.options import QUIET, SPECIAL_TOKENS, THINK, ModelName
from trimkv_cli.errors import UsageError
from trimkv_cli.loading.options import Beside, EngineOptions, SamplingOptions
from trimkv_cli.settings import option
from trimkv_cli.units import parse_duration, parse_size

if TYPE_CHECKING:
    import socket

    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.serve.batches import Batches
    from trimkv_cli.serve.completions import Completions
    from trimkv_cli.serve.files import Files
    from trimkv_cli.serve.worker import Worker

_serve = partial(option, panel="Server", setting=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where to listen, whom to answer, and what to keep between requests."""

    host: str = _serve("127.0.0.1", "Address to listen on; another than this machine's own needs a key.", "ADDRESS")
    port: int = _serve(8012, "Port to listen on; 0 = any that is free.", "PORT", least=0)
    api_key: str | None = _serve(None, "Answer only those who bring this key; better: TRIMKV_API_KEY.", "KEY")
    api_key_file: str | None = _serve(None, "Read the key from this file.", "FILE")
    cors: list[str] | None = option(None, "Let pages of this origin ask from a browser; may be given again.", "ORIGIN")
    continue_: bool = _serve(
        True, "Go on from kept rows instead of reading whole histories again.", flag="--continue/--no-continue"
    )
    kept: int = _serve(4, "Conversations to keep in memory beside those in rows; part of the budget.", "N", least=0)
    idle: str | None = _serve(None, "Give the model up after this time without a request; the next loads it.", "TIME")
    max_queue: int = _serve(256, "Requests that may wait for a row; more are refused (429).", "N", least=0)
    max_body: str = _serve("4MiB", "Refuse larger requests (413), and hold so much of long ones at a time.", "SIZE")
    max_file: str = _serve("512MiB", "Refuse larger files for batches (413).", "SIZE")
    grace: str = option("30s", "For requests in flight when the server ends.", "TIME", panel="Server")
    strict: bool = option(
        False, "Refuse unknown keys and other models' names, which otherwise only warn.", panel="Server"
    )
    detach: bool = option(
        False, "Go on in the background once requests are taken; trimkv stop ends it.", panel="Server"
    )
    think: bool | None = THINK
    special_tokens: bool = SPECIAL_TOKENS
    quiet: bool = QUIET

    def __post_init__(self) -> None:
        parse_size(self.max_body)
        parse_size(self.max_file)
        for time in (self.grace, self.idle):
            if time is not None:
                parse_duration(time)
        if self.port > 65535:
            raise UsageError(f"--port {self.port} is too large", hint="1 to 65535")
        if self.api_key is not None and self.api_key_file is not None:
            raise UsageError("--api-key and --api-key-file are both given", hint="leave one of them out")

    def key(self) -> str | None:
        """Return the key that clients bring.

        Raises:
            UsageError: there is none and the address needs one, or the file cannot be read.
        """
        key = self.api_key
        if self.api_key_file is not None:
            try:
                key = Path(self.api_key_file).read_text("utf-8").strip()
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"--api-key-file {self.api_key_file}: {error}", hint="a text file with the key"
                ) from None
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise UsageError("the API key is empty, or has characters that no header can hold", hint="ASCII letters")
        if key is None and not _is_loopback(self.host):
            made = secrets.token_urlsafe(16)
            raise UsageError(f"--host {self.host} lets others ask, and there is no key", hint=f"--api-key {made}")
        return key


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(name: ModelName = None, *, form: ServeOptions, engine: EngineOptions, sampling: SamplingOptions) -> None:
    """Keep a model warm behind OpenAI's HTTP interface, inside the budget.

    trimkv serve smollm2-135m-instruct -b 2GiB

    trimkv serve --detach && trimkv ask "Why is the sky blue?" && trimkv stop

    curl localhost:8012/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

    OPENAI_BASE_URL=http://127.0.0.1:8012/v1 OPENAI_API_KEY=none python my_script.py

    Requests are read as `trimkv run` reads its lines: /v1/chat/completions, /v1/completions, /v1/models, /v1/files,
    /v1/batches, /health and /metrics. A history that begins with a conversation that was answered here is not read
    again: only what is new is; x-trimkv-cache says "continued" then, else "read". `trimkv ask`, `trimkv chat` and
    `trimkv summarize` ask a running server that was started with the same model, gates and settings, unless --server
    off. A batch runs in rows that nobody else asks for, and goes on after a restart with the same model and settings.
    Ctrl-C or SIGTERM finish what runs (--grace), a second ends at once.
    """
    from trimkv_cli.serve.server import bind

    if engine.on_overflow == "map-reduce":
        raise UsageError("--on-overflow map-reduce is for summarize", hint="--on-overflow rebase")
    key = form.key()
    engine = replace(engine, model=name or engine.model)
    opened = bind(form.host, form.port)
    try:
        if not form.detach:
            _serve_on(opened, key, form, engine, sampling)
            return
        from trimkv_cli.commands.detach import detached

        with detached(shown_url(opened), quiet=form.quiet) as ready:
            _serve_on(opened, key, form, engine, sampling, ready)
    finally:
        opened.close()


def shown_url(opened: socket.socket) -> str:
    """Return where a bound socket is reached."""
    host, port = opened.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _serve_on(
    opened: socket.socket,
    key: str | None,
    form: ServeOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    from trimkv_cli.commands.memory import check_budget, memory_line
    from trimkv_cli.commands.serve_about import about_server
    from trimkv_cli.serve.app import Trust, make_app
    from trimkv_cli.serve.notes import Note, noted
    from trimkv_cli.serve.server import Server
    from trimkv_cli.ui.plain import print_note

    worker = _start_worker(form, engine)
    try:
        completions = _completions(worker, form, engine, sampling)
        trust = Trust(hosts=frozenset({form.host.lower()}), api_key=key, cors=tuple(form.cors or ()))
        rules, files = completions.rules, _files(form)
        batches = _batches(completions, files, engine, sampling)
        about = about_server(worker.ask(lambda llm: llm.facts).result(), completions, form, engine, sampling)
        app = make_app(
            completions,
            model_id=completions.recorder.model,
            names=rules.model_names,
            trust=trust,
            others=[*files.routes, *batches.routes],
            about=about.to_json(),
        )
        server = Server(app, opened, grace_s=parse_duration(form.grace), late=worker.end_all)
        url = shown_url(opened)

        def ready() -> None:
            if not form.quiet:
                print_note(f"{completions.recorder.model} answers at {url}/v1; Ctrl-C ends it")
            running.enter_context(noted(Note.of(url=url, api_key=key, about=about)))
            on_ready()

        with ExitStack() as running:
            running.enter_context(closing(batches))
            batches.start()
            server.run(ready)
        if worker.gauge.loaded:
            if not form.quiet:
                print_note(worker.ask(memory_line).result())
            worker.ask(check_budget).result()
    finally:
        worker.close()


def _start_worker(form: ServeOptions, engine: EngineOptions) -> Worker:
    """Load the model in the thread that will own it."""
    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.serve.bodies import BYTES_EACH
    from trimkv_cli.serve.histories import Histories
    from trimkv_cli.serve.worker import Worker, WorkerOptions

    kept = form.kept if form.continue_ else 0
    # Beside those that are kept, one more is copied while a request that goes on has not got its first token.
    beside = Beside(snapshots=kept + 1, requests_bytes=parse_size(form.max_body) * BYTES_EACH)
    first = iter([form.quiet])

    def load() -> Engine:
        return open_engine(engine, quiet=next(first, True), beside=beside)

    idle_s = None if form.idle is None else parse_duration(form.idle)
    worker = Worker(load, Histories(kept), options=WorkerOptions(most_waiting=form.max_queue, idle_s=idle_s))
    worker.start()
    return worker


def _completions(worker: Worker, form: ServeOptions, engine: EngineOptions, sampling: SamplingOptions) -> Completions:
    from trimkv_cli.commands.serve_about import memory_now
    from trimkv_cli.jobs.lines import Rules
    from trimkv_cli.jobs.records import Recorder
    from trimkv_cli.loading.sources import find_here, model_names
    from trimkv_cli.serve.bodies import Bodies
    from trimkv_cli.serve.completions import Completions

    llm = worker.ask(lambda loaded: loaded).result()
    facts = llm.facts
    defaults = replace(sampling, seed=secrets.randbits(62) if sampling.seed is None else sampling.seed)
    rules = Rules(
        defaults=defaults.resolve(facts.sampling_defaults),
        max_tokens_said=sampling.max_tokens is not None,
        think=form.think,
        special_tokens=form.special_tokens,
        strict=form.strict,
        model_names=model_names(engine, find_here(engine)),
    )
    recorder = Recorder(
        model=facts.model_id,
        run_seed=rules.defaults.seed,
        kv_budget=facts.plan.run.kv_budget,
        prefill_chunk=facts.plan.run.prefill_chunk,
        memory=memory_now(worker, facts, engine.budget),
    )
    return Completions(
        worker=worker,
        text=llm.text,
        rules=rules,
        recorder=recorder,
        bodies=Bodies(parse_size(form.max_body)),
        continues=form.continue_,
    )


def _files(form: ServeOptions) -> Files:
    from platformdirs import user_data_path

    from trimkv_cli.serve.files import Files, FileStore

    return Files(store=FileStore(user_data_path("trimkv") / "serve" / "files"), most_bytes=parse_size(form.max_file))


def _batches(completions: Completions, files: Files, engine: EngineOptions, sampling: SamplingOptions) -> Batches:
    """Return what runs batches, as `trimkv run` with the same options runs a file."""
    from trimkv_cli.jobs.resuming import CHOSEN
    from trimkv_cli.serve.batch_work import BatchWork
    from trimkv_cli.serve.batches import Batches

    work = BatchWork(
        worker=completions.worker,
        text=completions.text,
        rules=completions.rules,
        recorder=replace(completions.recorder, reproducible=engine.deterministic),
        choices={name: getattr(engine, name) for name in CHOSEN},
        run_seed=sampling.resolve({}).seed,
    )
    folder = files.store.folder.with_name("batches")
    return Batches(folder, files.store, work, bodies=completions.bodies)
