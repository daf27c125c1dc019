"""``mythos generate`` and ``mythos bench``: both run the engine."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_mythos.cli.targets import loop_counts, model_folder, resolve, run_record
from open_mythos.config import ConfigError

if TYPE_CHECKING:
    import torch

    from open_mythos.inference.engine import Handle, Request, Result
    from open_mythos.inference.exit_rules import Rule
    from open_mythos.inference.speculative import Draft
    from open_mythos.model import OpenMythos
    from open_mythos.tokenizer import MythosTokenizer

__all__ = ["bench", "generate"]

_WEIGHTS = typer.Option(
    help="Keep weights as int8 or bfloat16: smaller, faster on the CPU, slower on a GPU; not exact."
)
_CACHE = typer.Option(help="Keep the cache as int8: smaller, not exact.")
_DEVICE = typer.Option(help="cpu or cuda; cuda where there is a GPU.")
_DTYPE = typer.Option(help="float32 or bfloat16; bfloat16 on a GPU, else as saved.")


def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run directory, or a saved model.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; several share one batch.")],
    loops: Annotated[
        int | None, typer.Option(min=1, help="Loops for every token; the model's own by default.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to add at most; bytes, as a rule.")
    ] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest.")] = 50,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest that reach this sum.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Fixes the draws.")] = None,
    exit: Annotated[
        str | None,
        typer.Option(
            metavar="RULE", help="Let tokens leave early: state:0.05, kl:1e-3, same:2, top:0.9, act:0.99, ..."
        ),
    ] = None,
    speculate: Annotated[
        str | None, typer.Option(metavar="LOOPS,TOKENS", help="Draft so many tokens with so few loops.")
    ] = None,
    weights: Annotated[str | None, _WEIGHTS] = None,
    cache: Annotated[str | None, _CACHE] = None,
    device: Annotated[str | None, _DEVICE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
    report: Annotated[bool, typer.Option("--report", help="Afterwards say which loops were spent.")] = False,
) -> None:
    """Continue texts. One is shown piece by piece as it is produced."""
    folder = model_folder(model)
    if "" in prompt:
        raise ConfigError("prompt = '' is not allowed: it must hold at least one character")
    rule = None if exit is None else exit_rule(exit)
    draft = None if speculate is None else _draft(speculate)
    _check_bits(weights, cache)
    where, kind = _place(device, dtype)
    from open_mythos.inference.engine import Engine, Request
    from open_mythos.weights import from_pretrained

    network = _ready(from_pretrained(folder, dtype=kind), where, weights)
    tokenizer = _tokenizer(model, network)
    requests = [
        Request(
            _ids(text, network, tokenizer),
            max_new_tokens=max_new_tokens,
            n_loops=loops,
            exit=rule,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=None if seed is None else seed + i,
            speculate=draft,
        )
        for i, text in enumerate(prompt)
    ]
    options = _engine_options(network, requests, cache)
    with Engine(network, **options) as engine:
        handles = [engine.submit(request) for request in requests]
        _show(prompt, handles, tokenizer)
        if report:
            _report([handle.result() for handle in handles], requests, network)


def _tokenizer(model: Path, network: OpenMythos) -> MythosTokenizer:
    from open_mythos.tokenizer import tokenizer_of

    # A saved model alone does not say how its text was tokenised; bytes are the default.
    data = run_record(model)["config"]["data"] if (model / "run.json").is_file() else {}
    tokenizer = tokenizer_of(data)
    if tokenizer is not None and network.cfg.eos_token_id == tokenizer.eos_id:
        return tokenizer
    reads = "bytes" if tokenizer is None or data.get("tokenizer", "bytes") == "bytes" else data["tokenizer"]
    raise ConfigError(
        f"{model} has eos_token_id = {network.cfg.eos_token_id}: it reads no {reads}; "
        "try mythos eval, or model.generate(ids) in Python"
    )


def _ids(text: str, network: OpenMythos, tokenizer: MythosTokenizer) -> list[int]:
    ids = tokenizer.encode(text)
    return ids if network.cfg.bos_token_id is None else [network.cfg.bos_token_id, *ids]


def _engine_options(network: OpenMythos, requests: list[Request], cache: str | None) -> dict[str, Any]:
    """Rows for all, up to 64, and no larger a cache than they need."""
    from open_mythos.inference.quantise import Int8Codec

    longest = max(len(request.prompt) + request.max_new_tokens - 1 for request in requests)
    options: dict[str, Any] = {"max_context": min(longest, network.cfg.max_seq_len)}
    deepest = max(request.n_loops or network.cfg.max_loop_iters for request in requests)
    options["max_loops"] = max(deepest, network.cfg.max_loop_iters)
    draft = requests[0].speculate
    lanes = 1 if draft is None else draft.tokens + 1
    options["max_rows"] = max(lanes, min(64, lanes * len(requests)))
    options["queue"] = len(requests)
    return options | ({} if cache is None else {"codec": Int8Codec()})


def _place(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype | None]:
    """Where to compute, and in what; None: in the dtype of the weights as they are.

    Raises:
        ConfigError: there is no such device here, or the dtype is another one.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"dtype = {dtype!r} is not allowed: it must be 'float32' or 'bfloat16'")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *["cuda"] * (count > 0), *(f"cuda:{i}" for i in range(count))]
    if device not in (None, *known):
        why = "" if count else ", since torch sees no GPU"
        raise ConfigError(
            f"device = {device!r} is not allowed: it must be {' or '.join(map(repr, known))}{why}"
        )
    where = torch.device(device or ("cuda" if count else "cpu"))
    if dtype is None and where.type == "cuda":
        # GPUs before Ampere have no products of bfloat16.
        return where, torch.bfloat16 if torch.cuda.get_device_capability(where) >= (8, 0) else torch.float32
    if dtype is None:
        return where, None
    return where, torch.float32 if dtype == "float32" else torch.bfloat16


