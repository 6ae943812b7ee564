"""What a model has read, kept in a file: written once, asked again and again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_cli.engine.request import Request, SamplingParams
from trimkv_cli.errors import UsageError

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.engine.session import RowState


def check_place(path: str) -> None:
    """Find out before a long read whether its cache can be written.

    Raises:
        UsageError: the folder is missing.
    """
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"cannot write {path}: its folder does not exist", hint="check the path given to --save-cache")


def save_read(llm: Engine, request_id: str, path: str) -> None:
    """Write what a finished request left in the cache; raises as `write_row` does."""
    from trimkv_cli.engine.row_files import write_row

    write_row(Path(path), llm.save(request_id), model_id=llm.facts.model_id, fingerprint=llm.fingerprint)


def restore_read(llm: Engine, path: str) -> RowState:
    """Put a saved read back into the cache, where its path names it; raises as `read_row` does."""
    from trimkv_cli.engine.row_files import read_row

    state = read_row(Path(path), model_id=llm.facts.model_id, fingerprint=llm.fingerprint)
    llm.restore(state, path)
    return state


def next_turn(llm: Engine, path: str, user: str, *, params: SamplingParams, think: bool | None) -> Request:
    """Put a saved read back into the cache and return the request that asks about it; raises as `read_row` does."""
    from trimkv_cli.commands.prompts import need_text

    state = restore_read(llm, path)
    ids = need_text(llm.text).render_turn(
        user, last_token_id=state.last_token, eos_token_ids=llm.facts.eos_token_ids, think=think
    )
    return Request(id="ask", prompt_token_ids=tuple(ids), params=params, keep=True, continues=path)
