"""Tokenizers: bytes by default, Hugging Face tokenizers on request.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["ByteTokenizer", "MythosTokenizer", "get_vocab_size", "load_tokenizer"]


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
    """The tokenizer that goes with a model: bytes, or any Hugging Face tokenizer by name.

    Args:
        model_id: None for the byte tokenizer. A string is passed to ``transformers.AutoTokenizer``: a Hub id
            or a local directory. transformers is imported then and not before. Code shipped with a tokenizer
            is never run.

    Attributes:
        model_id: as given.
        tokenizer: the ``ByteTokenizer`` or the Hugging Face tokenizer behind this one.

    Raises:
        ImportError: ``model_id`` is a string and transformers is not installed.
        ValueError: ``model_id`` is neither None nor a non-empty string.
    """

    def __init__(self, model_id: str | None = None) -> None:
        if model_id is not None and (not isinstance(model_id, str) or not model_id):
            raise ValueError(
                f"model_id={model_id!r}; allowed is None (bytes) or the name of a Hugging Face tokenizer"
            )
        self.model_id = model_id
        self.tokenizer: Any = ByteTokenizer() if model_id is None else _hugging_face_tokenizer(model_id)

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
        return self._special("eos")

    @property
    def pad_id(self) -> int | None:
        """Id that fills up a batch; None if the tokenizer has none."""
        return self._special("pad")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens around it."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.tokenizer.encode(text)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of ``token_ids``, special tokens left out."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.tokenizer.decode(token_ids)
        return str(self.tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=True))

    def _special(self, kind: str) -> int | None:
        name = f"{kind}_id" if isinstance(self.tokenizer, ByteTokenizer) else f"{kind}_token_id"
        value = getattr(self.tokenizer, name)
        return None if value is None else int(value)


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
