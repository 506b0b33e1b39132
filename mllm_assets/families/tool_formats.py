"""How tools, and the calls of them, are written into a conversation: LLaMA-Factory's formats.

An entry's `tools` are a JSON list of functions with their parameters; the content of a function message is JSON too,
one call with `name` and `arguments` or a list of them, and may have reasoning before it. Which words the model reads
depends on the family. Source: llamafactory 0.9.5, `data/tool_utils.py` and `data/formatter.py`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_assets.errors import DataError

_QUOTE = '<|"|>'  # Gemma 4's
DEFAULT_REASONING = ("<think>\n", "\n</think>\n\n")  # of formats that do not name their own
_CALL = re.compile("<tool_call>(.*?)</tool_call>", re.DOTALL)

_IN_WORDS = (
    "You have access to the following tools:\n{tools}Use the following format if using a tool:\n```\n"
    "Action: tool name (one of [{names}])\n"
    "Action Input: the input to the tool, in a JSON format representing the kwargs "
    '(e.g. ```{{"input": "hello world", "num_beams": 5}}```)\n```\n'
)
_QWEN = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
_QWEN35 = (
    "\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>{tools}\n</tools>\n\n"
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: "
    "an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language "
    "BEFORE the function call, but NOT after\n"
    "- If there is no function call available, answer the question like normal with your current knowledge "
    "and do not tell the user about function calls\n</IMPORTANT>"
)


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the model calls; `arguments` are JSON, mostly an object."""

    name: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """What describes the tools after the system text, and what calls them in an answer."""

    describe: Callable[[Sequence[Mapping[str, Any]]], str]
    call: Callable[[Sequence[Call]], str]


def tools_text(name: str, tools: str, where: str) -> str:
    """What follows the system text of a row with tools; nothing for an empty list.

    Raises:
        DataError: The tools are not a JSON list of functions with what the format shows of them.
    """
    try:
        found = json.loads(tools)
    except ValueError:
        raise DataError(f"{where}: its tools are not JSON. Write them as a list of functions.") from None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise DataError(f"{where}: its tools should be a list of functions, got {tools:.60}. Correct the row.")
    if not found:
        return ""
    try:
        return FORMATS[name].describe(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: its tools lack {error}. A tool is an object with name, description and parameters, which have "
            "properties."
        ) from None


def call_text(name: str, content: str, where: str, *, reasoning: tuple[str, str] | None) -> str:
    """A function message as the model writes it, its reasoning first.

    Args:
        name: The format's.
        content: JSON of the calls, with reasoning before it, or other text where the JSON is inside `<tool_call>`.
        where: For messages.
        reasoning: What opens and closes reasoning; None for a format that knows neither that nor `<tool_call>`.

    Raises:
        DataError: There is no JSON in it with a name and arguments.
    """
    before, calls = "", content
    if reasoning and (inside := _CALL.search(content)):
        before, calls = content.replace(inside.group(), ""), inside[1]
    elif reasoning:
        opening, closing = map(re.escape, reasoning)
        if thought := re.search(f"{opening}(.*?){closing}", content, re.DOTALL):
            before, calls = thought.group(), content.replace(thought.group(), "")
    try:
        found = json.loads(calls)
        read = [Call(call["name"], call["arguments"]) for call in (found if isinstance(found, list) else [found])]
        return before + FORMATS[name].call(read)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f'{where}: expected a call as JSON, {{"name": ..., "arguments": ...}} or a list of them, got {calls:.60}. '
            "Correct the row."
        ) from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return tool["function"] if tool.get("type") == "function" else tool


def _tools_in_words(tools: Sequence[Mapping[str, Any]]) -> str:
    functions, texts = [_function(tool) for tool in tools], []
    for function in functions:
        parameters = function["parameters"]
        lines = []
        for name, shape in parameters["properties"].items():
            needed = ", required" if name in parameters.get("required", []) else ""
            choice = f", should be one of [{', '.join(shape['enum'])}]" if shape.get("enum") else ""
            items = f", where each item should be {shape['items'].get('type', '')}" if shape.get("items") else ""
            told = shape.get("description", "")
            lines.append(f"  - {name} ({shape.get('type', '')}{needed}): {told}{choice}{items}\n")
        described = function.get("description", "")
        texts.append(f"> Tool Name: {function['name']}\nTool Description: {described}\nTool Args:\n{''.join(lines)}\n")
    return _IN_WORDS.format(tools="".join(texts), names=", ".join(function["name"] for function in functions))


