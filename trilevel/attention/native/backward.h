// The backward pass: probabilities are computed again from the log-sum-exp, in float32.
//
// The tiles of a row are cut into parts that do not depend on the number of threads. A part adds up gradients in memory of
// its own; what reaches beyond it (halos, entries, sums) is added in a fixed order afterwards, so no atomics are needed.
#pragma once
#include "forward.h"

namespace trilevel {
namespace {

constexpr int MAX_PARTS = 16;

struct Part {
  int row, first_item, last_item;
  int begin, end;              // positions whose key gradients no other part writes while it runs
  int halo_begin, halo_end;    // positions its windows reach
  std::vector<float> halo;     // [keys, values] of (halo_begin .. begin) and (end .. halo_end)
  std::vector<int> tokens;     // ascending positions of the entries its tiles read one by one
  std::vector<float> token_grads, token_bias, region_grads, rest_grads;

  int halo_rows() const { return (begin - halo_begin) + (halo_end - end); }
  int token_place(int position) const { return int(std::lower_bound(tokens.begin(), tokens.end(), position) - tokens.begin()); }
};

// a kv head of a row: its parts, and (causal) what its tiles send to the sums before them
struct HeadGrads {
  int data, kv, row;
  int first_tile, num_tiles;
  std::vector<Part> parts;
  std::vector<float> past;  // (tile, [keys, values], dim)
  std::vector<int> past_begin;
  std::vector<float> pool_weight;
};

typedef HeadClassData<F32> Data;

inline void zero(std::vector<float>& x, int64_t size) { x.assign(size, 0.0f); }

inline void lay_out_part(const trilevel_call& call, const Plan& plan, const Data& data, int padded, Part& part) {
  const Row& row = plan.rows[part.row];
  const Tiling& tiling = *data.tiling;
  const int first = tiling.items[part.first_item].first, last = tiling.items[part.last_item - 1].last;
  part.begin = tiling.tiles[first].begin;
  part.end = tiling.tiles[last - 1].end;
  part.halo_begin = std::max(0, part.begin - call.radius);
  part.halo_end = call.is_causal ? part.end : std::min(row.tokens, part.end + call.radius);
  zero(part.halo, int64_t(part.halo_rows()) * 2 * padded);
  if (data.has_tokens) {
    for (int t = first, seen = -1; t < last; t++) {
      const Tile& tile = tiling.tiles[t];
      const int set = data.tokens_by_set ? tile.set : tile.segment;
      if (set < 0 || set == seen) continue;
      seen = set;
      const TokenSet& tokens = data.tokens_by_set ? row.sets[set] : data.stored_set(row, set);
      part.tokens.insert(part.tokens.end(), tokens.begin(), tokens.end());
    }
    std::sort(part.tokens.begin(), part.tokens.end());
    part.tokens.erase(std::unique(part.tokens.begin(), part.tokens.end()), part.tokens.end());
    zero(part.token_grads, int64_t(part.tokens.size()) * 2 * padded);
    zero(part.token_bias, int64_t(part.tokens.size()));
  }
  if (data.has_regions) zero(part.region_grads, int64_t(row.regions.size()) * 2 * padded);
  if (data.has_rest && !data.rest_in_past) zero(part.rest_grads, int64_t(row.segments.size()) * 2 * padded);
}

struct GradScratch {
  Buffer<float> rows, queries, grad_rows, grad_queries, scores, products, grad_query, own, entry_grads;
};

// e^(score - lse); rounding of huge scores must not take it above 1
inline lanes probability(lanes score, lanes lse) {
  const lanes x = score - lse;
  return exp_neg(select(x > 0, lanes{}, x));
}

// gradients of a tile of one head
struct BackwardTile {
  Walker<F32>& walker;
  const trilevel_grads& grads;
  HeadGrads& head_grads;
  Part& part;
  GradScratch& scratch;
  float* own;  // [keys, values] of halo_begin .. halo_end
  const int padded;

