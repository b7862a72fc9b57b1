#!/usr/bin/env python3
"""Plain English and Chinese text from the Debian package `debian-handbook`.

The package holds "The Debian Administrator's Handbook" as HTML in many
languages.  This module strips the tags of the `en-US` and `zh-CN` editions
and splits each into a training part and a held-out part.  The split is by
whole chapters, named below, and is the same in both languages, so that no
sentence of the held-out part (nor its translation) is ever in the other one.

    python handbook.py --deb debian-handbook_*.deb --out DIR
    python handbook.py --root EXTRACTED_PACKAGE    --out DIR

writes train.en.txt, train.zh.txt, heldout.en.txt and heldout.zh.txt.
Only the Python standard library is used; the output is the same on every run.

The text is (c) Raphael Hertzog and Roland Mas, GPL-2+ or CC-BY-SA-3.0.
"""

import argparse
import hashlib
import io
import re
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

# Our language name -> folder of the package.
LANGUAGES = {"en": "en-US", "zh": "zh-CN"}

# The chapters held out, by the name of their first page.  All other chapters
# are for training (or calibration).  About 9 % of the characters.
HELD_OUT_CHAPTERS = (
    "unix-services.html",  # 9. Unix Services: SSH, rights, logs, cron, backup
)

# Pages that are not prose about the subject: title page with the licences and
# the table of contents, foreword, thanks, and remarks on the book itself.
SKIPPED_PAGES = (
    "index.html",
    "foreword.html",
    "sect.contributing.html",
    "sect.acknowledgments.html",
    "sect.future-of-this-book.html",
)

# Parts of the Chinese edition are not translated.  A paragraph with a smaller
# share of Chinese characters than this is English and is left out there;
# <pre> blocks (commands, files and their output) are kept.
MIN_CHINESE = 0.05

BLOCK_TAGS = frozenset(
    "address blockquote br dd div dl dt h1 h2 h3 h4 h5 h6 hr li ol p pre "
    "table tbody td th thead tr ul".split()
)
VOID_TAGS = frozenset("area base br col hr img input link meta".split())


class _PageText(HTMLParser):
    """Collects a page's text: one block per line, <pre> kept as it is."""

    def __init__(self, chinese):
        super().__init__(convert_charrefs=True)
        self.chinese = chinese  # leave English paragraphs out?
        self.lines = []  # finished lines
        self.pieces = []  # the block being read
        self.stack = []  # open tags: (name, is it skipped, is it <pre>)

    @staticmethod
    def _is_skipped(tag, attrs):
        """Navigation bars, banners and tables of contents."""
        names = (attrs.get("class") or "").split()
        return (
            tag in ("head", "script", "style")
            or "docnav" in names
            or "toc" in names
            or attrs.get("id") in ("banner", "title")
        )

    def _finish_block(self):
        text = "".join(self.pieces)
        self.pieces = []
        if self.stack and any(is_pre for _, _, is_pre in self.stack):
            text = "\n".join(line.rstrip() for line in text.split("\n"))
            text = text.strip("\n")
        else:
            text = re.sub(r"\s+", " ", text).strip()
            han = len(re.findall(r"[\u4e00-\u9fff]", text))
            if self.chinese and han < MIN_CHINESE * len(text):
                return
        if text:
            self.lines.append(text)

    def handle_starttag(self, tag, attrs):
        if tag in BLOCK_TAGS:
            self._finish_block()
        if tag not in VOID_TAGS:
            self.stack.append((tag, self._is_skipped(tag, dict(attrs)), tag == "pre"))

    def handle_endtag(self, tag):
        if tag in BLOCK_TAGS:
            self._finish_block()
        for depth in range(len(self.stack) - 1, -1, -1):
            if self.stack[depth][0] == tag:
                del self.stack[depth:]
                break

    def handle_data(self, data):
        if not any(is_skipped for _, is_skipped, _ in self.stack):
            self.pieces.append(data)

    def close(self):
        super().close()
        self._finish_block()


def page_text(html, chinese=False):
    """The text of one HTML page."""
    parser = _PageText(chinese)
    parser.feed(html)
    parser.close()
    return "\n".join(parser.lines) + "\n"


def _pages_of_folder(root):
    """{(folder, page): HTML} from a folder of an extracted package."""
    root = Path(root)
    found = sorted(root.glob("**/en-US/index.html"))
    if len(found) != 1:
        raise ValueError(f"{root}: expected one en-US/index.html, found {len(found)}")
    base = found[0].parent.parent
    return {
        (folder, path.name): path.read_text(encoding="utf-8")
        for folder in LANGUAGES.values()
        for path in sorted((base / folder).glob("*.html"))
    }


def _pages_of_deb(deb):
    """The same from a .deb: an `ar` archive with a data.tar.* inside."""
    data = Path(deb).read_bytes()
    if data[:8] != b"!<arch>\n":
        raise ValueError(f"{deb}: not a Debian package")
    pages, at = {}, 8
    while at + 60 <= len(data):
        name = data[at : at + 16].decode("ascii").strip().rstrip("/")
        size = int(data[at + 48 : at + 58])
        body = data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
        if not name.startswith("data.tar"):
            continue
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            for member in tar:
                parts = member.name.split("/")
                wanted = len(parts) >= 2 and parts[-2] in LANGUAGES.values()
                if wanted and member.isfile() and parts[-1].endswith(".html"):
                    html = tar.extractfile(member).read().decode("utf-8")
                    pages[parts[-2], parts[-1]] = html
    return pages


def chapters(pages, folder):
    """[(chapter's first page, text)] of one language, in the book's order."""
    index = pages[folder, "index.html"]
    order = list(dict.fromkeys(re.findall(r'href="([\w.-]+\.html)', index)))
    result = {}
    for page in order:
        if page in SKIPPED_PAGES:
            continue
        html = pages[folder, page]
        up = re.search(r'<link rel="up" href="([\w.-]+\.html)', html).group(1)
        chapter = page if up == "index.html" else up
        result[chapter] = result.get(chapter, "") + page_text(html, folder == LANGUAGES["zh"])
    return list(result.items())


def load(deb=None, root=None):
    """{"train.en": text, "train.zh": ..., "heldout.en": ..., "heldout.zh": ...}"""
    pages = _pages_of_deb(deb) if deb else _pages_of_folder(root)
    texts = {}
    for language, folder in LANGUAGES.items():
        parts = chapters(pages, folder)
        missing = set(HELD_OUT_CHAPTERS) - {name for name, _ in parts}
        if missing:
            raise ValueError(f"{folder}: no chapter {sorted(missing)}")
        for part, held in (("train", False), ("heldout", True)):
            chosen = [t for name, t in parts if (name in HELD_OUT_CHAPTERS) == held]
            texts[f"{part}.{language}"] = "\n".join(chosen)
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--deb", help="the package file")
    source.add_argument("--root", help="folder with the extracted package")
    parser.add_argument("--out", required=True, help="folder for the four text files")
    args = parser.parse_args()
    try:
        texts = load(deb=args.deb, root=args.root)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"handbook.py: {error}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        data = text.encode("utf-8")
        (out / f"{name}.txt").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        print(f"{name}.txt: {len(text)} characters, {len(data)} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
