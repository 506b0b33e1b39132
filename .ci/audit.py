"""Known vulnerabilities of the pinned packages, and packages that do not fit together: part of `make check`.

    .ci/audit.py [REQUIREMENTS IGNORED]

`pip-audit` asks the service of osv.dev for every line of constraints.txt. Of PyPI's own service it takes "unknown
package", which a mirror answers for all of them, for "no vulnerability"; osv.dev answers or it does not. Where it does
not answer, this says NOT CHECKED and passes: a check must not depend on somebody else's server.
What is known and accepted is in audit-ignored.txt, with the reason.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OSV_URL = os.environ.get("MLLM_ASSETS_OSV_URL", "https://api.osv.dev/v1/query")
NO_ANSWER = ("ConnectionError", "Timeout", "ProxyError", "SSLError", "HTTPError")


def ignored(path: Path) -> dict[str, str]:
    """Id -> reason of each vulnerability that is accepted. A line without a reason ends the check."""
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            name, _, reason = line.partition(" ")
            if not reason.strip():
                sys.exit(f"{path.name}:{number}: {name} has no reason. Write it behind the id.")
            found[name] = reason.strip()
    return found


def audit(requirements: Path, accepted: dict[str, str]) -> list[str]:
    """One line for each known vulnerability of the pinned packages."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(requirements), "--no-deps", "--disable-pip"]
    command += ["-s", "osv", "--osv-url", OSV_URL, "-f", "json", "--progress-spinner", "off", "--timeout", "10"]
    for name in accepted:
        command += ["--ignore-vuln", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if any(name in last for name in NO_ANSWER):
            print(f"audit: NOT CHECKED for vulnerabilities: no answer of {OSV_URL} ({last[:160]})")
            return []
        sys.exit(f"audit: pip-audit failed: {last}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        print(f"audit: NOT CHECKED: {', '.join(skipped)}")
    print(f"audit: {len(packages) - len(skipped)} packages checked, {len(accepted)} vulnerabilities accepted")
    return [
        f"{package['name']} {package['version']}: {flaw['id']} ({', '.join(flaw['aliases'])}), fixed in "
        f"{', '.join(flaw['fix_versions']) or 'no version yet'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]


def misfits() -> list[str]:
    """What `pip check` says, less what requirements-ui.txt explains: its packages are installed without their pins."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    lines = (ROOT / "requirements-ui.txt").read_text().splitlines()
    expected = {line.partition("==")[0] for line in lines if "==" in line}
    return [line for line in done.stdout.splitlines() if done.returncode and line.split()[0] not in expected]


def main() -> None:
    requirements = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "constraints.txt"
    ignored_path = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / ".ci" / "audit-ignored.txt"
    problems = audit(requirements, ignored(ignored_path)) + ([] if sys.argv[1:] else misfits())
    if problems:
        advice = f"Raise the version in {requirements.name}, or accept it in {ignored_path.name} with a reason."
        sys.exit("\n".join(["audit:", *problems, advice]))


if __name__ == "__main__":
    main()
