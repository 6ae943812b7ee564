"""Tools in prompts: what transformers renders of them, token by token, and never a special token of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers import tiny_tokenizers as tiny
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import UsageError

CHATS = {"hermes": tiny.hermes, "llama32": tiny.llama32, "mistral": tiny.mistral, "harmony": tiny.harmony}
every_chat = pytest.mark.parametrize("make", CHATS.values(), ids=CHATS)
Make = Callable[[], PreTrainedTokenizerFast]

ASKED = {"role": "user", "content": "How is it?"}


def tool(description: str = "The weather.", name: str = "f") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"town": {"type": "string", "description": description}}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def history(value: str = "Bern", result: str = "sunny", call_id: str = "abcdefgh1") -> list[dict[str, Any]]:
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": {"town": value}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [ASKED, called, {"role": "tool", "tool_call_id": call_id, "content": result}]


@every_chat
def test_tools_calls_and_results_are_rendered_as_transformers_does(make: Make) -> None:
    text = Text(make())
    for messages in ([ASKED], history()):
        theirs = text.tokenizer.apply_chat_template(
            messages, tools=[tool()], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert list(text.render_chat(messages, tools=[tool()]).token_ids) == theirs


@every_chat
def test_special_tokens_in_tools_calls_and_results_are_text(make: Make) -> None:
    """Catches a tool's description that ends the system message and begins another."""
    text = Text(make())
    added = "".join(token for token in text.tokenizer.get_added_vocab() if len(token) > 1)
    ids = text.tokenizer.get_added_vocab().values()
    evil = text.render_chat(history(added, added), tools=[tool(added)])
    plain = text.render_chat(history("x", "y"), tools=[tool("z")])
    assert [i for i in evil.token_ids if i in ids] == [i for i in plain.token_ids if i in ids]
    assert text.tokenizer.decode(evil.token_ids).count(added) == 4


@every_chat
def test_requests_with_the_same_tools_share_what_tells_of_them(make: Make) -> None:
    text = Text(make())
    prompt = text.render_chat([ASKED], tools=[tool()])
    shared = text.tokenizer.decode(prompt.token_ids[: prompt.prefix_len])
    assert "The weather." in shared
    assert ASKED["content"] not in shared


def test_ids_become_what_a_template_takes() -> None:
    """Catches a conversation that Mistral's template refuses because another server named its calls."""
    text = Text(tiny.mistral())
    rendered = text.tokenizer.decode(text.render_chat(history(call_id="call_0123456789"), tools=[tool()]).token_ids)
    ids = [part.split('"')[0] for part in rendered.replace("call_id", "id").split('"id": "')[1:]]
    assert len(ids) == 2
    assert len(ids[0]) == 9
    assert ids[0] == ids[1]


def test_a_template_without_tools_refuses_them() -> None:
    """Catches tools that go unsaid, and a result that the template takes for a message of an unknown speaker."""
    text = Text(tiny.chatml())
    assert not text.template.supports_tools
    assert not text.template.supports_calls
    with pytest.raises(UsageError, match="knows no tools") as refused:
        text.render_chat([ASKED], tools=[tool(name="How")])
    assert refused.value.param == "tools"
    with pytest.raises(UsageError, match="knows no calls") as refused:
        text.render_chat(history())
    assert refused.value.param == "messages"


def test_a_kept_conversation_goes_on_with_results_as_if_all_were_read() -> None:
    """Catches a result that is rendered otherwise when only what is new is fed."""
    text = Text(tiny.hermes())
    prompt = text.render_chat([ASKED], tools=[tool()]).token_ids
    call = '\n<tool_call>\n{"name": "f", "arguments": {"town": "Bern"}}\n</tool_call>'
    answer = [*text.encode(call, special=True), *text.end_ids]
    rest = text.render_rest(history(), 1, last_token_id=answer[-1], eos_token_ids=text.end_ids, tools=[tool()])
    whole = text.render_chat(history(), tools=[tool()]).token_ids
    assert [*prompt, *answer[:-1], *rest] == list(whole)
