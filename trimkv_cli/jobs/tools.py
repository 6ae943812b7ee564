"""The functions that a request offers to the model, and what it asks of their calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trimkv_cli.errors import UsageError
from trimkv_cli.events import Notice
from trimkv_cli.jobs.bodies import Body, Message, ToolChoice
from trimkv_cli.jobs.formats import schema_form

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What the model is told of, in OpenAI's form, and which of it may or has to be called."""

    definitions: tuple[dict[str, Any], ...]
    callable: tuple[str, ...]  # the functions that may be called; () = the answer is text whatever it says
    forced: bool = False  # the answer is a call
    parallel: bool = True  # several calls may come of one answer

    def schema(self, name: str) -> dict[str, Any]:
        """Return the schema of a function's arguments; one without parameters takes none."""
        functions = (definition["function"] for definition in self.definitions)
        found = next(function for function in functions if function["name"] == name)
        return found.get("parameters") or NO_ARGUMENTS


def make_tools(body: Body) -> Tools | None:
    """Return the tools of a request; None where it has none.

    Raises:
        UsageError: tools that contradict each other or the rest of the request, by parameter.
    """
    choice = body.tool_choice
    forced = choice == "required" or isinstance(choice, ToolChoice)
    if not body.tools:
        if forced:
            raise _error("tool_choice", "there are no tools to call: give tools")
        return None
    if body.messages is None:
        raise _error("tools", "need messages, which the model's template tells of them")
    names = [tool.function.name for tool in body.tools]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise _error(f"tools[{place}].function.name", f"{name!r} is the name of an earlier one")
    _check_schemas(body, forced=forced)
    if isinstance(choice, ToolChoice):
        if choice.function.name not in names:
            known = ", ".join(names[:8])
            raise _error("tool_choice.function.name", f"no tool is called {choice.function.name[:64]!r}: {known}")
        names = [choice.function.name]
    if choice != "none" and body.response_format is not None and body.response_format.type != "text":
        raise _error("response_format", "a format cannot go with calls: leave it out, or tool_choice none")
    return Tools(
        definitions=tuple(tool.plain() for tool in body.tools),
        callable=() if choice == "none" else tuple(names),
        forced=forced,
        parallel=body.parallel_tool_calls is not False and not isinstance(choice, ToolChoice),
    )


def tool_notes(body: Body) -> Iterator[Notice]:
    """Yield what a reader of the answer should know of its tools."""
    if body.tool_choice in (None, "auto") and any(tool.function.strict for tool in body.tools or ()):
        message = "strict: arguments are held to their schema only where tool_choice makes the model call"
        yield Notice(code="tools", message=message)


def check_history(messages: list[Message]) -> None:
    """Raise when the calls and results of a conversation do not fit together.

    Raises:
        UsageError: naming the message's key.
    """
    called: set[str] = set()
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if message.role == "assistant":
            called |= {call.id for call in message.tool_calls or ()}
        elif message.tool_calls:
            raise _error(f"{where}.tool_calls", "are for messages of the assistant")
        if message.role != "tool":
            if message.tool_call_id:
                raise _error(f"{where}.tool_call_id", "is for messages of the role tool")
        elif not message.tool_call_id:
            raise _error(f"{where}.tool_call_id", "field required")
        elif message.tool_call_id not in called:
            raise _error(f"{where}.tool_call_id", f"no earlier message calls {message.tool_call_id[:64]!r}")


def _check_schemas(body: Body, *, forced: bool) -> None:
    """Refuse what is no schema; keywords that cannot be enforced matter only where a call is held to its schema."""
    for place, tool in enumerate(body.tools or ()):
        schema = tool.function.parameters
        where = f"tools[{place}].function.parameters"
        if schema and schema.get("type", "object") != "object":
            raise _error(where, 'the arguments of a function are an object: "type": "object"')
        try:
            if schema:
                schema_form(schema)
        except UsageError as error:
            if forced or "nimplemented" not in error.message:
                raise _error(where, error.message) from error


def _error(param: str, message: str) -> UsageError:
    return UsageError(f"{param}: {message}", param=param)
