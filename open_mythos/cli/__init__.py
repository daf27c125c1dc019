"""The command line: ``mythos prepare | train | export | generate | bench | eval | inspect | report | ...``.

Every command imports what it needs when it runs, so that help is fast and loads no torch. Exit codes: 0 it
went well, 1 it failed, 2 it was asked wrongly, 130 it was interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from open_mythos.cli.inference import bench, generate
from open_mythos.cli.targets import loop_counts, model_folder, resolve, run_record
from open_mythos.config import ConfigError
from open_mythos.reproduce.command import reproduce

__all__ = ["app", "main"]

app = typer.Typer(
    help="Recurrent-depth transformers: encode once, loop one block as long as asked, decode once.",
    no_args_is_help=True,
    add_completion=False,
    # Plain help: rich's, with its Markdown parser, would take longer to import than half a second allows.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# typer carries its own copy of click or imports it, depending on its release; both have this class.
_UsageError: Any = typer.BadParameter.__base__


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit with its code; errors are one line on standard error."""
    args = sys.argv[1:] if argv is None else list(argv)
    # Anywhere on the line, since it is wanted after a command has failed.
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        code = typer.main.get_command(app).main(args, prog_name="mythos", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except _UsageError as error:
        # Asked for nothing at all: the message is the help page.
        sys.exit(_complain(error.format_message(), 2, type(error).__name__ != "NoArgsIsHelpError"))
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; there is nobody to tell
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        sys.exit(_complain(_describe(error), 2 if isinstance(error, ValueError) else 1))
    if code == 130:  # some releases of typer turn an interrupt into this themselves
        _complain("interrupted", code)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str, code: int, prefix: bool = True) -> int:
    rank = _rank()
    # What was asked wrongly is so on every process, and the first one tells.
    if rank == 0 or code == 1:
        who = f"mythos, process {rank}" if rank else "mythos"
        print(f"{who}: error: {message}" if prefix else message, file=sys.stderr, flush=True)
    return code


def _rank() -> int:
    """Of this process among those that torchrun started; 0 when it is alone."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


def _describe(error: Exception) -> str:
    """One line: our own messages as they are, others with their type."""
    text = " ".join(str(error).split())
    module = type(error).__module__.partition(".")[0]
    if module == "open_mythos" or type(error) is ValueError:
        return text
    if isinstance(error, ImportError) and getattr(error, "name", None):
        return f"this needs the package {error.name!r}, which is not installed"
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _version(value: bool) -> None:
    if value:
        from open_mythos import __version__

        print(f"mythos {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def _examples(*lines: str) -> str:
    # \b keeps the lines as they are.
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@app.command(
    epilog=_examples(
        "mythos train configs/smoke.toml",
        "mythos train configs/demo-lm.toml data.source=./notes optim.lr=1e-3 --out runs/notes",
        "mythos train configs/demo-lm.toml --out runs/notes --resume",
        "mythos train my.toml --adapt lora --from runs/notes/model --out runs/adapted",
        "torchrun --nproc-per-node 8 -m open_mythos.cli train my.toml",
    )
)
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file with model, data, loops, optim, train, eval.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as optim.lr=1e-3.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/NAME_OF_CONFIG by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last saved state in --out.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    stop_at: Annotated[int | None, typer.Option(min=1, help="Save and stop after this step.")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda; short for parallel.device=...")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="DIR", help="A saved model whose weights to begin with.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--adapt", metavar="lora", help="Train the per-loop LoRA alone; needs --from."),
    ] = None,
    sweep: Annotated[bool, typer.Option("--eval", help="Afterwards do what mythos eval does.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train a model and write a run directory."""
    from open_mythos.training.config import load_config

    named = {"parallel.device": device, "adapt.start": start, "adapt.kind": kind}
    flags = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    settings = load_config(config, [*(overrides or ()), *flags])
    out = Path("runs") / config.stem if out is None else out
    from open_mythos.training import trainer
    from open_mythos.training.progress import default_progress

    trainer.train(
        settings,
        out,
        resume=resume,
        overwrite=overwrite,
        stop_at=stop_at,
        progress=default_progress(quiet),
        tell=None if quiet else _tell,
    )
    if _rank():
        return
    if sweep:
        _evaluate(out, run_record(out), None)
    print(out)


@app.command(
    epilog=_examples(
        "mythos prepare configs/demo-lm.toml",
        "mythos prepare configs/fineweb-edu.toml data.max_tokens=100_000_000",
    )
)
def prepare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, as for mythos train.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as data.source=./notes.")
    ] = None,
) -> None:
    """Tokenise the text of a config, once; say what is in it and what was left out."""
    from open_mythos.training.config import load_config

    data = load_config(config, overrides or ()).data
    if data.is_task:
        raise ConfigError(f"data.source = {data.source!r} is not allowed: a task makes its data as it goes")
    from open_mythos.tables import new_table, show
    from open_mythos.training.prepare import prepare as make

    prepared = make(data, lambda text: print(text, file=sys.stderr, flush=True))
    report = prepared.report()
    table = new_table(
        "Documents and tokens", "split", "documents", "tokens", f"blocks of {data.options['seq_len']}"
    )
    for name, split in report["splits"].items():
        blocks = prepared.blocks(name, data.options["seq_len"])
        table.add_row(name, *(f"{n:,}" for n in (split["documents"], split["tokens"], blocks)))
    bad = new_table("Bad records, left out", "reason", "records", "the first")
    first = {found["reason"]: found["where"] for found in reversed(prepared.located())}
    for reason, count in report["bad"].items():
        bad.add_row(reason, f"{count:,}", first.get(reason, "see the report"))
    show(table, *([bad] if report["bad"] else []))
    print(prepared.folder)


