"""Files of strangers: what none of their parts breaks must not break together, in memory, count or time."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mllm_assets.data.ingest import sources, tables
from mllm_assets.data.ingest.image_folder import read_metadata
from mllm_assets.data.ingest.source_rows import class_names
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.ingest.webdataset import _samples
from mllm_assets.data.sharegpt import row_files
from mllm_assets.data.sharegpt.conversation import as_conversation
from mllm_assets.data.sharegpt.entries import load_entry, read_dataset_info
from mllm_assets.data.sharegpt.json_text import LIMITS, JsonLimits, list_items
from mllm_assets.data.sharegpt.row_files import file_rows
from mllm_assets.errors import DataError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, write_source

pytestmark = pytest.mark.not_fast


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def add(archive: tarfile.TarFile, name: str, **fields: object) -> None:
    member = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(bytes(member.size)))


def sparse(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
        add(archive, "a.png", size=512, pax_headers=headers)


def headers_for_all(path: Path) -> None:
    parts = [tarfile.TarInfo.create_pax_global_header({f"k{n}": "x" * 100_000}) for n in range(40)]
    path.write_bytes(b"".join([*parts, tarfile.TarInfo("a.txt").tobuf(), bytes(1024)]))


def names_of_names(path: Path) -> None:
    link = tarfile.TarInfo("././@LongLink")
    link.type, link.size = tarfile.GNUTYPE_LONGNAME, 5
    path.write_bytes((link.tobuf() + b"aaaaa".ljust(512, b"\0")) * 5000)


def claims(size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        member = tarfile.TarInfo("a.png")
        member.size = size
        path.write_bytes(member.tobuf(format=tarfile.GNU_FORMAT) + bytes(1024))

    return write


def long_name(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        add(archive, "a" * 5000 + ".png")


@pytest.mark.attack("tar")
@pytest.mark.parametrize(
    ("write", "said"),
    [
        (sparse, "a sparse member, which is not read"),
        (headers_for_all, "headers of all members of more than 1,048,576 bytes"),
        (names_of_names, "recursion depth"),
        (claims(2**62), "it expands to more than 4.0 GiB"),
        (claims(-512), "it is cut off"),
        (claims(2**20), "a.png"),
        (long_name, "a name of 5,004 letters"),
    ],
)
def test_a_tar_that_is_not_what_it_says_is_one_line(tmp_path: Path, write: Callable[[Path], None], said: str) -> None:
    """The map of a sparse member was read to its end, and one that breaks off was a ValueError of the library."""
    write(tmp_path / "a.tar")
    with pytest.raises(DataError) as caught:
        list(_samples(tmp_path / "a.tar"))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


@pytest.mark.attack("tar")
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_passed_over(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a.png", type=kind, linkname="/etc/passwd")
        add(archive, "../../b.png", size=3)
    assert list(_samples(tmp_path / "a.tar")) == [("../../b", [("png", bytes(3))])]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.attack("tar")
def test_many_members_take_no_more_memory_than_one(tmp_path: Path) -> None:
    """tarfile keeps the header of each until the end: 300,000 of them in 160 KiB took 140 MiB."""
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
        file.write(folder.tobuf() * 40_000)
    assert peak_of(lambda: list(_samples(tmp_path / "a.tar.gz"))) < 8 * 2**20


@pytest.mark.attack("tar")
def test_damaged_headers_are_never_an_error_of_the_library(tmp_path: Path, record_property: Callable) -> None:
    import random

    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(4):
            add(archive, f"é{number}.png", size=3, pax_headers={"comment": "x"})
    whole, numbers = (tmp_path / "a.tar").read_bytes(), random.Random(1)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(numbers.randint(1, 8)):
            damaged[numbers.randrange(len(damaged) // 2)] = numbers.randrange(256)
        (tmp_path / "b.tar").write_bytes(damaged)
        try:
            list(_samples(tmp_path / "b.tar"))
        except DataError as error:
            assert "b.tar" in str(error)
    record_property("tries", 300)


@pytest.mark.attack("JSON")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["' + "x" * 3000, "near line 1: longer than 1,000 bytes, which no row is"),
        ('[{},\n{"a": [' + "1," * 3000, "near line 2: longer than 1,000 bytes"),
        ('{"a": 1, ' + " " * 3000, "near line 1: expected a list of rows (no [)"),
        ("[{}," + "\n" * 3000 + "x]", "near line 3001: expected a list of rows (Expecting value)"),
        ("[" * 3000, "near line 1: "),  # nested too deeply, or for Python 3.13, which goes deeper, too long
    ],
)
def test_a_long_file_is_not_read_as_a_whole_to_say_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    """One row of 512 MiB took ten times that, and an error in the last line all of the file once more."""
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError) as caught:
        list(list_items(tmp_path / "rows.json", JsonLimits(max_line_bytes=1000)))
    assert said in str(caught.value)


@pytest.mark.attack("JSON")
def test_a_row_of_a_gigabyte_is_refused_in_little_memory(tmp_path: Path) -> None:
    for name, start in (("a.json", b'["'), ("a.jsonl", b"")):
        with (tmp_path / name).open("wb") as file:  # sparse: it takes no disk
            file.write(start)
            file.truncate(2**28)
    with pytest.raises(DataError, match="longer than 16,777,216 bytes"):
        peak = peak_of(lambda: list(file_rows(tmp_path / "a.json")))
        assert peak < 8 * LIMITS.max_line_bytes
    assert peak_of(lambda: list(file_rows(tmp_path / "a.jsonl"))) < 8 * LIMITS.max_line_bytes


@pytest.mark.attack("JSON")
@pytest.mark.timeout(20)
def test_a_key_twice_among_many_is_found_at_once(tmp_path: Path) -> None:
    """Each key was counted among all: 200,000 keys took minutes."""
    keys = ",".join(f'"k{n}":0' for n in range(100_000))
    (tmp_path / "rows.jsonl").write_text("{" + keys + ',"k99999":1}\n')
    [row] = file_rows(tmp_path / "rows.jsonl")
    assert "the key 'k99999' is there twice" in (row.problem or "")


@pytest.mark.attack("JSON")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a": {"file_name": "x"}, "a": {"file_name": "y"}}', "the key 'a' is there twice"),
        (None, "has 1,073,741,824 bytes, expected at most 16,777,216"),
    ],
)
def test_a_dataset_info_is_read_as_strictly_as_rows(tmp_path: Path, text: str | None, said: str) -> None:
    """Nesting was a RecursionError in the loading of the graph, and of two entries of a name the last one counted."""
    path = tmp_path / "dataset_info.json"
    with path.open("w") as file:
        file.write(text or "")
        if text is None:
            file.truncate(2**30)
    with pytest.raises(DataError) as caught:
        read_dataset_info(tmp_path)
    assert said in str(caught.value)


@pytest.mark.attack("names")
@pytest.mark.parametrize("name", ["a\x00.json", "../a.json", "/etc/passwd", "\ud800.json", "a" * 300, "pipe.json", "."])
def test_a_file_name_of_an_entry_stays_inside_and_is_a_file(tmp_path: Path, name: str) -> None:
    """Reading a pipe never ends."""
    from mllm_assets.data.sharegpt.rows import rows_of_entry

    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": name}}))
    with pytest.raises(DataError):
        list(rows_of_entry(tmp_path, load_entry(tmp_path, "mine")))


@pytest.mark.attack("Parquet")
def test_one_picture_that_stands_in_many_rows_is_not_in_memory_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4.5 KB of Parquet, a thousand rows of one picture of 128 MiB, took 5.5 GiB, and would have filled any disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array([bytes(2**23)], pa.binary()))
    table = pa.table({"image": picture, "text": ["x"] * 100})
    pq.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=2**30, store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 2**20
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert row_files.rows_at_once(file, 64) == 1
    monkeypatch.setattr(row_files, "FREE_BYTES", 2**27)
    rows = tables.read_tables(SourceSpec(kind="parquet", path="a.parquet"), tmp_path)
    with pytest.raises(DataError, match="it expands to more than 200 bytes for each of its own"):
        assert sum(len(row.images[0] or b"") for row in rows) <= 2**28


def test_usual_rows_are_read_many_at_once(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_source(tmp_path, [(png(n), f"picture {n}") for n in range(40)])
    with pq.ParquetFile(tmp_path / "source.parquet") as file:
        assert row_files.rows_at_once(file, 64) == 64


@pytest.mark.attack("CSV")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("," * 2**25, "a row of more than 16,777,216 characters"),
        ("," * 20_000, "has more than 10,000 columns"),
        ("file_name,text\n" + "," * 2**25, "a row of more than 16,777,216 characters"),
        ("file_name,text\n" + ('"' + "x\n" * 50_000 + '",') * 200, "a row of more than 16,777,216 characters"),
    ],
)
def test_a_row_of_a_csv_has_a_bound_over_all_its_lines(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_metadata(tmp_path / "metadata.csv"))
    assert said in str(caught.value)


def test_values_that_have_no_column_are_a_problem_of_their_row(tmp_path: Path) -> None:
    """A caption with a comma and no quotes was cut at it, without a word."""
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one, two\nb.png,fine\n")
    first, second = read_metadata(tmp_path / "metadata.csv")
    assert "metadata.csv, line 2: more values than columns" in (first.problem or "")
    assert second.value == {"file_name": "b.png", "text": "fine"}


@pytest.mark.attack("JSON")
@pytest.mark.parametrize("text", ["[" * 100_000, '[{"role": "user", "role": "user"}]', "[NaN]", "x" * (2**24 + 1)])
def test_a_conversation_in_a_column_is_read_as_strictly(text: str) -> None:
    assert all(not isinstance(turn, dict) for turn in json.loads(as_conversation(text).messages))


@pytest.mark.attack("JSON")
@pytest.mark.parametrize(
    "text",
    [b"[", b"[]", b"7", b"[" * 100_000, b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 7}}}}'],
)
def test_what_stands_instead_of_datasets_metadata_names_no_class(text: bytes) -> None:
    import pyarrow as pa

    assert class_names(pa.schema([("label", pa.int64())], metadata={"huggingface": text})) == {}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "MLLM_ASSETS_MAX_SOURCE_ROWS",
            "has more than 5 rows, where reading stopped. Set MLLM_ASSETS_MAX_SOURCE_ROWS higher",
        ),
        ("MLLM_ASSETS_MAX_SOURCE_GIB", "has more than 1 GiB of images and texts"),
        ("MLLM_ASSETS_MAX_SOURCE_HOURS", "has more than 1 hours of reading"),
    ],
)
def test_a_source_has_bounds_for_all_of_it(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    write_source(layout.root, [(png(n), "x") for n in range(6)])
    ticks = iter(range(0, 10**6, 1800))
    monkeypatch.setattr(sources.time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setenv("MLLM_ASSETS_MAX_SOURCE_HOURS", "1" if name.endswith("HOURS") else "1000")
    if name.endswith("ROWS"):
        monkeypatch.setenv(name, "5")
    if name.endswith("GIB"):
        monkeypatch.setenv(name, "1")
        monkeypatch.setattr(sources, "GIB", 100)
    with pytest.raises(DataError) as caught:
        ingest(made_spec(4, 2), layout)
    assert said in str(caught.value)
    assert not list(layout.raw("made", "x").parent.glob("*"))
