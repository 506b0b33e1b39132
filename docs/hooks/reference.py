"""The reference pages: what the code itself says of its recipe keys, commands, YAML and assets."""

import argparse
import dataclasses
import json
import os
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal

from metadata_keys import COST_KEYS, METADATA_KEYS, PROGRESS_KEYS
from recipe_keys import KEY_SENTENCES

from mllm_assets.cli import _parser
from mllm_assets.data.ingest.flags import PROBES
from mllm_assets.data.ingest.kinds import KINDS
from mllm_assets.data.ingest.spec import QualitySpec
from mllm_assets.evaluation.gates import GATES
from mllm_assets.evaluation.scores import METRICS, definitions
from mllm_assets.families.family import FAMILIES
from mllm_assets.recipe.keys import ALIASES, KEYS, Key


def recipe_keys() -> str:
    """Every key of LLaMA-Factory's SFT arguments, by what becomes of it."""
    supported = {name: key for name, key in sorted(KEYS.items()) if key.status == "supported"}
    lines = [
        "# Recipe keys",
        "",
        f"All {len(KEYS)} keys of LLaMA-Factory's SFT arguments. A key that is not here is refused, with the nearest",
        "known one; a recipe is checked whole before anything runs.",
        "",
        f"## Supported ({len(supported)})",
        "",
        *_table(
            ("key", "what it does", "type", "default"),
            (
                (f"`{name}`", KEY_SENTENCES[name], _type(key.annotation), _default(key))
                for name, key in supported.items()
            ),
        ),
        "",
        "Older names: " + ", ".join(f"`{old}` is `{alias.name}`" for old, alias in sorted(ALIASES.items())) + ".",
    ]
    for status, title, text in (
        ("no_effect", "Without effect", "Accepted, and named before the run starts where they ask for something."),
        ("refused", "Refused", "Where they ask for more than the default."),
    ):
        keys = {name: key for name, key in KEYS.items() if key.status == status}
        lines += ["", f"## {title} ({len(keys)})", "", text, ""]
        lines += _table(("why", "keys"), ((note, ", ".join(names)) for note, names in _by_note(keys)))
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Every command's own help."""
    os.environ["COLUMNS"] = "110"
    lines = ["# Commands", "", "`mllm-assets`, beside `dg` and `dagster`; each command's own `--help`."]
    for name, parser in _subcommands(_parser()):
        lines += ["", f"## {name}", "", "```text", parser.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def yaml_keys() -> str:
    """The attributes of each component, from the model that Dagster validates the YAML with."""
    from mllm_assets import components

    lines = [
        "# YAML of the components",
        "",
        "`attributes:` of a `defs.yaml`. `mllm-assets check-graph` names file and line of a mistake.",
    ]
    for name in sorted(components.__all__):
        component = getattr(components, name)
        model = component.get_model_cls()
        assert model is not None
        schema = model.model_json_schema()
        lines += ["", f"## mllm_assets.components.{name}", "", (component.__doc__ or "").strip().split("\n\n")[0]]
        for title, properties, required in _objects(schema):
            lines += ["", f"### {name}: `{title}`", ""] if title else [""]
            rows = (
                (
                    f"`{key}`",
                    _json_type(found),
                    "required" if key in required else _yaml_default(found),
                    _one_line(found["description"]),
                )
                for key, found in properties.items()
            )
            lines += _table(("key", "type", "default", ""), rows)
    return "\n".join(lines) + "\n"


def assets() -> str:
    """The assets of a dataset, a model and a recipe, with their checks, from the shipped graph."""
    import dagster as dg

    from mllm_assets.definitions import defs

    shipped = defs()
    graph = shipped.resolve_asset_graph()
    specs = {spec.key: spec for spec in shipped.resolve_all_asset_specs()}
    lines = ["# Assets and checks", "", "In the order in which they are made, each by an example of the shipped graph."]
    for prefix, title in (("emoji", "A dataset"), ("pretrained", "A model"), ("emoji_projector_sft", "A recipe")):
        keys = [key for key in graph.toposorted_asset_keys if key.path[0] == prefix and key in specs]
        keys = keys[:1] if prefix == "pretrained" else keys
        rows = (
            (
                f"`{key.to_user_string()}`",
                ", ".join(sorted(specs[key].kinds)),
                specs[key].group_name or "",
                _one_line((specs[key].description or "").split("\n\nNote:")[0]),
            )
            for key in keys
        )
        lines += ["", f"## {title}", "", *_table(("asset", "kinds", "group", ""), rows)]
        checks = sorted((key for key in graph.asset_check_keys if key.asset_key in keys), key=str)
        found = ((f"`{k.asset_key.to_user_string()}`", f"`{k.name}`", *_check(graph, k)) for k in checks)
        if checks:
            lines += ["", *_table(("asset", "check", "blocking", ""), found)]
    lines += [
        "",
        "## Metadata",
        "",
        "What a materialisation says, in the order of the page. `*` is a dataset's or a recipe's name.",
        "Figures are plotted over time; what is empty is left out. Paths, digests and whatever else is wider than the",
        "page's column at 1280 pixels are in the window `details`, as JSON, under the names below.",
    ]
    for name, keys in METADATA_KEYS.items():
        title = "pretrained/*" if name == "pretrained" else f"*/{name}"
        lines += ["", f"### {title}", "", *_table(("key", ""), ((f"`{key}`", text) for key, text in keys.items()))]
    lines += ["", "### Cost", "", "Of every asset. The released model and its card have the sums of its line.", ""]
    lines += _table(("key", ""), ((f"`{key}`", text) for key, text in COST_KEYS.items()))
    lines += ["", "### Progress", "", "Every few seconds while a worker runs, as an observation of its asset.", ""]
    lines += _table(("key", ""), ((f"`{key}`", text) for key, text in PROGRESS_KEYS.items()))
    assert isinstance(shipped, dg.Definitions)
    return "\n".join(lines) + "\n"


def registered() -> str:
    """What is registered: model families, metrics, gates, kinds of source and quality probes."""
    told = definitions()
    defaults = {field.name: field.default for field in dataclasses.fields(QualitySpec)}
    better = {True: "higher", False: "lower"}
    tables = {
        "Model families": (
            ("family", "`model_type`", "`template`", "for example", "vision features", "hidden states", "packing"),
            (
                (f.name, f"`{f.model_type}`", ", ".join(f"`{name}`" for name in f.templates), f"`{f.example}`",
                 *("yes" if has else "no" for has in (f.vision_cut, f.caches_hidden_states, f.packed_masks)))
                for f in FAMILIES.values()
            ),
        ),
        "Metrics": (
            ("metric", "unit", "better", "headline", ""),
            (
                (f"`{m.name}`", m.unit, better[m.higher_is_better], "yes" if m.headline else "no", told[m.name])
                for m in METRICS.values()
            ),
        ),
        "Gates": (("gate", "true when it passes"), ((f"`{gate.name}`", gate.claim) for gate in GATES.values())),
        "Sources": (("kind", ""), ((f"`{kind.name}`", kind.description) for kind in KINDS.values())),
        "Quality probes": (
            ("flag", "key of the limit", "limit", "score, 0 to 1"),
            (
                (f"`{p.name}`", f"`{p.setting}`" if p.setting else "",
                 str(defaults[p.setting] if p.setting else p.limit), f"`{p.sql}`" if p.sql else "")
                for p in PROBES.values()
            ),
        ),
    }  # fmt: skip
    lines = [
        "# What is built in",
        "",
        "Each of these is one object that is registered in one place, also from outside of the package: a module with",
        "`register(Metric(...))` that `MLLM_ASSETS_PLUGINS` names (several separated by commas), or",
        '`plugins = ["my_project.plugins"]` below `[tool.mllm_assets]` in the `pyproject.toml` of the folder that',
        "commands are run in. Graph, commands, worker and decoders import it when they start. The functions are",
        "`mllm_assets.families.family.register`, `mllm_assets.evaluation.scores.register`,",
        "`mllm_assets.evaluation.gates.register`, `mllm_assets.data.ingest.kinds.register` and",
        "`mllm_assets.data.ingest.flags.register`.",
    ]
    for title, (header, rows) in tables.items():
        lines += ["", f"## {title}", "", *_table(header, rows)]
    return "\n".join(lines) + "\n"


def _check(graph: Any, key: Any) -> tuple[str, str]:
    node = graph.get(key)
    return ("yes" if node.blocking else "no"), _one_line(node.description or "")


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                nested = list(_subcommands(sub))
                yield from nested or [(sub.prog, sub)]


def _objects(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], set[str]]]:
    """The properties of a model and of the models within it, each once: title, properties, required keys."""
    yield "", schema["properties"], set(schema.get("required", ()))
    for name, found in schema.get("$defs", {}).items():
        if "properties" in found:
            yield name.removesuffix("Model"), found["properties"], set(found.get("required", ()))


