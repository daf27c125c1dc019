"""The corpus script: text out of packages, near-duplicates gone, no document on two sides of a split."""

from __future__ import annotations

import importlib
import itertools
import json
import lzma
import random
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from open_mythos.tokenizer import MythosTokenizer
from open_mythos.training.dataconfig import DataConfig
from open_mythos.training.prepare import prepare

WORDS = [a + b + c for a, b, c in itertools.product("bdfgklmnprst", "aeiou", ("", "ra", "ton", "ly"))]
GLUE = "the of and to in is that it for as with be on by this are from or an at".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def corpus(root: Path) -> Iterator[Any]:
    """The script as a module, its neighbours with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        yield importlib.import_module("build_corpus")


def prose(seed: int, words: int = 300) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(GLUE if i % 2 else WORDS) for i in range(words)) + ".\n"


def changed(text: str, share: float, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) if draw.random() < share else word for word in text.split()) + "\n"


def documents(corpus: Any, texts: list[str]) -> list[Any]:
    return [corpus.document("p", str(number), "prose", text) for number, text in enumerate(texts)]


def test_a_page_loses_its_frames_and_keeps_its_text(corpus: Any) -> None:
    text = importlib.import_module("corpus_text").text_of_page(
        "<html><head><title>no</title><style>p {}</style></head><body><div class='sidebar'>menu<div>more</div></div>"
        "<nav>next</nav><h1>A &amp; B</h1><p>One\n  two <b>three</b>.</p><pre>if x:\n    y = 1</pre>"
        "<ul><li>first<li>second</ul><script>var z;</script></body></html>"
    )
    assert text.split("\n\n") == ["A & B", "One two three.", "if x:\n    y = 1", "- first\n- second\n"]


def test_a_manual_page_loses_its_requests(corpus: Any) -> None:
    roff = '.TH X 1\n.\\" comment\n.SH NAME\nx \\- do \\fBit\\fR\n.B well\n.PP\nand \\-\\-fast\n'
    text = importlib.import_module("corpus_text").text_of_manual(roff)
    assert text == "NAME\nx - do it\nwell\n\nand --fast\n"


@pytest.mark.parametrize(
    ("name", "sort"),
    [
        ("./usr/share/doc/x/html/a.html", "page"),
        ("usr/share/doc/x/a.txt.gz", "text"),
        ("usr/share/man/man1/ls.1.gz", "manual"),
        ("usr/share/man/de/man1/ls.1.gz", None),
        ("usr/share/dictd/x.dict.dz", "dictionary"),
        ("usr/share/doc/x/html/genindex.html", None),
        ("usr/share/doc/x/changelog.gz", None),
        ("usr/share/help/fr/x/a.page", None),
        ("usr/share/help/C/x/a.page", "page"),
        ("usr/share/doc/x/html/fr-FR/a.html", None),
        ("django/db/models.py", "code"),
        ("x/data.json", None),
    ],
)
def test_files_are_sorted_by_name(corpus: Any, name: str, sort: str | None) -> None:
    assert corpus.sort_of(name) == sort


def test_texts_that_are_not_worth_keeping_are_named_so(corpus: Any) -> None:
    german = "Der Hund und die Katze gehen nicht durch das Haus, weil es dunkel ist. " * 20
    for text, kind, why in (
        (prose(0), "prose", ""),
        ("short", "prose", "wrong size"),
        ("1234 5678 90 " * 100, "prose", "few letters"),
        (german, "prose", "not English prose"),
        ("x = 1\n" * 100 + "y" * 900, "code", "long lines"),
        ("value = other\n" * 100, "code", ""),
    ):
        assert corpus.fault(text, kind) == why


def test_a_dictionary_is_cut_between_entries(corpus: Any) -> None:
    entries = [f"Word{number}\n   meaning of it, {number} times\n" for number in range(2000)]
    parts = list(importlib.import_module("corpus_text").entries("".join(entries)))
    assert len(parts) > 3
    assert all(part.startswith("Word") for part in parts)
    assert "".join(parts) == "".join(entries)


def test_equal_and_near_equal_documents_are_kept_once(corpus: Any) -> None:
    texts = [prose(seed) for seed in range(30)]
    equal = "  ".join(texts[0].split())  # white space does not count
    near = [changed(text, 0.02) for text in texts[:10]]
    far = [changed(text, 0.5) for text in texts[:10]]
    dropped: Counter[str] = Counter()
    kept = corpus.distinct(documents(corpus, [*texts, equal, *near, *far]), dropped)
    assert [d.text for d in kept] == [*texts, *far]
    assert dropped == {"duplicate": 1, "near-duplicate": 10}


def test_the_sketch_estimates_the_share_of_shingles_in_common(corpus: Any) -> None:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    errors = []
    for seed in range(20):
        one = prose(seed, 1000)
        other = changed(one, 0.05, seed)
        exact = len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))
        a, b = documents(corpus, [one, other])
        errors.append(float(np.mean(a.sketch == b.sketch)) - exact)
    assert abs(float(np.mean(errors))) < 0.05
    assert float(np.std(errors)) < 0.12  # 64 bins: about sqrt(.6 · .4 / 64) = .06


def test_no_document_and_no_passage_is_in_two_splits(corpus: Any) -> None:
    texts = [prose(seed, 240) for seed in range(400)]
    # Too little in common for a near-duplicate, far too much for a fair test.
    texts += [" ".join(text.split()[:90]) + " " + prose(1000 + i, 150) for i, text in enumerate(texts[:200])]
    dropped: Counter[str] = Counter()
    kept = corpus.distinct(documents(corpus, texts), dropped)
    assert not dropped
    splits = corpus.deal(kept, dropped)
    assert all(len(splits[split]) for split in ("train", "validation", "test"))
    assert sum(map(len, splits.values())) + sum(dropped.values()) == len(texts)
    assert sum(dropped.values()) > 0

    def passages(split: str) -> Counter[tuple[str, ...]]:
        rows = (d.text.split() for d in splits[split])
        return Counter(tuple(row[i : i + 32]) for row in rows for i in range(len(row) - 31))

    for one, other in itertools.combinations(splits, 2):
        shared = passages(one).keys() & passages(other).keys()
        assert len(shared) <= 0.02 * len(passages(other))
    again = corpus.deal(documents(corpus, texts[::-1]), Counter())
    assert {d.text for d in again["test"]} == {d.text for d in splits["test"]}  # whatever the order


@pytest.fixture(scope="module")
def built(corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Path]]:
    """Two builds from the same three small packages."""
    base = tmp_path_factory.mktemp("corpus")
    (base / "packages").mkdir()
    for number, name in enumerate(("alpha", "beta_x", "alpha_doc")):
        with zipfile.ZipFile(base / "packages" / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", "Name: x\nLicense-Expression: MIT\n")
            for i in range(60):
                wheel.writestr(f"{name}/guide{i}.md", prose(100 * number + i))
                wheel.writestr(f"{name}/code{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 20)
            wheel.writestr(f"{name}/same.md", prose(77))
    recipe = base / "recipe.toml"
    recipe.write_text(
        '[sources]\npypi = ["alpha", "beta.X", "alpha-doc"]\n[most]\npypi = 1_000_000\n"beta.X" = 20_000\n'
    )
    outs = [base / "one", base / "two"]
    for out in outs:
        paths = ["--out", str(out), "--downloads", str(base / "packages"), "--recipe", str(recipe)]
        corpus.main([*paths, "--vocab-size", "400", "--jobs", "1"])
    return json.loads((outs[0] / "manifest.json").read_text()), outs


def test_the_manifest_says_what_is_in_the_corpus(built: tuple[dict[str, Any], list[Path]]) -> None:
    manifest, (out, _) = built
    rows = {}
    for split in ("train", "validation", "test"):
        with lzma.open(out / f"{split}.jsonl.xz", "rt", encoding="utf-8") as file:
            rows[split] = [json.loads(line) for line in file]
    every = [row for split in rows.values() for row in split]
    assert {split: len(found) for split, found in rows.items()} == {
        split: facts["documents"] for split, facts in manifest["splits"].items()
    }
    assert manifest["bytes"] == sum(len(row["text"].encode()) for row in every)
    assert 0 < manifest["prose_share"] < 1
    sources = manifest["sources"]
    assert [source["package"] for source in sources.values()] == [
        f"{name}-1.0-py3-none-any.whl" for name in ("alpha", "beta_x", "alpha_doc")
    ]
    assert all(source["licences"] == ["MIT"] for source in sources.values())
    assert sum(source["share"] for source in sources.values()) == pytest.approx(1, abs=1e-4)
    assert sources["beta.X"]["bytes"] < 25_000 < sources["alpha"]["bytes"]
    assert manifest["left_out"]["duplicate"] >= 1
    texts = [row["text"] for row in every]
    assert len(set(texts)) == len(texts)


def test_the_same_packages_give_the_same_files(built: tuple[dict[str, Any], list[Path]]) -> None:
    one, two = built[1]
    for name in ("train.jsonl.xz", "test.jsonl.xz", "tokenizer.json", "manifest.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_the_corpus_is_what_training_reads(built: tuple[dict[str, Any], list[Path]], tmp_path: Path) -> None:
    manifest, (out, _) = built
    name = str(out / "tokenizer.json")
    tokenizer = MythosTokenizer(name)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (400, 0)
    lengths = tokenizer.byte_lengths()
    assert lengths is not None
    prepared = prepare(DataConfig(str(out / "*.jsonl.xz"), {"tokenizer": name, "cache": str(tmp_path)}))
    for split, facts in manifest["splits"].items():
        index = prepared.index["splits"][split]
        assert index["documents"] == facts["documents"]
        ids = [
            np.fromfile(prepared.folder / s["file"], dtype=prepared.index["dtype"]) for s in index["shards"]
        ]
        stored = sum(lengths[i] for i in np.concatenate(ids).tolist())
        assert stored == facts["bytes"] + facts["documents"]  # and an end mark each
