"""Bad input is refused at the door: one sentence that names the field, the value and what is allowed.

Each case runs against a model and a cache that must be exactly as before afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import KVCache, LastLoop, MythosConfig, OpenMythos, rescale_spectral_radius, stream
from open_mythos.config import ConfigError
from open_mythos.model.cache import CacheError

V = 23
IDS = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(0))

SMALL: dict[str, Any] = {
    "vocab_size": V,
    "dim": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 16,
    "max_loop_iters": 4,
    "prelude_layers": 1,
    "coda_layers": 1,
    "attn_type": "gqa",
    "kv_lora_rank": 6,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 6,
    "n_experts": 4,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 8,
    "lora_rank": 2,
    "max_output_tokens": 12,
    "dropout": 0.1,
}

# Configuration: changes to SMALL, and the message.

CONFIG: list[tuple[dict[str, Any], str]] = [
    *[
        (
            {name: value},
            rf"^{name} = {re.escape(repr(value))} is not .* a whole number of at least {low}$",
        )
        for name, low, value in [
            ("vocab_size", 1, 0),
            ("dim", 1, -8),
            ("dim", 1, 16.0),
            ("dim", 1, "16"),
            ("n_heads", 1, 0),
            ("n_heads", 1, True),
            ("n_kv_heads", 1, 0),
            ("max_seq_len", 1, 0),
            ("max_seq_len", 1, None),
            ("max_loop_iters", 1, 0),
            ("prelude_layers", 0, -1),
            ("coda_layers", 0, -1),
            ("kv_lora_rank", 1, 0),
            ("q_lora_rank", 1, 0),
            ("qk_rope_head_dim", 2, 0),
            ("qk_nope_head_dim", 1, 0),
            ("v_head_dim", 1, 0),
            ("n_experts", 1, 0),
            ("n_shared_experts", 0, -1),
            ("n_experts_per_tok", 1, 0),
            ("expert_dim", 1, 0),
            ("lora_rank", 0, -1),
            ("max_output_tokens", 1, 0),
        ]
    ],
    ({"ffn_dim": 0}, r"^ffn_dim = 0 .* None or a whole number of at least 1$"),
    ({"eos_token_id": V}, rf"^eos_token_id = {V} .* None or 0 to vocab_size - 1 \({V - 1}\)$"),
    ({"bos_token_id": -1}, r"^bos_token_id = -1 .* None or a whole number of at least 0$"),
    ({"pad_token_id": 99}, r"^pad_token_id = 99 .* None or 0 to vocab_size - 1"),
    ({"n_kv_heads": 5}, r"^n_kv_heads = 5 .* 1 to n_heads \(4\) when attn_type is 'gqa'$"),
    ({"n_heads": 3}, r"^n_heads = 3 .* a divisor of dim \(16\) when attn_type is 'gqa'$"),
    ({"n_heads": 16}, r"^n_heads = 16 .* dim / n_heads even, but it is 1"),
    ({"attn_type": "mla", "qk_rope_head_dim": 5}, r"^qk_rope_head_dim = 5 .* an even number"),
    ({"n_experts_per_tok": 5}, r"^n_experts_per_tok = 5 .* 1 to n_experts \(4\)$"),
    ({"attn_type": "mha"}, r"^attn_type = 'mha' .* 'mla' or 'gqa'$"),
    ({"attn_type": ["mla"]}, r"^attn_type = \['mla'\] .* 'mla' or 'gqa'$"),
    ({"halting": "act"}, r"^halting = 'act' .* 'select' or 'average' or 'upstream' or 'off'$"),
    ({"initial_state": None}, r"^initial_state = None .* 'prelude' or 'zero' or 'random'$"),
    ({"block_output": 1}, r"^block_output = 1 .* 'update' or 'state'$"),
    ({"init": "xavier"}, r"^init = 'xavier' .* 'scaled' or 'upstream'$"),
    ({"dropout": 1.0}, r"^dropout = 1.0 .* at least 0 and below 1$"),
    ({"dropout": -0.1}, r"^dropout = -0.1 .* at least 0 and below 1$"),
    ({"act_threshold": 0.0}, r"^act_threshold = 0.0 .* above 0$"),
    ({"act_threshold": math.nan}, r"^act_threshold = nan .* a finite number"),
    ({"act_threshold": 10**400}, r"^act_threshold = 10+ .* a finite number"),
    ({"rope_theta": 1.0}, r"^rope_theta = 1.0 .* above 1$"),
    ({"rope_theta": math.inf}, r"^rope_theta = inf .* a finite number"),
    ({"norm_eps": 0}, r"^norm_eps = 0 .* above 0$"),
    ({"halt_bias_init": "-3"}, r"^halt_bias_init = '-3' .* a finite number$"),
    ({"halt_tolerance": -1.0}, r"^halt_tolerance = -1.0 .* above 0$"),
    ({"router_bias_rate": -1e-3}, r"^router_bias_rate = -0.001 .* at least 0 and at most 1000$"),
    ({"alibi": 1e300}, r"^alibi = 1e\+300 .* at least 0 and at most 10000$"),
    ({"extra_loops": 1e300}, r"^extra_loops = 1e\+300 .* at least 0 and at most 1000$"),
    ({"tie_embeddings": 1}, r"^tie_embeddings = 1 .* True or False$"),
    ({"qk_norm": "yes"}, r"^qk_norm = 'yes' .* True or False$"),
    ({"n_expert": 4}, r"^n_expert = 4 .* no such field; did you mean 'n_experts'\?$"),
    ({"zzz": 4}, r"^zzz = 4 .* no such field; the fields are vocab_size, "),
]


@pytest.mark.parametrize(
    ("changes", "message"), CONFIG, ids=lambda x: str(x)[:40] if isinstance(x, dict) else ""
)
def test_config(changes: dict[str, Any], message: str) -> None:
    doors: list[Callable[[], Any]] = [
        lambda: MythosConfig(**{**SMALL, **changes}),
        lambda: MythosConfig.from_dict({**SMALL, **changes}),
        lambda: MythosConfig(**SMALL).replace(**changes),
    ]
    for door in doors:
        with pytest.raises(ConfigError, match=message) as caught:
            door()
        assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MythosConfig.from_json("{"), "^config is not valid JSON: "),
        (lambda: MythosConfig.from_json(b"\xff"), "^config is not valid JSON: .*decode"),  # type: ignore[arg-type]
        (lambda: MythosConfig.from_json("[" * 10**5), "^config is not valid JSON: .*recursion"),
        (
            lambda: MythosConfig.from_json('{"dim": ' + "9" * 5000 + "}"),
            "^config is not valid JSON: .*digits",
        ),
        (lambda: MythosConfig.from_json(None), "^a config must be JSON text, got NoneType$"),  # type: ignore[arg-type]
        (lambda: MythosConfig.from_json("[1]"), "^a config must be a JSON object of fields, got list$"),
        (lambda: MythosConfig.from_dict(None), "^a config must be a JSON object of fields, got NoneType$"),  # type: ignore[arg-type]
        (lambda: MythosConfig.from_dict({1: 2}), "^1 = 2 .* no such field"),  # type: ignore[dict-item]
        (
            lambda: MythosConfig.upstream(qk_norm=True),
            "^qk_norm = True .* False, which the upstream preset fixes$",
        ),
        (lambda: OpenMythos({"dim": 16}), "^cfg must be a MythosConfig, got dict$"),  # type: ignore[arg-type]
    ],
)
def test_config_documents(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=message):
        call()


# The model, its cache, generation.


@dataclass
class Scene:
    """A GQA model in training mode, an empty cache, one with five tokens of two loops, and a dict like it."""

    model: OpenMythos
    empty: KVCache
    cache: KVCache
    packed: KVCache
    entries: dict[str, dict[str, Tensor]]

    @classmethod
    def make(cls) -> Scene:
        torch.manual_seed(0)
        model = OpenMythos(MythosConfig(**SMALL)).eval()
        scene = cls(model, KVCache(), KVCache(), KVCache(), {})
        with torch.no_grad():
            model(IDS, 2, scene.cache)
            model(IDS, 2, scene.entries)
            model(IDS, 2, scene.packed, document_ids=torch.zeros_like(IDS))
        model.train()
        model.recurrent.eval()  # a mixture of modes, all of which must survive
        return scene

    def state(self) -> Any:
        caches = [self.empty, self.cache, self.packed]
        return (
            [tensor.clone() for tensor in self.model.state_dict().values()],
            [module.training for module in self.model.modules()],
            [{s: {n: t.clone() for n, t in e.items()} for s, e in cache.entries.items()} for cache in caches],
            [(cache.length, cache.packed, cache.nbytes) for cache in caches],
            {s: {n: t.clone() for n, t in e.items()} for s, e in self.entries.items()},
            torch.get_rng_state(),
        )


def other(**changes: Any) -> OpenMythos:
    return OpenMythos(MythosConfig(**{**SMALL, **changes}))


def like(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.full((2, 5), value, dtype=dtype)


ONE = IDS[:, :1]

FORWARD: dict[str, tuple[Callable[[Scene], Any], str]] = {
    "no loops": (lambda s: s.model(IDS, 0), r"^n_loops = 0 is not allowed: .* at least 1, or None$"),
    "negative loops": (lambda s: s.model(IDS, -1), r"^n_loops = -1 is not allowed"),
    "loops not whole": (lambda s: s.model(IDS, 2.0), r"^n_loops = 2.0 is not allowed"),
    "loops a bool": (lambda s: s.model(IDS, True), r"^n_loops = True is not allowed"),
    "id too large": (
        lambda s: s.model(like(V)),
        rf"^input_ids contains {V}: .* 0 to vocab_size - 1 \({V - 1}\)$",
    ),
    "id negative": (lambda s: s.model(like(-1)), r"^input_ids contains -1: .* 0 to vocab_size - 1"),
    "ids 1-D": (
        lambda s: s.model(IDS[0]),
        r"^input_ids must be .* \(B, S\), got torch.int64 of shape \(5,\)$",
    ),
    "ids float": (
        lambda s: s.model(IDS.float()),
        r"^input_ids must be an int64 or int32 .* got torch.float32",
    ),
    "ids a list": (lambda s: s.model([[1, 2]]), r"^input_ids must be .* got list$"),
    "no tokens": (lambda s: s.model(IDS[:, :0]), r"^input_ids has shape \(2, 0\): .* at least one token"),
    "no rows": (lambda s: s.model(IDS[:0]), r"^input_ids has shape \(0, 5\)"),
    "too long": (
        lambda s: s.model(torch.zeros(1, 17, dtype=torch.long)),
        r"^0 cached and 17 new tokens exceed max_seq_len = 16",
    ),
    "too long with cache": (
        lambda s: s.model(torch.zeros(2, 12, dtype=torch.long), 2, s.cache),
        r"^5 cached and 12 new tokens exceed max_seq_len = 16",
    ),
    "mask of another shape": (
        lambda s: s.model(IDS, attention_mask=torch.ones(2, 4)),
        r"^attention_mask must have the shape of input_ids, \(2, 5\), got \(2, 4\)$",
    ),
    "mask over the cached tokens too": (
        lambda s: s.model(ONE, 2, s.cache, attention_mask=torch.ones(2, 6)),
        r"^attention_mask must have the shape of input_ids, \(2, 1\), got \(2, 6\)$",
    ),
    "mask a list": (lambda s: s.model(IDS, attention_mask=[[1] * 5] * 2), r"^attention_mask .* got list$"),
    "documents of another shape": (
        lambda s: s.model(IDS, document_ids=IDS[0]),
        r"^document_ids must have the shape of input_ids, \(2, 5\), got \(5,\)$",
    ),
    "documents float": (
        lambda s: s.model(IDS, document_ids=IDS.float()),
        r"^document_ids must be whole numbers, got torch.float32$",
    ),
    "documents negative": (
        lambda s: s.model(IDS, document_ids=like(-1)),
        r"^document_ids contains -1: it must be at least 0",
    ),
    "start without cache": (
        lambda s: s.model(IDS, start_pos=3),
        r"^start_pos = 3 .* no cache is given, .* be 0$",
    ),
    "start forgotten the other way": (
        lambda s: s.model(ONE, 2, s.cache, 0),
        r"^start_pos = 0 .* the cache holds 5 tokens, so it must be 5$",
    ),
    "start wrong in a dict": (lambda s: s.model(ONE, 2, s.entries, 7), r"^start_pos = 7 .* holds 5 tokens"),
    "start not a number": (lambda s: s.model(ONE, 2, s.cache, "5"), r"^start_pos = '5' is not allowed"),
    "no gradient path": (lambda s: rescale_spectral_radius(s.model, 1.0), r"^limit = 1.0 is not allowed"),
}

CACHE: dict[str, tuple[Callable[[Scene], Any], str]] = {
    "prefill at 2, decode at 4": (
        lambda s: s.model(ONE, 4, s.cache),
        r"^n_loops = 4 .* holds 5 tokens, but loop 3 of only 0; run at most 2 loops",
    ),
    "the same in a dict": (lambda s: s.model(ONE, 4, s.entries), r"^n_loops = 4 .* run at most 2 loops"),
    "default loops deeper than the cache": (
        lambda s: s.model(ONE, None, s.cache),
        r"^n_loops = 4 .* at most 2",
    ),
    "another batch": (lambda s: s.model(IDS[:1], 2, s.cache), r"^the cache holds a batch of 2, .* batch 1$"),
    "another batch in a dict": (lambda s: s.model(IDS[:1], 2, s.entries), r"holds a batch of 2"),
    "an MLA model": (
        lambda s: other(attn_type="mla")(ONE, 2, s.cache),
        r"^the cache holds k and v in prelude_0, but this model keeps latent",
    ),
    "another width": (
        lambda s: other(n_kv_heads=4)(ONE, 2, s.cache),
        r"^the cache holds prelude_0/k .*\(2, 5, 2, 4\).* brings .*\(2, 1, 4, 4\): .* widths must be equal$",
    ),
    "another dtype": (
        lambda s: other().bfloat16()(ONE, 2, s.cache),
        r"^the cache holds prelude_0/k as torch.float32 .* brings torch.bfloat16",
    ),
    "another depth": (
        lambda s: other(prelude_layers=2)(ONE, 2, s.cache),
        r"^prelude_1 holds 0 of the 5 cached tokens",
    ),
    "mask with a dict": (
        lambda s: s.model(IDS, kv_cache={}, attention_mask=like(1)),
        r"^a plain dict keeps no padding or document marks: pass kv_cache=KVCache\(\)",
    ),
    "documents forgotten": (
        lambda s: s.model(ONE, 2, s.packed),
        r"^the cache holds packed documents: pass doc",
    ),
    "a list as cache": (
        lambda s: s.model(IDS, 2, []),
        r"^kv_cache must be a KVCache, a dict or None, got list$",
    ),
    "a dict of something else": (lambda s: s.model(IDS, 2, {"a": 1}), r"^kv_cache\['a'\] is not a slot"),
    "a dict of flat tensors": (
        lambda s: s.model(IDS, 2, {"a": {"k": torch.ones(3)}}),
        r"^kv_cache\['a'\] is not a slot: it must be a dict of \(B, C, ...\) tensors$",
    ),
    "a dict of unequal batches": (
        lambda s: s.model(IDS, 2, {"a": {"k": torch.ones(2, 3)}, "b": {"k": torch.ones(1, 3)}}),
        r"^kv_cache\['b'\] has another batch than the first slot, 2$",
    ),
    "policy by name": (
        lambda s: KVCache("last"),
        r"^policy = 'last' .* EveryLoop\(\), LastLoop\(\) or None$",
    ),
    "policy a class": (lambda s: KVCache(LastLoop), r"^policy = <class .* LastLoop\(\) or None$"),
    "capacity": (lambda s: KVCache(capacity=-1), r"^capacity = -1 .* whole number of at least 0$"),
    "trim too long": (lambda s: s.cache.trim(6), r"^length = 6 .* 0 to 5, the cached tokens$"),
    "trim negative": (lambda s: s.cache.trim(-1), r"^length = -1 .* 0 to 5"),
    "select beyond": (
        lambda s: s.cache.select(torch.tensor([0, 2])),
        r"^rows = \[0, 2\] .* each must be 0 to 1$",
    ),
    "select by mask": (
        lambda s: s.cache.select(torch.tensor([True, False])),
        r"^rows = .* tensor of row numbers$",
    ),
    "select a list": (lambda s: s.cache.select([0]), r"^rows = \[0\] .* 1-D tensor of row numbers$"),
    "restore nothing": (
        lambda s: s.cache.restore(None),
        r"^snapshot must be what snapshot\(\) returned, got NoneType$",
    ),
}


def gen(**changes: Any) -> Callable[[Scene], Any]:
    settings = {"input_ids": IDS, "max_new_tokens": 2, "n_loops": 2, **changes}
    return lambda s: s.model.generate(**settings)


GENERATE: dict[str, tuple[Callable[[Scene], Any], str]] = {
    "empty prompt": (gen(input_ids=IDS[:, :0]), r"^input_ids has shape \(2, 0\): every prompt .* one token$"),
    "1-D prompt": (
        gen(input_ids=IDS[0]),
        r"^input_ids must be int64 or int32 of shape \(B, S\), got .* \(5,\)$",
    ),
    "float prompt": (gen(input_ids=IDS.float()), r"^input_ids must be int64 or int32 .* got torch.float32"),
    "text": (gen(input_ids="hello"), r"^input_ids must be a tensor of ids or a list of prompts, got str$"),
    "nothing": (
        gen(input_ids=None),
        r"^input_ids must be a tensor of ids or a list of prompts, got NoneType$",
    ),
    "no prompts": (gen(input_ids=[]), r"^input_ids is an empty list"),
    "one prompt not in a list": (
        gen(input_ids=[1, 2]),
        r"^input_ids\[0\] = 1 .* a list of ids or a 1-D tensor$",
    ),
    "an empty prompt among others": (gen(input_ids=[[1], []]), r"^input_ids\[1\] is empty"),
    "ids not whole": (gen(input_ids=[[1], [1.5]]), r"^input_ids\[1\] = \[1.5\] is not allowed"),
    "id too large": (gen(input_ids=like(V)), rf"^input_ids contains {V}: it must be 0 to vocab_size - 1"),
    "id too large in a list": (gen(input_ids=[[1], [V]]), rf"^input_ids\[1\] contains {V}: it must be 0"),
    "id beyond 64 bits in a list": (
        gen(input_ids=[[1, 2**70]]),
        rf"^input_ids\[0\] contains {2**70}: it must be 0",
    ),
    "loops": (gen(n_loops=0), r"^n_loops = 0 is not allowed: .* at least 1$"),
    "negative length": (gen(max_new_tokens=-1), r"^max_new_tokens = -1 .* 0 to 12$"),
    "length not whole": (gen(max_new_tokens=2.5), r"^max_new_tokens = 2.5 .* whole number, 0 to 12$"),
    "beyond max_output_tokens": (gen(max_new_tokens=13), r"^max_new_tokens = 13 .* 0 to 12$"),
    "beyond max_seq_len": (
        gen(input_ids=torch.zeros(1, 10, dtype=torch.long), max_new_tokens=8),
        r"^max_new_tokens = 8 .* 10 prompt tokens leave room for 7 under max_seq_len = 16$",
    ),
    "temperature negative": (gen(temperature=-0.1), r"^temperature = -0.1 .* finite number of at least 0$"),
    "temperature nan": (gen(temperature=math.nan), r"^temperature = nan "),
    "temperature text": (gen(temperature="hot"), r"^temperature = 'hot' "),
    "top_k negative": (gen(top_k=-1), r"^top_k = -1 .* whole number of at least 0$"),
    "top_k not whole": (gen(top_k=1.5), r"^top_k = 1.5 "),
    "top_p zero": (gen(top_p=0.0), r"^top_p = 0.0 .* above 0 and at most 1, or None$"),
    "top_p above one": (gen(top_p=1.5), r"^top_p = 1.5 "),
    "eos outside": (gen(eos_token_id=V), rf"^eos_token_id = {V} .* 0 to {V - 1}$"),
    "seed negative": (gen(seed=-1), r"^seed = -1 .* whole number, 0 to "),
    "seed not whole": (gen(seed=1.0), r"^seed = 1.0 "),
    "mask of another shape": (
        gen(attention_mask=torch.ones(2, 4)),
        r"^attention_mask .* \(2, 5\), got \(2, 4\)$",
    ),
    "mask with a list": (
        gen(input_ids=[[1]], attention_mask=torch.ones(1, 1)),
        r"^attention_mask is not allowed",
    ),
    "all padding": (
        gen(attention_mask=torch.tensor([[1] * 5, [0] * 5])),
        r"^attention_mask row 1 is all padding: every prompt must hold at least one token$",
    ),
    "policy by name": (gen(cache_policy="last"), r"^policy = 'last' is not allowed"),
    "a stream, when called": (lambda s: stream(s.model, [[1], [V]], 2), rf"^input_ids\[1\] contains {V}"),
    "a stream's sampling, when called": (
        lambda s: stream(s.model, IDS, 2, temperature=-1),
        r"^temperature = -1 ",
    ),
}


@pytest.mark.parametrize(
    ("call", "message"),
    [*FORWARD.values(), *CACHE.values(), *GENERATE.values()],
    ids=[
        f"{kind}: {name}"
        for kind, t in (("forward", FORWARD), ("cache", CACHE), ("generate", GENERATE))
        for name in t
    ],
)
def test_calls(call: Callable[[Scene], Any], message: str) -> None:
    scene = Scene.make()
    before = scene.state()
    work: list[Any] = []
    scene.model.recurrent.register_forward_pre_hook(lambda *_: work.append(1))
    # Another model may be built by the case; its weights are drawn from the generator compared below.
    rng = torch.get_rng_state()
    with pytest.raises((ValueError, ConfigError, CacheError), match=message) as caught:
        call(scene)
    torch.set_rng_state(rng)
    assert str(caught.value).count("\n") == 0 or "tensor(" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert not work, "refused before the loop ran"
    torch.testing.assert_close(scene.state(), before, rtol=0, atol=0)


def test_there_are_more_than_sixty_cases() -> None:
    assert len(CONFIG) >= 50
    assert len(FORWARD) + len(CACHE) + len(GENERATE) >= 70


def test_after_a_refusal_the_same_objects_still_work() -> None:
    scene = Scene.make()
    with pytest.raises(CacheError):
        scene.model(ONE, 4, scene.cache)
    scene.model.eval()
    a, b = scene.model(ONE, 2, scene.cache), scene.model(ONE, 2, scene.entries)
    assert torch.equal(a, b)
    assert len(scene.cache) == 6