@app.command(
    epilog=_examples("mythos export runs/smoke", "mythos export runs/smoke --step 6 --out models/six")
)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    step: Annotated[
        int | None, typer.Option(min=0, help="Take the checkpoint of this step; the newest by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Model directory; RUN/model by default.")] = None,
) -> None:
    """Write the weights of a checkpoint as a model, also of a run that has not come to its end."""
    from open_mythos.training.checkpoint import export_checkpoint

    out = run / "model" if out is None else out
    checkpoints = run / "checkpoints"
    found = export_checkpoint(checkpoints if step is None else checkpoints / f"step-{step:09d}", out)
    print(f"step {found.step}: {out}")


app.command(
    epilog=_examples(
        'mythos generate runs/demo/lm --prompt "def main(" --loops 8',
        'mythos generate runs/demo/lm --prompt "The " --exit state:0.05,min=2 --report',
        'mythos generate runs/demo/lm --prompt "The " --loops 16 --temperature 0 --speculate 4,3',
    )
)(generate)
app.command(
    epilog=_examples(
        "mythos bench mythos_nano",
        "mythos bench runs/demo/lm --batch 1,4 --loops 16 --weights int8 --json bench.json",
    )
)(bench)


@app.command(
    name="eval",
    epilog=_examples("mythos eval runs/demo/parity", "mythos eval runs/demo/parity --loops 1,2,4,8,16,32,64"),
)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    loops: Annotated[
        str | None, typer.Option(help="Loop counts, with commas; the config's by default.")
    ] = None,
) -> None:
    """Measure quality against loops on held-out data."""
    record = run_record(run)
    _evaluate(run, record, None if loops is None else loop_counts("loops", loops))


def _evaluate(run: Path, record: dict[str, Any], counts: list[int] | None) -> None:
    """Sweep over loops, write eval.json, show it."""
    from open_mythos.tables import new_table, show
    from open_mythos.training.checkpoint import write_json
    from open_mythos.training.config import RunConfig
    from open_mythos.training.evaluate import sweep
    from open_mythos.training.trainer import cpu_threads
    from open_mythos.weights import from_pretrained

    config = RunConfig.from_dict(record["config"])
    with cpu_threads(config.train.threads):
        result = sweep(from_pretrained(model_folder(run)), config, record, counts, _tell)
    write_json(run / "eval.json", result)
    table = new_table(
        f"{result['task']}: {result['metric']} against loops", "split", *map(str, result["loops"])
    )
    for name, split in result["splits"].items():
        table.add_row(name, *(f"{value:.3f}" for value in split["values"]))
    show(table)
    print(f"trained with {result['trained_mean']:.1f} loops on average, at most {result['trained_max']}")


@app.command(
    epilog=_examples(
        "mythos inspect mythos_1b",
        "mythos inspect configs/demo-parity.toml --loops 1,8,64",
        "mythos inspect runs/demo/lm --budget 200k",
    )
)
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A TOML config, a variant such as mythos_1b, a run or a model."
        ),
    ],
    budget: Annotated[
        str | None, typer.Option(help="Propose the nearest config of so many parameters: 200k.")
    ] = None,
    loops: Annotated[
        str | None, typer.Option(help="Loop counts, with commas; 1 to the config's by default.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens that a token sees, for the FLOPs.")] = 1,
) -> None:
    """Count parameters, FLOPs and cache bytes."""
    from open_mythos import accounting
    from open_mythos.tables import cache_table, flops_table, parameter_table, show

    cfg, folder = resolve(target)
    counts = loop_counts("loops", loops) if loops else sorted({1, 2, 4, 8, 16, cfg.max_loop_iters})
    if budget is not None:
        before = cfg
        cfg, changes = accounting.propose(cfg, budget)
        limit = accounting.format_count(accounting.parse_count(budget))
        total = accounting.parameters(before).total
        print(
            f"budget {limit}: {total:,} parameters "
            + ("fit as they are" if not changes else "are too many; change")
        )
        for change in changes:
            print(f"  {change}")
    show(parameter_table(cfg), flops_table(cfg, counts, context), cache_table(cfg))
    if folder is not None and budget is None:
        from open_mythos import kernels
        from open_mythos.model import spectral_radius
        from open_mythos.weights import from_pretrained

        print(f"spectral radius ρ(A) = {spectral_radius(from_pretrained(folder)):.6f}, stable below 1")
        print(kernels.status())


@app.command(epilog=_examples("mythos report runs/demo/parity runs/demo/lm --out runs/demo/report.html"))
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about these runs."""
    if out.is_dir():
        raise ConfigError(f"out = {str(out)!r} is a directory: it must be the HTML file to write")
    for run in runs:
        run_record(run)
    from open_mythos.analysis.report import build_report

    build_report(runs, out)
    print(out)


app.command(
    epilog=_examples(
        "mythos reproduce --list",
        "mythos reproduce parity --seeds 6",
        "mythos reproduce parity --quick",
        "mythos reproduce --pages",
    )
)(reproduce)


@app.command(epilog=_examples("mythos demo", "mythos demo --out runs/quick train.steps=20 eval.examples=8"))
def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="For both runs, such as train.steps=20."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for both runs and the report.")] = Path("runs/demo"),
) -> None:
    """Train on text and on parity, then ask for more loops."""
    from open_mythos.demo import run

    print(run(out, overrides or ()))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
