"""Quality against loops on text: bits per byte, whatever the tokenizer, and each loop run once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from open_mythos import OpenMythos
from open_mythos.tokenizer import MythosTokenizer
from open_mythos.training.config import RunConfig
from open_mythos.training.evaluate import sweep
from open_mythos.training.sources import evaluation_batches, train_stream

EOS = "<|endoftext|>"
TEXTS = [f"Straße {n}: ünïcödé ☃ and 𝄞, the {n}th time; the time of day\n\tis noon.\n" * 3 for n in range(40)]
RUN = {"loops": {"mean": 2.0, "max": 4}}


def bpe(path: Path, byte_level: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else EOS))
    special = {"special_tokens": [EOS], "vocab_size": 320, "show_progress": False}
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(**special))
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for split, part in (("train", TEXTS[:20]), ("validation", TEXTS[20:30]), ("test", TEXTS[30:])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / f"{split}.jsonl").write_text(rows)
    bpe(tmp_path / "tokenizer.json")
    return tmp_path


def config(corpus: Path, tokenizer: str, seq_len: int = 24, **model: Any) -> RunConfig:
    sizes = {"dim": 16, "n_heads": 2, "n_kv_heads": 1, "attn_type": "gqa", "prelude_layers": 1, "coda_layers": 1,
             "n_experts": 2, "n_experts_per_tok": 1, "expert_dim": 8, "lora_rank": 0, "max_loop_iters": 4}  # fmt: skip
    source = {"source": str(corpus / "*.jsonl"), "tokenizer": tokenizer, "seq_len": seq_len}
    return RunConfig.from_dict(
        {
            "model": {**sizes, **model},
            "data": {**source, "cache": str(corpus / "cache")},
            "loops": {"kind": "fixed", "loops": 2},
            "train": {"batch_size": 64 // seq_len + 2},
            "eval": {"examples": 1000},
        }
    )


def test_byte_lengths_add_up_to_the_text(tmp_path: Path) -> None:
    bpe(tmp_path / "tokenizer.json")
    tokenizer = MythosTokenizer(str(tmp_path / "tokenizer.json"))
    lengths = tokenizer.byte_lengths()
    assert lengths is not None
    for text in (*TEXTS, "\x00 日本語 " + EOS, ""):
        assert sum(lengths[i] for i in tokenizer.encode_batch([text])[0]) == len(text.encode())
    assert lengths[tokenizer.eos_id] == 1
    assert MythosTokenizer().byte_lengths() == [1] * 259


@pytest.mark.parametrize("harm", ["metaspace", "normalizer"])
def test_tokenizers_that_lose_the_bytes_have_no_lengths(tmp_path: Path, harm: str) -> None:
    tokenizer = bpe(tmp_path / "tokenizer.json", byte_level=harm != "metaspace")
    if harm == "normalizer":
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert MythosTokenizer(str(tmp_path / "tokenizer.json")).byte_lengths() is None


@pytest.mark.parametrize("tokens", ["bytes", "bpe"])
def test_bits_per_byte_are_nats_over_ln_2_and_bytes(corpus: Path, tokens: str) -> None:
    name = "bytes" if tokens == "bytes" else str(corpus / "tokenizer.json")
    cfg = config(corpus, name, seq_len=1)  # so that no token is left over at the end
    model = OpenMythos(cfg.model)
    torch.nn.init.zeros_(model.embed.weight)  # every token is as likely as any other
    found = sweep(model, cfg, RUN, [1])
    assert found["metric"] == "bits_per_byte"
    tokenizer = cfg.data.tokenizer()
    rows = tokenizer.encode_batch(TEXTS[30:])
    count = sum(map(len, rows))  # the end mark is asked for, and the first token of a document is not
    size = sum(
        len(t.encode()) + 1 - len(tokenizer.decode([row[0]]).encode())
        for t, row in zip(TEXTS[30:], rows, strict=True)
    )
    expected = count * math.log2(cfg.model.vocab_size) / size
    assert found["splits"]["test"]["values"] == [pytest.approx(expected, rel=1e-5)]
    assert (count == size) is (tokens == "bytes")


def test_without_byte_lengths_it_is_bits_per_token(corpus: Path) -> None:
    bpe(corpus / "other.json", byte_level=False)
    cfg = config(corpus, str(corpus / "other.json"))
    model = OpenMythos(cfg.model)
    torch.nn.init.zeros_(model.embed.weight)
    found = sweep(model, cfg, RUN, [1])
    assert found["metric"] == "bits_per_token"
    assert found["splits"]["test"]["values"] == [pytest.approx(math.log2(cfg.model.vocab_size), rel=1e-5)]


@pytest.mark.parametrize("halting", ["off", "select", "average", "upstream"])
def test_every_loop_count_is_scored_as_the_model_would_answer(corpus: Path, halting: str) -> None:
    cfg = config(corpus, "bytes", halting=halting, halt_bias_init=-0.5, act_threshold=0.7)
    torch.manual_seed(0)
    model = OpenMythos(cfg.model).eval()
    torch.nn.init.normal_(model.recurrent.act.halt.weight, std=0.5)
    counts = [5, 1, 3]
    nats = dict.fromkeys(counts, 0.0)
    scored = 0
    for batch in evaluation_batches(cfg, "test"):
        scored += int((batch["targets"] >= 0).sum())
        for count in counts:
            with torch.no_grad():
                logits = model(batch["ids"], count, document_ids=batch["document_ids"])
            wanted = batch["targets"].flatten()
            nats[count] += float(F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"))
    expected = [nats[count] / scored / math.log(2) for count in counts]
    assert len(set(expected)) == 3
    assert sweep(model, cfg, RUN, counts)["splits"]["test"]["values"] == pytest.approx(expected, rel=1e-5)


def test_joined_documents_are_scored_as_they_are_trained(corpus: Path) -> None:
    cfg = config(corpus, "bytes")
    joined = RunConfig.from_dict({**cfg.to_dict(), "data": {**cfg.to_dict()["data"], "apart": False}})
    assert all("document_ids" not in batch for batch in evaluation_batches(joined, "test"))
    assert "document_ids" not in next(train_stream(joined)[0])
    torch.manual_seed(0)
    model = OpenMythos(cfg.model)
    one, other = (sweep(model, each, RUN, [2])["splits"]["test"]["values"] for each in (cfg, joined))
    assert one != other
