"""`DecodeCache`: causal multi-level attention one token at a time, in memory that does not grow with the tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trilevel.attention.cache_levels import (
    Arrival,
    GlobalState,
    LevelState,
    LocalState,
    Part,
    RegionalState,
    Room,
    Window,
)
from trilevel.attention.levels import Levels
from trilevel.errors import ConfigError, ShapeError


class DecodeCache:
    """The past of causal `calibrated` attention, for decoding: step by step equals the whole call.

    Keeps for every KV head the last `w + 1` keys and values and, by head class: local, the sinks and the sum of what
    left the window; regional, one summary a complete region and the running pooling of the open one; global, the top
    `p` tokens of all complete selection chunks, the open chunk and the sum of what left the window. Memory is
    O(w + m + p + chunk) a KV head, where m = tokens / region_size is the only part that grows; a step costs as much.

    Rows that have seen a non-finite key, value or score are NaN from there on, as in the whole call.

    For inference: nothing here has a gradient. Every row of the batch has the same length: no padding, one segment.

    Args:
        levels: `calibrated`, with `region_size` where a head sees regions, without `dense_below`.
        num_heads: query heads, in the order local, regional, global.
        num_kv_heads: key and value heads.
        head_dim: features of a head.
        batch: rows.
        dtype: of queries, keys and values; sums are float32 at least.
        device: of all of them.

    Raises:
        ConfigError: the levels cannot be decoded token by token.

    >>> cache = DecodeCache(Levels(), num_heads=4, num_kv_heads=4, head_dim=8, batch=1)
    >>> token = torch.ones(1, 4, 1, 8)
    >>> cache.step(token, token, token).shape, cache.num_tokens
    (torch.Size([1, 4, 1, 8]), 1)
    """

    def __init__(
        self,
        levels: Levels,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_levels(levels)
        split = levels.ratio.split(num_heads, num_kv_heads)
        self.levels, self.num_tokens = levels, 0
        self.num_heads, self._group = num_heads, num_heads // num_kv_heads
        self._room = Room(
            batch=batch,
            kv_heads=num_kv_heads,
            dim=head_dim,
            dtype=dtype,
            sum_dtype=torch.promote_types(dtype, torch.float32),
            device=torch.device(device),
            radius=levels.radius,
        )
        # rows that have seen a non-finite token
        self._spoiled = torch.zeros(batch, dtype=torch.bool, device=device)
        self._num_forced = torch.zeros(batch, dtype=torch.long, device=device)
        self._window = Window(self._room)
        self._states: list[tuple[slice, LevelState]] = []
        first = 0
        for kind, heads in enumerate(split):
            last = first + heads // self._group
            if last > first:
                state = _state(kind, levels, replace(self._room, kv_heads=last - first))
                self._states.append((slice(first, last), state))
            first = last

    @torch.no_grad()
    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        score: Tensor | None = None,
        forced: Tensor | None = None,
        pool_weight: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attend with the next token and remember it.

        Args:
            query: (batch, heads, 1, dim).
            key: (batch, kv_heads, 1, dim), rotated if keys are.
            value: like key.
            score: (batch, 1) learned score plus prior as global token, default 0.
            forced: (batch, 1) bool, always selected once its chunk is complete.
            pool_weight: (kv_heads, dim), u_h, the same at every step.
            scale: of the logits, default 1 / sqrt(dim).

        Returns:
            (batch, heads, 1, dim), row `num_tokens` of the whole call.

        Raises:
            ShapeError: shapes or types differ from what the cache was made for, or more tokens are forced than there
                are global ones; the cache is then unchanged.
        """
        room = self._room
        self._check("query", query, (room.batch, self.num_heads, 1, room.dim))
        self._check("key", key, (room.batch, room.kv_heads, 1, room.dim))
        self._check("value", value, (room.batch, room.kv_heads, 1, room.dim))
        arrival = self._arrival(key, value, score, forced, pool_weight)
        arrival = replace(arrival, leaving=self._window.push(arrival.pair, self.num_tokens))
        self.num_tokens += 1
        near = self._window.part(self.num_tokens)
        scaled = query.to(room.sum_dtype) * (room.dim**-0.5 if scale is None else scale)
        scaled = scaled.view(room.batch, room.kv_heads, self._group, room.dim)
        outputs = []
        for heads, state in self._states:
            state.push(arrival.of_heads(heads))
            parts = [Part(near.pair[:, :, heads]), *state.parts(self.num_tokens)]
            outputs.append(_attend(scaled[:, heads], parts))
        out = torch.cat(outputs, 1).reshape(query.shape).to(query.dtype)
        # an infinite key can get the weight 0: rows that see one are NaN as in the whole call
        spoiled = self._spoiled | ~query.isfinite().all(dim=(1, 2, 3))
        return torch.where(spoiled[:, None, None, None], torch.nan, out)

    @torch.no_grad()
    def prefill(
        self,
        key: Tensor,
        value: Tensor,
        *,
        score: Tensor | None = None,
        forced: Tensor | None = None,
        pool_weight: Tensor | None = None,
    ) -> None:
        """Remember a prompt, as if by one step a token; its outputs are those of `multi_level_attention`.

        Args:
            key: (batch, kv_heads, tokens, dim).
            value: like key.
            score: (batch, tokens).
            forced: (batch, tokens) bool.
            pool_weight: (kv_heads, dim).

        Raises:
            ConfigError: the cache holds tokens already.
            ShapeError: as in `step`.
        """
        if self.num_tokens:
            raise ConfigError(
                f"prefill: the cache holds {self.num_tokens} tokens and must be empty. Use step, or a new cache."
            )
        room, tokens = self._room, key.shape[2] if key.ndim == 4 else 0
        self._check("key", key, (room.batch, room.kv_heads, tokens, room.dim))
        self._check("value", value, (room.batch, room.kv_heads, tokens, room.dim))
        if tokens == 0:
            return
        arrival = self._arrival(key, value, score, forced, pool_weight)
        self._window.fill(arrival.pair)
        for heads, state in self._states:
            state.fill(arrival.of_heads(heads))
        self.num_tokens = tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        held = [*self._window.tensors(), *(tensor for _, state in self._states for tensor in state.tensors())]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def _arrival(
        self, key: Tensor, value: Tensor, score: Tensor | None, forced: Tensor | None, pool_weight: Tensor | None
    ) -> Arrival:
        room, shape = self._room, (key.shape[0], key.shape[2])
        pool_logit = key.new_zeros(key.shape[:3], dtype=room.sum_dtype)
        if pool_weight is not None:
            _check_shape("pool_weight", pool_weight, (room.kv_heads, room.dim))
            pool_logit = (key.to(room.sum_dtype) * pool_weight.to(room.sum_dtype)[:, None]).sum(-1)
        strength = key.new_zeros(shape, dtype=room.sum_dtype)
        if score is not None:
            _check_shape("score", score, shape)
            strength = score.to(room.sum_dtype)
        bias = logsigmoid(strength) if self.levels.selection_gradient == "gate" else torch.zeros_like(strength)
        if forced is not None:
            self._force(forced, shape)
            strength = torch.where(forced, torch.inf, strength)
        pair = torch.stack([key, value])
        self._spoiled = self._spoiled | ~pair.isfinite().all(dim=(0, 2, 3, 4))
        if score is not None:
            self._spoiled = self._spoiled | ~score.isfinite().all(1)
        return Arrival(
            pair=pair,
            leaving=None,
            pool_logit=pool_logit,
            strength=strength,
            bias=bias,
            position=self.num_tokens,
        )

    def _force(self, forced: Tensor, shape: tuple[int, ...]) -> None:
        _check_shape("forced", forced, shape)
        if forced.dtype != torch.bool:
            raise ShapeError(f"forced must be bool, got {forced.dtype}; call .bool().")
        count = self._num_forced + forced.sum(1)
        if (most := int(count.max())) > self.levels.num_global_tokens:
            raise ShapeError(
                f"forced marks {most} tokens of a row so far, num_global_tokens={self.levels.num_global_tokens} holds "
                "fewer. Raise num_global_tokens or force fewer."
            )
        self._num_forced = count

    def _check(self, name: str, given: Tensor, wanted: tuple[int, ...]) -> None:
        _check_shape(name, given, wanted)
        if given.dtype != self._room.dtype:
            raise ShapeError(f"{name} must be {self._room.dtype} as the cache, got {given.dtype}. Cast it.")


