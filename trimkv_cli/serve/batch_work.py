"""The work of one batch: `trimkv run`'s own job over the rows that are free, then its records as two files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from trimkv_cli.errors import TrimkvError
from trimkv_cli.jobs.job import BackendFacts, Job, run_job
from trimkv_cli.jobs.lines import BadLine, Item, Kind, Rules
from trimkv_cli.jobs.outputs import Output
from trimkv_cli.jobs.progress import Limits, Stop, Summary
from trimkv_cli.jobs.reading import LineReader, open_input
from trimkv_cli.jobs.records import Recorder
from trimkv_cli.jobs.requests import Tokenizer
from trimkv_cli.jobs.resuming import differences, job_fingerprint, path_beside, remembering, repair
from trimkv_cli.jobs.selection import Earlier, Selection, is_success, parse_lines
from trimkv_cli.jobs.writing import Writer, open_output
from trimkv_cli.serve.files import FileStore
from trimkv_cli.serve.rows import SpareRows
from trimkv_cli.serve.worker import Worker

KINDS: Mapping[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}  # by endpoint
_RESULT = "batch_output"

Told = Callable[[Earlier, Summary], None]  # what earlier servers did, and this one so far


class BatchFault(TrimkvError):
    """Report why a batch as a whole cannot go on; `code` is for programs."""

    def __init__(self, message: str, *, code: str, line: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.line = line


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWork:
    """Answer the lines of batches over one worker; `choices` are what beside model and rules decides tokens."""

    worker: Worker
    text: Tokenizer | None
    rules: Rules
    recorder: Recorder
    choices: Mapping[str, object]
    run_seed: int  # of batches to come

    def fingerprint(self, run_seed: int) -> dict[str, str]:
        """Name everything that decides a batch's tokens now."""
        facts = self.worker.ask(BackendFacts.of).result()
        rules = self._seeded(run_seed)
        return job_fingerprint(
            facts.fingerprint, rules, template=facts.template, choices=self.choices, prompt_column=None
        )

    def answer(
        self,
        source: Path,
        records: Path,
        *,
        name: str,
        endpoint: str,
        run_seed: int,
        fingerprint: Mapping[str, str],
        stop: Stop,
        told: Told,
    ) -> Summary:
        """Answer what `records` does not hold yet; what is stopped goes on with the same call.

        `fingerprint` is what the batch was taken with.

        Raises:
            BatchFault: the model, or a setting, is not what it was.
            TrimkvError: the engine fails whatever it is given, or the disk is full.
        """
        if changed := differences(fingerprint, self.fingerprint(run_seed)):
            raise BatchFault(f"the model, or a setting, is another one now: {', '.join(changed)}", code="model_changed")
        rules = self._seeded(run_seed)
        output = Output.taken_up(records)
        earlier = output.earlier
        with ExitStack() as stack:
            stream = stack.enter_context(output.same_input(open_input(str(source))))
            reader = LineReader(remembering(stream, output.claim(fingerprint)))
            rows = stack.enter_context(closing(SpareRows(self.worker, self.text, name=name)))
            records.touch(0o600)
            job = Job(
                lines=of_endpoint(parse_lines(reader, rules, Selection(earlier=earlier)), endpoint),
                sink=Writer(stack.enter_context(open_output(str(records)))),
                recorder=replace(self.recorder, run_seed=run_seed),
                limits=Limits(grace_s=0.0),
                stop=stop,
                progress=lambda summary: told(earlier, summary),
            )
            try:
                return run_job(rows, job)
            finally:
                told(earlier, job.summary)

    def _seeded(self, run_seed: int) -> Rules:
        return replace(self.rules, defaults=replace(self.rules.defaults, seed=run_seed))


def count_lines(source: Path, *, stopped: Callable[[], bool]) -> int:
    """Count the lines that are not blank."""
    count = 0
    for _ in LineReader(open_input(str(source))):
        count += 1
        if stopped():
            break
    return count


def of_endpoint(lines: Iterable[Item | BadLine], endpoint: str) -> Iterator[Item | BadLine]:
    """Refuse lines that ask another endpoint than their batch."""
    for line in lines:
        if isinstance(line, Item) and line.kind != KINDS[endpoint]:
            message = f"url: this batch is for {endpoint}"
            yield BadLine(
                line=line.line,
                custom_id=line.custom_id,
                status=400,
                message=message,
                param="url",
                code="mismatched_endpoint",
            )
        else:
            yield line


def split(records: Path, store: FileStore, *, ids: tuple[str, str], name: str) -> dict[str, Any]:
    """Put the answers into one file of the store and the failures into another, and say where and how many.

    Raises:
        TrimkvError: they cannot be written.
    """
    if not records.exists():
        return {"output_file_id": None, "error_file_id": None}
    repair(records)
    completed = failed = 0
    with store.writing(ids[0]) as answers, store.writing(ids[1]) as failures, records.open("rb") as lines:
        for line in lines:
            good = is_success(orjson.loads(line))
            (answers if good else failures).stream.write(line)
            completed, failed = completed + good, failed + (not good)
        return {
            "output_file_id": answers.keep(filename=f"{name}_output.jsonl", purpose=_RESULT).id if completed else None,
            "error_file_id": failures.keep(filename=f"{name}_error.jsonl", purpose=_RESULT).id if failed else None,
            "completed": completed,
            "failed": failed,
        }


def forget(records: Path) -> None:
    """Remove the records and what lies beside them."""
    for path in (records, path_beside(records), records.with_name(f"{records.name}.trimkv.torn")):
        path.unlink(missing_ok=True)
