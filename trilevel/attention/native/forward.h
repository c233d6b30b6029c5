// The forward pass of a tile of queries: near block, dense tail, folded remainder.
#pragma once
#include <exception>

#include "prepare.h"

namespace trilevel {
namespace {

constexpr int TAIL_CHUNK = 64;
constexpr float LOWEST = -3e38f;  // below every finite logit, so that the first maximum needs no special case

inline int round_up(int x, int granule) { return (x + granule - 1) / granule * granule; }

// a run of entries that all queries of a tile share; rows special_begin .. special_end have a bias for each query
struct Tail {
  const void *key, *value;         // the engine's form
  const float *key_f32, *value_f32;
  int rows;
  const float* bias;
  int special_begin, special_end;
  const lanes* special;
  const int* tokens;  // positions, null for regions

  lanes bias_of(int row) const {
    return row >= special_begin && row < special_end ? special[row - special_begin] : all(bias[row]);
  }
};

// what the queries of a tile see, the same for all heads of a class
struct TileView {
  const Row* row;
  Tile tile;
  int index;  // of the tile in its tiling
  int begin, rows;  // columns: positions begin .. begin + rows, rows padded to the engine's granule
  ilanes low, high, rest;  // near(i) = [low, high); causal: the remainder holds positions from `rest` to `low`
  const uint8_t* claimed;
  Reach reach;
  bool has_flags;

  bool is_real(int column) const {
    const int i = begin + column;
    return i < row->tokens && row->is_real(i);
  }
  bool is_claimed(int column) const {
    const int i = begin + column;
    return claimed && i < row->tokens && claimed[i];
  }
  ilanes near(int column) const {
    const ilanes i = all_int(begin + column);
    const ilanes inside = (low <= i) & (i < high);
    return has_flags && !is_real(column) ? ilanes{} : inside;
  }
  ilanes past(int column) const {
    const ilanes i = all_int(begin + column);
    if (has_flags && (!is_real(column) || is_claimed(column))) return ilanes{};
    return (rest <= i) & (i < low);
  }
};

// sums of the remainder before a tile's columns (causal) or of the segment
struct Rest {
  const float *key, *value;
  float count;
};

struct TileScratch {
  Buffer<float> rows, queries, near, chunk, out, mix, keys, values, temp, tokens_key, tokens_value, tokens_key_f32, tokens_value_f32,
      bias, region_bias, sums;
  Buffer<lanes> special_regions, special_tokens;
  Buffer<uint8_t> claimed;
};

template <class E>
struct Walker {
  const trilevel_call& call;
  const Plan& plan;
  const HeadClassData<E>& data;
  TileScratch& scratch;
  const int dim, padded;
  const bool streamed;
  const std::vector<float>& log_table;

  // of the item
  const Item* item = nullptr;
  const Row* row = nullptr;
  int64_t kv = 0;
  Source key{}, value{};
  int pack_begin = 0;
  const typename E::Key* keys = nullptr;
  const typename E::Value* values = nullptr;
  int claimed_set = -1;
  bool is_in_place = false;

  Walker(const trilevel_call& c, const Plan& p, const HeadClassData<E>& d, TileScratch& s, const std::vector<float>& logs)
      : call(c), plan(p), data(d), scratch(s), dim(int(c.dim)), padded(E::padded_dim(int(c.dim))), streamed(is_streamed(c)), log_table(logs) {}

