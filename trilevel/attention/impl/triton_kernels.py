"""The kernels of `impl/triton.py`: a tile of queries against near block, dense tail, region summaries, remainder.

Logits are in base 2. A tile of logits is always (queries, entries), forward and backward, so one function says what a
query sees. `rows` is the table of `impl/triton.py` (TABLE), or absent where ranks are positions; a query that is
padding or behind the end reads zeros and writes zeros. UP: products in float32, for the interpreter, which would
multiply the bits of bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# fields of the table of rows, each `tokens` long
KEY_RANK = tl.constexpr(0)
RANK = tl.constexpr(1)
LOW = tl.constexpr(2)
HIGH = tl.constexpr(3)
SET = tl.constexpr(4)
COUNT = tl.constexpr(5)
START = tl.constexpr(6)
REGION_FROM = tl.constexpr(7)
REGION_TO = tl.constexpr(8)
NUM_FIELDS = 9

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(2147483647)


@triton.jit
def dot(a, b, acc, UP: tl.constexpr):
    """`acc + a @ b`, float32 operands in full precision."""
    if UP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def vectors(base, at, inside, stride, stride_d, DIM: tl.constexpr, D: tl.constexpr):
    """Rows `at` of a matrix, (rows, D); what is not inside is 0."""
    column = tl.arange(0, D)
    pointer = base + at.to(tl.int64)[:, None] * stride + column[None, :] * stride_d
    mask = inside[:, None] & (column < DIM)[None, :]
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def store_vectors(base, at, inside, stride, stride_d, x, DIM: tl.constexpr, D: tl.constexpr):
    """Write rows `at` of a matrix in its own type."""
    column = tl.arange(0, D)
    pointer = base + at.to(tl.int64)[:, None] * stride + column[None, :] * stride_d
    tl.store(pointer, x.to(base.dtype.element_ty), mask=inside[:, None] & (column < DIM)[None, :])


@triton.jit
def field(rows, number, at, tokens, other):
    """A field of the table of rows, `other` behind the end."""
    return tl.load(rows + number * tokens + at, mask=at < tokens, other=other)


@triton.jit
def near_interval(rows, at, tokens, radius, TABLE: tl.constexpr):
    """Whether queries are real, and near(i) as ranks from low to high."""
    if TABLE:
        real = field(rows, KEY_RANK, at, tokens, -1) >= 0
        low = field(rows, LOW, at, tokens, 0)
        high = field(rows, HIGH, at, tokens, 0)
    else:
        real = at < tokens
        low = tl.maximum(at - radius, 0)
        high = tl.minimum(at + radius + 1, tokens)
    return real, low, high


@triton.jit
def near_mask(rows, key_at, query_at, low, high, tokens, TABLE: tl.constexpr):
    """(queries, keys): which keys are in near(i); a query always sees itself, so that no row is empty."""
    rank = field(rows, KEY_RANK, key_at, tokens, -1) if TABLE else key_at
    inside = (rank[None, :] >= low[:, None]) & (rank[None, :] < high[:, None])
    return inside | (query_at[:, None] == key_at[None, :])


@triton.jit
def own_set(rows, at, tokens, TABLE: tl.constexpr):
    """The set of tail tokens that a query reads, -1 for none."""
    return field(rows, SET, at, tokens, -1) if TABLE else tl.where(at < tokens, 0, -1)


@triton.jit
def set_range(own):
    """First and last + 1 of the sets that a tile of queries reads."""
    return tl.min(tl.where(own < 0, NONE, own), 0), tl.max(own, 0) + 1


@triton.jit
def tail_seen(tail_rank, at, inside, own, number, low, high, CAUSAL: tl.constexpr):
    """Ranks of tail tokens of set `number`, and (queries, tokens) which are visible outside near(i)."""
    rank = tl.load(tail_rank + at, mask=inside, other=-1)
    # causal: what is not before the window is in it or in the future
    outside = rank[None, :] < low[:, None]
    if not CAUSAL:
        outside = outside | (rank[None, :] >= high[:, None])
    return rank, outside & (rank >= 0)[None, :] & (own == number)[:, None]


@triton.jit
def held_mask(seen, rank, rows, at, tokens, TABLE: tl.constexpr):
    """Which of the seen tail tokens the sums of the remainder hold as well."""
    if TABLE:
        return seen & (rank[None, :] >= field(rows, START, at, tokens, 0)[:, None])
    return seen


@triton.jit
def tails_by_region(
    tail_rank, start, end, own, low, high, width,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """(queries, regions): how many seen tail tokens lie in a region; a product of zeros and ones, so it is exact."""
    found = tl.zeros([BM, BN], tl.float32)
    first, last = set_range(own)
    for number in range(first, last):
        for t0 in range(0, width, BN):
            t = t0 + tl.arange(0, BN)
            rank, seen = tail_seen(tail_rank + number * width, t, t < width, own, number, low, high, CAUSAL)
            inside = (rank[:, None] >= start[None, :]) & (rank[:, None] < end[None, :])
            found = dot(seen.to(tl.float16), inside.to(tl.float16), found, UP)
    return found


@triton.jit
def region_bias(
    rows, region_span, tail_rank, at, r, low, high, own, tokens, num_regions, width,
    BM: tl.constexpr, BN: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr, TAIL: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """(queries, regions): log2 of the tokens of a region that are visible and in no other entry, -inf for none."""
    inside = r < num_regions
    start = tl.load(region_span + r, mask=inside, other=0)
    end = tl.load(region_span + num_regions + r, mask=inside, other=0)
    near = tl.minimum(end[None, :], high[:, None]) - tl.maximum(start[None, :], low[:, None])
    count = ((end - start)[None, :] - tl.maximum(near, 0)).to(tl.float32)
    if TAIL:
        count -= tails_by_region(tail_rank, start, end, own, low, high, width, BM, BN, CAUSAL, UP)
    seen = count > 0
    if TABLE:
        first, last = field(rows, REGION_FROM, at, tokens, 0), field(rows, REGION_TO, at, tokens, 0)
        seen = seen & (r[None, :] >= first[:, None]) & (r[None, :] < last[:, None])
    if CAUSAL:
        closed = tl.load(region_span + 2 * num_regions + r, mask=inside, other=NONE)
        seen = seen & (closed[None, :] <= field(rows, RANK, at, tokens, 0)[:, None] + 1)
    return tl.where(seen, tl.log2(tl.maximum(count, 1.0)), float("-inf"))


@triton.jit
def region_range(rows, at, real, tokens, num_regions, TABLE: tl.constexpr):
    """First and last + 1 of the regions that a tile of queries may see."""
    if TABLE:
        first = tl.where(real, field(rows, REGION_FROM, at, tokens, 0), NONE)
        last = tl.where(real, field(rows, REGION_TO, at, tokens, 0), 0)
        return tl.min(first, 0), tl.max(last, 0)
    return 0, num_regions


@triton.jit
def rest_sums(sums, entry, at, real, tokens, REST_ROWS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    """Sums of the remainder for a tile of queries: one row for all, or a row each."""
    place = entry * tokens + at if REST_ROWS else entry + at * 0
    return vectors(sums, place, real, DIM, 1, DIM, D)


@triton.jit
def held_products(
    x, near_side, tail_side, rows, tail_rank, tail_row, at, real, low, high, own, tokens, width, first, last,
    stride_n, stride_d, DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TABLE: tl.constexpr, CAUSAL: tl.constexpr, TAIL: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Sum of x . y over the tokens y of other entries that the sums of the remainder hold too; tokens that are left."""
    total = tl.zeros([BM], tl.float32)
    left = field(rows, COUNT, at, tokens, 0) if TABLE else tl.where(real, tokens, 0)
    if not CAUSAL:
        left -= high - low
        for n0 in range(first, last, BN):
            n = n0 + tl.arange(0, BN)
            y = vectors(near_side, n, n < tokens, stride_n, stride_d, DIM, D)
            near = near_mask(rows, n, at, low, high, tokens, TABLE)
            product = dot(x, tl.trans(y), tl.zeros([BM, BN], tl.float32), UP)
            total += tl.sum(tl.where(near, product, 0.0), 1)
    if TAIL:
        set_first, set_last = set_range(own)
        for number in range(set_first, set_last):
            for t0 in range(0, width, BN):
                t = t0 + tl.arange(0, BN)
                rank, seen = tail_seen(tail_rank + number * width, t, t < width, own, number, low, high, CAUSAL)
                held = held_mask(seen, rank, rows, at, tokens, TABLE)
                y = vectors(tail_side, tail_row + number * width + t, t < width, DIM, 1, DIM, D)
                product = dot(x, tl.trans(y), tl.zeros([BM, BN], tl.float32), UP)
                total += tl.sum(tl.where(held, product, 0.0), 1)
                left -= tl.sum(held.to(tl.int32), 1)
    return total, left