def _yaml_default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    return "" if default == "__DAGSTER_UNSET_DEFAULT__" else f"`{json.dumps(default)}`"


def _json_type(schema: Mapping[str, Any]) -> str:
    """A type as YAML writers think of it; Dagster admits a template string everywhere, which says nothing."""
    if "$ref" in schema:
        return f"`{schema['$ref'].rsplit('/', 1)[-1].removesuffix('Model')}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        options = [s for s in schema["anyOf"] if s.get("type") not in ("string", "null")] or schema["anyOf"][:1]
        return " or ".join(dict.fromkeys(_json_type(option) for option in options))
    if schema.get("type") == "array":
        return f"list of {_json_type(schema.get('items', {}))}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"by name: {_json_type(values)}" if isinstance(values, dict) else "mapping"
    return schema.get("type", "any")


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (UnionType, typing.Union):
        return " or ".join(_type(option) for option in typing.get_args(annotation))
    return "null" if annotation is NoneType else getattr(annotation, "__name__", str(annotation))


def _default(key: Key) -> str:
    if key.default is dataclasses.MISSING:
        return "required"
    return f"`{json.dumps(key.default, default=str)}`"


def _by_note(keys: Mapping[str, Key]) -> Iterator[tuple[str, list[str]]]:
    for note in dict.fromkeys(key.note for key in keys.values()):
        yield note[:1].upper() + note[1:], [f"`{name}`" for name, key in keys.items() if key.note == note]


def _one_line(text: str) -> str:
    """A description on one line, its `<placeholders>` kept from being read as HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
