"""The command ``mythos reproduce``; light to import, since the command line imports it always."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_mythos.config import ConfigError

if TYPE_CHECKING:
    from open_mythos.reproduce.base import Experiment
    from open_mythos.reproduce.plan import Settings

__all__ = ["reproduce"]

_RESULTS = Path("docs/results/reproduce")


# Options of the command that need more than a line.
_Names = Annotated[
    list[str] | None, typer.Argument(metavar="NAME...", help="Experiments; several share the machine.")
]
_Pages = Annotated[
    bool, typer.Option("--pages", help="Write page and pictures again, from result files alone.")
]
_Jobs = Annotated[int | None, typer.Option(help="Runs at once; one for each core, or each GPU, by default.")]
_Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as optim.lr=1e-3.")
]
_Quick = Annotated[bool, typer.Option("--quick", help="Toy runs of some seconds, to see that it works.")]
_Limit = Annotated[float | None, typer.Option(metavar="SECONDS", help="Start no run after so long.")]
_Remeasure = Annotated[bool, typer.Option("--remeasure", help="Measure again what is trained already.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Train again what is there already.")]
_Out = Annotated[
    Path | None, typer.Option(help="Folder of the results; docs/results/reproduce for a plain run.")
]
_Runs = Annotated[
    Path | None, typer.Option(help="Folder of the run directories; runs/reproduce for a plain run.")
]
_Configs = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the experiments, if not configs/reproduce.")
]


def reproduce(
    names: _Names = None,
    listed: Annotated[bool, typer.Option("--list", help="Show all experiments and how they stand.")] = False,
    pages: _Pages = False,
    seeds: Annotated[int | None, typer.Option(help="So many, from 0; the claim's by default.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these arms, with commas.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the experiment's own by default.")] = None,
    jobs: _Jobs = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    changes: _Changes = None,
    quick: _Quick = False,
    time_limit: _Limit = None,
    remeasure: _Remeasure = False,
    overwrite: _Overwrite = False,
    out: _Out = None,
    runs: _Runs = None,
    configs: _Configs = None,
) -> None:
    """Train, measure and judge: the project's claims, one command each."""
    from open_mythos.reproduce.base import named
    from open_mythos.reproduce.base import names as all_names
    from open_mythos.reproduce.plan import Settings
    from open_mythos.training.config import override

    kept, shown = _folders(quick, split, changes or [], configs)
    places = [place for place in (configs,) if place is not None]
    results = out or shown
    if pages:
        _pages(results)
        return
    if listed or not names:
        _list([named(name, *places) for name in all_names(*places)], results)
        return
    settings = Settings(
        runs=runs or kept,
        out=results,
        seeds=seeds,
        arms=None if arms is None else tuple(arm.strip() for arm in arms.split(",")),
        split=split,
        device=device,
        changes=tuple(override(text) for text in changes or ()),
        quick=quick,
        jobs=jobs,
        time_limit=time_limit,
        remeasure=remeasure,
        # What a toy leaves behind is of no use to the next.
        overwrite=overwrite or quick,
    )
    _run([named(name, *places) for name in dict.fromkeys(names)], settings)


def _folders(quick: bool, split: str, changes: list[str], configs: Path | None) -> tuple[Path, Path]:
    """Where run directories and results go: only what counts goes where the page is made from, and only in a checkout.

    Each set of changes has folders of its own, since its runs are other runs.
    """
    if quick:
        return Path("runs/reproduce-quick"), Path("runs/reproduce-quick-results")
    if changes or configs:
        label = re.sub(r"[^\w.=+-]", "_", "+".join(changes))[:100]
        return Path("runs/reproduce-trial") / label, Path("runs/reproduce-trial-results") / label
    counts = split == "test" and _RESULTS.parent.is_dir()
    return Path("runs/reproduce"), _RESULTS if counts else Path("runs/reproduce-results")


def _run(experiments: list[Experiment], settings: Settings) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install open-mythos[report]", name=None
        ) from error
    from open_mythos.reproduce.pages import write_pages
    from open_mythos.reproduce.runner import reproduce as run

    outcomes = run(experiments, settings, _tell)
    for outcome in outcomes:
        if outcome.result is None:
            print(f"{outcome.experiment.name}: nothing has finished")
        else:
            verdict = outcome.result["verdict"]
            print(f"{outcome.experiment.name}: {verdict['state']}. {verdict['sentence']}")
    if any(outcome.result for outcome in outcomes):
        write_pages(settings.out)
        _tell(f"results: {settings.out}")
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


def _pages(out: Path) -> None:
    from open_mythos.reproduce.pages import write_pages

    if not out.is_dir():
        raise ConfigError(f"out = {str(out)!r} is not there: it must be a folder of results")
    for path in write_pages(out):
        print(path)


def _list(experiments: list[Experiment], results: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from open_mythos.reproduce.pages import headline
    from open_mythos.reproduce.results import read_result

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("name", "claim", "wanted", "verdict", "measured"):
        table.add_column(column, overflow="fold")
    for experiment in sorted(experiments, key=lambda one: (one.order, one.name)):
        result: dict[str, Any] | None = read_result(results / f"{experiment.name}.json")
        stands = ("not run", "") if result is None else (result["verdict"]["state"], headline(result))
        table.add_row(experiment.name, experiment.claim, experiment.target, *stands)
    console = Console()
    # Nobody folds the table of a file or a pipe; 160 columns hold it.
    (console if console.is_terminal else Console(width=160)).print(table)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
