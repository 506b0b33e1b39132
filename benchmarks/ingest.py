"""Images per CPU-second from a Parquet source to a training directory, and the memory it takes.

`python benchmarks/ingest.py [--images 1000] [--rounds 3]` compares, in turn, on the same made 512 px images:
- the usual script: `datasets` decodes each image, Pillow saves it as PNG, a JSON file names them;
- this project: ingest, measurements with decode check, splits; the processes that decode are counted;
- the same where the measurements are known: bytes pass through, nothing is decoded;
- `cp -r` of the same files, what the disk allows.
`--again` takes 10,000 images of 64 px through the line, and again after 1 % new ones: what is spent a second time.
`--memory` takes 10,000 and 100,000 images of 64 px from the source to `dataset_info.json`, each asset in a process of
its own, and prints its peak memory.
The tables on standard output are those of RESULTS.md. CPU time of imports is not counted, for either side.
"""

import argparse
import io
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mllm_assets.data.curate.checks import every_image_has_a_placeholder, splits_share_no_image
from mllm_assets.data.curate.register import register
from mllm_assets.data.curate.splits import split
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.decoding import end_workers
from mllm_assets.data.quality.report import write_report
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.layout import Layout

ASSETS = ("raw", "sample_quality", "splits", "dataset_info")
MIN_RATIO_MEASURED, MIN_RATIO_PASSED, MAX_MEMORY_RATIO = 8, 50, 1.2
WAYS = {
    "script": "the usual script: decode and save as PNG",
    "measured": "this project, decode check and measurements",
    "passed": "this project, measurements known",
    "cp": "`cp -r` of the same files",
}
WORDS = "red blue green small large cat dog tree house with a the on near under sitting standing running".split()


def picture(random: np.random.Generator, edge_px: int) -> Image.Image:
    """Soft shapes at several scales and a little noise, as a photo has."""
    total = np.zeros((edge_px, edge_px, 3), np.float32)
    for cells in (4, 16, 64):
        blocks = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(blocks.resize((edge_px, edge_px), Image.Resampling.BICUBIC), np.float32) / cells**0.5
    total *= 0.9
    total += random.normal(0, 2, total.shape).astype(np.float32)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def write_source(path: Path, count: int, edge_px: int, kind: str, *, first: int = 0) -> None:
    """A Parquet file as the Hub has them; row i is the same whatever `count` is."""
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())])
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema) as writer:
        pending: list[dict[str, Any]] = []
        for number in range(first, first + count):
            random = np.random.default_rng(number)
            buffer = io.BytesIO()
            options = {"quality": 90} if kind == "JPEG" else {"compress_level": 6 if edge_px > 64 else 1}
            picture(random, edge_px).save(buffer, kind, **options)
            text = f"{number} " + " ".join(random.choice(WORDS, 12))
            pending.append({"image": {"bytes": buffer.getvalue(), "path": None}, "text": text})
            if len(pending) == 500:
                writer.write_table(pa.Table.from_pylist(pending, schema=schema))
                pending = []
        if pending:
            writer.write_table(pa.Table.from_pylist(pending, schema=schema))


def made_spec(count: int) -> DatasetSpec:
    num_val = count // 10
    return DatasetSpec(
        name="made",
        source=SourceSpec(kind="parquet", path="source.parquet"),
        prompts=("What do you see?", "Describe this image."),
        split=SplitSpec(num_train=count - num_val, num_val=num_val),
    )