@triton.jit
def fold(acc, top, total, logit, v, held, rest, REST: tl.constexpr, UP: tl.constexpr):
    """One tile more in a running softmax; `rest` is the logit of one token of the remainder, taken off held tokens."""
    new = tl.maximum(top, tl.max(logit, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(top - safe)
    weight = tl.exp2(logit - safe[:, None])
    total = total * shrink + tl.sum(weight, 1)
    if REST:
        weight -= tl.where(held, tl.exp2(rest - safe)[:, None], 0.0)
    return dot(weight.to(v.dtype), v, acc * shrink[:, None], UP), new, total


# lengths and counts change from call to call: no kernel is compiled again for one that is 1 or a multiple of 16
UNSPECIALISED = ["tokens", "stat_b", "rows_b", "span_b", "readers_b", "parts", "num_sets", "width", "num_regions"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward(
    q, k, v, out, lse, rest_logit, rows, tail_key, tail_value, tail_rank, tail_bias,
    region_key, region_value, region_span, key_sum, value_sum,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, stat_b, rows_b, span_b,
    tokens, heads, group, radius, num_sets, width, num_regions, scale,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr,
    TAIL: tl.constexpr, TAIL_BIAS: tl.constexpr, REGION: tl.constexpr, REST: tl.constexpr, REST_ROWS: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """Output, log-sum-exp and (REST) the logit of one token of the remainder, a tile of queries of a head each."""
    base2 = scale * LOG2E
    blocks = tl.cdiv(tokens, BM)
    m0 = tl.program_id(0) % blocks * BM
    row, head = tl.program_id(0) // blocks // heads, tl.program_id(0) // blocks % heads
    row, head, kv_heads = row.to(tl.int64), head.to(tl.int64), heads // group
    kv_head, entry = head // group, row * kv_heads + head // group
    k, v = k + row * k_b + kv_head * k_h, v + row * v_b + kv_head * v_h
    rows, region_span = rows + row * rows_b, region_span + row * span_b
    tail_rank, tail_bias = tail_rank + row * num_sets * width, tail_bias + row * num_sets * width
    tail_row, region_row = entry * num_sets * width, entry * num_regions

    at = m0 + tl.arange(0, BM)
    real, low, high = near_interval(rows, at, tokens, radius, TABLE)
    own = own_set(rows, at, tokens, TABLE)
    queries = vectors(q + row * q_b + head * q_h, at, real, q_n, q_d, DIM, D)
    first, last = tl.maximum(m0 - radius, 0), tl.minimum(m0 + BM + (0 if CAUSAL else radius), tokens)
    acc = tl.zeros([BM, D], tl.float32)
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    rest = top
    if REST:
        held_sum, left = held_products(
            queries, k, tail_key, rows, tail_rank, tail_row, at, real, low, high, own, tokens, width, first, last,
            k_n, k_d, DIM, D, BM, BN, TABLE, CAUSAL, TAIL, UP,
        )  # fmt: skip
        whole = tl.sum(queries.to(tl.float32) * rest_sums(key_sum, entry, at, real, tokens, REST_ROWS, DIM, D), 1)
        some = left > 0
        left = tl.maximum(left, 1).to(tl.float32)
        rest = tl.where(some, (whole - held_sum) * base2 / left, float("-inf"))
        top, total = rest + tl.log2(left), tl.where(some, 1.0, 0.0)
    for n0 in range(first, last, BN):
        n = n0 + tl.arange(0, BN)
        keys = vectors(k, n, n < tokens, k_n, k_d, DIM, D)
        near = near_mask(rows, n, at, low, high, tokens, TABLE)
        logit = dot(queries, tl.trans(keys), tl.zeros([BM, BN], tl.float32), UP) * base2
        values = vectors(v, n, n < tokens, v_n, v_d, DIM, D)
        logit = tl.where(near, logit, float("-inf"))
        acc, top, total = fold(acc, top, total, logit, values, near, rest, REST and not CAUSAL, UP)
    if TAIL:
        set_first, set_last = set_range(own)
        for number in range(set_first, set_last):
            for t0 in range(0, width, BN):
                t = t0 + tl.arange(0, BN)
                rank, seen = tail_seen(tail_rank + number * width, t, t < width, own, number, low, high, CAUSAL)
                keys = vectors(tail_key, tail_row + number * width + t, t < width, DIM, 1, DIM, D)
                logit = dot(queries, tl.trans(keys), tl.zeros([BM, BN], tl.float32), UP) * base2
                if TAIL_BIAS:
                    logit += tl.load(tail_bias + number * width + t, mask=t < width, other=0.0)[None, :] * LOG2E
                values = vectors(tail_value, tail_row + number * width + t, t < width, DIM, 1, DIM, D)
                logit = tl.where(seen, logit, float("-inf"))
                held = held_mask(seen, rank, rows, at, tokens, TABLE)
                acc, top, total = fold(acc, top, total, logit, values, held, rest, REST, UP)
    if REGION:
        region_first, region_last = region_range(rows, at, real, tokens, num_regions, TABLE)
        for r0 in range(region_first, region_last, BN):
            r = r0 + tl.arange(0, BN)
            bias = region_bias(
                rows, region_span, tail_rank, at, r, low, high, own, tokens, num_regions, width,
                BM, BN, TABLE, CAUSAL, TAIL, UP,
            )  # fmt: skip
            keys = vectors(region_key, region_row + r, r < num_regions, DIM, 1, DIM, D)
            logit = dot(queries, tl.trans(keys), tl.zeros([BM, BN], tl.float32), UP) * base2 + bias
            values = vectors(region_value, region_row + r, r < num_regions, DIM, 1, DIM, D)
            acc, top, total = fold(acc, top, total, logit, values, bias, rest, False, UP)
    top, total = tl.where(real, top, 0.0), tl.where(real, total, 1.0)
    if REST:
        share = tl.exp2(rest - top)
        acc += share[:, None] * rest_sums(value_sum, entry, at, real, tokens, REST_ROWS, DIM, D)
        tl.store(rest_logit + row * stat_b + head * tokens + at, rest, mask=at < tokens)
    out_at = out + row * o_b + head * o_h
    store_vectors(out_at, at, at < tokens, o_n, o_d, tl.where(real[:, None], acc / total[:, None], 0.0), DIM, D)
    found = tl.where(real, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse + row * stat_b + head * tokens + at, found, mask=at < tokens)


INTERPRETED = isinstance(forward, InterpretedFunction)
