"""What litellm makes of an endpoint: whole and streamed answers, three choices, log probabilities, a schema, errors.

python -m venv build/litellm && build/litellm/bin/pip install litellm==1.110.2
trimkv serve mini --port 8012 &
build/litellm/bin/python kernels/bench/litellm_answers.py http://127.0.0.1:8012/v1 > litellm-mini.json

It runs in litellm's environment, of sixty packages, and imports nothing of trimkv. What fails ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from importlib.metadata import version
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no network

_ASKED = [{"role": "user", "content": "My cat is called Zubo. What is my cat called?"}]
_KIND = {"type": "json_schema", "json_schema": {"name": "cat", "schema": {"enum": ["Zubo", "Rex"]}, "strict": True}}


def answers(url: str) -> dict[str, Any]:
    """Ask for everything once; return what was said."""
    import litellm

    common: dict[str, Any] = {"model": "openai/mini", "api_base": url, "api_key": "none", "messages": _ASKED}
    sampled = {**common, "max_tokens": 8, "temperature": 3.0, "seed": 5}
    whole = litellm.completion(**sampled, n=3, logprobs=True, top_logprobs=2)
    streamed = [""] * 3
    for chunk in litellm.completion(**sampled, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    said = [choice.message.content for choice in whole.choices]
    _same("streamed", streamed, said)
    _same("async", [choice.message.content for choice in asyncio.run(_once(sampled)).choices], said)
    _same("log probabilities", [len(choice.logprobs["content"]) > 0 for choice in whole.choices], [True] * 3)
    counted = list(litellm.completion(**sampled, stream=True, stream_options={"include_usage": True}))
    _same("usage", counted[-1].usage.completion_tokens, whole.usage.completion_tokens // 3)
    chosen = litellm.completion(**common, response_format=_KIND, max_tokens=30).choices[0].message.content
    _same("schema", json.loads(chosen) in ("Zubo", "Rex"), True)
    stopped = litellm.completion(**common, temperature=0, stop=["called"], max_tokens=20).choices[0]
    _same("stop", ("called" in stopped.message.content, stopped.finish_reason), (False, "stop"))
    text = litellm.text_completion(
        model="text-completion-openai/mini", prompt="My cat is", api_base=url, api_key="none", max_tokens=4
    )
    refused = ""
    try:
        litellm.completion(**common, max_tokens=10**7)
    except litellm.ContextWindowExceededError as error:
        refused = type(error).__name__
    _same("an error", refused, "ContextWindowExceededError")
    return {"said": said, "schema": chosen, "stopped": stopped.message.content, "text": text.choices[0].text}


async def _once(sampled: dict[str, Any]) -> Any:
    import litellm

    return await litellm.acompletion(**sampled, n=3)


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise SystemExit(f"{what}: {found!r} instead of {wanted!r}")


def main() -> None:
    """Print a record."""
    record = {"command": "litellm_answers.py", "litellm": version("litellm"), "openai": version("openai")}
    print(json.dumps({**record, **answers(sys.argv[1])}, indent=2))


if __name__ == "__main__":
    main()
