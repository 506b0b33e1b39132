"""What is declared and switched off: it is in the graph, and ends at once with how to switch it on.

Lines that fetch gigabytes or need a licence or a GPU are off until somebody asks for them, so that "Materialize all" of
a new project makes what any machine can make.
"""

from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path

import dagster as dg

from mllm_assets.components.reporting import OFF


class SwitchesOn:
    """A component whose `enabled` switches on what is off by itself, where a line of it needs that."""

    @abstractmethod
    def switched_on(self, root: Path) -> Collection[str]:
        """Entries of `dataset_info.json` and directories of models that the lines that are on read."""


def switched_on(context: dg.ComponentLoadContext) -> set[str]:
    """What the project's components switch on."""
    components = context.component_tree.get_all_components(of_type=SwitchesOn)  # pyright: ignore[reportArgumentType]
    return {name for component in components for name in component.switched_on(context.project_root)}


def off_asset(asset: dg.AssetsDefinition, why: str) -> dg.AssetsDefinition:
    """An asset that ends at once with `why`; its keys, checks and edges stay.

    Its group is called `<group>_off`, so that a collapsed one says so too.
    """
    specs = [
        spec.merge_attributes(tags={OFF: ""}).replace_attributes(
            description=f"{why}\n\n{spec.description or ''}".strip(),
            group_name=f"{spec.group_name}_off",
            automation_condition=None,
        )
        for spec in asset.specs
    ]

    @dg.multi_asset(name=asset.op.name, specs=specs, check_specs=list(asset.check_specs))
    def off():  # Dagster wants an annotation that fits the number of keys, or none
        raise dg.Failure(description=why, allow_retries=False)

    return off


def off_text(name: str, why: str) -> str:
    return f"{name} is switched off: it {why}. Switch it on: mllm-assets enable {name}, or `enabled` in its defs.yaml"