def _calls_in_words(calls: Sequence[Call]) -> str:
    return "\n".join(f"Action: {call.name}\nAction Input: {_json(call.arguments)}" for call in calls)


def _qwen_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    wrapped = [tool if tool.get("type") == "function" else {"type": "function", "function": tool} for tool in tools]
    return _QWEN.format(tools="".join(f"\n{_json(tool)}" for tool in wrapped))


def _qwen_calls(calls: Sequence[Call]) -> str:
    texts = [_json({"name": call.name, "arguments": call.arguments}) for call in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def _qwen35_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    return _QWEN35.format(tools="".join(f"\n{_json(_function(tool))}" for tool in tools))


def _qwen35_calls(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n<function={call.name}>{_qwen35_arguments(call)}\n</function>\n</tool_call>" for call in calls
    )


def _qwen35_arguments(call: Call) -> str:
    values = {key: value if isinstance(value, str) else _json(value) for key, value in call.arguments.items()}
    return "".join(f"\n<parameter={key}>\n{value}\n</parameter>" for key, value in values.items())


def _gemma4_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(_gemma4_declaration(_function(tool)) for tool in tools)


def _gemma4_declaration(function: Mapping[str, Any]) -> str:
    text = f"declaration:{function['name']}{{description:{_QUOTE}{function.get('description', '')}{_QUOTE}"
    if parameters := function.get("parameters"):
        parts = []
        if properties := parameters.get("properties"):
            shapes = ",".join(f"{name}:{{{_gemma4_shape(shape)}}}" for name, shape in properties.items())
            parts.append(f"properties:{{{shapes}}}")
        if required := parameters.get("required"):
            parts.append(f"required:[{','.join(f'{_QUOTE}{name}{_QUOTE}' for name in required)}]")
        if kind := parameters.get("type"):
            parts.append(f"type:{_QUOTE}{str(kind).upper()}{_QUOTE}")
        text += f",parameters:{{{','.join(parts)}}}"
    if response := function.get("response"):
        parts = [f"description:{_QUOTE}{told}{_QUOTE}" for told in [response.get("description")] if told]
        if (kind := str(response.get("type", "")).upper()) == "OBJECT":
            parts.append(f"type:{_QUOTE}{kind}{_QUOTE}")
        text += f",response:{{{','.join(parts)}}}"
    return text + "}"


def _gemma4_shape(shape: Mapping[str, Any]) -> str:
    parts = [f"description:{_QUOTE}{told}{_QUOTE}" for told in [shape.get("description")] if told]
    return ",".join([*parts, *(f"type:{_QUOTE}{str(kind).upper()}{_QUOTE}" for kind in [shape.get("type")] if kind)])


def _gemma4_calls(calls: Sequence[Call]) -> str:
    return "".join(f"<|tool_call>call:{call.name}{{{_gemma4_arguments(call.arguments)}}}<tool_call|>" for call in calls)


def _gemma4_arguments(arguments: Any) -> str:
    if isinstance(arguments, dict):
        return ",".join(f"{key}:{_gemma4_value(arguments[key])}" for key in sorted(arguments))
    return arguments if isinstance(arguments, str) else _gemma4_value(arguments)


def _gemma4_value(value: Any) -> str:
    if isinstance(value, str):
        return f"{_QUOTE}{value}{_QUOTE}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_gemma4_value(value[key])}" for key in sorted(value)) + "}"
    return f"[{','.join(map(_gemma4_value, value))}]" if isinstance(value, list) else str(value)


FORMATS: Mapping[str, ToolFormat] = {
    "default": ToolFormat(_tools_in_words, _calls_in_words),
    "qwen": ToolFormat(_qwen_tools, _qwen_calls),
    "qwen3_5": ToolFormat(_qwen35_tools, _qwen35_calls),
    "gemma4": ToolFormat(_gemma4_tools, _gemma4_calls),
}
