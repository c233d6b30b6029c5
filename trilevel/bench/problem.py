"""One attention problem of the bench, and what each contender's output should be at sampled queries.

The definitions are written per query from DESIGN.md section 3 and import no implementation, so they check `reference`
and `blocked` as well as the peers, at the very length that is timed: O(sampled queries * tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trilevel.attention.levels import Levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Inputs of one length and precision: one segment, batch of one, no padding, bidirectional.

    Shapes: query, key, value (1, heads, tokens, dim); global_score (1, tokens) float32, all different.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    global_score: Tensor
    levels: Levels

    @staticmethod
    def draw(
        tokens: int, dtype: torch.dtype, levels: Levels, *, heads: int = 8, dim: int = 64, seed: int = 0
    ) -> Problem:
        """Normal inputs, a function of the arguments alone."""
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator).to(dtype) for _ in range(3))
        score = torch.randperm(tokens, generator=generator)[None].float() / tokens
        return Problem(query=q, key=k, value=v, global_score=score, levels=levels)

    @property
    def tokens(self) -> int:
        """Length."""
        return self.query.shape[2]

    @property
    def heads(self) -> int:
        """Heads."""
        return self.query.shape[1]

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return 1 / math.sqrt(self.query.shape[3])

    @property
    def global_index(self) -> Tensor:
        """Positions of the global tokens, ascending: (p,)."""
        count = min(self.levels.num_global_tokens, self.tokens)
        return self.global_score[0].topk(count).indices.sort().values

    def sampled_rows(self, count: int = 32) -> Tensor:
        """Queries to check: the borders, some global tokens, and others spread over the input."""
        n = self.tokens
        spread = torch.linspace(0, n - 1, count).round().long()
        some_global = self.global_index[:: max(1, self.global_index.numel() // 8)]
        rows: Tensor = torch.cat([spread, some_global, torch.tensor([min(1, n - 1), max(0, n - 2)])]).unique()
        return rows

    def as_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value without the batch axis, (heads, tokens, dim), in another precision."""
        return self.query[0].to(dtype), self.key[0].to(dtype), self.value[0].to(dtype)


def dense_rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense attention at some queries: (heads, rows, dim)."""
    q, k, v = problem.as_dtype(dtype)
    return _mix(_logits(q[:, rows], k, problem.scale), v)


def window_rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention to the near window alone at some queries: (heads, rows, dim)."""
    q, k, v = problem.as_dtype(dtype)
    logits = _logits(q[:, rows], k, problem.scale)
    return _mix(logits.masked_fill(~_near(problem, rows), -math.inf), v)


def levels_rows(problem: Problem, rows: Tensor, dtype: torch.dtype, levels: Levels) -> Tensor:
    """Multi-level attention with unlearned (mean) pooling at some queries: (heads, rows, dim)."""
    split = levels.ratio.split(problem.heads)
    strict = levels.mode == "strict"
    functions = (
        window_rows if strict else _local_rows,
        _strict_regional_rows if strict else _regional_rows,
        _strict_global_rows if strict else _global_rows,
    )
    ends = [sum(split[:index]) for index in range(4)]
    parts = [
        function(_some_heads(problem, slice(ends[index], ends[index + 1])), rows, dtype)
        for index, function in enumerate(functions)
        if split[index]
    ]
    return torch.cat(parts)


def _some_heads(problem: Problem, heads: slice) -> Problem:
    return Problem(
        query=problem.query[:, heads],
        key=problem.key[:, heads],
        value=problem.value[:, heads],
        global_score=problem.global_score,
        levels=problem.levels,
    )


def _local_rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    near = _near(problem, rows)
    return _singles_and_remainder(problem, rows, dtype, near)


def _global_rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    seen = _near(problem, rows)
    seen[:, problem.global_index] = True
    return _singles_and_remainder(problem, rows, dtype, seen)


def _singles_and_remainder(problem: Problem, rows: Tensor, dtype: torch.dtype, seen: Tensor) -> Tensor:
    """The tokens in `seen` (rows, tokens) one by one, and the mean of all others at the log of their number."""
    q, k, v = problem.as_dtype(dtype)
    q = q[:, rows]
    rest = (~seen).to(dtype)
    count = rest.sum(1)
    weight = rest / count.clamp(min=1)[:, None]
    rest_key, rest_value = weight @ k, weight @ v
    single = _logits(q, k, problem.scale).masked_fill(~seen, -math.inf)
    mean = (q * rest_key).sum(-1) * problem.scale + count.log()
    weights = torch.cat([single, mean[..., None]], -1).softmax(-1)
    return weights[..., :-1] @ v + weights[..., -1:] * rest_value


def _regional_rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    q, k, v = problem.as_dtype(dtype)
    q = q[:, rows]
    near, region = _near(problem, rows), _region(problem)
    num_regions = int(region[-1]) + 1
    outside = torch.zeros(len(rows), num_regions, dtype=dtype).index_add_(1, region, (~near).to(dtype))
    single = _logits(q, k, problem.scale).masked_fill(~near, -math.inf)
    summary = _logits(q, _region_means(k, region), problem.scale) + outside.log()
    weights = torch.cat([single, summary], -1).softmax(-1)
    return weights[..., : problem.tokens] @ v + weights[..., problem.tokens :] @ _region_means(v, region)


def _strict_regional_rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    region = _region(problem)
    q, k, v = (_region_means(x, region) for x in problem.as_dtype(dtype))
    return _mix(_logits(q, k, problem.scale), v)[:, region[rows]]


def _strict_global_rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    q, k, v = (x[:, problem.global_index] for x in problem.as_dtype(dtype))
    scattered = torch.zeros(problem.heads, problem.tokens, v.shape[-1], dtype=dtype)
    scattered[:, problem.global_index] = _mix(_logits(q, k, problem.scale), v)
    return scattered[:, rows]


def _near(problem: Problem, rows: Tensor) -> Tensor:
    near: Tensor = (rows[:, None] - torch.arange(problem.tokens)).abs() <= problem.levels.radius
    return near


def _region(problem: Problem) -> Tensor:
    """Region of each token: (tokens,)."""
    levels = problem.levels
    size = levels.region_size if levels.num_regions is None else -(-problem.tokens // levels.num_regions)
    assert size is not None
    return torch.arange(problem.tokens) // size


def _region_means(x: Tensor, region: Tensor) -> Tensor:
    # sums of many tokens are float32 at least in every implementation
    stats = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(x.shape[0], int(region[-1]) + 1, x.shape[2], dtype=stats).index_add_(1, region, x.to(stats))
    return (sums / region.bincount()[:, None]).to(x.dtype)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q @ k.transpose(-1, -2)) * scale


def _mix(logits: Tensor, v: Tensor) -> Tensor:
    return logits.softmax(-1) @ v
