"""Build a text corpus of prose and code out of openly licensed packages, and a tokenizer for it.

    python benchmarks/build_corpus.py --out corpus

Downloads the packages that benchmarks/corpus.toml names (with apt-get and pip, where they are not there yet), unpacks
them without installing or running anything, takes the text out, removes duplicates and near-duplicates, and deals
whole documents to three splits by a hash of their text. It writes, into ``--out``:

    train.jsonl.xz validation.jsonl.xz test.jsonl.xz    {"text", "source", "name", "kind"}, one document a line
    tokenizer.json                                      byte-level BPE, trained on the train split alone
    manifest.json                                       sources, versions, licences, sizes, shares, what was left out

The same packages give the same files. Nothing of it belongs into the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from corpus_likeness import CONTAINED, PASSAGE, SHINGLE, SIMILAR, Document, deal, distinct, document
from corpus_text import FILE_BYTES, fault, sort_of, texts_of, tidy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VOCAB_SIZE = 16384
EOS = "<|endoftext|>"
# Likenesses are found far away, and not looked for too hard: twice as fast as the usual preset, and as small.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 4, "dict_size": 2**26}]

# Packages.


def members(package: Path) -> dict[str, Callable[[], bytes]]:
    """The files in a .deb or .whl, each with what reads it; nothing is unpacked to disk."""
    if package.suffix == ".whl":
        wheel = zipfile.ZipFile(package)
        return {name: partial(wheel.read, name) for name in wheel.namelist()}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    tar = tarfile.open(fileobj=io.BytesIO(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))  # noqa: SIM115
    found = [member for member in tar.getmembers() if member.isfile() and member.size <= 50 * FILE_BYTES[1]]
    return {member.name: partial(_content, tar, member) for member in found}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def without_frames(documents: list[Document]) -> list[Document]:
    """Prose without the lines that many documents of one source share: menus, notices, licence headers."""
    counts = Counter(
        line for d in documents if d.kind == "prose" for line in set(d.text.splitlines()) if line
    )
    often = {
        line for line, count in counts.items() if count > max(5, len(documents) // 20) and len(line) > 15
    }
    out = []
    for d in documents:
        lines = d.text.splitlines()
        if d.kind == "prose" and any(line in often for line in lines):
            text = tidy("\n".join(line for line in lines if line not in often))
            if len(text) >= FILE_BYTES[0]:
                out.append(document(d.source, d.name, d.kind, text))
        else:
            out.append(d)
    return out


def read_package(package: Path, source: str, most: int) -> tuple[list[Document], dict[str, Any]]:
    """The documents of a package up to ``most`` bytes, chosen by a hash of their names, and an account of it."""
    dropped: Counter[str] = Counter()
    inside = members(package)
    files = {name: read for name, read in inside.items() if sort_of(name) is not None}
    notices = [
        inside[name] for name in inside if re.search(r"/doc/[^/]+/copyright$|\.dist-info/METADATA$", name)
    ]
    documents: list[Document] = []
    size = 0
    for name in sorted(files, key=lambda n: hashlib.blake2b(n.encode()).digest()):
        if size >= most:
            dropped["beyond the most of a source"] += 1
            continue
        try:
            parts = list(texts_of(name, files[name]()))
        except (UnicodeDecodeError, OSError, EOFError, zlib.error, AssertionError):
            dropped["unreadable"] += 1
            continue
        for number, (kind, text) in enumerate(parts):
            why = fault(text, kind)
            if why or size >= most:
                dropped[why or "beyond the most of a source"] += 1
                continue
            size += len(text)
            place = f"{name.removeprefix('./')}{f':{number}' if len(parts) > 1 else ''}"
            documents.append(document(source, place, kind, text))
    notice = "\n".join(read().decode("utf-8", "replace") for read in notices)
    account = {
        "package": package.name,
        "licences": licences(notice),
        "left_out": dict(sorted(dropped.items())),
    }
    return sorted(without_frames(documents), key=lambda d: d.name), account


def licences(notice: str) -> list[str]:
    """The short names of licences in a Debian copyright file or a wheel's metadata."""
    labels = "License|License-Expression|Classifier: License :: OSI Approved ::"
    found = re.findall(rf"^(?:{labels})[: ]+(.+)$", notice, re.MULTILINE)
    named = {" ".join(name.split())[:60] for name in found}
    if not named:
        named = {"common-licenses/" + name for name in re.findall(r"common-licenses/([\w.-]+\w)", notice)}
    return sorted(named)[:12]