def _state(kind: int, levels: Levels, room: Room) -> LevelState:
    """An empty state of local (0), regional (1) or global (2) heads."""
    if kind == 0:
        return LocalState(room, num_sinks=levels.num_sinks)
    regions = None
    if kind == 1 or levels.union:
        assert levels.region_size is not None
        regions = RegionalState(room, size=levels.region_size)
    if kind == 1 and regions is not None:
        return regions
    return GlobalState(room, num_global_tokens=levels.num_global_tokens, chunk=levels.chunk, regions=regions)


def _attend(query: Tensor, parts: list[Part]) -> Tensor:
    """One softmax over all parts; query (batch, kv_heads, group, dim), scaled."""
    pairs = [part.pair.to(query.dtype) for part in parts]
    logits = [
        query @ pair[0].transpose(-1, -2) if part.bias is None else query @ pair[0].transpose(-1, -2) + part.bias
        for part, pair in zip(parts, pairs, strict=True)
    ]
    weight = torch.cat(logits, -1).softmax(-1)
    shares = weight.split([logit.shape[-1] for logit in logits], -1)
    return torch.stack([share @ pair[1] for share, pair in zip(shares, pairs, strict=True)]).sum(0)


def _check_levels(levels: Levels) -> None:
    if levels.mode != "calibrated":
        raise ConfigError(f"DecodeCache: mode={levels.mode!r} is bidirectional; decoding needs mode='calibrated'.")
    if levels.region_size is None and (levels.ratio.regional or levels.union):
        raise ConfigError(
            f"DecodeCache: num_regions={levels.num_regions} needs the whole length; decoding needs region_size."
        )
    if levels.dense_below is not None:
        raise ConfigError(
            f"DecodeCache: dense_below={levels.dense_below} makes earlier outputs depend on the final length, which "
            "decoding does not know. Set dense_below=None."
        )


def _check_shape(name: str, given: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(given.shape) != wanted:
        raise ShapeError(f"{name} must have shape {wanted} for this cache, got {tuple(given.shape)}.")
