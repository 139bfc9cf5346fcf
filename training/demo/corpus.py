"""Turns diatheke's markup on standard input into one plain text file a chapter."""

import collections
import pathlib
import re
import sys

# Anything before the reference (a psalm's title, repeated at each of its verses) is dropped with it.
VERSE = re.compile(r"^(?:<[^>]*>[^<]*</title>|<[^>]*>|\s)*([1-4A-Z][^:<]*?) (\d+):(\d+): ?(.*)$")
# The Greek versions of Esther and Daniel repeat most of the Hebrew ones: they would leak into held-out text.
REPEATED = re.compile(r"\(Greek\)|^Additional Psalm|^Prayer of Manasses")
ASCII = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "--", "–": "-", "\u00a0": " "})


def plain(markup: str) -> str:
    markup = re.sub(r"<title\b.*?</title>", "", markup)
    markup = re.sub(r'<div [^>]*type="x-p"[^>]*>|<lg [^>]*>|</?p[ />]', "\n", markup)
    markup = re.sub(r'<l [^>]*type="selah"[^>]*>|<l [^>]*eID[^>]*>', "\n", markup)
    # Where a footnote was, two words stand without a space between them.
    text = re.sub(r"<[^>]*>", "", markup.replace("</w><w", "</w> <w")).translate(ASCII)
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[,;:!?.])(?=[A-Za-z])", " ", text)


def chapters(lines):
    texts = collections.OrderedDict()
    key = None
    for line in lines:
        verse = VERSE.match(line)
        if verse:
            book, chapter, number, rest = verse.groups()
            key = (book, int(chapter))
            rest = rest if int(number) > 0 else ""
        elif key is None or line.startswith("("):
            continue
        else:
            rest = line
        texts[key] = texts.get(key, "") + plain(rest) + " "
    return texts


def main() -> None:
    out = pathlib.Path(sys.argv[1])
    books = []
    for (book, chapter), text in chapters(sys.stdin.read().splitlines()).items():
        if REPEATED.search(book):
            continue
        if book not in books:
            books.append(book)
        text = "\n".join(line.strip() for line in re.sub(r"[ \t]+", " ", text).split("\n") if line.strip())
        if not text:
            continue
        name = f"{books.index(book) + 1:02}-{book.lower().replace(' ', '-')}-{chapter:03}.txt"
        (out / name).write_text(text + "\n", encoding="utf-8")


main()