  float* own_key(int position) { return own + int64_t(position - part.halo_begin) * padded; }
  float* own_value(int position) { return own_key(position) + int64_t(part.halo_end - part.halo_begin) * padded; }

  void read_grads(const TileView& view, int64_t head, float* out, lanes& delta, lanes& lse) {
    const trilevel_call& call = walker.call;
    const Source grad = source(call, grads.grad_out, walker.item->row, head, padded, false);
    const Source attended = source(call, call.out, walker.item->row, head, padded, false);
    float* temp = scratch.grad_query.get(LANES * padded);
    delta = lanes{};
    lse = all(INF);
    std::memset(out, 0, LANES * padded * sizeof(float));
    for (int q = 0; q < view.tile.end - view.tile.begin; q++) {
      const int i = view.tile.begin + q;
      if (!walker.row->is_real(i)) continue;
      const int64_t at = (walker.item->row * call.heads + head) * call.tokens + i;
      grad.read(i, out + q * padded);
      delta[q] = -(grads.grad_lse ? grads.grad_lse[at] : 0.0f);
      // bfloat16 outputs are too coarse: the sum over the entries is taken instead
      if (call.dtype == TRILEVEL_F32) delta[q] += dot(out + q * padded, attended.view(i, temp), padded);
      lse[q] = call.lse[at];
    }
  }

  void operator()(const TileView& view, const Tail* tails, int num_tails, const Rest& rest, int64_t head) {
    const bool has_rest = walker.data.has_rest, in_past = walker.data.rest_in_past;
    const int n = view.rows, most = std::max(n, TAIL_CHUNK);
    float* rows = scratch.rows.get(LANES * padded);
    float* queries = scratch.queries.get(LANES * padded);
    float* grad_rows = scratch.grad_rows.get(LANES * padded);
    float* grad_queries = scratch.grad_queries.get(LANES * padded);
    float* scores = scratch.scores.get(most * LANES);
    float* products = scratch.products.get(most * LANES);
    lanes delta, lse;
    walker.read_queries(view, head, rows);
    for (int c = 0; c < LANES * padded; c += LANES) store(rows + c, load(rows + c) * walker.call.scale);
    read_grads(view, head, grad_rows, delta, lse);
    F32::put_queries(queries, rows, padded, padded);
    F32::put_queries(grad_queries, grad_rows, padded, padded);
    float* grad_query = scratch.grad_query.get(LANES * padded);

    const int at = view.begin - walker.pack_begin;
    F32::score(walker.keys, at, n, queries, padded, scores);
    F32::score(walker.values, at, n, grad_queries, padded, products);
    lanes share{}, epsilon{}, mean{}, count = all(1.0f);
    if (has_rest) {
      const lanes logit = rest_logit(view, rest, in_past, rows, padded, scores, 1.0f, count);
      mean = rest_product(view, rest.value, in_past, grad_rows, padded, products) / count;
      share = probability(logit, lse) / count;
    }
    if (walker.call.dtype == TRILEVEL_BF16) {
      delta += share * count * mean;
      for (int j = 0; j < n; j++)
        delta += select(view.near(j), probability(load(scores + j * LANES), lse) * load(products + j * LANES), lanes{});
      for (int t = 0; t < num_tails; t++) delta += tail_product(tails[t], queries, grad_queries, lse);
    }
    epsilon = share * (mean - delta);
    for (int j = 0; j < n; j++) {
      const ilanes near = view.near(j);
      lanes w = select(near, probability(load(scores + j * LANES), lse), lanes{});
      lanes e = select(near, w * (load(products + j * LANES) - delta), lanes{});
      if (has_rest && in_past) {
        const ilanes past = view.past(j);
        w += select(past, share, lanes{});
        e += select(past, epsilon, lanes{});
      } else if (has_rest && !(view.has_flags && view.is_claimed(j))) {
        w -= select(near, share, lanes{});
        e -= select(near, epsilon, lanes{});
      }
      store(scores + j * LANES, e);
      store(products + j * LANES, w);
    }
    send_rest(view, rest, has_rest, in_past, rows, grad_rows, share, epsilon, grad_query);
    F32::mix(scores, n, &view.reach, walker.keys, at, padded, grad_query, nullptr);
    spread_f32(scores, n, rows, padded, own_key(view.begin), padded);
    spread_f32(products, n, grad_rows, padded, own_value(view.begin), padded);
    for (int t = 0; t < num_tails; t++) tail(view, tails[t], rows, queries, grad_rows, grad_queries, scores, products, delta, lse, grad_query);

    const trilevel_call& call = walker.call;
    for (int q = 0; q < view.tile.end - view.tile.begin; q++) {
      float* out = grads.query + ((walker.item->row * call.heads + head) * call.tokens + view.tile.begin + q) * call.dim;
      for (int c = 0; c < int(call.dim); c++) out[c] = grad_query[q * padded + c] * call.scale;
    }
  }

