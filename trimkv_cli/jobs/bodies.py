"""The pydantic models of request bodies: which keys are honoured, and their types and ranges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

_UNIONS = {
    "prompt": ("text", "token_ids"),
    "logprobs": ("bool", "int", "constrained"),
    "tool_choice": ("mode", "named"),
}
_SAMPLING_KEYS = (
    "temperature",
    "top_p",
    "min_p",
    "top_h",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
)
MOST_CHOICES = 128


def _one_or_more_texts(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if value is None or isinstance(value, list):
        return value
    raise PydanticCustomError("text_or_list", "should be a string or a list of strings")


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise PydanticCustomError("text_or_parts", "should be a string or a list of text parts")


def _one_prompt(value: object) -> object:
    """Unwrap a list that holds one prompt; a list of numbers is a prompt of token ids."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise PydanticCustomError("several_prompts", "holds several prompts; give each a line of its own")
        value = value[0]
    if value is None or isinstance(value, str | list):
        return value
    raise PydanticCustomError("prompt", "should be a string or a list of token ids")


def _whole(value: object) -> object:
    """Take 8.0 for 8, as JSON Schema does: pandas and JavaScript write whole numbers so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_numbers(value: object) -> object:
    return [_whole(each) for each in value] if isinstance(value, list) else value


def _token_id(value: object) -> object:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        return value
    raise PydanticCustomError("token_id", "should be a token id, which is a whole number in quotes")


def _arguments(value: object) -> object:
    if isinstance(value, str | dict):
        return value
    raise PydanticCustomError("arguments", "should be a string with a JSON object")


def _legacy_role(value: object) -> object:
    if value == "function":
        raise PydanticCustomError("tools", "results of functions are messages of the role tool")
    return value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Whole = BeforeValidator(_whole)
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True), BeforeValidator(_whole_numbers)
]
_Prompt = Annotated[
    Annotated[str, Tag("text")] | Annotated[TokenIds, Tag("token_ids")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "token_ids"),
]


class Strict(BaseModel):
    """Take JSON types as they are: no "64" for 64, no 1 for true."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    def extras(self) -> Iterator[tuple[str, Any]]:
        """Yield the keys that the model does not name, with their values."""
        yield from (self.model_extra or {}).items()


