"""What the tests share: the project's root on sys.path, and scripts run in a process of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def environment(**extra):
    """The environment of a script under test: one thread, and our modules importable from any folder."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in extra.items()}}


def words(argv):
    """Command line as strings, `a2gnn.py` with its full path."""
    return [str(ROOT / a) if str(a).endswith(".py") and (ROOT / a).exists() else str(a) for a in argv]


def sh(*argv, cwd=ROOT, ok=True, timeout=600, env=None):
    """Run `python ARGV…` to its end -> CompletedProcess with .stdout (both streams, text) and .returncode.

    ok=True asserts exit status 0, ok=False any other, both showing the end of the output; ok=None neither.
    Our own scripts are found by name, whatever cwd is.
    """
    argv = words(argv)
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=environment(**(env or {})), timeout=timeout,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False)
    tail = f"python {' '.join(argv)}\nexit status {done.returncode}\n{done.stdout[-4000:]}"
    assert ok is None or (done.returncode == 0) == ok, tail
    return done


def kill_when(condition, *argv, cwd=ROOT, timeout=300, env=None):
    """Start `python ARGV…` and SIGKILL it, with all its children, as soon as condition() is true.

    Fails when the script ends by itself first, or when condition() stays false for `timeout` seconds.
    """
    process = subprocess.Popen([sys.executable, *words(argv)], cwd=cwd, env=environment(**(env or {})),
                               start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + timeout
        while not condition():
            assert process.poll() is None, f"ended by itself with status {process.returncode}: {argv}"
            assert time.monotonic() < end, f"nothing to kill after {timeout} s: {argv}"
            time.sleep(0.02)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def folder_from(variable):
    """The folder that an environment variable names, or a skip."""
    folder = os.environ.get(variable)
    if not folder or not Path(folder).is_dir(): pytest.skip(f"{variable} names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def pictures():
    """Folder of real photographs with ground truth (WSSS_DATA); the test skips without it."""
    return folder_from("WSSS_DATA")


@pytest.fixture(scope="session")
def papers():
    """Folder of the papers' texts (WSSS_PAPERS); the test skips without it."""
    return folder_from("WSSS_PAPERS")