  template <class Visit>
  void walk(int64_t item_index, int64_t kv_index, Visit visit) {
    item = &data.tiling->items[item_index];
    row = &plan.rows[item->row];
    kv = kv_index;
    key = source(call, call.key, item->row, data.first_kv + kv, padded, true);
    value = source(call, call.value, item->row, data.first_kv + kv, padded, false);
    pack();
    float* sums = scratch.sums.get(4 * padded);
    Running running{*row, key, value, data.kind == LOCAL ? data.claimed(*row) : nullptr, data.rest_by_region, padded, sums, sums + padded,
                    scratch.temp.get(padded)};
    int reached = pack_begin;
    if (data.has_rest && data.rest_in_past) {
      const int64_t slot = kv * int64_t(data.tiling->items.size()) + item_index;
      std::memcpy(sums, data.sums.data() + slot * 2 * padded, 2 * padded * sizeof(float));
      running.count = data.rest_count[slot];
      running.resume(pack_begin);
    }
    for (int t = item->first; t < item->last; t++) {
      const Tile& tile = data.tiling->tiles[t];
      mark_set(tile.set);
      TileView view = view_of(tile);
      view.index = t;
      Tail tails[2];
      int num_tails = 0;
      if (data.has_tokens) num_tails += token_tail(view, tails[num_tails]);
      if (data.has_regions) num_tails += region_tail(view, tails[num_tails]);
      Rest rest{};
      if (data.has_rest && data.rest_in_past) {
        running.advance(reached, view.begin);
        reached = view.begin;
        rest = past_rest(view, running, sums + 2 * padded);
      } else if (data.has_rest) {
        const int64_t at = data.first_segment[item->row] + tile.segment;
        const float* total = data.sums.data() + (kv * data.num_segments + at) * 2 * padded;
        rest = {total, total + padded, data.rest_count[at]};
      }
      // what the next tile reads first
      const int next = view.begin + view.rows, ahead = std::min(next + TILE, row->tokens);
      if (is_in_place) expect_pairs(next, ahead);
      for (int h = 0; h < data.group; h++)
        source(call, call.query, item->row, data.first_head + kv * data.group + h, padded, false).expect(tile.end, std::min(tile.end + TILE, row->tokens));
      for (int h = 0; h < data.group; h++) visit(view, tails, num_tails, rest, data.first_head + kv * data.group + h);
    }
    mark_set(-1);
  }

 private:
  // keys and values that the item's windows reach, in the engine's form; rows that have it already are read in place
  void pack() {
    const Tile &first = data.tiling->tiles[item->first], &last = data.tiling->tiles[item->last - 1];
    pack_begin = std::max(0, first.begin - call.radius);
    const int end = std::min(row->tokens, call.is_causal ? last.end : last.end + call.radius);
    if constexpr (E::GRANULE == 1)
      if (call.dtype == TRILEVEL_F32 && !row->valid && !key.cos && dim == padded && is_dense(key) && is_dense(value)) {
        keys = static_cast<const float*>(key.row(pack_begin));
        values = static_cast<const float*>(value.row(pack_begin));
        is_in_place = true;
        return;
      }
    const int rows = round_up(end - pack_begin, 32) + SPARE_ROWS;
    typename E::Key* to_keys = reinterpret_cast<typename E::Key*>(scratch.keys.get(E::key_floats(rows, padded)));
    typename E::Value* to_values = reinterpret_cast<typename E::Value*>(scratch.values.get(E::value_floats(rows, padded)));
    keys = to_keys;
    values = to_values;
    float* temp = scratch.temp.get(2 * padded);
    for (int j = pack_pairs(end, to_keys, to_values); j < rows; j++) {
      const int i = pack_begin + j;
      if (i >= end || !row->is_real(i)) {
        E::clear(to_keys, to_values, j, padded);
        continue;
      }
      const float* k = key.view(i, temp);
      E::put(to_keys, to_values, j, padded, k, value.view(i, temp + padded));
    }
  }
  void expect_pairs(int begin, int end) const {
    key.expect(begin, end);
    value.expect(begin, end);
  }
  static bool is_dense(const Source& x) { return x.stride == int64_t(x.dim) * int64_t(sizeof(float)); }
  bool is_plain_bf16() const { return call.dtype == TRILEVEL_BF16 && !key.cos && dim == padded; }

  // pairs of rows that need no conversion; returns how many rows were done
  int pack_pairs(int end, typename E::Key* to_keys, typename E::Value* to_values) {
    int j = 0;
#if defined(__AVX512BF16__)
    if constexpr (E::GRANULE > 1) {
      if (!is_plain_bf16() || row->valid) return 0;
      for (; pack_begin + j + 2 <= end; j += 2) {
        const int i = pack_begin + j;
        if (j % 16 == 0) expect_pairs(i + 16, std::min(i + 32, end));
        E::put_pair(to_keys, to_values, j, padded, (const uint16_t*)key.row(i), (const uint16_t*)key.row(i + 1),
                    (const uint16_t*)value.row(i), (const uint16_t*)value.row(i + 1));
      }
    }
#endif
    (void)end, (void)to_keys, (void)to_values;
    return j;
  }

