"""Runs the checks of this folder: finds them, counts them, prints a line for each."""

import importlib.util
import itertools
import subprocess
import time
import traceback
from functools import cache
from pathlib import Path

import checkpoints

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "models"


@cache
def module(path):
    """A Python file of the project as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def decoder():
    """docs/decode.py."""
    return module(ROOT / "docs" / "decode.py")


def refused(action):
    """The sentence with which `action` is refused; fails when it is not."""
    try:
        action()
    except (ValueError, KeyError, OSError) as error:
        return str(error)
    raise AssertionError("not refused")


class Context:
    """What the checks share: the binary, the held-out text, a folder for outputs."""

    def __init__(self, folder, qtool, texts):
        self.folder, self.qtool, self.texts = Path(folder), Path(qtool), texts
        self.numbers = itertools.count()

    def new(self, name):
        """A path for a new folder."""
        return self.folder / f"{next(self.numbers):03}-{name}"

    def run(self, *arguments):
        """Runs qtool; fails unless its status is 0."""
        command = [str(self.qtool), *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        said = f"{' '.join(command)}: {ran.returncode}\n{ran.stdout}{ran.stderr}"
        assert ran.returncode == 0, said
        return ran.stdout

    @cache
    def artifact(self, model, *options):
        """The artifact of a model's folder; made once."""
        out = self.new(model.name + "".join(options).replace("--", "-"))
        self.run("quantize", model, "-o", out, *options)
        return out

    @cache
    def paddle(self, model):
        """The Paddle form of a sample model; made once."""
        out = self.new(f"{model}-paddle")
        count = checkpoints.write_paddle(MODELS / model, out)
        assert count > 30, count
        return out

    @cache
    def export(self, artifact):
        """The bf16 export of an artifact; made once."""
        out = self.new(f"{artifact.name[4:]}-bf16")
        self.run("export", artifact, "--to", "bf16", "-o", out)
        return out


def run(context, modules):
    """Runs every function `test_*` of the modules; returns (passed, failed)."""
    passed = failed = 0
    for each in modules:
        tests = [value for name, value in vars(each).items() if name.startswith("test_")]
        assert tests, f"{each.__name__} has no tests"
        for test in tests:
            start, name = time.monotonic(), f"{each.__name__}.{test.__name__}"
            try:
                note = test(context)
            except Exception:  # a failed check must not hide the others
                failed += 1
                print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
                continue
            passed += 1
            seconds = time.monotonic() - start
            print(f"ok {name} ({seconds:.1f} s){': ' + note if note else ''}", flush=True)
    return passed, failed
