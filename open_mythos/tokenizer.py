"""Tokenizers: bytes by default, Hugging Face tokenizers on request.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["ByteTokenizer", "Ids", "MythosTokenizer", "get_vocab_size", "load_tokenizer", "tokenizer_of"]

# Special tokens of published tokenizer.json files, which do not say what their tokens are for. The first that a file
# has is taken.
_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
_PAD = ("<pad>", "[PAD]", "<|pad|>")


class ByteTokenizer:
    """Token i is byte i; three special tokens follow. Nothing is trained and nothing is downloaded.

    Attributes:
        bos_id: 256, beginning of a document.
        eos_id: 257, end of a document.
        pad_id: 258, filler.
        vocab_size: 259.
    """

    bos_id = 256
    eos_id = 257
    pad_id = 258
    vocab_size = 259

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return "ByteTokenizer()"

    def encode(self, text: str | bytes, bos: bool = False, eos: bool = False) -> list[int]:
        """UTF-8 bytes of ``text`` (or the bytes themselves) as token ids.

        Args:
            text: str or bytes.
            bos: put ``bos_id`` first.
            eos: put ``eos_id`` last.

        Raises:
            ValueError: ``text`` is neither str nor bytes, or holds a lone surrogate, which has no UTF-8 form.
        """
        if isinstance(text, str):
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"text has a lone surrogate at character {error.start}; "
                    "allowed is text with a UTF-8 form, or bytes"
                ) from error
        elif isinstance(text, (bytes, bytearray)):
            data = bytes(text)
        else:
            raise ValueError(f"text is {type(text).__name__}; allowed is str or bytes")
        return [self.bos_id] * bos + list(data) + [self.eos_id] * eos

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        """The exact bytes behind ``token_ids``; special tokens are left out.

        Raises:
            ValueError: an id is outside 0 … 258.
        """
        ids = [int(i) for i in token_ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i}; allowed is 0 <= id < {self.vocab_size}")
        return bytes(i for i in ids if i < 256)

    def decode(self, token_ids: Iterable[int], errors: str = "replace") -> str:
        """Text behind ``token_ids``; special tokens are left out.

        Args:
            token_ids: ids in 0 … 258, a list or a 1-D tensor.
            errors: what to do with bytes that are not UTF-8, as in ``bytes.decode``. A model may produce such
                bytes, so the default puts U+FFFD there; ``decode_bytes`` loses nothing.

        Raises:
            ValueError: an id is out of range, or ``errors="strict"`` and the bytes are not UTF-8.
        """
        return self.decode_bytes(token_ids).decode("utf-8", errors)


class MythosTokenizer:
    """The tokenizer that goes with a model: bytes, a ``tokenizer.json``, or a Hugging Face tokenizer by name.

    Args:
        model_id: None for the byte tokenizer. A name that ends in .json is a file of the tokenizers library,
            which is imported then. Any other string is passed to ``transformers.AutoTokenizer``: a Hub id or
            a local directory. transformers is imported then and not before. Code shipped with a tokenizer is
            never run.
        eos_token: the token that ends a document, for a file that has none of the usual ones.

    Attributes:
        model_id: as given.
        tokenizer: the ``ByteTokenizer`` or the Hugging Face tokenizer behind this one.

    Raises:
        ImportError: ``model_id`` is a string and the library for it is not installed.
        ValueError: ``model_id`` is neither None nor a non-empty string, the file is no tokenizer, or it has
            no such ``eos_token``.
    """

    def __init__(self, model_id: str | None = None, *, eos_token: str | None = None) -> None:
        if model_id is not None and (not isinstance(model_id, str) or not model_id):
            raise ValueError(
                f"model_id={model_id!r}; allowed is None (bytes) or the name of a Hugging Face tokenizer"
            )
        self.model_id = model_id
        self.tokenizer: Any = ByteTokenizer()
        if model_id is not None:
            load: Any = _JsonTokenizer if model_id.endswith(".json") else _hugging_face_tokenizer
            self.tokenizer = load(model_id)
        self._eos = None if eos_token is None else self._named(eos_token)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __repr__(self) -> str:
        return f"MythosTokenizer({self.model_id!r})"

    @property
    def vocab_size(self) -> int:
        """V, the number of ids that ``encode`` may produce, added tokens included.

        OpenMythos up to 0.5.0 returned the ``vocab_size`` of the Hugging Face tokenizer, which leaves added
        tokens out: an embedding of that size is too small for the ids of chat and control tokens. This is
        ``len(tokenizer)``.
        """
        return len(self.tokenizer)

    @property
    def bos_id(self) -> int | None:
        """Id that begins a document; None if the tokenizer has none."""
        return self._special("bos")

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document; None if the tokenizer has none."""
        return self._special("eos") if self._eos is None else self._eos

    @property
    def pad_id(self) -> int | None:
        """Id that fills up a batch; None if the tokenizer has none."""
        return self._special("pad")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens around it."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.tokenizer.encode(text)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text. The name of a special token in a text is text like any other here, so that a
        document cannot end itself.
        """
        if isinstance(self.tokenizer, ByteTokenizer):
            return [self.tokenizer.encode(text) for text in texts]
        if isinstance(self.tokenizer, _JsonTokenizer):
            return self.tokenizer.encode_batch(texts)
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    @property
    def fingerprint(self) -> str:
        """Tells apart tokenizers that give different ids: "bytes", or a hash of the whole tokenizer."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return "bytes"
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = (
            backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        )
        return hashlib.sha256(f"{content} {self.eos_id} {self.bos_id}".encode()).hexdigest()

    def byte_lengths(self) -> list[int] | None:
        """How many bytes of text each id stands for, (V,); special tokens, which stand for none, count as one.

        None for a tokenizer whose ids do not stand for the same bytes everywhere: one that is not byte-level, or that
        changes the text first.
        """
        if isinstance(self.tokenizer, ByteTokenizer):
            return [1] * self.tokenizer.vocab_size
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        made = json.loads(backend.to_str())
        if (made["decoder"] or {}).get("type") != "ByteLevel" or made["normalizer"] is not None:
            return None
        marks = {token["id"] for token in made["added_tokens"]}
        lengths = [1] * len(self)
        for token, number in self.tokenizer.get_vocab().items():
            lengths[number] = (
                1 if number in marks else len(token)
            )  # one character of such a token is one byte
        return lengths

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of ``token_ids``, special tokens left out."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.tokenizer.decode(token_ids)
        return str(self.tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=True))

    def _named(self, token: str) -> int:
        vocabulary = {} if isinstance(self.tokenizer, ByteTokenizer) else self.tokenizer.get_vocab()
        if token not in vocabulary:
            raise ValueError(f"eos_token={token!r}; allowed is a token of {self.model_id or 'bytes'}")
        return int(vocabulary[token])

    def _special(self, kind: str) -> int | None:
        name = f"{kind}_id" if isinstance(self.tokenizer, ByteTokenizer) else f"{kind}_token_id"
        value = getattr(self.tokenizer, name)
        return None if value is None else int(value)


