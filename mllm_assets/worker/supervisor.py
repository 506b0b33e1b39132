"""A process between launcher and worker that leaves no process behind: `supervisor.py GRACE_S LAUNCHER COMMAND...`.

Standard library only; it runs as a plain file, so that it starts in 30 ms. It ends the worker's complete tree when the
launcher closes its stdin or dies (a pipe's other end closes however a process ends, kill -9 included), on SIGTERM,
SIGINT or SIGHUP, and when the worker ends and leaves children. A tree is walked, not a process group killed: the
ranks of torchrun start sessions of their own. As a child subreaper the supervisor adopts what the tree orphans.

LAUNCHER is `-` for the stdin, or, for a launcher on another machine, `SECONDS:FILE`: a file that the launcher writes
again and again, and whose content must not stay the same for so long.

What is not covered: on other systems than Linux only the worker's process group is ended. Where launcher and
supervisor are killed with -9 in the same instant, torchrun and its ranks die (PR_SET_PDEATHSIG), and PyTorch's loader
processes see it and end; other children of a task may stay.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
MARK = "MLLM_ASSETS_JOB"
TASKS = "MLLM_ASSETS_TASKS"  # the number of an open socket by which tasks reach the worker
IS_LINUX = sys.platform == "linux"


def tree(pid: int) -> list[int]:
    """Ids of all descendants of a process, parents before children."""
    try:
        children = []
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                children += [int(child) for child in file.read().split()]
    except OSError:
        return []  # it has ended
    return children + [below for child in children for below in tree(child)]


def marked(mark: str) -> list[int]:
    """Ids of this user's processes that carry a job's mark in their environment, whoever their parent is."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for name in os.listdir("/proc") if IS_LINUX else ():
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if wanted in file.read().split(b"\0"):
                        found.append(int(name))
            except OSError:
                continue  # it has ended, or belongs to another user
    return found


def send(pids: list[int], number: int) -> None:
    """Signal each process that still exists."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def descendants() -> list[int]:
    """Ids of all processes below this one, and of those that carry this job's mark (kernels without `children`)."""
    mark = os.environ.get(MARK)
    return list(dict.fromkeys([*tree(os.getpid()), *(marked(mark) if mark else [])]))


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies."""
    if IS_LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of what descendants leave behind."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    if not IS_LINUX:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    adopt_orphans()
    handed_on = [int(os.environ[TASKS])] if TASKS in os.environ else []
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent, pass_fds=handed_on)
    for number in handed_on:
        os.close(number)
    return child


def _signal_all(child: subprocess.Popen[bytes], number: int) -> bool:
    """Signal everything below; returns whether there was anything."""
    if not IS_LINUX:
        try:
            os.killpg(child.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return child.poll() is None
    pids = descendants()
    send(pids, number)
    return bool(pids)


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Collect what has ended, orphans too, but leave the worker's exit code to `child`."""
    child.poll()
    try:
        while child.returncode is not None and os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def wait_for_launcher(launcher: str) -> None:
    """Return when the launcher has gone or gives no sign of life."""
    if launcher == "-":
        os.read(0, 1)  # returns at end of file: nobody holds the other end any more
        return
    silence_s, _, path = launcher.partition(":")
    seen, seen_at = b"", time.monotonic()
    while time.monotonic() - seen_at < float(silence_s):
        time.sleep(min(1.0, float(silence_s) / 4))
        try:
            with open(path, "rb") as file:  # reopened: a network file system checks for changes only then
                beat = file.read()
        except OSError:
            continue  # missing, perhaps only for now
        if beat != seen:
            seen, seen_at = beat, time.monotonic()


def main() -> None:
    """Run the command until it ends or must end; exit with its code (128 + number for a signal)."""
    grace_s, stop, parent = float(sys.argv[1]), threading.Event(), os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    child = _start(sys.argv[3:])

    def watch() -> None:
        wait_for_launcher(sys.argv[2])
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    while child.poll() is None and not stop.wait(0.1) and os.getppid() == parent:
        pass
    if child.poll() is None:
        _signal_all(child, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    while _signal_all(child, signal.SIGKILL):
        _reap(child)
        time.sleep(0.02)
    code = child.wait()
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)  # the reading thread may still block, and has nothing to lose


if __name__ == "__main__":
    main()
