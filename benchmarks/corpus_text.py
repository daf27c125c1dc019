"""From the files of packages to plain text: pages, manuals, dictionaries, code; and what is not worth keeping."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["FILE_BYTES", "fault", "sort_of", "text_of_manual", "text_of_page", "texts_of", "tidy"]

HTML = (".html", ".htm", ".xhtml", ".page")
TEXT = (".txt", ".md", ".markdown", ".rst", ".texi", ".info", ".pod")
CODE = (
    ".c",
    ".cc",
    ".cpp",
    ".el",
    ".f90",
    ".h",
    ".hpp",
    ".hs",
    ".java",
    ".lua",
    ".pl",
    ".py",
    ".rkt",
    ".rs",
    ".sh",
)
_MANUAL = re.compile(r"/man/man\d/.*\.\d\w*$")
# Lists of what is documented elsewhere, sources shown as pages, what packagers write, and other languages.
_PASSED = re.compile(
    r"/(_sources|_modules|src|locale|changelogs?)/|/(changelog|copyright|NEWS)[^/]*$"
    r"|/(genindex|search|py-modindex|contents)[^/]*\.html$|/share/help/(?!C/)|/help/(?!en)[a-z]{2}/"
    r"|/(?!en)[a-z]{2}[-_][A-Z]{2}/|/man/[a-z]{2}(_[A-Z]{2})?/|\.(?!en)[a-z]{2}(_[A-Z]{2})?\.(html|txt)$",
    re.IGNORECASE,
)
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a all also an and are as at be been but by can do for from had has have he her his i if in is it its may more "
        "must not of on one only or other she should so such than that the their then there these they this to use "
        "used was we were when which will with would you your",
    )
)
FILE_BYTES = (300, 1_500_000)
DICTIONARY_BYTES = 12_000  # of entries that make a document


class _Page(HTMLParser):
    """The text of a page, without what frames it."""

    BREAKS = re.compile(r"p|div|li|tr|h[1-6]|br|dt|dd|pre|table|ul|ol|section|title|blockquote|item")
    DROPPED = re.compile(r"script|style|nav|header|footer|head|svg|aside|form|button|select|info")
    FRAMES = re.compile(r"nav|sidebar|footer|breadcrumb|headerlink|toc\b|related|searchbox", re.IGNORECASE)

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.dropping: list[str] = []  # the element that is dropped, and those of its name inside
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.dropping:
            if tag == self.dropping[0]:
                self.dropping.append(tag)
            return
        marks = " ".join(value or "" for name, value in attrs if name in ("class", "id", "role"))
        if self.DROPPED.fullmatch(tag) or (
            tag in ("div", "ul", "table", "a", "p") and self.FRAMES.search(marks)
        ):
            self.dropping = [tag]
            return
        self.pre += tag == "pre"
        if self.BREAKS.fullmatch(tag):
            self.parts.append("\n- " if tag == "li" else "\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.BREAKS.fullmatch(tag) and not self.dropping:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self.dropping:
            if tag == self.dropping[0]:
                self.dropping.pop()
            return
        self.pre -= tag == "pre" and self.pre > 0
        if self.BREAKS.fullmatch(tag) and tag != "br":
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.dropping:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def text_of_page(page: str) -> str:
    """The text of an HTML page, one line a block."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    return tidy("".join(parser.parts))


def text_of_manual(roff: str) -> str:
    """The text of a manual page, near enough: requests and escapes are taken out, their words stay."""
    lines = []
    for line in roff.splitlines():
        if line.startswith(('.\\"', "'\\\"", ".so", ".TH", ".de", ".if", ".ie", ".el", ".nr", ".ds", "..")):
            continue
        if line.startswith((".SH", ".SS", ".Sh", ".Ss")):
            lines.append("")
        line = re.sub(r"^[.'][ \t]*[A-Za-z]{1,3}\b ?", "", line)
        line = re.sub(r"\\f[A-Z]|\\f\(\w\w|\\s[-+]?\d|\\[&/,|^%)]", "", line)
        line = re.sub(r"\\\(\w\w|\\\[\w+\]", " ", line).replace("\\-", "-").replace("\\e", "\\")
        lines.append(line.replace("\\ ", " "))
    return tidy("\n".join(lines))


def tidy(text: str) -> str:
    """No space at the end of lines, no control characters, at most one empty line."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff\u00ad¶]", "", text.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t\xa0]+\n", "\n", text)).strip() + "\n"


def sort_of(name: str) -> str | None:
    """What is in a file of this name: "page", "manual", "text", "dictionary", "code", or None."""
    path = "/" + name.removeprefix("./").removesuffix(".gz")
    if _PASSED.search(path):
        return None
    if path.endswith(".dict.dz"):
        return "dictionary"
    if _MANUAL.search(path):
        return "manual"
    suffix = Path(path).suffix.lower()
    if re.search(r"/games/fortunes/\w+$|/dictd/|/crawl/dat/(database|descript)/", path) and suffix in (
        "",
        ".txt",
    ):
        return "text"
    if suffix in HTML:
        return "page"
    if suffix in TEXT:
        return "text"
    return "code" if suffix in CODE else None


def entries(dictionary: str) -> Iterator[str]:
    """A dictionary as documents: runs of whole entries, which begin at the left margin."""
    held: list[str] = []
    size = 0
    for line in dictionary.splitlines():
        if size > DICTIONARY_BYTES and line[:1].isalpha():
            yield tidy("\n".join(held))
            held, size = [], 0
        held.append(line)
        size += len(line) + 1
    yield tidy("\n".join(held))


def fault(text: str, kind: str) -> str:
    """Why a text is left out, in two words; empty for a good one."""
    if not FILE_BYTES[0] <= len(text) <= FILE_BYTES[1]:
        return "wrong size"
    dense = len(text) - text.count(" ") - text.count("\n")
    letters = sum(map(len, re.findall(r"[A-Za-z]+", text)))
    if letters < (0.7 if kind == "prose" else 0.5) * dense:
        return "few letters"
    if kind == "code":
        return "long lines" if max(map(len, text.splitlines())) > 800 else ""
    words = re.findall(r"[A-Za-z']+", text.lower())
    return "" if sum(word in _COMMON for word in words) >= 0.18 * len(words) else "not English prose"


def texts_of(name: str, data: bytes) -> Iterator[tuple[str, str]]:
    """(kind, text) of each document in a file."""
    if name.endswith((".gz", ".dz")):
        data = gzip.decompress(data)
    sort = sort_of(name)
    text = data.decode("utf-8", "ignore" if sort in ("page", "dictionary") else "strict")
    if len(text) > 3 * FILE_BYTES[1] and sort != "dictionary":
        return
    if sort == "dictionary":
        yield from (("prose", part) for part in entries(text))
    elif sort == "code":
        yield "code", tidy(text)
    else:
        yield "prose", {"page": text_of_page, "manual": text_of_manual}.get(sort or "", tidy)(text)