  // causal global tokens change from set to set: which tokens are claimed by the tile's own
  void mark_set(int set) {
    if (!data.tokens_by_set || set == claimed_set) return;
    uint8_t* claimed = scratch.claimed.data();
    if (!claimed) throw std::bad_alloc();
    if (claimed_set >= 0)
      for (int i : row->sets[claimed_set]) claimed[i] = 0;
    claimed_set = set;
    if (set >= 0)
      for (int i : row->sets[set]) claimed[i] = 1;
  }

  TileView view_of(const Tile& tile) const {
    const Segment& s = row->segments[tile.segment];
    TileView view;
    view.row = row;
    view.tile = tile;
    const int begin = std::max(tile.begin - call.radius, s.begin);
    const int end = call.is_causal ? tile.end : std::min(tile.end + call.radius, s.end);
    view.begin = pack_begin + (begin - pack_begin) / E::GRANULE * E::GRANULE;
    view.rows = round_up(end - view.begin, E::GRANULE);
    view.claimed = data.tokens_by_set ? scratch.claimed.data() : data.claimed(*row);
    view.has_flags = row->valid || view.claimed;
    for (int q = 0; q < LANES; q++) {
      const int i = tile.begin + q;
      const bool is_query = i < tile.end && row->is_real(i);
      view.low[q] = is_query ? std::max(i - call.radius, s.begin) : 0;
      view.high[q] = !is_query ? 0 : call.is_causal ? i + 1 : std::min(i + call.radius + 1, s.end);
      view.rest[q] = is_query && data.has_rest && data.rest_in_past ? rest_begin(*row, s, data.rest_by_region, i) : INT32_MAX;
    }
    const bool from_start = data.has_rest && data.rest_in_past;
    for (int g = 0; g < 4; g++) {
      int first = INT32_MAX, last = 0;
      for (int q = 4 * g; q < 4 * g + 4; q++)
        if (view.high[q] > view.low[q]) first = std::min(first, view.low[q] - view.begin), last = std::max(last, view.high[q] - view.begin);
      view.reach.begin[g] = last == 0 ? 0 : from_start ? 0 : first;
      view.reach.end[g] = last;
    }
    return view;
  }

  // visible outside the window, as a bias
  lanes token_bias(const TileView& view, int position, float bias) const {
    const ilanes i = all_int(position);
    const ilanes outside = call.is_causal ? i < view.low : (i < view.low) | (i >= view.high);
    return select(outside, all(bias), all(-INF));
  }

  int token_tail(const TileView& view, Tail& tail) {
    if (view.tile.set < 0) return 0;
    const TokenSet& set = data.tokens_by_set ? row->sets[view.tile.set] : data.stored_set(*row, view.tile.segment);
    const int rows = int(set.size());
    const int begin = int(std::lower_bound(set.begin(), set.end(), view.begin) - set.begin());
    const int end = int(std::lower_bound(set.begin(), set.end(), view.begin + view.rows) - set.begin());
    if (data.tokens_by_set)
      gather_set(set, tail);
    else
      point_to(data.tokens, data.tokens.first[item->row][view.tile.segment], tail);
    // nothing at or after the end of the columns is visible to a causal query
    tail.rows = call.is_causal ? end : rows;
    tail.special_begin = begin;
    tail.special_end = end;
    lanes* special = scratch.special_tokens.get(end - begin + 1);
    for (int j = begin; j < end; j++) special[j - begin] = token_bias(view, set[j], tail.bias[j]);
    tail.special = special;
    tail.tokens = set.data();
    return tail.rows > 0;
  }

  void point_to(const Entries<E>& entries, int64_t first, Tail& tail) const {
    const int64_t at = entries.place(kv, first) * padded;
    tail.key_f32 = entries.key.data() + at;
    tail.value_f32 = entries.value.data() + at;
    tail.key = E::GRANULE == 1 ? (const void*)tail.key_f32 : reinterpret_cast<const typename E::Key*>(entries.packed_key.data()) + at;
    tail.value = E::GRANULE == 1 ? (const void*)tail.value_f32 : reinterpret_cast<const typename E::Value*>(entries.packed_value.data()) + at;
    tail.bias = entries.bias.data() + first;
  }

