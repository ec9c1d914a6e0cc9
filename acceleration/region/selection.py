"""Which tokens are active: the most important ones, and never one left out for longer than allowed."""

from dataclasses import dataclass

import torch


def friendly_count(tokens: int, ratio: float) -> int:
    """Return how many of ``tokens`` a share of ``ratio`` is, rounded to a count that kernels like.

    Multiples of 64, of less where there are few tokens: of the largest power of two that is at most a sixteenth of them.
    """
    unit = min(64, 1 << max((tokens // 16).bit_length() - 1, 0))
    return min(max(round(tokens * ratio / unit) * unit, unit), tokens)


@dataclass
class Selector:
    """Chooses the active tokens of a step and remembers how long each has been left out.

    Attributes:
        drops: steps in a row that each token has been left out, int64 [N].
        most_skips: most that may become.
        always: tokens that are always active, bool [N]; None for none.
        never: tokens that never need to be, bool [N]; None for none. They count neither as left out nor as starving.
    """

    drops: torch.Tensor
    most_skips: int
    always: torch.Tensor | None = None
    never: torch.Tensor | None = None

    def choose(self, importance: torch.Tensor, count: int) -> torch.Tensor:
        """Return the active tokens in ascending order, int64 [n].

        n is ``count``, more where more must be active, less where fewer may be. Of equally important tokens the first.

        Args:
            importance: fp32 [N], larger means keep; what is not a number counts as most important.
            count: how many are wanted, in [1, N].
        """
        tokens = len(importance)
        if count >= tokens and self.never is None:
            return torch.arange(tokens, device=importance.device)
        due = self.drops >= self.most_skips
        if self.always is not None:
            due = due | self.always
        score = torch.nan_to_num(importance, nan=torch.inf, posinf=torch.inf).masked_fill(due, torch.inf)
        open_to = tokens
        if self.never is not None:
            due = due & ~self.never
            score = score.masked_fill(self.never, -torch.inf)
            open_to -= int(self.never.sum())
        wanted = max(min(max(count, int(due.sum())), open_to), 1)
        return score.sort(descending=True, stable=True).indices[:wanted].sort().values

    def note(self, active: torch.Tensor | None) -> None:
        """Count a step: ``active`` tokens were computed, None for all."""
        if active is None:
            self.drops.zero_()
            return
        self.drops += 1
        self.drops[active] = 0
        if self.never is not None:
            self.drops[self.never] = 0
