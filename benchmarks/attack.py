"""Run every test that attacks the product and write what was tried and what held to benchmarks/attacks.md.

`make attack` runs them all: each case of a test marked `attack("what")` is one try, made with the real readers, stores,
servers, processes and file systems. `--junitxml FILE` takes the results of a whole run of the tests instead, which has
them too. Fails if one try did not hold.
"""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("attacks.md")
REPOSITORY = Path(__file__).parents[1]
OPTIONS = ["-o", "addopts=", "-q", "--timeout", "900", "-m", "attack", "-n", "3", "--dist", "loadfile"]


class Tries:
    """Counts the cases of each kind of attack: held, broken, and not tried for want of an extra."""

    def __init__(self) -> None:
        self.held, self.broken, self.skipped = Counter[str](), Counter[str](), Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)  # `attack` is set by tests/conftest.py from the mark
        kind, tries = properties.get("attack"), properties.get("tries", 1)
        if kind is None:
            return
        if report.failed:
            self.broken[kind] += tries
        elif report.skipped:
            self.skipped[kind] += tries
        elif report.when == "call":
            self.held[kind] += tries

    def read(self, path: Path) -> None:
        """Count the cases of a run that pytest wrote with `--junitxml`."""
        for case in ElementTree.parse(path).iter("testcase"):
            properties = {item.get("name"): item.get("value") for item in case.iter("property")}
            kind, tries = properties.get("attack"), int(properties.get("tries") or 1)
            if kind is not None:
                ended = {child.tag for child in case}
                counter = self.broken if ended & {"failure", "error"} else self.held
                (self.skipped if "skipped" in ended else counter)[kind] += tries

    def table(self, how: str) -> str:
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=REPOSITORY).strip()
        kinds = sorted({*self.held, *self.broken, *self.skipped})
        rows = [(kind, self.held[kind] + self.broken[kind], self.held[kind], self.skipped[kind]) for kind in kinds]
        rows.append(("**all**", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
        lines = [f"| {kind} | {tries} | {held} | {skipped} |" for kind, tries, held, skipped in rows]
        head = ["| what | tries | held | not tried (an extra is missing) |", "| --- | ---: | ---: | ---: |"]
        made = f"Made by {how} on {datetime.now(UTC):%Y-%m-%d} at {commit}."
        what = 'A try is a case, or one file of a case, of the tests marked `attack("what")`.'
        return "\n".join(["# Attacks", "", made, what, "", *head, *lines, ""])


def main() -> None:
    """Run them, write the table, print it."""
    tries = Tries()
    if sys.argv[1:2] == ["--junitxml"]:
        tries.read(Path(sys.argv[2]))
        code, how = int(tries.broken.total() > 0), "a run of all tests"
    else:
        code = pytest.main([*OPTIONS, *(sys.argv[1:] or [str(REPOSITORY / "tests")])], plugins=[tries])
        how = "`make attack`"
    table = tries.table(how)
    TABLE.write_text(table, encoding="utf-8")
    print(table)
    sys.exit(int(code))


if __name__ == "__main__":
    main()