def _check_bits(weights: str | None, cache: str | None) -> None:
    if weights not in (None, "int8", "bfloat16"):
        raise ConfigError(f"weights = {weights!r} is not allowed: it must be 'int8' or 'bfloat16'")
    if cache not in (None, "int8"):
        raise ConfigError(f"cache = {cache!r} is not allowed: it must be 'int8'")


def _ready(network: OpenMythos, where: torch.device, weights: str | None) -> OpenMythos:
    """The network in eval mode where it is to compute, perhaps in fewer bits.

    Raises:
        ConfigError: the weights are bfloat16 already and should be kept as that.
    """
    import torch

    network = network.eval().requires_grad_(False)
    if weights is not None:
        if weights == "bfloat16" and network.embed.weight.dtype == torch.bfloat16:
            raise ConfigError(
                "weights = 'bfloat16' is not allowed with dtype = 'bfloat16', in which all weights are so already: "
                "leave it out, or give --dtype float32"
            )
        from open_mythos.inference.quantise import quantise

        # Before it is moved: a GPU then need never hold what is being coded.
        network = quantise(network, weights)  # type: ignore[arg-type]
    return network.to(where)


def _report(results: list[Result], requests: list[Request], network: OpenMythos) -> None:
    for result, request in zip(results, requests, strict=True):
        # Each new token is what the token before it came to, of which the first one is the prompt's last.
        spent = result.prompt_loops[-1:] + result.loops
        mean, most = statistics.mean(spent), request.n_loops or network.cfg.max_loop_iters
        print(f"{len(result.tokens)} tokens, {mean:.2f} of {most} loops each", file=sys.stderr)


def _show(prompts: list[str], handles: list[Handle], tokenizer: MythosTokenizer) -> None:
    for i, (text, handle) in enumerate(zip(prompts, handles, strict=True)):
        sys.stdout.write("\n" * (i > 0) + text)
        for piece in _pieces(tokenizer, handle):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


