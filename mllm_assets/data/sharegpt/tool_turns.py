"""Turns of tools: which tag has which role, and OpenAI's notation as LLaMA-Factory reads it.

Source: llamafactory 0.9.5, `data/converter.py`.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from mllm_assets.data.sharegpt.conversation import ASSISTANT, FUNCTION, OBSERVATION, USER, content_text

# what LLaMA-Factory writes between the results of several calls, which are one message to it
_BETWEEN_RESULTS = "\n</tool_response>\n<tool_response>\n"
Numbered = tuple[int, Any]  # a turn, and its number in the row


def roles_by_tag(tags: Mapping[str, str]) -> dict[Any, str]:
    """Which role each tag is for; a tag that the entry does not name is of none."""
    named = {tags.get("observation_tag"): OBSERVATION, tags.get("function_tag"): FUNCTION}
    spoken = {tags.get("user_tag", "human"): USER, tags.get("assistant_tag", "gpt"): ASSISTANT}
    return {**spoken, **{tag: role for tag, role in named.items() if tag is not None and tag not in spoken}}


def called(turn: Any, tags: Mapping[str, str]) -> Any:
    """An answer with `tool_calls` as a function message; any other turn as it is."""
    role_tag, content_tag, function_tag = tags.get("role_tag"), tags.get("content_tag"), tags.get("function_tag")
    if not isinstance(turn, dict) or not turn.get("tool_calls") or function_tag is None:
        return turn
    if turn.get(role_tag) not in (tags.get("assistant_tag"), function_tag):
        return turn
    calls = turn["tool_calls"]
    if not isinstance(calls, list) or not all(isinstance(call, dict) and "function" in call for call in calls):
        return turn
    content = json.dumps([call["function"] for call in calls], ensure_ascii=False)
    return {role_tag: function_tag, content_tag: content}


def with_joined_observations(turns: Iterable[Numbered], tags: Mapping[str, str]) -> list[Numbered]:
    """Results of several calls that follow each other as one message."""
    role_tag, content_tag, tag = tags.get("role_tag"), tags.get("content_tag"), tags.get("observation_tag")

    def is_result(numbered: Numbered) -> bool:
        turn = numbered[1]
        return tag is not None and isinstance(turn, dict) and turn.get(role_tag) == tag and content_tag in turn

    joined: list[Numbered] = []
    for is_of_tool, group in groupby(turns, key=is_result):
        some = list(group)
        texts = [content_text(turn[content_tag]) for _, turn in some] if is_of_tool else []
        if len(texts) > 1 and all(isinstance(text, str) for text in texts):
            some = [(some[0][0], {role_tag: tag, content_tag: _BETWEEN_RESULTS.join(texts)})]
        joined += some
    return joined


def tools_of(value: Any) -> str | None:
    """What a row's column of tools holds as JSON text; None if it is neither that nor a list."""
    if not value:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else None
