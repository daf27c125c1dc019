"""Named sizes: each function returns a config. ``python -m open_mythos.variants`` prints this table.

::

    name            dim  heads  layers  loops  experts  expert_dim    all  active  KV MLA  KV GQA
    mythos_nano      96      4   1+1+1      4    4/2+1          64   294k    257k     480    1152
    mythos_micro    160      5   1+1+1      8    8/2+1         112  1.06M    741k    1280    2560
    mythos_small    512      8   1+1+1      8   16/4+1         256  12.3M   7.58M    3200    5120
    mythos_1b      2048     16   2+1+2     16   64/4+2        1920  1.01B    300M   11520   40960
    mythos_3b      3072     24   2+1+2     16   64/4+2        4096  3.04B    777M   16640   61440
    mythos_10b     4096     32   2+1+2     24  128/4+2        5632  9.98B    1.4B   32256  114688
    mythos_50b     6144     48   3+1+3     32  256/4+4        9728  50.4B   5.19B   43776  155648
    mythos_100b    8192     64   4+1+4     32  256/8+4       13568  99.5B   16.9B   46080  163840
    mythos_500b   12288     96   4+1+4     48  512/8+8       23040   498B   69.8B  121856  458752
    mythos_1t     16384    128   6+1+6     64  512/8+8       34560   999B    143B  165376  622592

Parameters: all / used by one token, the looped block counted once. KV: bfloat16 bytes per token with every
loop kept, as configured (MLA) and with GQA instead.

dim, heads, experts, loops and context are those of the public 0.5.0 release, which counts within 5 % of the
names but for 1b (1.064 B there: expert_dim is 1920 here, not 2048). Dense layers are 4/3 dim wide, rounded up
to a multiple of 64, because fast matrix products need aligned widths. nano, micro and small are ours: bytes
for tokens (259 ids), and equal query, key and value widths, so that CPU attention needs no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_mythos.accounting import format_count, kv_table, parameters
from open_mythos.config import MythosConfig

__all__ = [
    "VARIANTS",
    "mythos_1b",
    "mythos_1t",
    "mythos_3b",
    "mythos_10b",
    "mythos_50b",
    "mythos_100b",
    "mythos_500b",
    "mythos_micro",
    "mythos_nano",
    "mythos_small",
    "table",
]

_COLUMNS = (
    *("vocab_size", "dim", "n_heads", "n_kv_heads", "prelude_layers", "coda_layers", "max_loop_iters"),
    *("n_experts", "n_shared_experts", "n_experts_per_tok", "expert_dim"),
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("lora_rank", "max_seq_len", "max_output_tokens", "rope_theta"),
)
_SIZES = """
name    vocab    dim   H  G  pre coda T    E  sh k     F     R    Q  rope nope  v lora context  output   theta
nano      259     96   4  2    1  1   4    4   1 2    64    32   48    8   16   24   4     512     512   10000
micro     259    160   5  2    1  1   8    8   1 2   112    48   96   16   16   32   4    1024    1024   10000
small     259    512   8  2    1  1   8   16   1 4   256   128  256   32   32   64   8    2048    2048   10000
1b      32000   2048  16  4    2  2  16   64   2 4  1920   256  512   32   64   64   8    4096    4096  500000
3b      32000   3072  24  6    2  2  16   64   2 4  4096   384  768   32   96   96   8    4096    4096  500000
10b     32000   4096  32  8    2  2  24  128   2 4  5632   512 1024   64  128  128  16    8192    4096  500000
50b     32000   6144  48  8    3  3  32  256   4 4  9728   512 1536   64  128  128  32    8192    4096  500000
100b    32000   8192  64  8    4  4  32  256   4 8 13568   512 2048   64  128  128  64 1000000  131072 1000000
500b   100000  12288  96 16    4  4  48  512   8 8 23040  1024 3072   64  128  128 128 1000000  131072 1000000
1t     100000  16384 128 16    6  6  64  512   8 8 34560  1024 4096   64  128  128 256 1000000  131072 2000000
"""


def _config(name: str) -> MythosConfig:
    row = next(cells for cells in map(str.split, _SIZES.splitlines()) if cells[:1] == [name])
    fields: dict[str, Any] = dict(zip(_COLUMNS, map(int, row[1:]), strict=True))
    fields["ffn_dim"] = -(-4 * fields["dim"] // (3 * 64)) * 64
    if fields["vocab_size"] == 259:
        fields.update(bos_token_id=256, eos_token_id=257, pad_token_id=258)
    return MythosConfig(attn_type="mla", **fields)


def mythos_nano() -> MythosConfig:
    """0.3 M parameters over bytes; for tests and first tries."""
    return _config("nano")


def mythos_micro() -> MythosConfig:
    """1 M parameters over bytes; trains on a laptop."""
    return _config("micro")


def mythos_small() -> MythosConfig:
    """12 M parameters over bytes; the largest that still trains on a laptop."""
    return _config("small")


def mythos_1b() -> MythosConfig:
    """1 B parameters, 16 loops, 4 k context."""
    return _config("1b")


def mythos_3b() -> MythosConfig:
    """3 B parameters, 16 loops, 4 k context."""
    return _config("3b")


def mythos_10b() -> MythosConfig:
    """10 B parameters, 24 loops, 8 k context."""
    return _config("10b")


def mythos_50b() -> MythosConfig:
    """50 B parameters, 32 loops, 8 k context."""
    return _config("50b")


def mythos_100b() -> MythosConfig:
    """100 B parameters, 32 loops, 1 M context."""
    return _config("100b")


def mythos_500b() -> MythosConfig:
    """500 B parameters, 48 loops, 1 M context, 100,000 token ids."""
    return _config("500b")


def mythos_1t() -> MythosConfig:
    """1 T parameters, 64 loops, 1 M context, 100,000 token ids."""
    return _config("1t")


VARIANTS: dict[str, Callable[[], MythosConfig]] = {
    "mythos_nano": mythos_nano,
    "mythos_micro": mythos_micro,
    "mythos_small": mythos_small,
    "mythos_1b": mythos_1b,
    "mythos_3b": mythos_3b,
    "mythos_10b": mythos_10b,
    "mythos_50b": mythos_50b,
    "mythos_100b": mythos_100b,
    "mythos_500b": mythos_500b,
    "mythos_1t": mythos_1t,
}


def table() -> str:
    """Every variant, one a line: sizes, total and active parameters, cache bytes per token."""
    head = ("name", "dim", "heads", "layers", "loops", "experts", "expert_dim")
    rows: list[tuple[str, ...]] = [(*head, "all", "active", "KV MLA", "KV GQA")]
    for name, build in VARIANTS.items():
        cfg = build()
        count, kv = parameters(cfg), kv_table(cfg)
        layers = f"{cfg.prelude_layers}+1+{cfg.coda_layers}"
        experts = f"{cfg.n_experts}/{cfg.n_experts_per_tok}+{cfg.n_shared_experts}"
        sizes = (cfg.dim, cfg.n_heads, layers, cfg.max_loop_iters, experts, cfg.expert_dim)
        costs = (format_count(count.total), format_count(count.active))
        cache = (kv["mla", "every-loop"], kv["gqa", "every-loop"])
        rows.append((name, *(str(value) for value in (*sizes, *costs, *cache))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    names = [row[0].ljust(widths[0]) for row in rows]
    return "\n".join("  ".join((name, *row[1:])) for name, row in zip(names, aligned, strict=True))


if __name__ == "__main__":
    print(table())
