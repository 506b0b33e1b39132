"""The house: which rooms the package has, on which floor each lies, and what the imports between them really are.

This list is the only one: `tests/unit/test_house.py` judges every import by it, and the drawing of docs/architecture.md
is made from it and from the code. `python docs/hooks/house.py` prints the floors.
"""

import ast
import itertools
import re
import tomllib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "mllm_assets"
GROUND = "(top level)"
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft")

# From the roof down: a room may import what is listed below it, and nothing else
ROOMS: Mapping[str, str] = {
    "cli": "the commands of `mllm-assets`, and the board's page",
    "defs": "the shipped datasets, models, recipes and resources, in YAML",
    "components": "the assets, checks, sensors and resources: all that knows Dagster",
    "operations": "what doctor, gc and the alerts look at",
    "store": "the artefact store: objects by digest, and a mirror of what a dataset, run or release is made of",
    "releases": "versions of a model, the judgement before each, its card, the push to the Hub",
    "evaluation": "predictions, metrics, intervals and gates; the gallery and the comparison of two runs",
    "inference": "a model answers: in batches, on a page, over OpenAI's protocol",
    "training.loop": "the steps: trainer, loss, checkpoints as deltas, memory, reporting",
    "training.caches": "what the frozen part computes, kept by content",
    "training.encoding": "a row becomes tokens, labels and pixels; rows become a batch",
    "training.models": "loading, freezing, quantisation, devices; the tiny model",
    "training.runs": "the name, fingerprint and directory of a run; the models that runs start from",
    "data.curate": "splits by duplicate groups, their checks and leaks; publishing and registering them",
    "data.quality": "measurements and verdicts of every sample, in DuckDB",
    "data.ingest": "any source, folder or Hub, becomes one Parquet file",
    "data.sharegpt": "LLaMA-Factory's data directory, read strictly",
    "sample_data": "800 emoji, and how their file is made",
    "worker": "the process that has torch: its tasks, start, supervision and protocol",
    "hub": "the Hub's API: tokens, retries, snapshots",
    "recipe": "a LLaMA-Factory recipe: its keys, rules and reader",
    "families": "what differs between families of models",
    "project": "a project's files and the commands that messages advise in it",
    GROUND: "errors, redaction, artefacts, layout, settings, plugins, tables, pages",
}
# Outside of the packages that pyproject.toml names, and why it does not matter there
LATE_IMPORTS = {
    "data/ingest/hub_stream.py": "`datasets` streams a repository without Parquet files, in the step that ingests it",
    "families/video_slots.py": "transformers' arithmetic of frame sizes, asked by the worker only",
    "families/image_slots.py": "transformers' arithmetic of image sizes, asked by the worker only",
}


@dataclass(frozen=True, kw_only=True)
class Import:
    """A module imports another one; both are paths relative to the package."""

    line: int
    source: Path
    target: Path


@dataclass(frozen=True, kw_only=True)
class House:
    """What a package's files say."""

    num_lines: Mapping[Path, int]
    imports: tuple[Import, ...]
    heavy: frozenset[Path]  # files that import torch and its like, wherever in the file


def read_house(package_dir: Path) -> House:
    """Read every module of a package: each import counts, also inside a function or under `TYPE_CHECKING`."""
    files = {_module_name(package_dir, path): path.relative_to(package_dir) for path in package_dir.rglob("*.py")}
    num_lines, imports, heavy = {}, [], set()
    for source in sorted(files.values()):
        text = (package_dir / source).read_text(encoding="utf-8")
        num_lines[source] = len(text.splitlines())
        for name, line in _imported(ast.parse(text)):
            target = files.get(name) or files.get(name.rpartition(".")[0])
            if target and target != source:
                imports.append(Import(line=line, source=source, target=target))
            if name.partition(".")[0] in HEAVY:
                heavy.add(source)
    return House(num_lines=num_lines, imports=tuple(imports), heavy=frozenset(heavy))


