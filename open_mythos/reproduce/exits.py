"""Exits on a trained language model: how few loops keep the bits of full depth, and which tokens get them.

The setting of every rule is chosen on the validation split; the split that is reported is read afterwards, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from open_mythos.config import ConfigError
from open_mythos.reproduce.base import Experiment, Record, Run, by_arm, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from open_mythos.model import OpenMythos

__all__ = ["Exits"]


@dataclass(frozen=True)
class Exits(Experiment):
    """Exit rules, each with the loosest setting that keeps the validation bits of full depth.

    Options:
        full: loops of full depth; 0: the mean of the training, rounded. Measured against more, a rule would
            look better.
        slack: bits per byte that may be lost, as a share.
        margin: the part of the slack that the search leaves unused, as the reported split differs.
        search_tokens, test_tokens: of the validation split and of the reported one.
        batch_tokens: of one pass.
        families: names of :data:`~open_mythos.reproduce.exits_measure.FAMILIES`, and "learned".
        gate_tokens, gate_steps: of the training split, on which the gate of "learned" is fitted, and of that fit.
        decode_tokens: tokens whose decoding is timed; four times as many of each of 16 rows are fed one by one under
            each cache policy; 0: neither.
        check_tokens: tokens in float64 for :func:`~open_mythos.reproduce.exits_decode.consistency`; 0: none.
    """

    KEPT: ClassVar[tuple[str, ...]] = ("exits-*.json", "gate-*.pt")
    OPTIONS: ClassVar[dict[str, Any]] = {
        "full": 0,
        "slack": 0.005,
        "margin": 0.2,
        "search_tokens": 65_536,
        "test_tokens": 524_288,
        "batch_tokens": 16_384,
        "families": [
            "fixed",
            "learned",
            "state",
            "kl",
            "kl-second",
            "top",
            "act",
            "kl-head",
            "same",
            "entropy",
        ],
        "gate_tokens": 131_072,
        "gate_steps": 2000,
        "decode_tokens": 64,
        "check_tokens": 48,
    }

    def measure(self, run: Run, model: OpenMythos, split: str) -> Record:
        """Every rule, searched and reported, and what the best one does with real text."""
        from open_mythos.reproduce import exits_measure as em

        options, config = run.options, run.config
        full = options["full"] or max(2, round(run.record["loops"]["mean"]))
        chosen = self._families(model, options)
        kept = em.Kept(run.folder / f"exits-{split}.json", run.identity(split, self.code))
        study = em.Study(model, config, full, options["batch_tokens"], kept)
        gate = run.folder / f"gate-{full}-{kept.identity}.pt"
        families = {
            name: family or em.learned(study.gate(gate, options["gate_tokens"], options["gate_steps"]))
            for name, family in chosen.items()
        }
        base, limit, found = study.search(
            families, options["search_tokens"], options["slack"] * (1 - options["margin"])
        )
        reported = em.Text(model, config, split, options["test_tokens"], options["batch_tokens"])
        whole, rules = study.report(families, found, reported)
        best = self._best(rules)
        rule = families[best["name"]].make(best["number"], full)
        return {
            "metric": f"bits_per_{reported.unit}",
            "full": full,
            "full_bits": whole["full"].bits,
            "two_bits": whole["two"].bits,
            "full_in_search": base,
            "limit": limit,
            "tokens": len(whole["full"].nats),
            "rules": rules,
            "best": {key: best[key] for key in _BEST},
            "meanings": study.meanings(rule, options["search_tokens"]),
            **self._use(run, reported, rule, full),
        }

    def _families(self, model: OpenMythos, options: Mapping[str, Any]) -> dict[str, Any]:
        """The rules that are asked for; None in the place of the one that has to be fitted first."""
        from open_mythos.reproduce.exits_measure import FAMILIES

        known: dict[str, Any] = {**FAMILIES, "learned": None}
        for name in options["families"]:
            if name not in known:
                raise ConfigError(
                    f"options.families: {name!r} is not allowed: each must be one of {', '.join(known)}"
                )
        names = [name for name in options["families"] if not (name == "act" and model.cfg.halting == "off")]
        if all(name == "fixed" for name in names):
            raise ConfigError("options.families is not allowed: it must name a rule that heeds the token")
        return {name: known[name] for name in names}

    @staticmethod
    def _best(rules: Sequence[Record]) -> Record:
        """Fewest FLOPs in the search among the rules that heed the token and kept the bits."""

        def searched(rule: Record) -> tuple[bool, float]:
            mine = [point for point in rule["search"] if point["value"] == rule["number"]]
            return not rule["met_in_search"], mine[0]["flops_share"] if mine else 1.0

        return min((rule for rule in rules if rule["heeds"]), key=searched)

    def _use(self, run: Run, text: Any, rule: Any, full: int) -> Record:
        """The best rule on some text, in float64 on each path, and its time."""
        from open_mythos.reproduce import exits_decode as ed
        from open_mythos.reproduce.exits_measure import shown_text

        model, ids, options = text.model, text.rows["ids"].to(text.model.embed.weight.device), run.options
        record: Record = {"rule": repr(rule), "text": shown_text(text, rule, full)}
        if options["check_tokens"]:
            record["consistency"] = ed.consistency(model, ids[:1, : options["check_tokens"]], rule, full)
        if options["decode_tokens"]:
            with text.precision():
                prompt = min(32, ids.shape[1] // 2)
                fed = ids[:1, : prompt + options["decode_tokens"]]
                record["decode"] = ed.decode(model, fed, rule, full, prompt)
                record["policies"] = ed.policies(text, rule, full, 16, 4 * options["decode_tokens"])
        return record

    def summary(self, records: Sequence[Record]) -> Record:
        """A row for each rule of each arm."""
        rows = []
        for arm, some in by_arm(records).items():
            title = self.arms[arm].title
            for name in dict.fromkeys(rule["name"] for r in some for rule in r["measured"]["rules"]):
                found = [rule for r in some for rule in r["measured"]["rules"] if rule["name"] == name]
                cells = [
                    spread([rule[key] if rule[key] is None else rule[key] - less for rule in found])
                    if found[0][key] is not None
                    else None
                    for key, less in _COLUMNS.values()
                ]
                label = f"{title}: {found[0]['title']}" if len(self.arms) > 1 else found[0]["title"]
                rows.append({"arm": arm, "title": label, "cells": cells})
        return {"columns": list(_COLUMNS), "rows": rows, "format": ["plain", *["percent"] * 3, "plain"]}

    def draw(self, records: Sequence[Record]) -> Figure:
        """Bits against loops, loops against difficulty, and a text coloured by loops."""
        from open_mythos.reproduce.exits_figure import exits

        return exits(records, self.title)


_COLUMNS = {
    "loops": ("loops", 0),
    "loops, of full depth": ("loops_share", 0),
    "FLOPs, of full depth": ("flops_share", 0),
    "bits lost": ("bits_ratio", 1),
    "loops with surprisal (Spearman)": ("spearman", 0),
}
_BEST = (
    "name",
    "title",
    "number",
    "met_in_search",
    "bits",
    "bits_ratio",
    "loops",
    "loops_share",
    "flops_share",
    "spearman",
    "spearman_two_loops",
)