  void gather_set(const TokenSet& set, Tail& tail) {
    const int rows = round_up(int(set.size()), ROW_GRANULE);
    float* k32 = scratch.tokens_key_f32.get(int64_t(rows) * padded);
    float* v32 = scratch.tokens_value_f32.get(int64_t(rows) * padded);
    float* bias = scratch.bias.get(rows);
    for (int j = 0; j < int(set.size()); j++) {
      key.read(set[j], k32 + int64_t(j) * padded);
      value.read(set[j], v32 + int64_t(j) * padded);
      const float x = call.has_gate_bias && call.score ? call.score[item->row * call.tokens + set[j]] : 0.0f;
      bias[j] = call.has_gate_bias ? std::min(x, 0.0f) - std::log1p(std::exp(-std::fabs(x))) : 0.0f;
    }
    tail.key = tail.key_f32 = k32;
    tail.value = tail.value_f32 = v32;
    tail.bias = bias;
    if (E::GRANULE == 1) return;
    typename E::Key* pk = reinterpret_cast<typename E::Key*>(scratch.tokens_key.get(E::key_floats(rows, padded)));
    typename E::Value* pv = reinterpret_cast<typename E::Value*>(scratch.tokens_value.get(E::value_floats(rows, padded)));
    for (int j = 0; j < rows; j++)
      if (j < int(set.size()))
        E::put(pk, pv, j, padded, k32 + int64_t(j) * padded, v32 + int64_t(j) * padded);
      else
        E::clear(pk, pv, j, padded);
    tail.key = pk;
    tail.value = pv;
  }

  int region_tail(const TileView& view, Tail& tail) {
    const Segment& s = row->segments[view.tile.segment];
    if (!s.num_regions) return 0;
    point_to(data.regions, data.regions.first[item->row][view.tile.segment], tail);
    const Region* regions = row->regions.data() + s.first_region;
    // regions that the columns touch
    const int first_column = std::max(view.begin, s.begin), stop = std::min(view.begin + view.rows, s.end);
    const int rank = row->rank(s.begin);
    const int begin = (row->rank(first_column) - rank) / s.region_size;
    const int end = (row->rank(stop) - rank + s.region_size - 1) / s.region_size;
    tail.rows = call.is_causal ? end : s.num_regions;
    tail.special_begin = begin;
    tail.special_end = end;
    if (data.tokens_by_set) tail.bias = set_biases(view, s, regions);
    lanes* special = scratch.special_regions.get(std::max(end - begin, 0) + 1);
    for (int r = begin; r < end; r++) special[r - begin] = region_bias(view, regions[r]);
    tail.special = special;
    tail.tokens = nullptr;
    return tail.rows > 0;
  }

  // causal with `union`: the log-counts of regions without the tokens of the tile's set
  const float* set_biases(const TileView& view, const Segment& s, const Region* regions) {
    float* out = scratch.region_bias.get(s.num_regions);
    for (int r = 0; r < s.num_regions; r++) out[r] = float(regions[r].count);
    if (view.tile.set >= 0)
      for (int i : row->sets[view.tile.set]) out[(row->rank(i) - row->rank(s.begin)) / s.region_size] -= 1;
    for (int r = 0; r < s.num_regions; r++) out[r] = log_table[int(out[r])];
    return out;
  }

  lanes region_bias(const TileView& view, const Region& region) const {
    ilanes count;
    const int from = std::max(region.begin, view.begin), to = std::min(region.end, view.begin + view.rows);
    if (!view.has_flags) {
      const ilanes a = all_int(region.begin), b = all_int(region.end);
      const ilanes low = view.low > a ? view.low : a, high = view.high < b ? view.high : b;
      const ilanes near = high > low ? high - low : ilanes{};
      count = all_int(region.count) - near;
    } else {
      int unclaimed = region.count;
      for (int i = region.begin; view.claimed && i < region.end; i++) unclaimed -= view.claimed[i] && row->is_real(i);
      count = all_int(unclaimed);
      for (int i = from; i < to; i++)
        if (!(view.claimed && view.claimed[i])) count += view.near(i - view.begin);  // true is -1
    }
    lanes bias{};
    for (int q = 0; q < LANES; q++) {
      const bool is_open = call.is_causal && !(region.is_full && region.end <= view.tile.begin + q + 1);
      bias[q] = is_open ? -INF : log_table[std::max(count[q], 0)];
    }
    return bias;
  }

