"""Install with uv into the environment that this Python is of: `python .ci/install.py -c constraints.txt -e '.[dev]'`.

pip takes minutes and says nothing; uv takes seconds and shows what it does. It is installed with pip, and is handed the
index, certificates, find-links and constraints that pip is set to. Where uv cannot be had, pip installs.
"""

import ast
import os
import subprocess
import sys
import time

# a setting of pip -> the variable of uv; several values are separated by spaces in both
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "no-index": "UV_NO_INDEX",
}


def uv_settings(listed: str) -> dict[str, str]:
    """The variables for uv that mean what `pip config list` says; those of the environment win."""
    found: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        scope, _, key = name.rpartition(".")
        if key in VARIABLES and scope in ("global", "install", ":env:"):
            found[VARIABLES[key]] = " ".join(str(ast.literal_eval(value)).split())
    if found.get("UV_NO_INDEX", "").lower() in ("", "0", "false", "no"):
        found.pop("UV_NO_INDEX", None)
    if "UV_FIND_LINKS" in found:
        found["UV_FIND_LINKS"] = found["UV_FIND_LINKS"].replace(" ", ",")
    if "UV_INDEX" in found:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip does: the best version of all indexes
    return found


def main(arguments: list[str]) -> int:
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    start_s = time.monotonic()
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=False).stdout
    if subprocess.run([*pip, "install", *quiet, "uv>=0.10"], check=False).returncode == 0:
        environment = {**uv_settings(listed), "UV_PYTHON": sys.executable, **os.environ}
        done = subprocess.run([sys.executable, "-m", "uv", "pip", "install", *arguments], env=environment, check=False)
    else:
        print("uv cannot be installed, so pip installs, in silence", flush=True)
        if "--excludes" in arguments:  # which pip does not know: it installs more
            at = arguments.index("--excludes")
            arguments = arguments[:at] + arguments[at + 2 :]
        done = subprocess.run([*pip, "install", *quiet, *arguments], check=False)
    print(f"installed in {time.monotonic() - start_s:.0f} s")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