def fetch(folder: Path, sources: Mapping[str, Sequence[str]], tell: Callable[[str], None]) -> dict[str, Path]:
    """Source → package file, downloaded where it is missing; one that cannot be had is left out with a word."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for index, names in sources.items():
        for name in names:
            if not (found := _found(folder, index, name)):
                command = ["apt-get", "download", name]
                if index == "pypi":
                    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
                    command = [*pip, "--no-deps", "--only-binary=:all:", name]
                done = subprocess.run(command, cwd=folder, capture_output=True, timeout=600)
                found = _found(folder, index, name)
                if not found:
                    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
                    tell(f"{name} is left out: {' '.join(last)}")
            if found:
                out[name] = found[-1]
    return out


def _found(folder: Path, index: str, name: str) -> list[Path]:
    """The files of a package; letter case, "-", "_" and "." are alike in the names of wheels."""
    if index == "debian":
        return sorted(p for p in folder.glob("*.deb") if p.name.split("_")[0] == name)
    plain = re.sub(r"[-_.]+", "_", name).lower()
    return sorted(
        p for p in folder.glob("*.whl") if re.sub(r"[-_.]+", "_", p.name.split("-")[0]).lower() == plain
    )


# Writing.


def write_split(path: Path, documents: Iterable[Document]) -> dict[str, Any]:
    """One document a line, compressed; returns sizes."""
    sizes: Counter[str] = Counter()
    count = 0
    with lzma.open(path, "wt", filters=XZ, encoding="utf-8", newline="\n") as file:
        for d in documents:
            record = {"text": d.text, "source": d.source, "name": d.name, "kind": d.kind}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            sizes[d.kind] += len(d.text.encode())
            count += 1
    total = sum(sizes.values())
    return {"documents": count, "bytes": total, **{f"{kind}_bytes": sizes[kind] for kind in ("prose", "code")},
            "compressed_bytes": path.stat().st_size}  # fmt: skip


def train_tokenizer(documents: Sequence[Document], out: Path, vocab_size: int, most: int) -> dict[str, Any]:
    """A byte-level BPE of every n-th document, ``most`` bytes at least if there are; saved to ``out``."""
    total = sum(len(d.text) for d in documents)
    step = max(1, total // most)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents[::step]), trainer)
    tokenizer.save(str(out))
    sample = [d.text for d in documents[1 :: 50 * step]] or [documents[0].text]
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch(sample))
    return {"vocab_size": tokenizer.get_vocab_size(), "trained_on_every": step,
            "bytes_per_token": sum(len(t.encode()) for t in sample) / tokens}  # fmt: skip


def _read(job: tuple[Path, str, int]) -> tuple[list[Document], dict[str, Any]]:
    return read_package(*job)


def build(
    recipe: Mapping[str, Any], out: Path, downloads: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Everything, from the list of sources to the manifest, which is returned too."""
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    packages = fetch(downloads, recipe["sources"], tell)
    index = {name: index for index, names in recipe["sources"].items() for name in names}
    most = {
        name: int(arguments.scale * recipe["most"].get(name, recipe["most"][index[name]]))
        for name in packages
    }
    documents: list[Document] = []
    accounts: dict[str, Any] = {}
    with get_context("spawn").Pool(arguments.jobs) as pool:
        jobs = [(path, name, most[name]) for name, path in packages.items()]
        for (_, name, _), (found, account) in zip(jobs, pool.imap(_read, jobs), strict=True):
            accounts[name] = {"index": index[name], **account}
            documents += found
            tell(f"{name}: {len(found)} documents, {sum(len(d.text) for d in found) / 1e6:.1f} MB")
    dropped: Counter[str] = Counter()
    splits = deal(distinct(documents, dropped), dropped)
    tell(f"left out: {dict(dropped)}")
    out.mkdir(parents=True, exist_ok=True)
    facts = {split: write_split(out / f"{split}.jsonl.xz", kept) for split, kept in splits.items()}
    tell("splits written")
    tokenizer = train_tokenizer(
        splits["train"], out / "tokenizer.json", arguments.vocab_size, arguments.tokenizer_bytes
    )
    sizes: Counter[str] = Counter()
    for d in (d for kept in splits.values() for d in kept):
        sizes[d.source] += len(d.text.encode())
    total = sum(sizes.values())
    for name, account in accounts.items():
        account |= {"bytes": sizes[name], "share": round(sizes[name] / max(1, total), 5)}
    prose = sum(split["prose_bytes"] for split in facts.values())
    manifest = {
        "bytes": total,
        "prose_share": prose / max(1, total),
        "compressed_bytes": sum(split["compressed_bytes"] for split in facts.values()),
        "splits": facts,
        "tokenizer": tokenizer,
        "left_out": dict(sorted(dropped.items())),
        "near_duplicate": {"shingle_words": SHINGLE, "similarity": SIMILAR, "passage_words": PASSAGE,
                           "passages_at_most": CONTAINED},
        "sources": accounts,
    }  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    tell(
        f"{total / 1e6:.1f} MB, {prose / total:.0%} prose, {manifest['compressed_bytes'] / 1e6:.1f} MB compressed"
    )
    return manifest


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the corpus")
    parser.add_argument("--downloads", type=Path, help="folder of packages (default: OUT/packages)")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("corpus.toml"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the most bytes of each source")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument(
        "--tokenizer-bytes", type=int, default=40_000_000, help="text that trains the tokenizer"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that read packages")
    arguments = parser.parse_args(argv)
    recipe = tomllib.loads(arguments.recipe.read_text(encoding="utf-8"))
    build(recipe, arguments.out, arguments.downloads or arguments.out / "packages", arguments)


if __name__ == "__main__":
    main()