 private:
  // sum over the entries of weight times value . gradient of the output
  lanes tail_product(const Tail& tail, const float* queries, const float* grad_queries, lanes lse) {
    float* scores = scratch.entry_grads.get(2 * TAIL_CHUNK * std::max(padded, LANES));
    float* products = scores + TAIL_CHUNK * LANES;
    lanes total{};
    for (int first = 0; first < tail.rows; first += TAIL_CHUNK) {
      const int n = std::min(TAIL_CHUNK, tail.rows - first);
      F32::score(tail.key_f32, first, n, queries, padded, scores);
      F32::score(tail.value_f32, first, n, grad_queries, padded, products);
      for (int j = 0; j < n; j++)
        total += probability(load(scores + j * LANES) + tail.bias_of(first + j), lse) * load(products + j * LANES);
    }
    return total;
  }

  // starts grad_query with the share of the sums, and what the sums get
  void send_rest(const TileView& view, const Rest& rest, bool has_rest, bool in_past, const float* rows, const float* grad_rows,
                 lanes share, lanes epsilon, float* grad_query) {
    std::memset(grad_query, 0, LANES * padded * sizeof(float));
    if (!has_rest) return;
    const int tile = view.index - head_grads.first_tile;
    float* to = in_past ? head_grads.past.data() + int64_t(tile) * 2 * padded
                        : part.rest_grads.data() + int64_t(view.tile.segment) * 2 * padded;
    for (int q = 0; q < LANES; q++) {
      if (in_past && !(view.rest[q] < view.begin)) continue;
      add_scaled(grad_query + q * padded, epsilon[q], rest.key, padded);
      add_scaled(to, epsilon[q], rows + q * padded, padded);
      add_scaled(to + padded, share[q], grad_rows + q * padded, padded);
    }
    if (in_past) head_grads.past_begin[tile] = view.begin;
  }

