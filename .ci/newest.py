"""Unit tests on the newest Python that this machine has, beside the one of `.venv`: `make test-newest`.

A Python that is found gets an environment of its own in `.venv/newest`, with what these tests import: neither torch nor
what needs it, so that it is there in seconds. Where none is found this says so and passes: only with `--fetch`, as in
`make test-newest FETCH=--fetch`, uv downloads one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".venv" / "newest"
NEWEST = (3, 13)  # of those that are supported
UNUSED = "torch accelerate peft pyright pre-commit pip-audit".split()  # by the tests of `make test-fast`
FETCH = "--fetch"  # the first argument; the others are pytest's
Found = tuple[tuple[int, ...], str]


def installed() -> list[Found]:
    """Version and path of each Python here that is newer than this one and supported, the newest last."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    names = [f"python3.{minor}" for minor in range(sys.version_info.minor + 1, NEWEST[1] + 1)]
    paths = [path for name in names if (path := shutil.which(name))]
    paths += [str(path) for name in names for path in pyenv.glob(f"versions/*/bin/{name}")]
    return sorted(filter(None, map(_described, paths)))


def _described(path: str) -> Found | None:
    """None of what only looks like a Python: pyenv's shims of versions that are not switched on."""
    asked = [path, "-c", "import ensurepip, ssl, sys; print(*sys.version_info[:3])"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return (tuple(map(int, done.stdout.split())), path) if done.returncode == 0 else None


def fetched() -> list[Found]:
    """The one that uv fetches, if it can."""
    uv, wanted = [sys.executable, "-m", "uv", "python"], ".".join(map(str, NEWEST))
    subprocess.run([*uv, "install", "--quiet", "--no-bin", wanted], stderr=subprocess.DEVNULL, check=False)
    done = subprocess.run([*uv, "find", wanted], capture_output=True, text=True, check=False)
    return list(filter(None, [_described(done.stdout.strip())])) if done.returncode == 0 else []


def main(tests: list[str]) -> int:
    may_fetch = tests[:1] == [FETCH]
    found = installed() or (fetched() if may_fetch and sys.version_info[:2] < NEWEST else [])
    if not found:
        how = "and uv can fetch none" if may_fetch else "make test-newest FETCH=--fetch gets one"
        print(f"NOT TESTED on a newer Python than this one: none is here, {how}", flush=True)
        return 0
    version, python = found[-1]
    print(f"unit tests on Python {'.'.join(map(str, version))}", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(HOME)], check=True)
    excluded = HOME / "excluded.txt"
    excluded.write_text("\n".join(UNUSED))
    own = str(HOME / "bin" / "python")
    install = [
        own,
        str(ROOT / ".ci" / "install.py"),
        "--excludes",
        str(excluded),
        "-c",
        "constraints.txt",
        "-e",
        ".[dev]",
    ]
    subprocess.run(install, cwd=ROOT, check=True)
    return subprocess.run(
        [own, "-m", "pytest", "-p", "no:cacheprovider", *tests[may_fetch:]], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