  // causal: the running sums without what the tile's set claims
  Rest past_rest(const TileView& view, const Running& running, float* own) {
    if (!data.tokens_by_set || view.tile.set < 0) return {running.sum_key, running.sum_value, running.count};
    std::memcpy(own, running.sum_key, 2 * padded * sizeof(float));
    float count = running.count;
    const Segment& s = row->segments[view.tile.segment];
    float* temp = scratch.temp.get(padded);
    const int group = data.rest_by_region ? running.group : s.first_real;
    for (int i : row->sets[view.tile.set]) {
      if (i >= view.begin) break;
      if (i < group) continue;
      add_scaled(own, -1.0f, key.view(i, temp), padded);
      add_scaled(own + padded, -1.0f, value.view(i, temp), padded);
      count -= 1;
    }
    return {own, own + padded, count};
  }

 public:
  // (16, padded) float32 rows of the tile's queries, zero where there is none
  void read_queries(const TileView& view, int64_t head, float* out) const {
    const Source query = source(call, call.query, item->row, head, padded, true);
    for (int q = 0; q < LANES; q++) {
      float* to = out + q * padded;
      const int i = view.tile.begin + q;
      if (i >= view.tile.end || !row->is_real(i))
        std::memset(to, 0, padded * sizeof(float));
      else
        query.read(i, to);
    }
  }

