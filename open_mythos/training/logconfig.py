"""The [log] section of a run config: what is told of a run, and when a run is going wrong. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from open_mythos.training.checks import choice, error, number, whole

__all__ = ["TRACKERS", "LogConfig"]

TRACKERS = ("trackio", "tensorboard", "wandb")


@dataclass(frozen=True)
class LogConfig:
    """What is told of a run beside metrics.jsonl; how often is ``train.log_every``. See docs/metrics.md.

    Attributes:
        trackers: any of "trackio", "tensorboard", "wandb".
        project: the project that trackio and W&B file the run under.
        online: W&B sends its records as it goes; else it keeps them in the run directory.
        monitor_every: steps between looks at the states, taken at the next logged step; 0 never looks.
        peak_tflops: what MFU is a share of, per device: a number, "measured" (a large matrix product, timed at
            the start), or "auto" (a table by device name, else measured; none on the CPU).
        window: steps that a measure's usual range is taken from.
        patience: steps in a row that the loss may be out of its range before the run stops; 0 never stops it.
        loss_rise: nats above its median at which the loss is out of its range.
        grad_factor: the same for gradient norms, as a multiple of the median.
        state_factor: the same for state norms, and below the median by as much.
        rho: largest ρ(A).
        correlation: largest token correlation.
        balance: smallest expert balance.
        halting: smallest mean halting depth, in loops.
    """

    trackers: tuple[str, ...] = ()
    project: str = "open-mythos"
    online: bool = False
    monitor_every: int = 10
    peak_tflops: float | str = "auto"
    window: int = 100
    patience: int = 100
    loss_rise: float = 0.5
    grad_factor: float = 10.0
    state_factor: float = 4.0
    rho: float = 0.9999
    correlation: float = 0.99
    balance: float = 0.05
    halting: float = 1.05

    def __post_init__(self) -> None:
        if not isinstance(self.trackers, (list, tuple)):
            raise error("log.trackers", self.trackers, "a list of names")
        for name in self.trackers:
            choice("log.trackers", name, TRACKERS)
        object.__setattr__(self, "trackers", tuple(dict.fromkeys(self.trackers)))
        if not isinstance(self.project, str) or not self.project:
            raise error("log.project", self.project, "a name")
        choice("log.online", self.online, (True, False))
        if isinstance(self.peak_tflops, str) and self.peak_tflops not in ("auto", "measured"):
            raise error("log.peak_tflops", self.peak_tflops, "'auto', 'measured' or a number above 0")
        if not isinstance(self.peak_tflops, str):
            number("log.peak_tflops", self.peak_tflops, 0, above=True)
        whole("log.monitor_every", self.monitor_every, 0)
        whole("log.patience", self.patience, 0)
        whole("log.window", self.window, 20)
        number("log.loss_rise", self.loss_rise, 0, above=True)
        number("log.halting", self.halting, 0)
        for name in ("grad_factor", "state_factor"):
            number(f"log.{name}", getattr(self, name), 1, above=True)
        for name in ("rho", "correlation", "balance"):
            number(f"log.{name}", getattr(self, name), 0, 1)
