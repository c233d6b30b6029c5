"""The backward kernels of `impl/triton.py`: queries first, then near keys, tail tokens and regions by their own tiles.

Weights are computed again from the log-sum-exp. The query kernel also leaves, for each query, what the others need:
`delta` = d out . out - d lse, and for the remainder `share` (weight of one of its tokens) and `slope` (gradient of its
logit over its tokens); a held token has both taken off its weight and its logit's gradient. No two programs write to
one place; where queries are split among programs, each writes its own part and torch adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trilevel.attention.impl.triton_kernels import (
    LOG2E,
    NONE,
    UNSPECIALISED,
    dot,
    held_mask,
    held_products,
    near_interval,
    near_mask,
    own_set,
    region_bias,
    region_range,
    rest_sums,
    set_range,
    store_vectors,
    tail_seen,
    vectors,
)


@triton.jit
def pull(
    queries, keys, values, up, lse, delta, base2, bias, seen, BM: tl.constexpr, BN: tl.constexpr, UP: tl.constexpr
):
    """Weights of a tile and the gradients of its logits, (queries, entries)."""
    logit = dot(queries, tl.trans(keys), tl.zeros([BM, BN], tl.float32), UP) * base2 + bias
    weight = tl.where(seen, tl.exp2(tl.where(seen, logit, float("-inf")) - lse[:, None]), 0.0)
    reach = dot(up, tl.trans(values), tl.zeros([BM, BN], tl.float32), UP)
    return weight, weight * (reach - delta[:, None])


@triton.jit
def push(grad_key, grad_value, weight, grad, queries, up, UP: tl.constexpr):
    """Add what a tile of queries sends to keys and values."""
    grad_value = dot(tl.trans(weight.to(up.dtype)), up, grad_value, UP)
    return dot(tl.trans(grad.to(queries.dtype)), queries, grad_key, UP), grad_value


@triton.jit
def statistic(base, at, real, other):
    """A number a query, `other` for padding."""
    return tl.load(base + at, mask=real, other=other)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_query(
    q, k, v, out, up, lse, up_lse, rest_logit, rows, tail_key, tail_value, tail_rank, tail_bias,
    region_key, region_value, region_span, key_sum, value_sum, grad_q, delta, share, slope,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, u_b, u_h, u_n, u_d,
    g_b, g_h, g_n, g_d, stat_b, rows_b, span_b,
    tokens, heads, group, radius, num_sets, width, num_regions, scale,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr,
    TAIL: tl.constexpr, TAIL_BIAS: tl.constexpr, REGION: tl.constexpr, REST: tl.constexpr, REST_ROWS: tl.constexpr,
    UP_LSE: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries of a head, and delta, share and slope."""
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
    stat = row * stat_b + head * tokens

    at = m0 + tl.arange(0, BM)
    real, low, high = near_interval(rows, at, tokens, radius, TABLE)
    own = own_set(rows, at, tokens, TABLE)
    queries = vectors(q + row * q_b + head * q_h, at, real, q_n, q_d, DIM, D)
    up_rows = vectors(up + row * u_b + head * u_h, at, real, u_n, u_d, DIM, D)
    result = vectors(out + row * o_b + head * o_h, at, real, o_n, o_d, DIM, D)
    norm = statistic(lse + stat, at, real, 0.0) * LOG2E
    change = tl.sum(up_rows.to(tl.float32) * result.to(tl.float32), 1)
    if UP_LSE:
        change -= statistic(up_lse + stat, at, real, 0.0)
    tl.store(delta + stat + at, change, mask=at < tokens)
    first, last = tl.maximum(m0 - radius, 0), tl.minimum(m0 + BM + (0 if CAUSAL else radius), tokens)
    acc = tl.zeros([BM, D], tl.float32)
    rest_slope = tl.zeros([BM], tl.float32)
    if REST:
        held_sum, left = held_products(
            up_rows, v, tail_value, rows, tail_rank, tail_row, at, real, low, high, own, tokens, width, first, last,
            v_n, v_d, DIM, D, BM, BN, TABLE, CAUSAL, TAIL, UP,
        )  # fmt: skip
        sums = rest_sums(value_sum, entry, at, real, tokens, REST_ROWS, DIM, D)
        reach = tl.sum(up_rows.to(tl.float32) * sums, 1) - held_sum
        rest_share = tl.exp2(statistic(rest_logit + stat, at, real, float("-inf")) - norm)
        rest_slope = rest_share * (reach / tl.maximum(left, 1).to(tl.float32) - change)
        tl.store(share + stat + at, rest_share, mask=at < tokens)
        tl.store(slope + stat + at, rest_slope, mask=at < tokens)
        acc += rest_slope[:, None] * rest_sums(key_sum, entry, at, real, tokens, REST_ROWS, DIM, D)
    for n0 in range(first, last, BN):
        n = n0 + tl.arange(0, BN)
        keys = vectors(k, n, n < tokens, k_n, k_d, DIM, D)
        values = vectors(v, n, n < tokens, v_n, v_d, DIM, D)
        near = near_mask(rows, n, at, low, high, tokens, TABLE)
        _, grad = pull(queries, keys, values, up_rows, norm, change, base2, 0.0, near, BM, BN, UP)
        if REST and not CAUSAL:
            grad -= tl.where(near, rest_slope[:, None], 0.0)
        acc = dot(grad.to(keys.dtype), keys, acc, UP)
    if TAIL:
        set_first, set_last = set_range(own)
        for number in range(set_first, set_last):
            for t0 in range(0, width, BN):
                t = t0 + tl.arange(0, BN)
                rank, seen = tail_seen(tail_rank + number * width, t, t < width, own, number, low, high, CAUSAL)
                keys = vectors(tail_key, tail_row + number * width + t, t < width, DIM, 1, DIM, D)
                values = vectors(tail_value, tail_row + number * width + t, t < width, DIM, 1, DIM, D)
                bias = 0.0
                if TAIL_BIAS:
                    bias = tl.load(tail_bias + number * width + t, mask=t < width, other=0.0)[None, :] * LOG2E
                _, grad = pull(queries, keys, values, up_rows, norm, change, base2, bias, seen, BM, BN, UP)
                if REST:
                    held = held_mask(seen, rank, rows, at, tokens, TABLE)
                    grad -= tl.where(held, rest_slope[:, None], 0.0)
                acc = dot(grad.to(keys.dtype), keys, acc, UP)
    if REGION:
        region_first, region_last = region_range(rows, at, real, tokens, num_regions, TABLE)
        for r0 in range(region_first, region_last, BN):
            r = r0 + tl.arange(0, BN)
            bias = region_bias(
                rows, region_span, tail_rank, at, r, low, high, own, tokens, num_regions, width,
                BM, BN, TABLE, CAUSAL, TAIL, UP,
            )  # fmt: skip
            keys = vectors(region_key, region_row + r, r < num_regions, DIM, 1, DIM, D)
            values = vectors(region_value, region_row + r, r < num_regions, DIM, 1, DIM, D)
            _, grad = pull(
                queries, keys, values, up_rows, norm, change, base2, bias, bias > float("-inf"), BM, BN, UP
            )  # fmt: skip
            acc = dot(grad.to(keys.dtype), keys, acc, UP)
    store_vectors(grad_q + row * g_b + head * g_h, at, at < tokens, g_n, g_d, acc * scale, DIM, D)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_near(
    q, k, v, up, lse, rows, delta, share, slope, grad_k, grad_v,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, u_b, u_h, u_n, u_d,
    gk_b, gk_h, gk_n, gk_d, gv_b, gv_h, gv_n, gv_d, stat_b, rows_b,
    tokens, kv_heads, group, radius, scale,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr,
    REST: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of a KV head, from the queries whose near window they are in."""
    base2 = scale * LOG2E
    blocks = tl.cdiv(tokens, BN)
    n0 = tl.program_id(0) % blocks * BN
    row, kv_head = tl.program_id(0) // blocks // kv_heads, tl.program_id(0) // blocks % kv_heads
    row, kv_head = row.to(tl.int64), kv_head.to(tl.int64)
    rows += row * rows_b
    n = n0 + tl.arange(0, BN)
    keys = vectors(k + row * k_b + kv_head * k_h, n, n < tokens, k_n, k_d, DIM, D)
    values = vectors(v + row * v_b + kv_head * v_h, n, n < tokens, v_n, v_d, DIM, D)
    grad_key, grad_value = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    first, last = tl.maximum(n0 - (0 if CAUSAL else radius), 0), tl.minimum(n0 + BN + radius, tokens)
    for member in range(group):
        head = kv_head * group + member
        stat = row * stat_b + head * tokens
        for m0 in range(first, last, BM):
            at = m0 + tl.arange(0, BM)
            real, low, high = near_interval(rows, at, tokens, radius, TABLE)
            queries = vectors(q + row * q_b + head * q_h, at, real, q_n, q_d, DIM, D)
            up_rows = vectors(up + row * u_b + head * u_h, at, real, u_n, u_d, DIM, D)
            norm = statistic(lse + stat, at, real, 0.0) * LOG2E
            near = near_mask(rows, n, at, low, high, tokens, TABLE)
            change = statistic(delta + stat, at, real, 0.0)
            weight, grad = pull(queries, keys, values, up_rows, norm, change, base2, 0.0, near, BM, BN, UP)
            if REST and not CAUSAL:
                weight -= tl.where(near, statistic(share + stat, at, real, 0.0)[:, None], 0.0)
                grad -= tl.where(near, statistic(slope + stat, at, real, 0.0)[:, None], 0.0)
            grad_key, grad_value = push(grad_key, grad_value, weight, grad, queries, up_rows, UP)
    store_vectors(grad_k + row * gk_b + kv_head * gk_h, n, n < tokens, gk_n, gk_d, grad_key * scale, DIM, D)
    store_vectors(grad_v + row * gv_b + kv_head * gv_h, n, n < tokens, gv_n, gv_d, grad_value, DIM, D)


@triton.jit
def part_of(first, last, part, parts, BM: tl.constexpr):
    """The queries from `first` to `last` that are this program's: whole tiles, so that no two share one."""
    step = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), BM), parts) * BM
    return first + part * step, tl.minimum(first + (part + 1) * step, last)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_tail(
    q, up, lse, rows, tail_key, tail_value, tail_rank, tail_bias, readers, delta, share, slope,
    grad_k, grad_v, grad_bias,
    q_b, q_h, q_n, q_d, u_b, u_h, u_n, u_d, stat_b, rows_b, readers_b,
    tokens, batch, kv_heads, group, radius, num_sets, width, parts, scale,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr,
    TAIL_BIAS: tl.constexpr, REST: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of a set of tail tokens, from a part of the queries that read the set."""
    base2 = scale * LOG2E
    tiles = tl.cdiv(width, BN)
    t = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    number, rest = tl.program_id(0) // tiles % num_sets, tl.program_id(0) // tiles // num_sets
    part, entry = rest % parts, (rest // parts).to(tl.int64)
    row, kv_head = entry // kv_heads, entry % kv_heads
    rows, readers = rows + row * rows_b, readers + row * readers_b
    tail_rank, tail_bias = tail_rank + (row * num_sets + number) * width, tail_bias + (row * num_sets + number) * width
    place = (entry * num_sets + number) * width
    keys = vectors(tail_key, place + t, t < width, DIM, 1, DIM, D)
    values = vectors(tail_value, place + t, t < width, DIM, 1, DIM, D)
    grad_key, grad_value = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    grad_c = tl.zeros([BN], tl.float32)
    bias = 0.0
    if TAIL_BIAS:
        bias = tl.load(tail_bias + t, mask=t < width, other=0.0)[None, :] * LOG2E
    first, last = part_of(tl.load(readers + number), tl.load(readers + num_sets + number), part, parts, BM)
    for member in range(group):
        head = kv_head * group + member
        stat = row * stat_b + head * tokens
        for m0 in range(first, last, BM):
            at = m0 + tl.arange(0, BM)
            real, low, high = near_interval(rows, at, tokens, radius, TABLE)
            own = own_set(rows, at, tokens, TABLE)
            queries = vectors(q + row * q_b + head * q_h, at, real, q_n, q_d, DIM, D)
            up_rows = vectors(up + row * u_b + head * u_h, at, real, u_n, u_d, DIM, D)
            norm = statistic(lse + stat, at, real, 0.0) * LOG2E
            rank, seen = tail_seen(tail_rank, t, t < width, own, number, low, high, CAUSAL)
            change = statistic(delta + stat, at, real, 0.0)
            weight, grad = pull(queries, keys, values, up_rows, norm, change, base2, bias, seen, BM, BN, UP)
            grad_c += tl.sum(grad, 0)
            if REST:
                held = held_mask(seen, rank, rows, at, tokens, TABLE)
                weight -= tl.where(held, statistic(share + stat, at, real, 0.0)[:, None], 0.0)
                grad -= tl.where(held, statistic(slope + stat, at, real, 0.0)[:, None], 0.0)
            grad_key, grad_value = push(grad_key, grad_value, weight, grad, queries, up_rows, UP)
    place += part.to(tl.int64) * batch * kv_heads * num_sets * width
    store_vectors(grad_k, place + t, t < width, DIM, 1, grad_key * scale, DIM, D)
    store_vectors(grad_v, place + t, t < width, DIM, 1, grad_value, DIM, D)
    if TAIL_BIAS:
        tl.store(grad_bias + place + t, grad_c, mask=t < width)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_region(
    q, up, lse, rows, tail_rank, region_key, region_value, region_span, readers, delta, grad_k, grad_v,
    q_b, q_h, q_n, q_d, u_b, u_h, u_n, u_d, stat_b, rows_b, span_b, readers_b,
    tokens, batch, kv_heads, group, radius, num_sets, width, num_regions, parts, scale,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr,
    TAIL: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of region summaries, from a part of the queries that may see one of them."""
    base2 = scale * LOG2E
    tiles = tl.cdiv(num_regions, BN)
    r = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    part, entry = tl.program_id(0) // tiles % parts, (tl.program_id(0) // tiles // parts).to(tl.int64)
    row, kv_head = entry // kv_heads, entry % kv_heads
    rows, readers, region_span = rows + row * rows_b, readers + row * readers_b, region_span + row * span_b
    tail_rank += row * num_sets * width
    place = entry * num_regions
    inside = r < num_regions
    keys = vectors(region_key, place + r, inside, DIM, 1, DIM, D)
    values = vectors(region_value, place + r, inside, DIM, 1, DIM, D)
    grad_key, grad_value = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    readers_first = tl.min(tl.load(readers + r, mask=inside, other=NONE), 0)
    readers_last = tl.max(tl.load(readers + num_regions + r, mask=inside, other=0), 0)
    first, last = part_of(tl.minimum(readers_first, readers_last), readers_last, part, parts, BM)
    for member in range(group):
        head = kv_head * group + member
        stat = row * stat_b + head * tokens
        for m0 in range(first, last, BM):
            at = m0 + tl.arange(0, BM)
            real, low, high = near_interval(rows, at, tokens, radius, TABLE)
            own = own_set(rows, at, tokens, TABLE)
            queries = vectors(q + row * q_b + head * q_h, at, real, q_n, q_d, DIM, D)
            up_rows = vectors(up + row * u_b + head * u_h, at, real, u_n, u_d, DIM, D)
            norm = statistic(lse + stat, at, real, 0.0) * LOG2E
            bias = region_bias(
                rows, region_span, tail_rank, at, r, low, high, own, tokens, num_regions, width,
                BM, BN, TABLE, CAUSAL, TAIL, UP,
            )  # fmt: skip
            seen = real[:, None] & (bias > float("-inf"))
            change = statistic(delta + stat, at, real, 0.0)
            weight, grad = pull(queries, keys, values, up_rows, norm, change, base2, bias, seen, BM, BN, UP)
            grad_key, grad_value = push(grad_key, grad_value, weight, grad, queries, up_rows, UP)
    place += part.to(tl.int64) * batch * kv_heads * num_regions
    store_vectors(grad_k, place + r, inside, DIM, 1, grad_key * scale, DIM, D)
    store_vectors(grad_v, place + r, inside, DIM, 1, grad_value, DIM, D)
