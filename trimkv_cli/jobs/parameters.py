"""Says what becomes of request parameters that the engine has no use for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
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

TOOLS = frozenset({"tools", "tool_choice", "functions", "function_call"})

# Known parameters that never change an answer here.
IDLE = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
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