def run_script(root: Path, count: int) -> None:
    """What a download script does: shuffle, take the first, decode, save, name in JSON."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(root / "source.parquet"), cache_dir=str(root / "cache"))
    cpu_s = cpu_seconds()
    rows = rows.shuffle(seed=42)
    (root / "script" / "images").mkdir(parents=True)
    samples = []
    for number in range(count):
        row = rows[number]
        name = f"images/made_train_{number:06d}.png"
        row["image"].convert("RGB").save(root / "script" / name)
        messages = [
            {"role": "user", "content": "<image>What do you see?"},
            {"role": "assistant", "content": row["text"]},
        ]
        samples.append({"messages": messages, "images": [name]})
    (root / "script" / "train.json").write_text(json.dumps(samples, indent=2, ensure_ascii=False))
    print(json.dumps({"cpu_s": cpu_seconds() - cpu_s}))


def run_line(root: Path, count: int) -> None:
    """Ingest, assess and split; prints CPU seconds of each, and what was decoded and written."""
    layout, spec = Layout(root), made_spec(count)
    import scipy.sparse.csgraph  # noqa: F401

    with suppress(ImportError):
        import pandas  # noqa: F401  # pyarrow does at its first array, where it is installed, and so does `datasets`

    images = set(layout.images.iterdir()) if layout.images.is_dir() else set()
    marks = [cpu_seconds()]
    raw = ingest(spec, layout)
    marks.append(cpu_seconds())
    quality = assess(spec, layout, raw.directory, "run-1")
    end_workers()
    marks.append(cpu_seconds())
    split(spec, layout, raw.directory, quality.directory, "run-1")
    marks.append(cpu_seconds())
    result = dict(zip(("ingest_s", "assess_s", "split_s"), np.diff(marks).tolist(), strict=True))
    result |= {"cpu_s": marks[-1] - marks[0], "num_decoded": quality.num_decoded}
    result["num_written"] = len(set(layout.images.iterdir()) - images)
    print(json.dumps(result))


def run_asset(root: Path, count: int, asset: str) -> None:
    """What the body of one asset does, its checks included; prints the peak memory of this process in MiB."""
    layout, spec = Layout(root), made_spec(count)
    store = QualityStore(layout.quality_db)

    def made(kind: Path) -> Path:
        [directory] = (path.parent for path in kind.parent.glob("*/manifest.json"))
        return directory

    started_s = cpu_seconds()
    match asset:
        case "raw":
            ingest(spec, layout)
        case "sample_quality":
            result = assess(spec, layout, made(layout.raw(spec.name, "any")), "run-1")
            write_report(made(layout.raw(spec.name, "any")), result.directory)
            end_workers()
        case "splits":
            raw, quality = made(layout.raw(spec.name, "any")), made(layout.quality(spec.name, "any"))
            version = split(spec, layout, raw, quality, "run-1")
            assert every_image_has_a_placeholder(version.directory, layout.data).passed
            assert splits_share_no_image(version.directory, layout.data, store=store).passed
        case "dataset_info":
            register(spec, layout, made(layout.version(spec.name, "any")))
    peak_mib = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps({"peak_mib": peak_mib, "cpu_s": cpu_seconds() - started_s}))


def cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def in_process(action: str, root: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--action", action, "--root", str(root), "--images", str(count)]
    started_s = time.monotonic()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {**json.loads(output.splitlines()[-1]), "wall_s": time.monotonic() - started_s}


def forget(root: Path, *, measurements: bool) -> None:
    """Remove what a run made, but for the measurements where they are to be kept."""
    for path in (root / "data").glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif measurements or not path.name.startswith(("quality.duckdb", ".quality.duckdb")):
            path.unlink()


def copied(root: Path, files: Path) -> dict[str, Any]:
    shutil.rmtree(root / "copy", ignore_errors=True)
    cpu_s, started_s = cpu_seconds(), time.monotonic()
    subprocess.run(["cp", "-r", str(files), str(root / "copy")], check=True)
    return {"cpu_s": cpu_seconds() - cpu_s, "wall_s": time.monotonic() - started_s}


def compare(kind: str, count: int, rounds: int, edge_px: int, root: Path) -> bool:
    write_source(root / "source.parquet", count, edge_px, kind)
    mean_kib = (root / "source.parquet").stat().st_size / count / 1024
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        shutil.rmtree(root / "script", ignore_errors=True)
        taken["script"].append(in_process("script", root, count))
        forget(root, measurements=True)
        taken["measured"].append(in_process("line", root, count))
        forget(root, measurements=False)
        taken["passed"].append(in_process("line", root, count))
        taken["cp"].append(copied(root, Layout(root).images))
        assert taken["measured"][-1]["num_decoded"] == taken["passed"][-1]["num_written"] == count
        assert taken["passed"][-1]["num_decoded"] == 0
    more = max(count // 100, 1)
    write_source(root / "source.parquet", count + more, edge_px, kind)
    again = in_process("line", root, count + more)
    medians = {way: statistics.median(run["cpu_s"] for run in runs) * 1000 / count for way, runs in taken.items()}
    print(f"\n{count} {kind} images of {edge_px} px, {mean_kib:.0f} KiB each, {rounds} rounds in turn, medians\n")
    print("| | CPU ms an image | images per CPU-second | times the script |\n|---|---|---|---|")
    for way, title in WAYS.items():
        ratio = medians["script"] / medians[way]
        print(f"| {title} | {medians[way]:.2f} | {1000 / medians[way]:.0f} | {ratio:.1f} |")
    first = statistics.median(run["cpu_s"] for run in taken["measured"])
    print(
        f"\n{more} new samples ({100 * more / count:.0f} %) later: {again['num_decoded']} images decoded, "
        f"{again['num_written']} files written, {again['cpu_s']:.2f} CPU-seconds "
        f"({100 * again['cpu_s'] / first:.0f} % of the first time's {first:.2f})."
    )
    parts = {
        name: statistics.median(run[name] for run in taken["measured"]) * 1000 / count
        for name in ("ingest_s", "assess_s", "split_s")
    }
    print("Of the measured way: " + ", ".join(f"{name[:-2]} {value:.2f} ms" for name, value in parts.items()) + ".")
    ok = (again["num_decoded"], again["num_written"]) == (more, more)
    return (
        ok
        and medians["script"] / medians["measured"] >= MIN_RATIO_MEASURED
        and (medians["script"] / medians["passed"] >= MIN_RATIO_PASSED)
    )


def measure_again(root: Path, count: int) -> None:
    more = max(count // 100, 1)
    print(f"\n| {count:,} images of 64 px, CPU-seconds | ingest | assess | split | all | decoded |")
    print("|---|---|---|---|---|---|")
    for title, number in (("first", count), (f"with {more} new ones", count + more)):
        write_source(root / "source.parquet", number, 64, "PNG")
        result = in_process("line", root, number)
        parts = " | ".join(f"{result[name]:.2f}" for name in ("ingest_s", "assess_s", "split_s", "cpu_s"))
        print(f"| {title} | {parts} | {result['num_decoded']} |", flush=True)


def measure_memory(root: Path, counts: tuple[int, int]) -> bool:
    peaks_mib: list[list[int]] = []
    print(f"\n| images of 64 px, peak MiB | {' | '.join(ASSETS)} | CPU-seconds |")
    print("|---|" + "---|" * (len(ASSETS) + 1))
    for count in counts:
        made = root / str(count)
        write_source(made / "source.parquet", count, 64, "PNG")
        results = [in_process(asset, made, count) for asset in ASSETS]
        peaks_mib.append([result["peak_mib"] for result in results])
        cpu_s = sum(result["cpu_s"] for result in results)
        print(f"| {count:,} | {' | '.join(map(str, peaks_mib[-1]))} | {cpu_s:.1f} |", flush=True)
        shutil.rmtree(made)
    ratios = [many / few for few, many in zip(*peaks_mib, strict=True)]
    print(f"| ratio (bound: {MAX_MEMORY_RATIO}) | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} | |")
    return max(ratios) <= MAX_MEMORY_RATIO


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--edge-px", type=int, default=512)
    parser.add_argument("--kinds", nargs="+", default=["JPEG", "PNG"])
    parser.add_argument("--again", action="store_true", help="what 1 %% new samples cost, instead of speed")
    parser.add_argument("--again-images", type=int, default=10_000)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--memory-images", type=int, nargs=2, default=(10_000, 100_000))
    parser.add_argument("--action", choices=("script", "line", *ASSETS), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.action is not None:
        if arguments.action in ASSETS:
            run_asset(arguments.root, arguments.images, arguments.action)
        else:
            {"script": run_script, "line": run_line}[arguments.action](arguments.root, arguments.images)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if arguments.again:
            measure_again(root, arguments.again_images)
            passed = True
        elif arguments.memory:
            passed = measure_memory(root, tuple(arguments.memory_images))
        else:
            passed = all(
                [
                    compare(kind, arguments.images, arguments.rounds, arguments.edge_px, root / kind)
                    for kind in arguments.kinds
                ]
            )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