  void tail(const TileView& view, const Tail& tail, const float* rows, const float* queries, const float* grad_rows,
            const float* grad_queries, float* scores, float* products, lanes delta, lanes lse, float* grad_query) {
    for (int first = 0; first < tail.rows; first += TAIL_CHUNK) {
      const int n = std::min(TAIL_CHUNK, tail.rows - first);
      F32::score(tail.key_f32, first, n, queries, padded, scores);
      F32::score(tail.value_f32, first, n, grad_queries, padded, products);
      for (int j = 0; j < n; j++) {
        const lanes bias = tail.bias_of(first + j);
        const lanes w = probability(load(scores + j * LANES) + bias, lse);
        store(scores + j * LANES, select(bias > all(-INF), w * (load(products + j * LANES) - delta), lanes{}));
        store(products + j * LANES, w);
      }
      F32::mix(scores, n, nullptr, tail.key_f32, first, padded, grad_query, nullptr);
      if (tail.tokens) {
        float* entries = scratch.entry_grads.get(2 * TAIL_CHUNK * padded);
        std::memset(entries, 0, 2 * TAIL_CHUNK * padded * sizeof(float));
        spread_f32(scores, n, rows, padded, entries, padded);
        spread_f32(products, n, grad_rows, padded, entries + TAIL_CHUNK * padded, padded);
        for (int j = 0; j < n; j++) {
          const int place = part.token_place(tail.tokens[first + j]);
          float* to = part.token_grads.data() + int64_t(place) * 2 * padded;
          add_row(to, entries + j * padded, padded);
          add_row(to + padded, entries + (TAIL_CHUNK + j) * padded, padded);
          part.token_bias[place] += sum(load(scores + j * LANES));
        }
      } else {
        const Segment& s = walker.row->segments[view.tile.segment];
        float* to = part.region_grads.data() + int64_t(s.first_region + first) * padded;
        spread_f32(scores, n, rows, padded, to, padded);
        spread_f32(products, n, grad_rows, padded, to + int64_t(walker.row->regions.size()) * padded, padded);
      }
    }
  }
};

inline void run_part(const trilevel_call& call, const trilevel_grads& grads, Prepared<F32>& made, HeadGrads& head, Part& part,
                     TileScratch& tiles, GradScratch& scratch) {
  const Data& data = made.classes[head.data];
  const int padded = F32::padded_dim(int(call.dim));
  lay_out_part(call, made.plan, data, padded, part);
  const int64_t reach = part.halo_end - part.halo_begin;
  float* own = scratch.own.get(reach * 2 * padded);
  std::memset(own, 0, sizeof(float) * reach * 2 * padded);
  Walker<F32> walker(call, made.plan, data, tiles, made.log_table);
  for (int item = part.first_item; item < part.last_item; item++) {
    BackwardTile backward{walker, grads, head, part, scratch, own, padded};
    walker.walk(item, head.kv, backward);
  }
  const int64_t at = (part.row * call.kv_heads + data.first_kv + head.kv) * call.tokens;
  for (int i = part.halo_begin, halo = 0; i < part.halo_end; i++) {
    const float *k = own + int64_t(i - part.halo_begin) * padded, *v = k + reach * padded;
    if (i < part.begin || i >= part.end) {
      std::memcpy(part.halo.data() + int64_t(halo) * 2 * padded, k, padded * sizeof(float));
      std::memcpy(part.halo.data() + int64_t(halo++) * 2 * padded + padded, v, padded * sizeof(float));
      continue;
    }
    for (int c = 0; c < int(call.dim); c++) grads.key[(at + i) * call.dim + c] += k[c];
    for (int c = 0; c < int(call.dim); c++) grads.value[(at + i) * call.dim + c] += v[c];
  }
}

// gradients of one kv head of one row that came from its parts
struct Gather {
  const trilevel_call& call;
  const trilevel_grads& grads;
  const Plan& plan;
  const Data& data;
  HeadGrads& head;
  PoolScratch& scratch;
  const int padded;

  const Row& row() const { return plan.rows[head.row]; }
  int64_t kv() const { return data.first_kv + head.kv; }

  void add(int position, const float* key, const float* value, float sign = 1) {
    const int64_t at = ((head.row * call.kv_heads + kv()) * call.tokens + position) * call.dim;
    for (int c = 0; c < int(call.dim); c++) grads.key[at + c] += sign * key[c];
    for (int c = 0; c < int(call.dim); c++) grads.value[at + c] += sign * value[c];
  }

  void run() {
    for (const Part& part : head.parts) {
      int halo = 0;
      for (int i = part.halo_begin; i < part.halo_end; i++) {
        if (i >= part.begin && i < part.end) continue;
        const float* x = part.halo.data() + int64_t(halo++) * 2 * padded;
        add(i, x, x + padded);
      }
      for (size_t j = 0; j < part.tokens.size(); j++) {
        const float* x = part.token_grads.data() + int64_t(j) * 2 * padded;
        add(part.tokens[j], x, x + padded);
      }
    }
    if (data.has_regions) regions();
    if (data.has_rest && data.rest_in_past) past();
    if (data.has_rest && !data.rest_in_past) rest();
  }

