"""The README's picture and its figures, from the parity run of ``make demo``.

To repeat::

    make demo && .venv/bin/python benchmarks/readme_figure.py runs/demo/parity docs/results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from open_mythos.analysis import plots


def main(run: Path, out: Path) -> None:
    evaluation = json.loads((run / "eval.json").read_text())
    meta = json.loads((run / "run.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    names = {name: name.removeprefix("test@") for name in evaluation["splits"]} | {
        "test": "24 bits (as in training)"
    }
    shown = {**evaluation, "splits": {names[name]: split for name, split in evaluation["splits"].items()}}
    figure = plots.quality(shown, title="Parity: more loops carry the answer further")
    (out / "demo_parity.png").write_bytes(plots.to_png(figure))
    record = {
        "command": "make demo",
        "versions": meta.get("versions"),
        "seed": meta.get("seed"),
        **evaluation,
    }
    (out / "demo_parity.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
