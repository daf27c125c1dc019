"""Tables on the terminal: what a config costs, and whatever else a command has to show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from open_mythos.accounting import POLICIES, flops_per_token, format_count, kv_table, parameters
from open_mythos.config import MythosConfig

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["cache_table", "flops_table", "new_table", "parameter_table", "show"]


def new_table(title: str, first: str, *columns: str) -> Table:
    """An empty table with these columns, all but the first for numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def show(*tables: Table) -> None:
    """Print them."""
    from rich.console import Console

    console = Console()
    # Wide enough for its tables when nobody watches; a terminal has the width that it has.
    if not console.is_terminal:
        console = Console(width=max(100, console.width))
    for table in tables:
        console.print(table)


def parameter_table(cfg: MythosConfig) -> Table:
    """Parameters of each part, of all, and of those that one token uses."""
    count = parameters(cfg)
    table = new_table("Parameters", "part", "parameters", "share")
    for part, number in count.parts.items():
        table.add_row(part, f"{number:,}", f"{number / count.total:.1%}")
    table.add_section()
    table.add_row("all", f"{count.total:,}", "100.0%")
    table.add_row("active for one token", f"{count.active:,}", f"{count.active / count.total:.1%}")
    return table


def flops_table(cfg: MythosConfig, counts: list[int], context: int) -> Table:
    """FLOPs of a token at each of these loop counts."""
    table = new_table(f"FLOPs of one token's forward pass, context {context}", "loops", "FLOPs", "of 1 loop")
    once = flops_per_token(cfg, 1, context=context)
    for loops in counts:
        flops = flops_per_token(cfg, loops, context=context)
        table.add_row(str(loops), format_count(flops), f"{flops / once:.2f}×")
    return table


def cache_table(cfg: MythosConfig) -> Table:
    """Cache bytes of a token, with either attention and each policy."""
    title = f"Cache, bytes per token at {cfg.max_loop_iters} loops, bfloat16"
    table = new_table(title, "attention", *POLICIES)
    cells = kv_table(cfg)
    for attention in ("gqa", "mla"):
        name = f"{attention} (this config)" if attention == cfg.attn_type else attention
        table.add_row(name, *(f"{cells[attention, policy]:,}" for policy in POLICIES))
    return table