class TextPart(Strict):
    """One part of a message; only text can be read."""

    type: Literal["text"]
    text: str


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """One of the tools that the model is told of."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """Return what chat templates are given: what was said of the function, but for how strictly it is meant."""
        function = self.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": self.type, "function": function}


class CalledFunction(Strict):
    """A function's name and its arguments, as the text of a JSON object or as one."""

    name: Name
    arguments: Annotated[str | dict[str, Any], BeforeValidator(_arguments)]


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """Return what chat templates are given, the arguments as an object where they are one."""
        arguments = self.function.arguments
        with contextlib.suppress(ValueError):
            said = orjson.loads(arguments) if isinstance(arguments, str) else arguments
            arguments = said if isinstance(said, dict) else arguments
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class Message(Strict):
    """One message of a conversation."""

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_legacy_role)]
    content: Annotated[list[TextPart], Field(min_length=1), BeforeValidator(_parts)]
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _calls(cls, value: Any) -> Any:
        """Let calls go without content, and refuse those of OpenAI's earlier form."""
        if isinstance(value, dict) and value.get("function_call"):
            raise PydanticCustomError("tools", "function_call is not supported: give tool_calls")
        if isinstance(value, dict) and value.get("tool_calls") and value.get("content") is None:
            return {**value, "content": ""}
        return value

    def plain(self) -> dict[str, Any]:
        """Return what chat templates know: developer is system, parts are joined by newlines."""
        role = "system" if self.role == "developer" else self.role
        said: dict[str, Any] = {"role": role, "content": "\n".join(part.text for part in self.content)}
        if self.tool_calls:
            said["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.role == "tool":
            said["tool_call_id"] = self.tool_call_id
        return said

    def parts(self) -> Iterator[Strict]:
        """Yield the objects that a message is made of."""
        yield from (self, *self.content)
        for call in self.tool_calls or ():
            yield from (call, call.function)


class TemplateOptions(BaseModel):
    """What may be passed on to the chat template."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    enable_thinking: bool | None = None


class JsonSchema(Strict):
    """A schema that the answer follows, as OpenAI's structured outputs name it."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer has to be; text may be anything."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChosenFunction(Strict):
    """The name of a function that has to be called."""

    name: str


class ToolChoice(Strict):
    """The one function that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


_ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[ToolChoice, Tag("named")],
    Discriminator(lambda value: "mode" if isinstance(value, str) else "named"),
]

Count = Annotated[int, Field(ge=1, lt=2**63), Whole]
TokenId = Annotated[str, BeforeValidator(_token_id)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(Strict):
    """One request: a prompt in one of three forms, and how to continue it; null means not given."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    prompt: Annotated[_Prompt | None, BeforeValidator(_one_prompt)] = None
    prompt_token_ids: TokenIds | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**63), Whole] | None = None  # −1 and 0 = off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_h: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), Whole] | None = None
    # a number only for /v1/completions
    logprobs: Annotated[bool | Annotated[int, Field(ge=0, le=20)] | None, Whole] = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    seed: Annotated[int, Field(gt=-(2**63), lt=2**63), Whole] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_one_or_more_texts)] = None
    ignore_eos: bool | None = None
    reasoning_budget: Annotated[int, Field(ge=0, lt=2**63), Whole] | None = None
    return_token_ids: bool | None = None
    special_tokens: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None

    def extras(self) -> Iterator[tuple[str, Any]]:
        """Yield those of messages, tools and formats too; empty values in messages say nothing."""
        yield from super().extras()
        for message in self.messages or ():
            for model in message.parts():
                yield from ((key, value) for key, value in model.extras() if value)
        for tool in self.tools or ():
            yield from (*tool.extras(), *tool.function.extras())
        if self.response_format is not None:
            for part in (self.response_format, self.response_format.json_schema):
                yield from () if part is None else part.extras()

    def sampling(self) -> dict[str, Any]:
        """Return what this body says about sampling, under the names of SamplingParams."""
        said: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING_KEYS}
        said["max_tokens"] = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        said["top_k"] = None if self.top_k is None else max(self.top_k, 0)
        said["stop"] = None if self.stop is None else tuple(self.stop)
        said["logit_bias"] = tuple((int(key), value) for key, value in (self.logit_bias or {}).items()) or None
        said["think_budget"] = self.reasoning_budget
        said["seed"] = None if self.seed is None else self.seed % 2**63
        return {name: value for name, value in said.items() if value is not None}


class BatchLine(Strict):
    """One line of the OpenAI batch format."""

    custom_id: Any = None
    method: Annotated[Literal["POST"], BeforeValidator(_upper)] = "POST"
    url: str
    body: dict[str, Any]


class SimpleLine(Body):
    """A body that is a line of its own."""

    id: Any = None
    custom_id: Any = None


def explain(error: ValidationError) -> list[tuple[str, str]]:
    """Return, for everything that is wrong, its path as `messages[0].content` and a sentence about it."""
    problems = error.errors(include_url=False, include_context=False)
    return [(param := _path(problem["loc"]), f"{param}: {_lower(problem)}") for problem in problems]


def _path(loc: tuple[int | str, ...]) -> str:
    """Join a location; the names of a union's members, which pydantic puts among them, are no keys and are left out."""
    members = _UNIONS.get(str(loc[0]), ())
    keys = loc[:1] + loc[2:] if len(loc) > 1 and str(loc[1]).startswith(members) and members else loc
    joined = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys if key != "[key]")
    return joined.removeprefix(".")


def _lower(error: ErrorDetails) -> str:
    message = error["msg"].replace("valid dictionary", "JSON object")
    return message[:1].lower() + message[1:]


# Known parameters that would change the answer, with the values at which they do not.
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "stream": (None, False),
    "stream_options": (None,),
    "prompt_logprobs": (None,),
    "length_penalty": (None, 1),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "echo": (None, False),
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "use_beam_search": (None, False),
    "min_tokens": (None, 0),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "continue_final_message": (None, False),
    "add_generation_prompt": (None, True),
}

INSTEAD: Mapping[str, str] = {"functions": "tools", "function_call": "tool_choice"}  # of OpenAI's earlier form

# Known parameters that never change an answer here.
IDLE = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


def is_harmless(name: str, value: object) -> bool:
    """Tell whether `name` at this value asks for nothing that is missing; 1 is 1.0, but not true."""
    return any(_kind(value) is _kind(harmless) and value == harmless for harmless in HARMLESS[name])


def _kind(value: object) -> type:
    return float if type(value) is int else type(value)
