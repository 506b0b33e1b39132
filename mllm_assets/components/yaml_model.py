"""The schema of a `defs.yaml`: names, types, defaults and help are written once, in a class and its docstring."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from inspect import cleandoc
from types import NoneType
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import dagster as dg
from pydantic import create_model


class YamlModel(dg.Model, dg.Resolvable):
    """Values of a `defs.yaml`. The `Attributes:` of a class's docstring are the help in editors and pages."""

    spec_class: ClassVar[type]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        # Dagster 1.13 drops the `Field(description=)` of a field with a default, and keeps a resolver's
        for name, text in attribute_docs(cls).items():
            info = cls.model_fields[name]
            info.metadata = [*info.metadata, dg.Resolver.default(description=text)]

    def to_spec(self) -> Any:
        """The dataclass that `yaml_of` was given. A null keeps the default, unless the field can be null.

        Raises:
            RecipeError: A value is not valid. Says which.
        """
        hints = get_type_hints(self.spec_class)
        values = {item.name: getattr(self, item.name) for item in fields(self.spec_class)}
        return self.spec_class(
            **{name: value for name, value in values.items() if value is not None or NoneType in get_args(hints[name])}
        )


class OneOf:
    """Marks a field whose schema names the keys of a registry, those of plugins too, as the known values."""

    def __init__(self, registry: Mapping[str, Any]) -> None:
        self._registry = registry

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema = handler(core_schema)  # also of the field as a whole, which may be a template: `{{ env.KIND }}`
        return {**schema, "enum": list(self._registry)} if "anyOf" not in schema else schema


def yaml_of(spec: type, **registries: Mapping[str, Any]) -> type[YamlModel]:
    """A base class with the fields of a dataclass. It checks types; `to_spec` checks what the dataclass does.

    So an invalid value fails only its own asset, and not the loading of all. `registries` are those whose keys are the
    values of a field.
    """
    hints = get_type_hints(spec)
    hints |= {name: Annotated[hints[name], OneOf(registry)] for name, registry in registries.items()}
    members: dict[str, Any] = {item.name: _member(item, hints[item.name]) for item in fields(spec)}
    form = create_model(spec.__name__, __base__=YamlModel, __doc__=spec.__doc__, **members)
    form.spec_class = spec
    return form


def _member(item: Field, hint: Any) -> tuple[Any, Any]:
    kind = _yaml_type(hint)
    if item.default is MISSING:
        return kind, ...
    return kind | None, list(item.default) if isinstance(item.default, tuple) else item.default


def _yaml_type(hint: Any) -> Any:
    """The type with lists instead of the tuples of a frozen dataclass."""
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]
    if tuple in [get_origin(part) for part in get_args(hint)]:
        first, *others = map(_yaml_type, get_args(hint))
        for other in others:
            first |= other
        return first
    return hint


def attribute_docs(owner: type) -> dict[str, str]:
    """The texts of the section `Attributes:` of a class's own docstring, each on one line."""
    _, _, section = cleandoc(owner.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
    section = re.split(r"\n(?=\S)", section, maxsplit=1)[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
