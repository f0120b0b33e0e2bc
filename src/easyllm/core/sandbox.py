"""Runs Python code that a model has written: in a process of its own, with limits.

The process has an empty environment and an empty temporary folder, bounded CPU time, memory,
file sizes and output, and an audit hook that refuses sockets, other processes, foreign libraries
and files outside its folder and Python's own. It is meant for answers of a model in training, which
may loop or misbehave by accident; it does not protect against an attacker who searches for a way
out of Python itself: for hostile code, run the whole training in a container.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MAX_OUTPUT = 10_000
"""Maximum number of characters of output that is returned."""
GUARD = """
import os, resource, sys
seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
for name, bound in (("CPU", seconds), ("AS", megabytes << 20), ("FSIZE", 1 << 20), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))
allowed = tuple({os.getcwd(), sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)})
REFUSED = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
           "os.system", "os.kill", "os.putenv", "ctypes.", "shutil.", "sys.setprofile",
           "sys.settrace", "mmap.", "ftplib.", "urllib.", "http.", "smtplib.")
def guard(event, arguments):
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if event in ("open", "os.listdir", "os.remove", "os.rename", "os.mkdir", "os.chmod"):
        path = arguments[0]
        if isinstance(path, (str, bytes)):
            full = os.path.realpath(os.fsdecode(path))
            if full != os.devnull and not full.startswith(allowed):
                raise PermissionError(f"{event} of {full} is not allowed here")
source = sys.stdin.read()
code = compile(source, "<answer>", "exec")
sys.addaudithook(guard)
exec(code, {"__name__": "__main__"})
"""


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """How the code ended.

    Attributes:
        passed: whether it ended by itself, without an error.
        output: what it has printed, and its traceback; at most 10,000 characters.
        timed_out: whether it was stopped because it ran too long.
    """

    passed: bool
    output: str
    timed_out: bool = False


def run_sandboxed(code: str, *, timeout_s: float = 5.0, memory_mb: int = 512) -> SandboxResult:
    """Runs Python code in a process of its own.

    Args:
        code: the source; it sees no other module than Python's own and those installed with it.
        timeout_s: maximum wall-clock time, which also bounds the CPU time.
        memory_mb: maximum address space, in MiB.
    """
    words = [sys.executable, "-I", "-c", GUARD, str(max(1, round(timeout_s))), str(memory_mb)]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / ".output", "w+b") as written:
        try:
            done = subprocess.run(
                words,
                input=code.encode("utf-8", "replace"),
                stdout=written,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "HOME": folder},
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return SandboxResult(passed=False, output="", timed_out=True)
        written.seek(0)
        output = written.read(4 * MAX_OUTPUT).decode("utf-8", "replace")[:MAX_OUTPUT]
        return SandboxResult(passed=done.returncode == 0, output=output)


__all__ = ["SandboxResult", "run_sandboxed"]
