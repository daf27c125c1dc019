"""New tokens on their way out: read from the device, oldest first, and handed to those who asked."""

from __future__ import annotations

from open_mythos.inference.intake import Intake
from open_mythos.inference.running import Late, Running

__all__ = ["Outlet"]


class Outlet(Intake):
    """Hands out what was drawn, and ends who has all."""

    def _cycled(self, run: Running, token: int, loops: int) -> bool:
        """Hand out a token, after those that came before it, unless one of them was the last."""
        while any(run in late.runs for late in self._late):
            self._hand_over(self._late.popleft())
        if run.handle.done:
            return False
        run.drawn += 1
        run.handle.state.loops.append(loops)
        self._hand_out(run, token)
        return True

    def _read(self, lag: int) -> None:
        """Hand out tokens, the oldest first, until so many reads are outstanding."""
        while self._late and (len(self._late) > lag or self._late[0].ready()):
            self._hand_over(self._late.popleft())

    def _arrive(self) -> None:
        """Let those decode whose prompts ran beside; where nobody else does, wait for them."""
        while self._apart and (self._apart[0].ready() or not any(run.decodes for run in self._running)):
            late = self._apart.pop(0)
            for run in late.runs:
                run.waits = False
            self._hand_over(late)

    def _hand_over(self, late: Late) -> None:
        for run, loops, token in late.read():
            if loops is not None and late.left:
                self.stats.row_loops += loops
            if run.handle.done:
                continue
            if loops is not None:
                run.handle.state.loops.append(loops)
            self._hand_out(run, token)

    def _hand_out(self, run: Running, token: int) -> None:
        handle, request = run.handle, run.checked.request
        if token < 0:
            self._end(run, "failed", ValueError("the logits are not finite"))
            return
        handle.state.tokens.append(token)
        self.stats.tokens += 1
        try:
            if request.on_token is not None:
                request.on_token(token)
        except Exception as error:
            self._end(run, "failed", error)
            return
        if token == run.checked.eos:
            self._end(run, "eos")
        elif len(handle.state.tokens) == request.max_new_tokens:
            self._end(run, "length")