def _module_name(package_dir: Path, path: Path) -> str:
    parts = path.relative_to(package_dir.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that may be modules: `from a.b import c` may mean `a.b.c` or `c` of `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(path: Path) -> str:
    """The room of a file: its folder, of `data/` and `training/` the folder within; `definitions.py` loads `defs/`."""
    if path == Path("definitions.py"):
        return "defs"
    folders = path.parts[:-1]
    return ".".join(folders[: 2 if folders[0] in ("data", "training") else 1]) if folders else GROUND


def violations(house: House) -> list[str]:
    """One line for each import that runs upward and for each circle; both name the files."""
    floors = {room: floor for floor, room in enumerate(ROOMS)}
    found = []
    for edge in house.imports:
        source, target = room_of(edge.source), room_of(edge.target)
        unknown = [room for room in (source, target) if room not in floors]
        if unknown:
            found.append(f"{edge.source}:{edge.line}: {unknown[0]} is not a room. Add it to ROOMS, on its floor.")
        elif floors[source] > floors[target]:
            found.append(
                f"{edge.source}:{edge.line} imports {edge.target}, which runs upward: {source} lies below {target}. "
                "Move what both need to the lower floor, or hand it in as an argument."
            )
    return found + [f"{' -> '.join(map(str, circle))}: a circle. Move what both need into a third file."
                    for circle in _circles(house.imports)]  # fmt: skip


def _circles(imports: Iterable[Import]) -> list[list[Path]]:
    """The shortest circle through each import that lies on one, each circle once."""
    targets: dict[Path, set[Path]] = {}
    for edge in imports:
        targets.setdefault(edge.source, set()).add(edge.target)
    circles: dict[frozenset[Path], list[Path]] = {}
    for start in sorted(targets):
        paths, queue = {start: [start]}, deque([start])
        while queue:
            at = queue.popleft()
            for target in sorted(targets.get(at, ())):
                if target == start:
                    circles.setdefault(frozenset(paths[at]), [*paths[at], start])
                    queue.clear()
                    break
                if target not in paths:
                    paths[target] = [*paths[at], target]
                    queue.append(target)
    return list(circles.values())


def torch_globs(pyproject: Path) -> list[str]:
    """Where pyproject.toml lets a file of the package import torch at its top."""
    ignores = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]["per-file-ignores"]
    return [glob for glob, rules in ignores.items() if glob.startswith(f"{PACKAGE}/") and "TID253" in rules]


def matched(glob: str, repository: Path) -> set[Path]:
    """The files of a glob with `{one,or,other}` in it, relative to the package."""
    parts = [part.split(",") for part in re.split(r"[{}]", glob)]
    texts = ("".join(choice) for choice in itertools.product(*parts))
    return {path.relative_to(repository / PACKAGE) for text in texts for path in repository.glob(text)}


# The drawing


@dataclass(frozen=True, kw_only=True)
class Room:
    name: str
    holds: str
    num_files: int
    num_lines: int
    num_heavy: int

    @property
    def size(self) -> str:
        return f"{self.num_files} file{'s' if self.num_files != 1 else ''}, {self.num_lines:,} lines"


def rooms(house: House) -> list[Room]:
    """The rooms from the roof down, with what lies in each."""
    files = {name: [path for path in house.num_lines if room_of(path) == name] for name in ROOMS}
    return [
        Room(
            name=name,
            holds=holds,
            num_files=len(files[name]),
            num_lines=sum(house.num_lines[path] for path in files[name]),
            num_heavy=sum(path in house.heavy for path in files[name] if path.as_posix() not in LATE_IMPORTS),
        )
        for name, holds in ROOMS.items()
    ]


def room_imports(house: House) -> Counter[tuple[str, str]]:
    """How many imports of files lead from a room to another one; a file that is named twice by a file counts once."""
    pairs = {(edge.source, edge.target) for edge in house.imports}
    counts = Counter((room_of(source), room_of(target)) for source, target in pairs)
    return Counter({(a, b): count for (a, b), count in counts.items() if a != b})


def drawing(house: House) -> str:
    """HTML: the floors with their rooms, and a table of which room imports which."""
    found = rooms(house)
    wings = {wing: [room for room in found if room.name.startswith(f"{wing}.")] for wing in ("data", "training")}
    above = list(itertools.takewhile(lambda room: room not in wings["training"], found))
    lines = ['<div class="house">', '<div class="house-flat">', *_boxes(above), "</div>"]
    for wing, inside in wings.items():
        lines += [f'<div class="house-wing"><p>{wing}/</p>', *_boxes(inside), "</div>"]
    ground = found[len(above) + sum(map(len, wings.values())) :]
    lines += ['<div class="house-flat house-ground">', *_boxes(ground), "</div>", "</div>", ""]
    total = f"{len(house.num_lines)} files, {sum(house.num_lines.values()):,} lines"
    lines += [f"<p>{total}. An orange edge marks a room in which files import torch.</p>", ""]
    return "\n".join([*lines, *_matrix(found, room_imports(house))]) + "\n"


def _boxes(some: Iterable[Room]) -> Iterator[str]:
    for room in some:
        heavy = f", torch in {room.num_heavy}" if room.num_heavy else ""
        mark = " house-torch" if heavy else ""
        name = room.name if room.name == GROUND else room.name.rpartition(".")[2] + "/"
        holds = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(room.holds))
        yield f'<div class="house-room{mark}"><b>{name}</b><small>{room.size}{heavy}</small><span>{holds}</span></div>'


def _matrix(found: list[Room], counts: Mapping[tuple[str, str], int]) -> Iterator[str]:
    """Rows import columns; as nothing runs upward, all counts lie on one side of the diagonal."""
    yield '<table class="house-imports"><thead><tr><th></th>'
    yield from (f"<th><span>{room.name}</span></th>" for room in found)
    yield "</tr></thead><tbody>"
    for row, importer in enumerate(found):
        cells = []
        for column, target in enumerate(found):
            count = counts.get((importer.name, target.name), 0)
            title = f' title="{importer.name} imports {target.name}: {count}"' if count else ""
            kind = "same" if row == column else "some" if count else "none"
            cells.append(f'<td class="house-{kind}"{title}>{count or ""}</td>')
        yield f"<tr><th>{importer.name}</th>{''.join(cells)}</tr>"
    yield "</tbody></table>"


def main() -> None:
    """Print the floors, for a terminal."""
    for room in rooms(read_house(REPOSITORY / PACKAGE)):
        print(f"{room.name:18} {room.size:>22}  {'torch' if room.num_heavy else '':5}  {room.holds}")


if __name__ == "__main__":
    main()