def tokenizer_of(data: Mapping[str, Any]) -> MythosTokenizer | None:
    """The tokenizer that a run's [data] section names; None if it names ids without one.

    Args:
        data: keys "tokenizer" (absent or "bytes": bytes), "eos_token" and "vocab_size", each may be absent.

    Raises:
        ImportError, ValueError, OSError: as :class:`MythosTokenizer`.
    """
    if data.get("vocab_size") is not None:
        return None
    name = data.get("tokenizer", "bytes")
    return MythosTokenizer(None if name == "bytes" else name, eos_token=data.get("eos_token"))


class Ids:
    """What is known of the ids in a token file: it was tokenised elsewhere.

    Args:
        vocab_size: V.
        eos_id: the id between documents.
    """

    bos_id = None
    pad_id = None

    def __init__(self, vocab_size: int, eos_id: int) -> None:
        self.vocab_size = vocab_size
        self.eos_id = eos_id

    @property
    def fingerprint(self) -> str:
        """Tells V and the separator apart."""
        return f"ids below {self.vocab_size}, {self.eos_id} between documents"


class _JsonTokenizer:
    """A ``tokenizer.json``, with what this module asks of a Hugging Face tokenizer."""

    def __init__(self, path: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                f"model_id={path!r} needs the package tokenizers: pip install open-mythos[data]"
            ) from error
        if not Path(path).is_file():
            raise ValueError(f"model_id={path!r}; allowed is a tokenizer.json file that exists")
        try:
            self.backend_tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"model_id={path!r} is no tokenizer.json: {error}") from error
        self._vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        self.eos_token_id = self._first(_EOS)
        self.bos_token_id = self._first(_BOS)
        self.pad_token_id = self._first(_PAD)

    def __len__(self) -> int:
        return max(self._vocabulary.values()) + 1

    def get_vocab(self) -> dict[str, int]:
        """Token → id."""
        return self._vocabulary

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of one text."""
        return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores, special tokens read as text."""
        self.backend_tokenizer.encode_special_tokens = True
        try:
            batch = self.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self.backend_tokenizer.encode_special_tokens = False
        return [encoding.ids for encoding in batch]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of these ids."""
        return str(self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def _first(self, names: Iterable[str]) -> int | None:
        return next((self._vocabulary[name] for name in names if name in self._vocabulary), None)


def load_tokenizer(model_id: str | None = None) -> MythosTokenizer:
    """``MythosTokenizer(model_id)``, under a name that OpenMythos announced in ``__all__`` and did not
    define.
    """
    return MythosTokenizer(model_id)


def get_vocab_size(tokenizer_or_model_id: Any = None) -> int:
    """V of a tokenizer, added tokens included.

    Args:
        tokenizer_or_model_id: a tokenizer (ours or a Hugging Face one), the name of a Hugging Face tokenizer,
            or None for bytes (259).

    Raises:
        ImportError: a name was given and transformers is not installed.
        ValueError: anything else.
    """
    if tokenizer_or_model_id is None or isinstance(tokenizer_or_model_id, str):
        return load_tokenizer(tokenizer_or_model_id).vocab_size
    if not (hasattr(tokenizer_or_model_id, "encode") and hasattr(tokenizer_or_model_id, "__len__")):
        raise ValueError(
            f"tokenizer_or_model_id is {type(tokenizer_or_model_id).__name__}; "
            "allowed is a tokenizer, a name or None"
        )
    return len(tokenizer_or_model_id)


def _hugging_face_tokenizer(model_id: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"model_id={model_id!r} names a Hugging Face tokenizer, which needs transformers: "
            "pip install open-mythos[hf]. MythosTokenizer() without a name works on bytes and needs nothing."
        ) from error
    return AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
