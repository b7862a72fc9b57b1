"""Runs a command and measures it: wall time, peak resident memory, peak anonymous memory.

Resident memory counts mapped files too (the checkpoint), as the kernel reports
it when the command ends.  Anonymous memory is what the command allocated; it
is read from /proc twenty times a second, so a shorter peak can escape.
"""

import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

INTERVAL = 0.05  # seconds between two looks


class Failed(Exception):
    """The command ended with an error; its last lines are the message."""


def _anonymous(pid):
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended
    return 0


def _watch(pid, ended, peak):
    while not ended.wait(INTERVAL):
        peak[0] = max(peak[0], _anonymous(pid))


def run(command, environment=None):
    """{"seconds", "peak_rss", "peak_anonymous", "stdout"} of a command (a list of strings)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        ended, peak = threading.Event(), [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, ended, peak))
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
            watcher.join()
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if process.returncode != 0:
        lines = [line.strip() for line in (stderr or stdout).splitlines() if line.strip()]
        raise Failed(lines[0] if lines else f"exit status {process.returncode}")
    return {
        "seconds": seconds,
        "peak_rss": usage.ru_maxrss * 1024,
        "peak_anonymous": peak[0],
        "stdout": stdout,
    }
