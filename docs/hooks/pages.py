"""Pages of the site that are not files of `docs/`: README, benchmarks, and a reference generated from the code."""

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from examples import examples  # noqa: E402
from house import drawing, read_house  # noqa: E402
from reference import assets, commands, recipe_keys, registered, yaml_keys  # noqa: E402

GENERATED = {
    "index.md": lambda: (REPOSITORY / "README.md").read_text(encoding="utf-8"),
    "contributing.md": lambda: (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    "changelog.md": lambda: (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"),
    "benchmarks.md": lambda: (REPOSITORY / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"),
    "reference/commands.md": commands,
    "reference/recipe-keys.md": recipe_keys,
    "reference/llamafactory-examples.md": examples,
    "reference/yaml.md": yaml_keys,
    "reference/assets.md": assets,
    "reference/built-in.md": registered,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, write in GENERATED.items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn links that hold in the repository into links that hold on the site."""
    if "<!-- the house -->" in markdown:
        markdown = markdown.replace("<!-- the house -->", drawing(read_house(REPOSITORY / "mllm_assets")))
    markdown = re.sub(r"\]\((?:\.\./)*docs/", "](", markdown)
    markdown = re.sub(r"\]\((?:\.\./)*benchmarks/RESULTS\.md", "](benchmarks.md", markdown)
    markdown = re.sub(r"\]\((?:\.\./)*README\.md", "](index.md", markdown)
    markdown = re.sub(r"\]\((?:\.\./)*(CONTRIBUTING|CHANGELOG)\.md", lambda m: f"]({m[1].lower()}.md", markdown)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)*(?:LICENSE|NOTICE)\)", r"`\1`", markdown)