 private:
  void rest() {
    const uint8_t* claimed = data.claimed(row());
    std::vector<float> total(2 * padded);
    for (int k = 0; k < int(row().segments.size()); k++) {
      std::fill(total.begin(), total.end(), 0.0f);
      for (const Part& part : head.parts) add_row(total.data(), part.rest_grads.data() + int64_t(k) * 2 * padded, 2 * padded);
      for (int i = row().segments[k].begin; i < row().segments[k].end; i++)
        if (row().is_real(i) && !(claimed && claimed[i])) add(i, total.data(), total.data() + padded);
    }
  }

  // backwards through the row: a token is in the sums of all later tiles that begin in its group
  void past() {
    const uint8_t* claimed = data.kind == LOCAL ? data.claimed(row()) : nullptr;
    std::vector<float> total(2 * padded, 0.0f);
    int tile = head.num_tiles - 1, group = -1, segment = int(row().segments.size()) - 1;
    for (int i = row().tokens - 1; i >= 0; i--) {
      if (!row().is_real(i)) continue;
      while (row().segments[segment].begin > i) segment--;
      const Segment& s = row().segments[segment];
      const int own = group_begin(row(), s, data.rest_by_region, i);
      if (own != group) std::fill(total.begin(), total.end(), 0.0f), group = own;
      for (; tile >= 0 && head.past_begin[tile] > i; tile--) {
        const float* x = head.past.data() + int64_t(tile) * 2 * padded;
        add_row(total.data(), x, 2 * padded);
        const int set = data.tokens_by_set ? data.tiling->tiles[head.first_tile + tile].set : -1;
        if (set < 0) continue;
        // what the tile's set claims was taken out of its sums
        for (int j : row().sets[set])
          if (j >= group && j < head.past_begin[tile]) add(j, x, x + padded, -1);
      }
      if (!(claimed && claimed[i])) add(i, total.data(), total.data() + padded);
    }
  }

  void regions() {
    const Source key = source(call, call.key, head.row, kv(), padded, true);
    const Source value = source(call, call.value, head.row, kv(), padded, false);
    const float* u = pool_vector(call, kv(), padded, scratch.u);
    if (u) zero(head.pool_weight, padded);
    const int64_t count = int64_t(row().regions.size());
    std::vector<float> grad(2 * padded), temp(2 * padded);
    for (int64_t r = 0; r < count; r++) {
      std::fill(grad.begin(), grad.end(), 0.0f);
      for (const Part& part : head.parts) {
        add_row(grad.data(), part.region_grads.data() + r * padded, padded);
        add_row(grad.data() + padded, part.region_grads.data() + (count + r) * padded, padded);
      }
      pool(row().regions[r], key, value, u, grad.data(), temp.data());
    }
  }

