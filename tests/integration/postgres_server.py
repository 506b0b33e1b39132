"""A real Postgres on this machine, with a data folder, a port and a password of its own."""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port


def find_postgres() -> Path | None:
    """The folder of `initdb` and `pg_ctl`: on the PATH, or where Debian puts the newest version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


@dataclass(frozen=True)
class PostgresServer:
    port: int
    password: str

    @property
    def env(self) -> dict[str, str]:
        """What deploy/dagster-postgres.yaml reads."""
        return {
            "DAGSTER_POSTGRES_HOST": "127.0.0.1",
            "DAGSTER_POSTGRES_DB": "postgres",
            "DAGSTER_POSTGRES_USER": "dagster",
            "DAGSTER_POSTGRES_PASSWORD": self.password,
        }


@contextmanager
def postgres_server(binaries: Path) -> Iterator[PostgresServer]:
    """Run a server that only this machine can reach; it is stopped and its data deleted with the block."""
    folder = Path(tempfile.mkdtemp(prefix="mllm_assets_postgres_"))  # pytest's own folders are closed to other users
    server = PostgresServer(free_port(), f"planted-{secrets.token_hex(8)}")
    (folder / "password").write_text(server.password)
    prefix: list[str] = []
    if os.geteuid() == 0:  # Postgres refuses root
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "password", "postgres")
        prefix = ["runuser", "-u", "postgres", "--"]

    def run(program: str, *arguments: str) -> None:
        command = [*prefix, str(binaries / program), "-D", str(folder / "data"), *arguments]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stdout

    try:
        run("initdb", "-U", "dagster", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-locale", "-N")
        options = f"-p {server.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -F"
        run("pg_ctl", "-w", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield server
        finally:
            run("pg_ctl", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)