def _pieces(tokenizer: MythosTokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """What each token adds to the text. A character that is not complete yet waits for its other tokens."""
    ids: list[int] = []
    text = shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


def exit_rule(text: str) -> Rule:
    """``name:number,min=2,max=8,every=2,reads=head`` as a rule of docs/exits.md.

    Raises:
        ValueError: the text is something else, or a number is out of range.
    """
    from open_mythos.inference import exits

    kinds: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "fixed": (exits.Fixed, "loops", {}),
        "act": (exits.ACT, "threshold", {}),
        "state": (exits.StateChange, "tolerance", {}),
        "kl": (exits.PredictionChange, "tolerance", {}),
        "same": (exits.SamePrediction, "patience", {}),
        **{name: (exits.Confidence, "threshold", {"measure": name}) for name in ("top", "margin", "entropy")},
    }
    head, *options = text.split(",")
    name, colon, number = head.partition(":")
    shape = "NAME or NAME:NUMBER, and then perhaps ,min=2 ,max=8 ,every=2 ,reads=head"
    problem = ConfigError(
        f"exit = {text!r} is not allowed: it must be {shape}; the names are {', '.join(kinds)}"
    )
    if name not in kinds:
        raise problem
    kind, main, fields = kinds[name]
    try:
        if colon:
            fields[main] = int(number) if name in ("fixed", "same") else float(number)
        for option in options:
            key, _, value = option.partition("=")
            known = {"min": "min_loops", "max": "max_loops", "every": "every", "reads": "reads"}[key]
            fields[known] = value if key == "reads" else int(value)
        return kind(**fields)
    except (KeyError, TypeError) as error:
        raise problem from error
    except ValueError as error:
        if type(error) is ValueError and "is not allowed" in str(error):
            raise
        raise problem from error


def _draft(text: str) -> Draft:
    from open_mythos.inference.speculative import Draft

    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError(
            f"speculate = {text!r} is not allowed: it must be LOOPS,TOKENS, two whole numbers such as 4,3"
        )
    return Draft(int(parts[0]), int(parts[1]))


def bench(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A variant such as mythos_nano, a TOML config, a run or a model."
        ),
    ],
    batch: Annotated[str, typer.Option(help="Requests at once, with commas.")] = "1,8",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to add.")] = 32,
    loops: Annotated[int | None, typer.Option(min=1, help="Loops; the config's by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each figure.")] = 3,
    weights: Annotated[str | None, _WEIGHTS] = None,
    cache: Annotated[str | None, _CACHE] = None,
    device: Annotated[str | None, _DEVICE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure the engine: prefill, decode at batch sizes, and requests of mixed depths."""
    sizes = loop_counts("batch", batch)
    _check_bits(weights, cache)
    cfg, folder = resolve(target)
    where, kind = _place(device, dtype)
    import torch

    from open_mythos.inference.bench import measure
    from open_mythos.inference.quantise import Int8Codec
    from open_mythos.model import OpenMythos
    from open_mythos.tables import new_table, show
    from open_mythos.weights import from_pretrained

    torch.manual_seed(0)
    network = OpenMythos(cfg).to(dtype=kind) if folder is None else from_pretrained(folder, dtype=kind)
    found = measure(
        _ready(network, where, weights),
        batches=sizes,
        prompt=prompt_tokens,
        new=new_tokens,
        loops=loops,
        rounds=rounds,
        codec=None if cache is None else Int8Codec(),
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    found = {"target": target, "weights": weights, "cache": cache} | found
    table = new_table(f"{target}, {found['loops']} loops, {found['setting']}", "work", "tokens/s", "range")
    for row in found["figures"]:
        low, high = row["range"]
        table.add_row(row["work"], f"{row['tokens_per_s']:,.1f}", f"{low:,.1f} to {high:,.1f}")
    show(table)
    print(f"computed by {found['runner']}")
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(out)
