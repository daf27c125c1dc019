"""Tokenizers: exact round trips, real vocabulary sizes, light import, clear refusals."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from open_mythos.tokenizer import ByteTokenizer, MythosTokenizer, get_vocab_size, load_tokenizer

TEXTS = ["", "plain", "naïve café", "数学と論理", "🙂 a\u0000b\r\n\tc", "\u2028\ufeff"]


@pytest.mark.parametrize("seed", range(5))
def test_bytes_round_trip(seed: int) -> None:
    data = random.Random(seed).randbytes(4000)
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(data, bos=True, eos=True)
    assert len(ids) == 4002
    assert tokenizer.decode_bytes(ids) == data


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), MythosTokenizer()], ids=repr)
def test_text_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_special_tokens_are_outside_the_bytes_and_where_asked(bos: bool, eos: bool) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("ab", bos=bos, eos=eos)
    assert ids == [256] * bos + [97, 98] + [257] * eos
    assert tokenizer.decode([*ids, tokenizer.pad_id, tokenizer.pad_id]) == "ab"
    assert (
        len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} | set(range(256))) == tokenizer.vocab_size
    )


def test_decode_puts_a_mark_for_bytes_that_are_not_text() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([97, 0xFF, 98]) == "a\ufffdb"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode([97, 0xFF, 98], errors="strict")


@pytest.mark.parametrize("bad", [-1, 259, 10**9])
def test_ids_out_of_range_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {bad}; allowed is 0 <= id < 259"):
        ByteTokenizer().decode([97, bad])


def test_text_that_has_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        ByteTokenizer().encode("a\ud800")
    with pytest.raises(ValueError, match="text is list; allowed is str or bytes"):
        ByteTokenizer().encode([1, 2])  # type: ignore[arg-type]


def test_names_of_the_first_release() -> None:
    assert isinstance(load_tokenizer(), MythosTokenizer)
    assert get_vocab_size() == 259
    assert (
        get_vocab_size(ByteTokenizer()) == get_vocab_size(MythosTokenizer()) == MythosTokenizer().vocab_size
    )
    tokenizer = MythosTokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
    with pytest.raises(ValueError, match="tokenizer_or_model_id is float"):
        get_vocab_size(1.5)
    with pytest.raises(ValueError, match="model_id=''; allowed is None"):
        MythosTokenizer("")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"'some/model' .* pip install open-mythos\[hf\]"):
        MythosTokenizer("some/model")
    assert MythosTokenizer().vocab_size == 259


def test_importing_the_module_is_light() -> None:
    """The file alone, run where torch and transformers cannot be imported."""
    import open_mythos.tokenizer as module

    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "t = runpy.run_path(sys.argv[1])['MythosTokenizer'](); assert t.decode(t.encode('ok')) == 'ok'"
    )
    subprocess.run([sys.executable, "-c", code, str(module.__file__)], check=True)


@pytest.fixture
def hugging_face_directory(tmp_path: Path) -> Path:
    """A word-level tokenizer with one added token beyond its vocabulary, saved as on the Hub."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_hugging_face_tokenizer_by_directory(hugging_face_directory: Path) -> None:
    tokenizer = MythosTokenizer(str(hugging_face_directory))
    assert tokenizer.encode("two one <call>") == [4, 3, 5]
    assert tokenizer.decode([1, 4, 3, 2]) == "two one"
    assert tokenizer.vocab_size == len(tokenizer) == 6
    assert tokenizer.tokenizer.vocab_size == 5
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert get_vocab_size(tokenizer) == get_vocab_size(tokenizer.tokenizer) == 6
    assert get_vocab_size(str(hugging_face_directory)) == 6


def test_a_tokenizer_file_alone_gives_the_same_ids(
    hugging_face_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name = MythosTokenizer(str(hugging_face_directory))
    texts = ["two one <call>", "one </s> two"]
    ids = by_name.encode_batch(texts)
    monkeypatch.setitem(sys.modules, "transformers", None)
    tokenizer = MythosTokenizer(str(hugging_face_directory / "tokenizer.json"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("two one <call>") == [4, 3, 5]
    assert tokenizer.decode([1, 4, 3, 2]) == "two one"
    assert tokenizer.encode_batch(texts) == ids
    assert tokenizer.fingerprint == by_name.fingerprint
    # As a prompt, </s> is the end mark; in a document it is five signs that this vocabulary lacks.
    assert 2 in tokenizer.encode(texts[1])
    assert 2 not in ids[1]
    named = MythosTokenizer(tokenizer.model_id, eos_token="<call>")
    assert named.eos_id == 5
    assert named.fingerprint != tokenizer.fingerprint


def test_bytes_in_a_batch_and_their_fingerprint() -> None:
    tokenizer = MythosTokenizer()
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.fingerprint == "bytes"


def test_bad_tokenizer_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match=r"allowed is a tokenizer.json file that exists"):
        MythosTokenizer(str(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"x.json' is no tokenizer.json"):
        MythosTokenizer(str(path))
    with pytest.raises(ValueError, match="eos_token='x'; allowed is a token of bytes"):
        MythosTokenizer(eos_token="x")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs the package tokenizers: pip install open-mythos\[data\]"):
        MythosTokenizer(str(path))
