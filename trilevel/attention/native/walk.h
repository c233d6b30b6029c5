// A walk over the tiles of an item: what the queries of each tile see, near and far, and the queries themselves.
#pragma once
#include "prepare.h"

namespace trilevel {
namespace {

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

  TRILEVEL_INLINE lanes bias_of(int row) const {
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

  TRILEVEL_INLINE bool is_real(int column) const {
    const int i = begin + column;
    return i < row->tokens && row->is_real(i);
  }
  TRILEVEL_INLINE bool is_claimed(int column) const {
    const int i = begin + column;
    return claimed && i < row->tokens && claimed[i];
  }
  TRILEVEL_INLINE ilanes near(int column) const {
    const ilanes i = all_int(begin + column);
    const ilanes inside = (low <= i) & (i < high);
    return has_flags && !is_real(column) ? ilanes{} : inside;
  }
  TRILEVEL_INLINE ilanes past(int column) const {
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
  lanes outside_bias(const TileView& view, int position, float bias) const {
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
    for (int j = begin; j < end; j++) special[j - begin] = outside_bias(view, set[j], tail.bias[j]);
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
      bias[j] = token_bias(call, item->row, set[j]);
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
      const ilanes low = larger(view.low, all_int(region.begin)), high = smaller(view.high, all_int(region.end));
      count = all_int(region.count) - larger(high - low, ilanes{});
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

}  // namespace
}  // namespace trilevel