  // of sum_j a_j k_j and sum_j a_j v_j with a = softmax(u . k)
  void pool(const Region& region, const Source& key, const Source& value, const float* u, const float* grad, float* temp) {
    float* keys = scratch.keys.get(int64_t(region.count) * padded);
    float* weights = scratch.weights.get(region.count);
    pool_weights(key, row(), region, u, padded, keys, weights);
    std::vector<float> slope(u ? region.count : 0);
    float mean = 0;
    int n = 0;
    for (int i = region.begin; u && i < region.end; i++) {
      if (!row().is_real(i)) continue;
      slope[n] = dot(grad, keys + int64_t(n) * padded, padded) + dot(grad + padded, value.view(i, temp), padded);
      mean += weights[n] * slope[n];
      n++;
    }
    n = 0;
    for (int i = region.begin; i < region.end; i++) {
      if (!row().is_real(i)) continue;
      for (int c = 0; c < 2 * padded; c++) temp[c] = weights[n] * grad[c];
      if (u) {
        const float logit = weights[n] * (slope[n] - mean);
        add_scaled(temp, logit, u, padded);
        add_scaled(head.pool_weight.data(), logit, keys + int64_t(n) * padded, padded);
      }
      add(i, temp, temp + padded);
      n++;
    }
  }
};

inline std::vector<HeadGrads> list_heads(const Prepared<F32>& made, int padded) {
  std::vector<HeadGrads> heads;
  for (int d = 0; d < int(made.classes.size()); d++) {
    const Data& data = made.classes[d];
    const Tiling& tiling = *data.tiling;
    for (int kv = 0; kv < data.num_kv; kv++)
      for (int begin = 0; begin < int(tiling.items.size());) {
        int end = begin;
        while (end < int(tiling.items.size()) && tiling.items[end].row == tiling.items[begin].row) end++;
        HeadGrads head{d, kv, tiling.items[begin].row, tiling.items[begin].first, 0, {}, {}, {}, {}};
        head.num_tiles = tiling.items[end - 1].last - head.first_tile;
        if (data.has_rest && data.rest_in_past) {
          zero(head.past, int64_t(head.num_tiles) * 2 * padded);
          head.past_begin.assign(head.num_tiles, 0);
        }
        // many entries: fewer parts, each keeps gradients of all of them
        const int most = made.plan.rows[head.row].regions.size() > 2048 ? MAX_PARTS / 4 : MAX_PARTS;
        const int step = (end - begin + most - 1) / most;
        for (int i = begin; i < end; i += step) {
          Part part{};
          part.row = head.row;
          part.first_item = i;
          part.last_item = std::min(i + step, end);
          head.parts.push_back(part);
        }
        heads.push_back(std::move(head));
        begin = end;
      }
  }
  return heads;
}

// the forward pass read region summaries in bfloat16: probabilities are those of what it read
inline void round_regions(const trilevel_call& call, Prepared<F32>& made, int padded) {
#if defined(__AVX512BF16__)
  if (call.dtype != TRILEVEL_BF16) return;
  for (Data& data : made.classes) {
    Entries<F32>& regions = data.regions;
    for (int64_t i = 0; data.has_regions && i < data.num_kv * (regions.rows + SPARE_ROWS) * padded; i++) {
      regions.key.data()[i] = bf16_to_float(float_to_bf16(regions.key.data()[i]));
      regions.value.data()[i] = bf16_to_float(float_to_bf16(regions.value.data()[i]));
    }
  }
#endif
  (void)call, (void)made, (void)padded;
}

inline void backward(const trilevel_call& call, const trilevel_grads& grads) {
  Prepared<F32> made;
  prepare(call, made);
  const int padded = F32::padded_dim(int(call.dim));
  round_regions(call, made, padded);
  std::vector<HeadGrads> heads = list_heads(made, padded);
  std::vector<std::pair<int, int>> work;
  for (int h = 0; h < int(heads.size()); h++)
    for (int p = 0; p < int(heads[h].parts.size()); p++) work.push_back({h, p});
  const int threads = std::max(1, call.threads);
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    TileScratch tiles;
    GradScratch scratch;
    PoolScratch pools;
    failure.guard([&] { std::memset(tiles.claimed.get(call.tokens), 0, call.tokens); });
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < int64_t(work.size()); t++)
      failure.guard([&] {
        HeadGrads& head = heads[work[t].first];
        run_part(call, grads, made, head, head.parts[work[t].second], tiles, scratch);
      });
#pragma omp for schedule(dynamic)
    for (int64_t h = 0; h < int64_t(heads.size()); h++)
      failure.guard([&] { Gather{call, grads, made.plan, made.classes[heads[h].data], heads[h], pools, padded}.run(); });
  }
  failure.rethrow();
  // what kv heads or rows share, in order
  for (const HeadGrads& head : heads) {
    const Data& data = made.classes[head.data];
    if (grads.pool_weight && !head.pool_weight.empty())
      for (int c = 0; c < int(call.dim); c++) grads.pool_weight[(data.first_kv + head.kv) * call.dim + c] += head.pool_weight[c];
    if (!grads.score || data.kind != GLOBAL) continue;
    for (const Part& part : head.parts)
      for (size_t j = 0; j < part.tokens.size(); j++) {
        const int64_t at = head.row * call.tokens + part.tokens[j];
        // c = log sigmoid(score), or its gradient straight through
        grads.score[at] += part.token_bias[j] / (1 + std::exp(call.score[at]));
      }
  }
}

}  // namespace
}  // namespace trilevel
