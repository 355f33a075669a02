"""A draft model beside the engine's own: found, held against it, loaded."""

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tokenspeed import loader
from tokenspeed.cache import KVPools
from tokenspeed.core.config import CacheGroupKind, EngineConfig, KVSpec, SchedulerConfig
from tokenspeed.core.errors import ConfigError, ModelError
from tokenspeed.distributed import Place
from tokenspeed.engine.assembly import OpenedModel, open_model
from tokenspeed.engine.sizing import PROPOSAL_WINDOW, draft_seats
from tokenspeed.execution import Drafting, seat_pages
from tokenspeed.modeling import Model, build_head, build_model
from tokenspeed.modeling.models.registry import head_class

__all__ = ["OpenedDraft", "groups_within", "load_draft", "open_draft"]

# A proposal goes on at least until it is more likely wrong than right, however large its model is.
_CHANCE_MIN_MOST = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedDraft:
    """A draft model that was found and not loaded.

    Attributes:
        opened: its files, and where and how it will run; the target's own for a head that the
            target's checkpoint carries.
        head: whether it is a head of the target.
        specs: what its cache groups keep of a token.
        groups: of each of a head's, whose pages of the target's it lies in; see `Drafting`.
        pages, page_size: its own, for whole seats; none for a head.
        weights_size_bytes: what its weights will take.
        chance_min: see `Drafting`.
    """

    opened: OpenedModel
    head: bool
    specs: tuple[KVSpec, ...]
    groups: tuple[int, ...]
    pages: int
    page_size: int
    weights_size_bytes: int
    chance_min: float

    @property
    def window(self) -> int:
        """The most tokens of a request that it reads before it proposes; 0 for a head."""
        return 0 if self.head else PROPOSAL_WINDOW

    @property
    def pages_size_bytes(self) -> int:
        """What its own pages will take."""
        tokens = self.pages * self.page_size
        return tokens * sum(spec.token_size_bytes for spec in self.specs)


def open_draft(
    config: EngineConfig,
    target: OpenedModel,
    shape: Model,
    *,
    weights_size_bytes: int,
    available_size_bytes: int,
    progress: loader.Progress | None = None,
) -> OpenedDraft | None:
    """Find the draft model that `config.speculate` names, or with `auto` the head that the target's
    checkpoint carries; None where there is none.

    Args:
        config: the engine's.
        target: the model that verifies.
        shape: the same, without memory.
        weights_size_bytes: what its weights will take.
        available_size_bytes: memory at hand before any weights are loaded.
        progress: told how far it is.

    Raises:
        ModelError: it cannot be had, read or run.
        ConfigError: it is of another vocabulary, or a head that keeps a past which the target has
            no pages for.
    """
    name = config.draft_model
    if name is None:
        if config.speculate != "auto" or shape.ranks > 1 or not _carries_head(target):
            return None
        opened, size_bytes = target, target.checkpoint.size_bytes // (target.config.layers + 1)
    else:
        own_config = replace(config, model=name)
        try:
            opened = open_model(own_config, place=Place(), progress=progress, beside=target)
        except ModelError as error:
            # Of two models, which one is it?
            raise type(error)(f"--speculate {config.speculate}: {error}") from error
        size_bytes = opened.checkpoint.size_bytes
    head = opened is target or head_class(opened.config.architecture) is not None
    if not head:
        _check_vocabulary(opened, target)
    own = _build(opened, head=head, device=torch.device("meta"), target=shape)
    size_bytes = own.planned_size_bytes(size_bytes, plain=opened.checkpoint.plain_names)
    specs, pages = own.kv_specs(), 0
    groups: tuple[int, ...] = ()
    if head:
        groups = groups_within(specs, shape.kv_specs(), name=name or opened.files.name)
    else:
        pages = seat_pages(PROPOSAL_WINDOW, config.page_size)
        pages *= draft_seats(
            config,
            seat_size_bytes=pages * config.page_size * sum(s.token_size_bytes for s in specs),
            room_size_bytes=available_size_bytes - weights_size_bytes - size_bytes,
        )
    return OpenedDraft(
        opened=opened,
        head=head,
        specs=specs,
        groups=groups,
        pages=pages,
        page_size=config.page_size,
        weights_size_bytes=size_bytes,
        # Both read their weights once for a token of one request. A guess that is right less often
        # than it costs of a step of the target is not worth its making.
        chance_min=min(_CHANCE_MIN_MOST, size_bytes / weights_size_bytes),
    )


