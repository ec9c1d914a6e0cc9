"""Region-adaptive sampling during a run: which tokens are active, their way through the blocks, and the others' rest."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evaluation import Call, Evaluation
from ..models import BlockSite, ModelDescriptor
from .importance import change_per_token, importance, mask_tokens, published_importance, spread_over_latent
from .maps import often, step_map
from .memory import DTYPES, Memory
from .schedule import RegionSchedule
from .selection import Selector, friendly_count
from .settings import HIDDEN, LINE, PUBLISHED, RegionSettings
from .store import KeyStore, Velocity, with_rows
from .tokens import STREAMS, Rows, Stream, TokenPlaces, readable, shortened

#: Where a call carries what this session does with it.
REGION = "region"


@dataclass(eq=False)
class _Passage:
    """One network call on its way through the blocks.

    Attributes:
        session: whose it is.
        active: the active tokens; None where all are computed, and keys and values kept.
        depth: the block it is in, None between blocks.
        attentions: self-attentions of that block so far.
        rows: places of the active tokens in that block; of all tokens where all are computed.
        through: whether the last block ran.
        obstacle: why its blocks cannot be given fewer tokens.
        known: what was shortened for earlier blocks.
        every: all tokens, where all are computed.
        hidden: last hidden state of all tokens, where inactive ones keep theirs.
    """

    session: "RegionSession"
    active: torch.Tensor | None
    depth: int | None = None
    attentions: int = 0
    rows: Rows | None = None
    through: bool = False
    obstacle: str | None = None
    known: dict[int, tuple] = field(default_factory=dict)
    every: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@dataclass
class _Branch:
    """What is kept of one guidance branch.

    Attributes:
        generation: which pass over all tokens it has seen.
        context: length of the text it was computed with.
        velocity: what inactive tokens go on with.
        hidden: last hidden state of all tokens [B, N, D], in its place.
    """

    generation: int
    context: int
    velocity: Velocity | None = None
    hidden: torch.Tensor | None = None


@dataclass
class RegionSession:
    """Implements :class:`~..run.Session`; the host brings every attention to :meth:`keys`.

    Attributes:
        settings: what the user asked for.
        schedule: full and partial steps.
        descriptor: the network's family.
        network: the network; only its sizes are read.
        memory: how keys and values are kept.
        worked_on: the part of the latent that is sampled at all (an inpainting mask); None for everything.
    """

    settings: RegionSettings
    schedule: RegionSchedule
    descriptor: ModelDescriptor
    network: Any
    memory: Memory
    worked_on: torch.Tensor | None = None
    section: str = "region"
    left: Counter = field(default_factory=Counter)
    _store: KeyStore = field(init=False, repr=False)
    _places: TokenPlaces = field(init=False, repr=False)
    _branches: dict[Hashable, _Branch] = field(default_factory=dict, repr=False)
    _selector: Selector | None = field(default=None, repr=False)
    _evaluation: Evaluation | None = field(default=None, repr=False)
    _before: torch.Tensor | None = field(default=None, repr=False)
    _active: torch.Tensor | None = field(default=None, repr=False)
    _grid: tuple[int, int, int] = (1, 1, 1)
    _generation: int = 0
    _renewed: bool = False
    _since: int = 0
    _full: int = 0
    _partial: int = 0
    _steps: list[tuple[Evaluation, torch.Tensor | None, tuple[int, int, int]]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._store = KeyStore(DTYPES[self.memory.format], self.memory.order)
        self._places = TokenPlaces(self.descriptor, self.network)

    @property
    def stream(self) -> Stream:
        """How blocks take their tokens."""
        return STREAMS[self.descriptor.family]

    @property
    def bytes(self) -> int:
        """Bytes stored now."""
        kept = (item for branch in self._branches.values() for item in (branch.velocity, branch.hidden))
        return self._store.bytes + sum(item.nbytes for item in kept if item is not None)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of keys and values, and what inactive tokens go on with."""
        return self._store.peak_bytes + self.bytes - self._store.bytes

    def begin(self, evaluation: Evaluation) -> None:
        """Choose the active tokens by what the last step changed; every branch follows."""
        self._close_evaluation()
        latent, before = evaluation.network_input, self._before
        self._evaluation, self._before, self._active = evaluation, latent.detach().clone(), None
        self._full = self._partial = 0
        self._renewed = False
        if before is None or before.shape != latent.shape or evaluation.skip or evaluation.pending:
            return
        if not self.schedule.partial(evaluation.step, self._since):
            return
        self._active = self._choose(latent - before, evaluation.step)

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the network on the active tokens, where everything they need is kept; on all elsewhere."""
        passage = self._passage(call)
        if passage is None:
            self._full += 1
            return compute()
        call.scratch[REGION] = passage
        denoised = compute()
        del call.scratch[REGION]
        if not passage.through:
            return denoised  # a cache answered
        if passage.active is None:
            self._full += 1
            call.evaluation.active_share = None  # whatever another call of the evaluation left out
            self._renew(call, passage, denoised)
            return denoised
        self._partial += 1
        if not self._full:
            call.evaluation.active_share = len(passage.active) / call.tokens
        return self._patched(call, passage, denoised)

    def depths(self, call: Call) -> frozenset[int] | None:
        """All blocks where tokens are left out or keys kept, none elsewhere."""
        return None if REGION in call.scratch else frozenset()

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run a block on the active tokens alone; the others' rows go past it."""
        passage = call.scratch.get(REGION)
        if passage is None:
            return original(args)
        passage.depth, passage.attentions = site.depth, 0
        try:
            out = self._whole_block(passage, call, site, args, original)
            if out is None:
                out = self._short_block(passage, call, site, args, original)
        finally:
            passage.depth = None
        passage.through |= site.last
        return out

    def keys(
        self, call: Call, queries: int, keys: torch.Tensor, values: torch.Tensor, axis: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int] | None:
        """Keep an attention's keys and values, or return those of all tokens for the active ones' queries.

        Args:
            call: the call it is in.
            queries: number of queries.
            keys: [B, N, D] or [B, H, N, d].
            values: likewise.
            axis: where the tokens are.

        Returns:
            Keys, values, and the places of the queries in a sequence of the length that comes last; None where attention is
            to be computed with what it was given.
        """
        passage = call.scratch.get(REGION)
        if passage is None or passage.depth is None or passage.rows is None or keys.shape[axis] != queries:
            return None
        if (self.stream.cross and passage.attentions) or len(keys) != len(call.branches) * call.rows:
            return None
        found = passage.rows.of_length(queries)
        if found is None:
            return None
        layer = passage.depth, passage.attentions
        passage.attentions += 1
        if passage.depth not in self.memory.layers:
            return None
        branches = [branch.key for branch in call.branches]
        if passage.active is None:
            self._store.keep(branches, layer, axis, call.evaluation.sigma, keys, values)
            return None
        if not all(self._store.has(branch, layer) for branch in branches):
            return None
        return *self._store.merged(branches, layer, found[0], call.evaluation.sigma, keys, values), *found

    def reset(self) -> None:
        """Forget everything of the trajectory that has ended."""
        self._close_evaluation()
        self._store.clear()
        self._branches.clear()
        self._places.reset()
        self._before = self._selector = self._active = None
        self._since = 0

    def close(self) -> None:
        """Free everything."""
        self.reset()
        self._steps.clear()

    def report(self) -> dict[str, Any]:
        """Return which tokens were active, per step, small enough to draw."""
        self._close_evaluation()
        steps = [
            {
                "evaluation": evaluation.index,
                "step": evaluation.step,
                "share": 1.0 if active is None else len(active) / (grid[0] * grid[1] * grid[2]),
                "rows": step_map(active, grid),
            }
            for evaluation, active, grid in self._steps
        ]
        last = self._steps[-1][2] if self._steps else self._grid
        return {
            "grid": list(last),
            "steps": steps,
            "often": often([active for _, active, grid in self._steps if active is not None and grid == last], last),
            "left": dict(self.left),
        }

    def _choose(self, update: torch.Tensor, step: int) -> torch.Tensor:
        """Return the active tokens of a step whose predecessor changed the latent by ``update``."""
        self._grid = self.descriptor.grid(self.network, update.shape)
        patch = _patch(self.descriptor, self.network)
        change = change_per_token(update, self._grid, patch)
        if self._selector is None or len(self._selector.drops) != len(change):
            self._selector = self._new_selector(change)
        published = self.settings.guard == PUBLISHED
        rule = published_importance if published else importance
        count = friendly_count(len(change), self.schedule.ratio(step))
        return self._selector.choose(rule(change, self._selector.drops, self.settings.starvation), count)

    def _new_selector(self, change: torch.Tensor) -> Selector:
        always = never = None
        if self.settings.mask:
            cells = [[float(cell) for cell in row] for row in self.settings.mask]
            always = mask_tokens(torch.tensor(cells, device=change.device), self._grid)
        if self.worked_on is not None:
            never = ~mask_tokens(self.worked_on.to(change.device), self._grid)
            never = None if not never.any() or never.all() else never
        # The published code has no such bound.
        most = len(self.schedule.schedule.sigmas) if self.settings.guard == PUBLISHED else self.settings.most_skips
        return Selector(torch.zeros_like(change, dtype=torch.int64), most, always, never)

    def _passage(self, call: Call) -> _Passage | None:
        """Return how a call goes through the blocks; None where it goes as ever, and nothing of it is kept."""
        step = call.evaluation.step
        if not call.skippable or call.network_input.shape[2:] != self._evaluation.network_input.shape[2:]:
            self.left["another latent, or another pack's blocks"] += 1
            return None
        if self._active is not None and all(self._ready(call, branch.key) for branch in call.branches):
            return _Passage(self, self._active)
        return _Passage(self, None) if self.schedule.keeps(step) else None

    def _ready(self, call: Call, key: Hashable) -> bool:
        branch = self._branches.get(key)
        return branch is not None and branch.generation == self._generation and branch.context == call.context_tokens

    def _whole_block(
        self, passage: _Passage, call: Call, site: BlockSite, args: dict, original: Callable
    ) -> dict | None:
        """Run a block on all tokens while its keys and values are kept; None where only some are active."""
        if passage.active is not None:
            return None
        if not readable(self.stream, args) or self._places.span(call, site, args) is None:
            passage.obstacle, passage.rows = "places of tokens that are not known", None
            return original(args)
        if passage.every is None:
            passage.every = torch.arange(call.tokens, device=args["img"].device)
        passage.rows = self._places.rows(call, site, args, passage.every)
        out = original(args)
        if site.last and self.settings.stale == HIDDEN:
            passage.hidden = out["img"].clone()
        return out

    def _short_block(self, passage: _Passage, call: Call, site: BlockSite, args: dict, original: Callable) -> dict:
        rows = passage.rows = self._places.rows(call, site, args, passage.active)
        out = original(shortened(self.stream, args, rows, passage.known))
        if len(rows.stream) == rows.stream_length:
            image = out["img"]
        else:
            image = with_rows(self._rest(call, site, args), rows.stream, out["img"])
        if site.last and self.settings.stale == HIDDEN:
            passage.hidden = image.clone()
        return {**out, "img": image}

    def _rest(self, call: Call, site: BlockSite, args: dict) -> torch.Tensor:
        """Return what a block yields for tokens that are not active."""
        if not site.last or self.settings.stale != HIDDEN:
            return args["img"]
        return torch.cat([self._branches[branch.key].hidden for branch in call.branches])

    def _renew(self, call: Call, passage: _Passage, denoised: torch.Tensor) -> None:
        """Take note of a call that computed every token."""
        if passage.obstacle is not None:
            self.left[passage.obstacle] += 1
            return
        if self._active is None and not self._renewed:
            self._generation += 1
            self._renewed = True
        hidden = passage.hidden
        output = None if hidden is not None else call.to_prediction(denoised)
        for index, branch in enumerate(call.branches):
            kept = self._branches.setdefault(branch.key, _Branch(0, 0))
            kept.generation, kept.context = self._generation, call.context_tokens
            if hidden is not None:
                kept.hidden = call.part(hidden, index)
            else:
                self._renew_velocity(kept, call.part(output, index), call.evaluation.sigma)

    def _renew_velocity(self, kept: _Branch, output: torch.Tensor, sigma: float) -> None:
        if kept.velocity is None or kept.velocity.newest.shape != output.shape:
            kept.velocity = Velocity.of(output, sigma, int(self.settings.stale == LINE))
        else:
            kept.velocity.renew(output, sigma)

    def _patched(self, call: Call, passage: _Passage, denoised: torch.Tensor) -> torch.Tensor:
        """Return the denoised latent with the inactive tokens' own velocity; nothing to do where the head has made it."""
        if self.settings.stale == HIDDEN:
            for index, branch in enumerate(call.branches):
                self._branches[branch.key].hidden = call.part(passage.hidden, index)
            return denoised
        output, sigma = call.to_prediction(denoised), call.evaluation.sigma
        if len(passage.active) == call.tokens:
            for index, branch in enumerate(call.branches):
                self._renew_velocity(self._branches[branch.key], call.part(output, index), sigma)
            return denoised
        flags = torch.zeros(call.tokens, dtype=torch.bool, device=output.device)
        flags[passage.active] = True
        patch = _patch(self.descriptor, self.network)
        pixels = spread_over_latent(flags, self._grid, patch, output.shape)
        parts = [
            self._branches[branch.key].velocity.patched(call.part(output, index), pixels, sigma)
            for index, branch in enumerate(call.branches)
        ]
        return call.to_denoised(torch.cat(parts))

    def _close_evaluation(self) -> None:
        """Take note of which tokens were left out, once it is known whether the network ran at all."""
        evaluation, self._evaluation = self._evaluation, None
        if evaluation is None or not self._full + self._partial:
            return
        active = self._active if not self._full else None
        if self._selector is not None:
            self._selector.note(active)
        self._since = 0 if active is None else self._since + 1
        grid = self.descriptor.grid(self.network, evaluation.network_input.shape)
        self._steps.append((evaluation, active, grid))


def _patch(descriptor: ModelDescriptor, network: Any) -> tuple[int, int, int]:
    """Return the latent pixels of a token, (t, h, w)."""
    size = descriptor.patch_size(network)
    size = (size, size) if isinstance(size, int) else tuple(size)
    return (1,) * (3 - len(size)) + size
