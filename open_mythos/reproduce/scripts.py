"""The articles' scripts as an experiment: :mod:`open_mythos.reproduce.articles` with our defaults and the release's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from open_mythos.config import MythosConfig
from open_mythos.reproduce.base import Experiment, Record, Run, by_arm, spread, value
from open_mythos.training.checks import choice

__all__ = ["Articles"]

LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
PARITY, CHAIN, LONGER = "parity, 24 bits", "chain, 2–5 digits", "chain, 6–8 digits"
AT_END = "chain, 2–5 digits, read at the end"


class Articles(Experiment):
    """The articles' loop trains, not the trainer; ``[model]`` holds what is changed of the articles' own fields.

    ``options``: ``preset``, "defaults" or "upstream" (what the public release computes); ``first_chain_seed``, the
    second article's SEED for seed 0; ``steps`` of the first script; ``epochs`` and ``examples`` of the
    second; ``rows`` to test on.
    """

    CONFIGURED: ClassVar[bool] = False
    OPTIONS: ClassVar[dict[str, Any]] = {
        "preset": "defaults",
        "first_chain_seed": 42,
        "steps": 600,
        "epochs": 6,
        "examples": 3000,
        "rows": 400,
    }

    def perform(self, run: Run, split: str) -> Record:
        """Both scripts; the second twice, as it does not say where it reads the answer.

        Their test data are drawn anew after the training, so both splits are of the same kind.
        """
        import torch

        from open_mythos.model import OpenMythos
        from open_mythos.reproduce.articles import chain_script, parity_script

        options = run.options
        choice("options.preset", options["preset"], ("defaults", "upstream"))
        make = MythosConfig if options["preset"] == "defaults" else MythosConfig.upstream

        def build(fields: dict[str, Any]) -> OpenMythos:
            return OpenMythos(make(**fields))

        torch.set_num_threads(1)
        changes: dict[str, Any] = {"model_overrides": run.sections.get("model"), "build": build}
        changes["rows"] = options["rows"]
        parity = parity_script(run.seed, options["steps"], loops=LOOPS, **changes)
        seed, epochs = options["first_chain_seed"] + run.seed, options["epochs"]
        changes["examples"] = options["examples"]
        chain = chain_script(seed, epochs, loops=LOOPS, **changes)
        at_end = chain_script(seed, epochs, loops=LOOPS, read="last", **changes)
        found = {
            PARITY: parity["accuracy"],
            CHAIN: chain["accuracy"],
            LONGER: chain["longer"],
            AT_END: at_end["accuracy"],
        }
        return {
            "metric": "accuracy",
            "better": "higher",
            "unit": "",
            "loops": list(LOOPS),
            "curves": {name: list(curve.values()) for name, curve in found.items()},
            "least_share": min(parity["shares"] + chain["shares"]),
            "shares": {"parity": parity["shares"], "chain": chain["shares"]},
            "finite": parity["finite"] and chain["finite"] and at_end["finite"],
            "seconds": parity["seconds"] + chain["seconds"] + at_end["seconds"],
        }

    def summary(self, records: Sequence[Record]) -> Record:
        """A row for each arm and script: at the three loops that were trained, and at more."""
        rows = []
        for arm, some in by_arm(records).items():
            for level in some[0]["measured"]["curves"]:
                cells = [spread([value(r, level, loops) for r in some]) for loops in (1, 3, 8, 16)]
                rows.append({"arm": arm, "title": self.arms[arm].title, "cells": [level, *cells]})
        return {
            "columns": ["script", "1 loop", "3 loops, as trained", "8 loops", "16 loops"],
            "format": ["plain", "percent", "percent", "percent", "percent"],
            "rows": rows,
        }
