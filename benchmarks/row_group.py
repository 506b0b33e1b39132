"""How far one Parquet row group of 400 MB raises the peak memory of the process that reads its rows.

`python -m benchmarks.row_group [--picture-kb 100 1000]` writes a group of random pictures in two ways and reads each,
in processes of their own: one that is started counts the memory of its parent as its own peak. pyarrow cuts pages only
between writes of 1,024 rows, so that by default a page holds that many pictures; a page is in memory as it is in the
file and as it is unpacked, and the one before while the next comes.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.data.sharegpt.row_files import file_rows

GROUP_MB, BOUND_MB = 400, 200
SCHEMA = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())])
WAYS = {"as pyarrow writes by default": 1024, "with write_batch_size=8": 8}


def write_group(path: Path, picture_kb: int, write_batch_size: int) -> None:
    randoms, num_rows = np.random.default_rng(0), GROUP_MB * 1000 // picture_kb
    rows = [
        {"image": {"bytes": randoms.bytes(picture_kb * 1000), "path": None}, "text": f"row {number}"}
        for number in range(num_rows)
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, path, row_group_size=num_rows, write_batch_size=write_batch_size)


def raised_mb(path: Path) -> float:
    """By how much the rows of a file raise this process' peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in file_rows(path):
        pass
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture-kb", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write is not None:
        path, picture_kb, write_batch_size = arguments.write
        write_group(Path(path), int(picture_kb), int(write_batch_size))
        return 0
    if arguments.read is not None:
        print(f"{raised_mb(arguments.read):.0f}")
        return 0
    most = 0
    print(f"| a group of {GROUP_MB} MB raises the peak by (bound: {BOUND_MB} MB) | {' | '.join(WAYS)} |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "group.parquet")
        for picture_kb in arguments.picture_kb:
            raised = []
            for write_batch_size in WAYS.values():
                start = [sys.executable, "-m", "benchmarks.row_group"]
                subprocess.run([*start, "--write", path, str(picture_kb), str(write_batch_size)], check=True)
                read = subprocess.run([*start, "--read", path], check=True, stdout=subprocess.PIPE, text=True)
                raised.append(int(read.stdout))
            print(f"| pictures of {picture_kb} KB | {' | '.join(f'{mb} MB' for mb in raised)} |", flush=True)
            most = max(most, *raised)
    return 0 if most <= BOUND_MB else 1


if __name__ == "__main__":
    sys.exit(main())
