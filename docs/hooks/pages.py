"""Pages of the site that are no files of `docs/`: README, benchmarks, and a reference generated from the code."""

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from reference import assets, commands, recipe_keys, yaml_keys  # noqa: E402

GENERATED = {
    "index.md": lambda: (REPOSITORY / "README.md").read_text(encoding="utf-8"),
    "benchmarks.md": lambda: (REPOSITORY / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"),
    "reference/commands.md": commands,
    "reference/recipe-keys.md": recipe_keys,
    "reference/yaml.md": yaml_keys,
    "reference/assets.md": assets,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, write in GENERATED.items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn links that hold in the repository into links that hold on the site."""
    markdown = re.sub(r"\]\((?:\.\./)*docs/", "](", markdown)
    markdown = re.sub(r"\]\((?:\.\./)*benchmarks/RESULTS\.md", "](benchmarks.md", markdown)
    markdown = re.sub(r"\]\((?:\.\./)*README\.md", "](index.md", markdown)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)*(?:LICENSE|NOTICE)\)", r"`\1`", markdown)