  // the queries in the engine's form; `rows` is scratch
  void put_queries(const TileView& view, int64_t head, float* rows, float* out) const {
    const Source query = source(call, call.query, item->row, head, padded, true);
    const bool is_whole = view.tile.end - view.tile.begin == LANES && !row->valid && dim == padded && !query.cos;
    const void* first = query.row(view.tile.begin);
    if constexpr (E::GRANULE == 1) {
      if (is_whole && call.dtype == TRILEVEL_F32)
        return E::put_queries(out, static_cast<const float*>(first), query.stride / int64_t(sizeof(float)), padded);
    }
#if defined(__AVX512BF16__)
    if constexpr (E::GRANULE > 1) {
      if (is_whole && call.dtype == TRILEVEL_BF16 && query.stride % 4 == 0)
        return pair_queries(out, static_cast<const float*>(first), query.stride / 4, padded);
    }
#endif
    read_queries(view, head, rows);
    E::put_queries(out, rows, padded, padded);
  }
};

// how many tokens the remainder of each query stands for
inline lanes rest_count(const TileView& view, const Rest& rest, bool in_past) {
  const ilanes has_base = in_past ? view.rest < all_int(view.begin) : (ilanes{} - 1);
  lanes number = select(has_base, all(rest.count), lanes{});
  if (!view.has_flags) {
    const ilanes begin = all_int(view.begin), from = view.rest > begin ? view.rest : begin;
    const ilanes past = view.low > from ? view.low - from : ilanes{};
    return in_past ? number + __builtin_convertvector(past, lanes) : number - __builtin_convertvector(view.high - view.low, lanes);
  }
  for (int j = 0; j < view.rows; j++)
    if (in_past)
      number += select(view.past(j), all(1.0f), lanes{});
    else if (!view.is_claimed(j))
      number -= select(view.near(j), all(1.0f), lanes{});
  return number;
}

// what the columns and the sums `base` of the remainder give, as products with the rows of `vectors`; `scores` are those of
// the columns
inline lanes rest_product(const TileView& view, const float* base, bool in_past, const float* vectors, int padded, const float* scores) {
  const ilanes has_base = in_past ? view.rest < all_int(view.begin) : (ilanes{} - 1);
  lanes total{};
  for (int q = 0; q < LANES; q++) total[q] = has_base[q] ? dot(vectors + q * padded, base, padded) : 0.0f;
  for (int j = 0; j < view.rows; j++)
    if (in_past)
      total += select(view.past(j), load(scores + j * LANES), lanes{});
    else if (!(view.has_flags && view.is_claimed(j)))
      total -= select(view.near(j), load(scores + j * LANES), lanes{});
  return total;
}

// logit of the remainder, -inf where it is empty, and its count, at least 1
inline lanes rest_logit(const TileView& view, const Rest& rest, bool in_past, const float* queries, int padded, const float* scores,
                        float scale, lanes& count) {
  const lanes number = rest_count(view, rest, in_past);
  const ilanes some = number > 0.5f;
  count = select(some, number, all(1.0f));
  const lanes mean = scale * rest_product(view, rest.key, in_past, queries, padded, scores) / count;
  // an infinite sum is not an empty remainder
  return select(some, mean + log_pos(count) + mean * 0.0f, all(-INF));
}

template <class E>
void attend_exactly(Walker<E>& walker, const TileView& view, const Tail* tails, int num_tails, const Rest& rest, int64_t head);

template <class E>
void attend_tile(Walker<E>& walker, const TileView& view, const Tail* tails, int num_tails, const Rest& rest, int64_t head) {
  const trilevel_call& call = walker.call;
  TileScratch& scratch = walker.scratch;
  const bool has_rest = walker.data.has_rest, in_past = walker.data.rest_in_past;
  const int padded = walker.padded, columns = round_up(view.rows, 32);
  float* rows = scratch.rows.get(LANES * padded);
  float* queries = scratch.queries.get(LANES * padded);
  float* near = scratch.near.get((columns + 32) * LANES);
  float* chunk = scratch.chunk.get(TAIL_CHUNK * LANES);
  float* out = scratch.out.get(LANES * padded);
  float* mixing = scratch.mix.get(std::max(columns, TAIL_CHUNK) * LANES);
  if (!walker.streamed) expect_rows(call, call.out, walker.item->row, head, view.tile.begin, view.tile.end);
  walker.put_queries(view, head, rows, queries);

  const int at = view.begin - walker.pack_begin;
  const lanes scale = all(call.scale);
  E::score(walker.keys, at, view.rows, queries, padded, near);
  lanes logit = all(-INF), count = all(1.0f);
  if (has_rest) {
    walker.read_queries(view, head, rows);
    logit = rest_logit(view, rest, in_past, rows, padded, near, call.scale, count);
  }
  lanes top = larger(all(LOWEST), logit);
  // what is seen and not finite has to show, also where its weight would be 0
  lanes shown = has_rest ? select(logit == all(-INF), lanes{}, logit * 0.0f) : lanes{};
  for (int j = 0; j < view.rows; j++) {
    const ilanes is_near = view.near(j);
    const lanes raw = load(near + j * LANES) * scale, s = select(is_near, raw, all(-INF));
    store(near + j * LANES, s);
    shown += select(is_near, raw * 0.0f, lanes{});
    top = larger(s, top);
  }
  const lanes rest_weight = exp_neg(logit - top);
  const lanes share = rest_weight / count;
  lanes total = rest_weight;
  for (int j = 0; j < view.rows; j++) {
    const lanes s = load(near + j * LANES);
    lanes w = exp_neg(s - top);
    total += w;
    if (has_rest && in_past)
      w += select(view.past(j), share, lanes{});
    else if (has_rest && !(view.has_flags && view.is_claimed(j)))
      w -= select(view.near(j), share, lanes{});
    store(near + j * LANES, w);
  }
  for (int q = 0; q < LANES; q++) {
    const bool has_base = has_rest && (!in_past || view.rest[q] < view.begin);
    for (int c = 0; c < padded; c += LANES) store(out + q * padded + c, has_base ? share[q] * load(rest.value + c) : lanes{});
  }
  E::mix(near, view.rows, &view.reach, walker.values, at, padded, out, mixing);

  for (int t = 0; t < num_tails; t++) {
    const Tail& tail = tails[t];
    for (int first = 0; first < tail.rows; first += TAIL_CHUNK) {
      const int n = std::min(TAIL_CHUNK, tail.rows - first), padded_rows = round_up(n, E::GRANULE);
      E::score(static_cast<const typename E::Key*>(tail.key), first, padded_rows, queries, padded, chunk);
      lanes above = top;
      for (int j = 0; j < n; j++) {
        const lanes bias = tail.bias_of(first + j), raw = load(chunk + j * LANES) * scale, s = raw + bias;
        store(chunk + j * LANES, s);
        shown += select(bias > all(-INF), raw * 0.0f, lanes{});
        above = larger(s, above);
      }
      if (any(above > top)) {
        const lanes factor = exp_neg(top - above);
        total *= factor;
        for (int q = 0; q < LANES; q++)
          for (int c = 0; c < padded; c += LANES) store(out + q * padded + c, load(out + q * padded + c) * factor[q]);
        top = above;
      }
      for (int j = 0; j < n; j++) {
        const lanes w = exp_neg(load(chunk + j * LANES) - top);
        total += w;
        store(chunk + j * LANES, w);
      }
      for (int j = n; j < padded_rows; j++) store(chunk + j * LANES, lanes{});
      E::mix(chunk, padded_rows, nullptr, static_cast<const typename E::Value*>(tail.value), first, padded, out, mixing);
    }
  }

  total += shown;
  lanes doubt{};
  for (int q = 0; q < view.tile.end - view.tile.begin; q++) {
    const int i = view.tile.begin + q;
    const bool is_seen = view.row->is_real(i) && total[q] != 0;
    doubt += write_row(call, call.out, walker.item->row, head, i, out + q * padded, is_seen ? 1 / total[q] : 0.0f, walker.streamed);
    if (call.lse) call.lse[(walker.item->row * call.heads + head) * call.tokens + i] = is_seen ? top[q] + std::log(total[q]) : -INF;
    if (is_seen && !(total[q] < INF)) doubt += all(NAN);
  }
  // 0 * NaN of a hidden entry is NaN: where anything is, do it again without touching what a query does not see
  if (any(doubt != 0.0f)) attend_exactly(walker, view, tails, num_tails, rest, head);
}

// one query after the other, reading visible entries alone
template <class E>
void attend_exactly(Walker<E>& walker, const TileView& view, const Tail* tails, int num_tails, const Rest& rest, int64_t head) {
  const trilevel_call& call = walker.call;
  const bool has_rest = walker.data.has_rest, in_past = walker.data.rest_in_past;
  const int padded = walker.padded;
  // rows that were streamed are written again
  end_streaming();
  Buffer<float> buffer;
  float* query = buffer.get(5 * padded);
  float *temp = query + padded, *out = temp + padded, *rest_key = out + padded, *rest_value = rest_key + padded;
  const Source queries = source(call, call.query, walker.item->row, head, padded, true);
  struct Seen {
    float logit;
    int tail, row;  // tail -1: a column
  };
  std::vector<Seen> seen;
  for (int q = 0; q < view.tile.end - view.tile.begin; q++) {
    const int i = view.tile.begin + q;
    if (!view.row->is_real(i)) continue;
    seen.clear();
    queries.read(i, query);
    for (int c = 0; c < padded; c++) query[c] *= call.scale;
    const bool has_base = has_rest && (!in_past || view.rest[q] < view.begin);
    float count = has_base ? rest.count : 0;
    std::memset(rest_key, 0, 2 * padded * sizeof(float));
    if (has_base) add_row(rest_key, rest.key, padded), add_row(rest_value, rest.value, padded);
    for (int j = 0; j < view.rows; j++) {
      const bool is_near = view.near(j)[q], is_past = has_rest && in_past && view.past(j)[q];
      if (!is_near && !is_past) continue;
      const float* k = walker.key.view(view.begin + j, temp);
      if (is_near) seen.push_back({dot(query, k, padded), -1, j});
      const float sign = is_past ? 1.0f : has_rest && !in_past && !view.is_claimed(j) ? -1.0f : 0.0f;
      if (sign == 0) continue;
      count += sign;
      add_scaled(rest_key, sign, k, padded);
      add_scaled(rest_value, sign, walker.value.view(view.begin + j, temp), padded);
    }
    for (int t = 0; t < num_tails; t++)
      for (int j = 0; j < tails[t].rows; j++) {
        const float bias = tails[t].bias_of(j)[q];
        if (bias == -INF) continue;
        seen.push_back({dot(query, tails[t].key_f32 + int64_t(j) * padded, padded) + bias, t, j});
      }
    const float rest_at = count > 0.5f ? dot(query, rest_key, padded) / count + std::log(count) : -INF;
    float top = std::max(rest_at, LOWEST), total = 0;
    for (const Seen& s : seen) top = std::max(top, s.logit);
    if (count > 0.5f && !std::isfinite(rest_at)) total = NAN;
    for (const Seen& s : seen)
      if (!std::isfinite(s.logit)) total = NAN;
    std::memset(out, 0, padded * sizeof(float));
    for (const Seen& s : seen) {
      const float w = std::exp(s.logit - top);
      total += w;
      const float* v = s.tail < 0 ? walker.value.view(view.begin + s.row, temp) : tails[s.tail].value_f32 + int64_t(s.row) * padded;
      add_scaled(out, w, v, padded);
    }
    if (count > 0.5f) {
      const float w = std::exp(rest_at - top);
      total += w;
      add_scaled(out, w / count, rest_value, padded);
    }
    for (int c = 0; c < padded; c++) out[c] = total != 0 ? out[c] / total : 0;
    write_row(call, call.out, walker.item->row, head, i, out, 1.0f, false);
    if (call.lse) call.lse[(walker.item->row * call.heads + head) * call.tokens + i] = total != 0 ? top + std::log(total) : -INF;
  }
}

// an exception must not leave a parallel region: the first one is kept and thrown behind it
class Failure {
 public:
  template <class Body>
  void guard(Body body) {
    try {
      body();
    } catch (...) {
#pragma omp critical(trilevel_failure)
      if (!first_) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

template <class E>
struct Prepared {
  Plan plan;
  std::vector<HeadClassData<E>> classes;
  std::vector<float> log_table;
};

template <class E>
void prepare(const trilevel_call& call, Prepared<E>& made) {
  made.plan = make_plan(call);
  std::vector<Task> tasks;
  for (int kind = LOCAL; kind <= GLOBAL; kind++)
    if (call.split[kind] > 0 && !(call.is_strict && kind != LOCAL)) made.classes.push_back(describe<E>(call, made.plan, kind));
  std::vector<std::vector<char>> resets(made.classes.size());
  for (int i = 0; i < int(made.classes.size()); i++) {
    list_tasks(call, made.plan, made.classes[i], i, tasks);
    resets[i].assign(made.classes[i].rest_count.size(), 0);
  }
  const int threads = std::max(1, call.threads);
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    PoolScratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < int64_t(tasks.size()); t++)
      failure.guard([&] { run_task(call, made.plan, made.classes[tasks[t].data], tasks[t], resets[tasks[t].data], scratch); });
  }
  failure.rethrow();
  for (int i = 0; i < int(made.classes.size()); i++)
    reduce_sums(made.plan, made.classes[i], tasks, i, resets[i], E::padded_dim(int(call.dim)));
  made.log_table.resize(made.plan.max_region + 1);
  for (int n = 0; n <= made.plan.max_region; n++) made.log_table[n] = n ? std::log(float(n)) : -INF;
}

// what one thread does next: an item of a kv head of a class
struct Work {
  int data;
  int64_t kv, item;
};

template <class E>
std::vector<Work> list_work(const Prepared<E>& made) {
  std::vector<Work> work;
  for (int i = 0; i < int(made.classes.size()); i++)
    for (int64_t kv = 0; kv < made.classes[i].num_kv; kv++)
      for (int64_t item = 0; item < int64_t(made.classes[i].tiling->items.size()); item++) work.push_back({i, kv, item});
  return work;
}

template <class E>
void forward(const trilevel_call& call) {
  Prepared<E> made;
  prepare(call, made);
  const std::vector<Work> work = list_work(made);
  const int threads = std::max(1, call.threads);
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    TileScratch scratch;
    failure.guard([&] { std::memset(scratch.claimed.get(call.tokens), 0, call.tokens); });
#if defined(TRILEVEL_USE_AMX)
    if (E::GRANULE > 1) Bf16::configure();
#endif
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < int64_t(work.size()); t++)
      failure.guard([&] {
        Walker<E> walker(call, made.plan, made.classes[work[t].data], scratch, made.log_table);
        walker.walk(work[t].item, work[t].kv, [&](const TileView& view, const Tail* tails, int num_tails, const Rest& rest, int64_t head) {
          attend_tile(walker, view, tails, num_tails, rest, head);
        });
      });
    end_streaming();
#if defined(TRILEVEL_USE_AMX)
    if (E::GRANULE > 1) Bf16::release();
#endif
  }
  failure.rethrow();
}

}  // namespace
}  // namespace trilevel