def load_draft(
    draft: OpenedDraft,
    config: SchedulerConfig,
    target: Model,
    *,
    progress: loader.Progress | None = None,
) -> Drafting:
    """Load a draft model, and make room for its KV: a head's in as many pages as the target has.

    Args:
        draft: which.
        config: sizes of pools.
        target: loaded.
        progress: told of the bytes read.

    Raises:
        ModelError: its weights cannot be read.
        InsufficientMemory: there is no room.
    """
    opened = draft.opened
    model = _build(opened, head=draft.head, device=opened.device, target=target)
    model.load_weights(opened.checkpoint.blocks(progress=progress))
    group = config.groups[0]
    pools = KVPools(
        draft.specs,
        pages=group.pages if draft.head else draft.pages,
        page_size=config.page_size,
        device=opened.device,
        host_pages=group.host_pages if draft.head else 0,
        padded=opened.device.type == "cuda",
    )
    return Drafting(
        model=model,
        pools=pools,
        groups=draft.groups,
        window=draft.window,
        chance_min=draft.chance_min,
    )


def _build(opened: OpenedModel, *, head: bool, device: torch.device, target: Model) -> Model:
    if head:
        return build_head(opened.config, device=device, kernels=opened.kernels, target=target)
    return build_model(opened.config, dtype=opened.dtype, device=device, kernels=opened.kernels)


def _carries_head(target: OpenedModel) -> bool:
    """Whether a checkpoint has the next-token layer that its configuration speaks of: many were
    written without it."""
    wanted = f"model.layers.{target.config.layers}.eh_proj.weight"
    return target.config.next_layers > 0 and any(
        name == wanted for name, _ in target.checkpoint.blocks()
    )


def groups_within(
    draft: Sequence[KVSpec], target: Sequence[KVSpec], *, name: str
) -> tuple[int, ...]:
    """Of each cache group of a head, a group of the target whose pages hold all positions that it
    reads.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for spec in draft:
        holding = [
            index
            for index, other in enumerate(target)
            if other.kind in (CacheGroupKind.FULL, CacheGroupKind.LATENT)
            or (
                (spec.window is not None and other.window is not None)
                and other.window >= spec.window
            )
        ]
        if not holding:
            wanted = "all positions" if spec.window is None else f"the last {spec.window} positions"
            kept = ", ".join(f"the last {other.window}" for other in target)
            raise ConfigError(
                f"--speculate draft:{name} reads {wanted}, but the model keeps pages of {kept} "
                "only; choose a draft model of its family, or --speculate suffix"
            )
        # Its own kind where there is one: pages behind a window return soonest.
        holding.sort(key=lambda index: target[index].window != spec.window)
        found.append(holding[0])
    return tuple(found)


def _check_vocabulary(draft: OpenedModel, target: OpenedModel) -> None:
    folders = [opened.files.tokenizer_dir for opened in (target, draft)]
    texts = [folder / "tokenizer.json" for folder in folders]
    if all(text.is_file() for text in texts) and filecmp.cmp(texts[0], texts[1], shallow=False):
        return
    ours, theirs = (loader.Tokenizer(folder).vocabulary for folder in folders)
    if ours == theirs:
        return
    token, text = min((token, text) for text, token in ours.items() ^ theirs.items())
    raise ConfigError(
        f"--speculate draft: {draft.files.name} has another vocabulary than {target.files.name} "
        f"({len(theirs)} tokens beside {len(ours)}; token {token}, {text!r}, is of one of them "
        "only); choose a draft model of the same tokenizer, or --speculate suffix"
    )
