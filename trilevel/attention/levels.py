"""What the heads of a layer see: the level ratio, and the sizes of the three levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from trilevel.errors import ConfigError

Mode = Literal["calibrated", "strict"]
SelectionGradient = Literal["straight_through", "gate"]


class HeadSplit(NamedTuple):
    """How many heads (or KV groups) are local, regional and global; they stand in this order along the head axis."""

    local: int
    regional: int
    global_: int

    def scaled(self, factor: int) -> HeadSplit:
        """The same split with every count multiplied by `factor` (KV groups to query heads)."""
        return HeadSplit(*(factor * count for count in self))


@dataclass(frozen=True, slots=True)
class LevelRatio:
    """Shares of local, regional and global heads, `LevelRatio(6, 3, 1)` for text, `LevelRatio(4, 4, 2)` for images.

    Shares need not sum to anything; at least one is positive.
    """

    local: float
    regional: float
    global_: float

    def __post_init__(self) -> None:
        """Check the shares."""
        shares = self.shares
        if any(not share >= 0 or share == float("inf") for share in shares) or sum(shares) <= 0:
            raise ConfigError(
                f"LevelRatio{shares}: every share must be finite and >= 0 and one of them > 0. "
                "Text works with LevelRatio(6, 3, 1), images with LevelRatio(4, 4, 2)."
            )

    @property
    def shares(self) -> tuple[float, float, float]:
        """The three shares in head order."""
        return (self.local, self.regional, self.global_)

    def split(self, num_heads: int, num_kv_heads: int | None = None) -> HeadSplit:
        """Share `num_heads` out by largest remainder, in whole KV groups, one at least for every non-zero share.

        Ties go to the earlier class. Twelve heads at 6:3:1 give 7:4:1.

        Raises:
            ConfigError: the heads are no multiple of the KV heads, or there are fewer groups than non-zero shares.
        """
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or groups < 1 or num_heads % groups:
            raise ConfigError(f"num_heads={num_heads} is no positive multiple of num_kv_heads={groups}.")
        wanted = sum(share > 0 for share in self.shares)
        if groups < wanted:
            raise ConfigError(
                f"{self} has {wanted} non-zero shares and needs as many KV groups, got {groups}. "
                "Use more heads or set a share to 0."
            )
        return HeadSplit(*largest_remainder(self.shares, groups)).scaled(num_heads // groups)


def largest_remainder(shares: Sequence[float], seats: int) -> list[int]:
    """Share `seats` out in proportion to `shares`, one at least for every non-zero share; ties go to the earlier one.

    There must be a seat for every non-zero share. Whole shares that sum to more than `seats` are never exceeded.
    """
    total, places = sum(shares), range(len(shares))
    counts = [int(share * seats // total) for share in shares]
    # seats * share - count * total is exact for whole shares, so equal remainders really tie
    missing = [counts[c] * total - seats * shares[c] for c in places]
    for index in sorted(places, key=missing.__getitem__)[: seats - sum(counts)]:
        counts[index] += 1
    for index in places:
        if shares[index] > 0 and counts[index] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[index] += 1
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """The levels of one layer (DESIGN.md section 3).

    Args:
        ratio: shares of local, regional and global heads.
        mode: `calibrated` (every entry carries its log-count, all heads keep their near window) or `strict` (the
            article's: regions attend to regions, global tokens to global tokens; bidirectional only).
        window: keys in the near window, odd, `2w + 1`; a causal head sees the `w + 1` that are not in the future.
        region_size: tokens in a region. Exactly one of `region_size` and `num_regions` is given.
        num_regions: regions in a segment; the size is then `ceil(real tokens / num_regions)`.
        num_global_tokens: global tokens in a segment, `p`.
        num_sinks: first tokens of the segment that local heads always see.
        union: global heads see the region summaries as well, so that near, global and regional entries partition the
            tokens (for heads that retrieve).
        selection_gradient: `straight_through` keeps the forward pass exact and sends the scorer the gradient of
            `log sigmoid(score)`; `gate` adds it to the logits in training and inference alike.
        selection_chunk: causal only: a token can be selected once its chunk of this many tokens is complete; default
            `w + 1`.
        dense_below: inputs of fewer tokens run as dense attention in every head, in training and inference alike.
    """

    ratio: LevelRatio = field(default_factory=lambda: LevelRatio(6, 3, 1))
    mode: Mode = "calibrated"
    window: int = 33
    region_size: int | None = 64
    num_regions: int | None = None
    num_global_tokens: int = 64
    num_sinks: int = 0
    union: bool = False
    selection_gradient: SelectionGradient = "straight_through"
    selection_chunk: int | None = None
    dense_below: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if self.mode not in ("calibrated", "strict"):
            raise ConfigError(f"Levels: mode={self.mode!r} is neither 'calibrated' nor 'strict'.")
        if self.selection_gradient not in ("straight_through", "gate"):
            raise ConfigError(
                f"Levels: selection_gradient={self.selection_gradient!r} is neither 'straight_through' nor 'gate'."
            )
        if self.window < 1 or self.window % 2 == 0:
            raise ConfigError(f"Levels: window={self.window} must be odd and >= 1 (2w + 1 keys, w on either side).")
        if (self.region_size is None) == (self.num_regions is None):
            raise ConfigError(
                f"Levels: exactly one of region_size={self.region_size} and num_regions={self.num_regions} is needed; "
                "set the other to None."
            )
        for name in ("region_size", "num_regions", "num_global_tokens", "selection_chunk", "dense_below"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"Levels: {name}={value} must be >= 1.")
        if self.num_sinks < 0:
            raise ConfigError(f"Levels: num_sinks={self.num_sinks} must be >= 0.")
        if self.mode == "strict" and (self.union or self.num_sinks):
            raise ConfigError("Levels: union and num_sinks belong to mode='calibrated'; strict has neither.")

    @property
    def radius(self) -> int:
        """`w`: keys on either side in the near window."""
        return self.window // 2

    @property
    def chunk(self) -> int:
        """Tokens in a selection chunk (causal)."""
        return self.radius + 1 if self.selection_chunk is None else self.selection_chunk
