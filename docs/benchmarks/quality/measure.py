"""Runs a command and measures it: wall time, processor time, peak resident memory, peak anonymous memory.

Processor time is what the kernel charged the command and its children with, on all cores: on a
machine that others use at the same time it says more than wall time.  Memory is read from /proc fifty times a second.  Resident memory counts mapped
files too (the checkpoint); the kernel keeps its peak, so only growth in the
last moment escapes.  Anonymous memory is what the command allocated; of it the
kernel keeps no peak, and a short one can escape.
"""

import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

INTERVAL = 0.02  # seconds between two looks


class Failed(Exception):
    """The command ended with an error; its last lines are the message."""


def _memory(pid):
    """(peak resident, anonymous) bytes of a process by now."""
    values = {"VmHWM": 0, "RssAnon": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in values:
                values[name] = int(value.split()[0]) * 1024
    except OSError:
        pass  # it has ended
    return values["VmHWM"], values["RssAnon"]


def _watch(pid, ended, peaks):
    while not ended.wait(INTERVAL):
        peaks[:] = map(max, peaks, _memory(pid))


def run(command, environment=None):
    """{"seconds", "processor_seconds", "peak_rss", "peak_anonymous", "stdout"} of a command (a list of strings)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        ended, peaks = threading.Event(), [0, 0]
        watcher = threading.Thread(target=_watch, args=(process.pid, ended, peaks))
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
            watcher.join()
        seconds = time.monotonic() - start
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if process.returncode != 0:
        lines = [line.strip() for line in (stderr or stdout).splitlines() if line.strip()]
        raise Failed(lines[0] if lines else f"exit status {process.returncode}")
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss": peaks[0],
        "peak_anonymous": peaks[1],
        "stdout": stdout,
    }
