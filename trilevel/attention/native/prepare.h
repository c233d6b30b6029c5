// What the tiles of a head class read beside their windows, made once a call: region summaries, selected tokens, sums.
#pragma once
#include "plan.h"
#include "rows.h"

namespace trilevel {
namespace {

constexpr int ROW_GRANULE = 32;  // entries of a segment start at a multiple of it, in every engine's form
constexpr int SPARE_ROWS = 64;   // rows behind the last entry that an engine may read

// entries that all queries of a segment share, for every kv head of a class: float32 rows and the engine's form
template <class E>
struct Entries {
  int64_t rows = 0;  // a kv head
  std::vector<std::vector<int64_t>> first;  // first[b][segment]
  Buffer<float> key, value;
  Buffer<float> packed_key, packed_value;
  std::vector<float> bias;  // of every row: log-count of a region, c of a token

  int64_t place(int64_t head, int64_t row) const { return head * (rows + SPARE_ROWS) + row; }
};

// a head class with everything its tiles need
template <class E>
struct HeadClassData {
  int kind;
  int first_head, first_kv, num_kv, group;
  bool has_rest, rest_in_past, rest_by_region, has_regions, has_tokens, tokens_by_set;
  const Tiling* tiling;
  Entries<E> regions, tokens;
  std::vector<int64_t> first_segment;  // of a row, in the sums
  int64_t num_segments = 0;
  Buffer<float> sums;    // bidirectional: (kv, segment, [keys, values], padded); causal: what lies before an item
  std::vector<float> rest_count;  // bidirectional: tokens in the sums of a segment; causal: (kv, item)
  Buffer<float> partial;

  const uint8_t* claimed(const Row& row) const {
    if (kind == LOCAL) return row.sunk.empty() ? nullptr : row.sunk.data();
    return kind == GLOBAL && !row.chosen.empty() ? row.chosen.data() : nullptr;
  }
  const TokenSet& stored_set(const Row& row, int segment) const { return kind == LOCAL ? row.sinks[segment] : row.sets[segment]; }
};

template <class E>
HeadClassData<E> describe(const trilevel_call& call, const Plan& plan, int kind) {
  HeadClassData<E> data;
  data.kind = kind;
  data.group = int(call.heads / call.kv_heads);
  data.first_head = kind == LOCAL ? 0 : kind == REGIONAL ? call.split[0] : call.split[0] + call.split[1];
  data.first_kv = data.first_head / data.group;
  data.num_kv = call.split[kind] / data.group;
  const bool pools = kind == REGIONAL || (kind == GLOBAL && call.is_union);
  data.has_regions = pools && !call.is_strict;
  data.has_tokens = !call.is_strict && ((kind == LOCAL && call.num_sinks) || kind == GLOBAL);
  data.tokens_by_set = kind == GLOBAL && call.is_causal;
  data.has_rest = !call.is_strict && (!pools || call.is_causal);
  data.rest_in_past = call.is_causal;
  data.rest_by_region = pools;
  data.tiling = &plan.tiling(call, kind);
  for (const Row& row : plan.rows) {
    data.first_segment.push_back(data.num_segments);
    data.num_segments += int64_t(row.segments.size());
  }
  return data;
}

template <class E, class Count>
void lay_out(const Plan& plan, Entries<E>& entries, Count count) {
  for (const Row& row : plan.rows) {
    std::vector<int64_t> first;
    for (int s = 0; s < int(row.segments.size()); s++) {
      first.push_back(entries.rows);
      entries.rows += (count(row, s) + ROW_GRANULE - 1) / ROW_GRANULE * ROW_GRANULE;
    }
    entries.first.push_back(first);
  }
}

template <class E>
void allocate(Entries<E>& entries, int num_kv, int padded) {
  const int64_t rows = (entries.rows + SPARE_ROWS) * num_kv;
  entries.key.get(rows * padded);
  entries.value.get(rows * padded);
  if (E::GRANULE > 1) {
    entries.packed_key.get(E::key_floats(int(1), padded) * rows);
    entries.packed_value.get(E::value_floats(int(1), padded) * rows);
  }
  entries.bias.assign(entries.rows, 0.0f);
}

// weights of a region's real tokens, softmax(u . key), at out[0 .. count); keys (count, padded) are filled in as well
inline void pool_weights(const Source& key, const Row& row, const Region& region, const float* u, int padded, float* keys,
                         float* out) {
  int n = 0;
  float top = -INF;
  for (int i = region.begin; i < region.end; i++) {
    if (!row.is_real(i)) continue;
    key.read(i, keys + int64_t(n) * padded);
    out[n] = u ? dot(keys + int64_t(n) * padded, u, padded) : 0.0f;
    top = std::max(top, out[n++]);
  }
  float total = 0;
  for (int j = 0; j < n; j++) total += out[j] = u ? std::exp(out[j] - top) : 1.0f;
  for (int j = 0; j < n; j++) out[j] /= total;
}

// u of a kv head with the dimension padded, or null when there is none
inline const float* pool_vector(const trilevel_call& call, int64_t kv, int padded, Buffer<float>& buffer) {
  if (!call.pool_weight) return nullptr;
  float* u = buffer.get(padded);
  std::memset(u, 0, padded * sizeof(float));
  std::memcpy(u, call.pool_weight + kv * call.dim, call.dim * sizeof(float));
  return u;
}

struct PoolScratch {
  Buffer<float> keys, weights, row, u;
};

inline void pool_region(const Row& row, const Region& region, const Source& key, const Source& value,
                        const float* u, int padded, PoolScratch& scratch, float* out_key, float* out_value) {
  float* keys = scratch.keys.get(int64_t(region.count) * padded);
  float* weights = scratch.weights.get(region.count);
  float* temp = scratch.row.get(padded);
  pool_weights(key, row, region, u, padded, keys, weights);
  std::memset(out_key, 0, padded * sizeof(float));
  std::memset(out_value, 0, padded * sizeof(float));
  int n = 0;
  for (int i = region.begin; i < region.end; i++) {
    if (!row.is_real(i)) continue;
    add_scaled(out_key, weights[n], keys + int64_t(n) * padded, padded);
    add_scaled(out_value, weights[n++], value.view(i, temp), padded);
  }
}

template <class E>
void pack_entries(Entries<E>& entries, int64_t head, int64_t first, int64_t count, int padded) {
  if (E::GRANULE == 1) return;
  const int64_t base = entries.place(head, first);
  typename E::Key* keys = reinterpret_cast<typename E::Key*>(entries.packed_key.data()) + base * padded;
  typename E::Value* values = reinterpret_cast<typename E::Value*>(entries.packed_value.data()) + base * padded;
  const int64_t stop = (count + ROW_GRANULE - 1) / ROW_GRANULE * ROW_GRANULE;
  for (int64_t j = 0; j < stop; j++)
    if (j < count)
      E::put(keys, values, int(j), padded, entries.key.data() + (base + j) * padded, entries.value.data() + (base + j) * padded);
    else
      E::clear(keys, values, int(j), padded);
}

// c of a selected token: log sigmoid(score) with `gate`, else 0
inline float token_bias(const trilevel_call& call, int64_t b, int position) {
  if (!call.has_gate_bias) return 0.0f;
  const float x = call.score ? call.score[b * call.tokens + position] : 0.0f;
  return std::min(x, 0.0f) - std::log1p(std::exp(-std::fabs(x)));
}

// the counts and biases that do not depend on a kv head
template <class E>
void fill_biases(const trilevel_call& call, const Plan& plan, HeadClassData<E>& data) {
  for (int b = 0; b < int(plan.rows.size()); b++) {
    const Row& row = plan.rows[b];
    const uint8_t* claimed = data.claimed(row);
    for (int k = 0; k < int(row.segments.size()); k++) {
      const Segment& s = row.segments[k];
      for (int r = 0; data.has_regions && r < s.num_regions; r++) {
        const Region& region = row.regions[s.first_region + r];
        int count = region.count;
        for (int i = region.begin; claimed && i < region.end; i++) count -= claimed[i] && row.is_real(i);
        data.regions.bias[data.regions.first[b][k] + r] = count > 0 ? std::log(float(count)) : -INF;
      }
      if (!data.has_tokens || data.tokens_by_set) continue;
      const TokenSet& set = data.stored_set(row, k);
      for (int j = 0; data.kind == GLOBAL && j < int(set.size()); j++)
        data.tokens.bias[data.tokens.first[b][k] + j] = token_bias(call, b, set[j]);
    }
  }
}

// a piece of preparation that one thread does: `what` of kv head `kv` of row `b`
struct Task {
  enum What { POOL, GATHER, SUM, PAST } what;
  int data, kv, b, segment;
  int begin, end;  // regions of the segment, positions, or the item
  int64_t slot;
};

template <class E>
void list_tasks(const trilevel_call& call, const Plan& plan, HeadClassData<E>& data, int index, std::vector<Task>& tasks) {
  const int padded = E::padded_dim(int(call.dim));
  if (data.has_regions) {
    lay_out(plan, data.regions, [](const Row& row, int s) { return int64_t(row.segments[s].num_regions); });
    allocate(data.regions, data.num_kv, padded);
  }
  if (data.has_tokens && !data.tokens_by_set) {
    lay_out(plan, data.tokens, [&](const Row& row, int s) { return int64_t(data.stored_set(row, s).size()); });
    allocate(data.tokens, data.num_kv, padded);
  }
  fill_biases(call, plan, data);
  int64_t slots = 0;
  for (int kv = 0; kv < data.num_kv; kv++) {
    for (int b = 0; b < int(plan.rows.size()); b++) {
      const Row& row = plan.rows[b];
      for (int k = 0; k < int(row.segments.size()); k++) {
        const Segment& s = row.segments[k];
        // pools start at a multiple of the granule, so that no two threads write one pair of packed rows
        for (int r = 0; data.has_regions && r < s.num_regions; r += ROW_GRANULE)
          tasks.push_back({Task::POOL, index, kv, b, k, r, std::min(r + ROW_GRANULE, s.num_regions), 0});
        if (data.has_tokens && !data.tokens_by_set) tasks.push_back({Task::GATHER, index, kv, b, k, 0, 0, 0});
        if (!data.has_rest || data.rest_in_past) continue;
        for (int64_t i = s.begin; i < s.end; i += SUM_CHUNK)
          tasks.push_back({Task::SUM, index, kv, b, k, int(i), int(std::min<int64_t>(i + SUM_CHUNK, s.end)), slots++});
      }
    }
    if (data.has_rest && data.rest_in_past)
      for (int i = 0; i < int(data.tiling->items.size()); i++) tasks.push_back({Task::PAST, index, kv, data.tiling->items[i].row, 0, i, 0, slots++});
  }
  data.partial.get(slots * 2 * padded);
  data.rest_count.assign(data.rest_in_past ? slots : data.num_segments, 0.0f);
  data.sums.get(2 * padded * (data.rest_in_past ? slots : data.num_segments * data.num_kv));
}

// position before which everything is in the sums that an item starts with
inline int past_begin(const trilevel_call& call, const Tiling& tiling, const Item& item) {
  return std::max(0, tiling.tiles[item.first].begin - call.radius);
}

// the first position of the group (segment, or region) of a real token
inline int group_begin(const Row& row, const Segment& s, bool by_region, int position) {
  if (!by_region) return s.first_real;
  return row.regions[s.first_region + (row.rank(position) - row.rank(s.begin)) / s.region_size].begin;
}

// running sums of unclaimed tokens that start anew in every group
struct Running {
  const Row& row;
  const Source &key, &value;
  const uint8_t* claimed;
  bool by_region;
  int padded;
  float *sum_key, *sum_value, *temp;
  int segment = 0, group = -1;
  float count = 0;
  bool was_reset = false;

  void clear() {
    std::memset(sum_key, 0, padded * sizeof(float));
    std::memset(sum_value, 0, padded * sizeof(float));
    count = 0;
  }
  // the group of the last real token before a position, whose sums are carried on
  void resume(int position) {
    const int last = row.rank(position) - 1;
    if (last < 0) return;
    const int i = row.position(last);
    while (row.segments[segment].end <= i) segment++;
    group = group_begin(row, row.segments[segment], by_region, i);
  }
  void advance(int from, int to) {
    for (int i = from; i < to; i++) {
      while (row.segments[segment].end <= i) segment++;
      if (!row.is_real(i)) continue;
      const int begin = group_begin(row, row.segments[segment], by_region, i);
      if (begin != group) {
        clear();
        was_reset = true;
        group = begin;
      }
      if (claimed && claimed[i]) continue;
      add_row(sum_key, key.view(i, temp), padded);
      add_row(sum_value, value.view(i, temp), padded);
      count += 1;
    }
  }
};

template <class E>
void run_task(const trilevel_call& call, const Plan& plan, HeadClassData<E>& data, const Task& task, std::vector<char>& resets,
              PoolScratch& scratch) {
  const int padded = E::padded_dim(int(call.dim));
  const Row& row = plan.rows[task.b];
  const Source key = source(call, call.key, task.b, data.first_kv + task.kv, padded, true);
  const Source value = source(call, call.value, task.b, data.first_kv + task.kv, padded, false);
  float* temp = scratch.row.get(padded);
  if (task.what == Task::POOL) {
    const float* u = pool_vector(call, data.first_kv + task.kv, padded, scratch.u);
    const int64_t first = data.regions.first[task.b][task.segment] + task.begin;
    for (int r = task.begin; r < task.end; r++) {
      const int64_t at = data.regions.place(task.kv, first + r - task.begin) * padded;
      pool_region(row, row.regions[row.segments[task.segment].first_region + r], key, value, u, padded, scratch,
                  data.regions.key.data() + at, data.regions.value.data() + at);
    }
    pack_entries(data.regions, task.kv, first, task.end - task.begin, padded);
  } else if (task.what == Task::GATHER) {
    const TokenSet& set = data.stored_set(row, task.segment);
    const int64_t first = data.tokens.first[task.b][task.segment];
    for (int j = 0; j < int(set.size()); j++) {
      const int64_t at = data.tokens.place(task.kv, first + j) * padded;
      key.read(set[j], data.tokens.key.data() + at);
      value.read(set[j], data.tokens.value.data() + at);
    }
    pack_entries(data.tokens, task.kv, first, int64_t(set.size()), padded);
  } else if (task.what == Task::SUM) {
    float* out = data.partial.data() + task.slot * 2 * padded;
    const uint8_t* claimed = data.claimed(row);
    std::memset(out, 0, 2 * padded * sizeof(float));
    for (int i = task.begin; i < task.end; i++) {
      if (!row.is_real(i) || (claimed && claimed[i])) continue;
      add_row(out, key.view(i, temp), padded);
      add_row(out + padded, value.view(i, temp), padded);
    }
  } else {
    const std::vector<Item>& items = data.tiling->items;
    const int from = past_begin(call, *data.tiling, items[task.begin]);
    const bool goes_on = task.begin + 1 < int(items.size()) && items[task.begin + 1].row == task.b;
    const int to = goes_on ? past_begin(call, *data.tiling, items[task.begin + 1]) : from;
    float* out = data.partial.data() + task.slot * 2 * padded;
    Running running{row, key, value, data.kind == LOCAL ? data.claimed(row) : nullptr, data.rest_by_region, padded, out, out + padded, temp};
    running.clear();
    running.resume(from);
    running.advance(from, to);
    data.rest_count[task.slot] = running.count;
    resets[task.slot] = running.was_reset;
  }
}

// add up the parts in a fixed order
template <class E>
void reduce_sums(const Plan& plan, HeadClassData<E>& data, const std::vector<Task>& tasks, int index, const std::vector<char>& resets,
                 int padded) {
  if (!data.has_rest) return;
  if (!data.rest_in_past) {
    std::memset(data.sums.data(), 0, sizeof(float) * 2 * padded * data.num_segments * data.num_kv);
    for (const Task& task : tasks)
      if (task.data == index && task.what == Task::SUM) {
        const int64_t at = task.kv * data.num_segments + data.first_segment[task.b] + task.segment;
        add_row(data.sums.data() + at * 2 * padded, data.partial.data() + task.slot * 2 * padded, 2 * padded);
      }
    for (int b = 0; b < int(plan.rows.size()); b++) {
      const Row& row = plan.rows[b];
      const uint8_t* claimed = data.claimed(row);
      for (int k = 0; k < int(row.segments.size()); k++) {
        const Segment& s = row.segments[k];
        int count = s.count;
        for (int i = s.begin; claimed && i < s.end; i++) count -= claimed[i] && row.is_real(i);
        data.rest_count[data.first_segment[b] + k] = float(count);
      }
    }
    return;
  }
  const int64_t items = int64_t(data.tiling->items.size());
  for (int64_t kv = 0; kv < data.num_kv; kv++)
    for (int64_t i = 0; i < items; i++) {
      const int64_t slot = kv * items + i;
      float* now = data.sums.data() + slot * 2 * padded;
      if (i == 0 || data.tiling->items[i - 1].row != data.tiling->items[i].row) {
        std::memset(now, 0, 2 * padded * sizeof(float));
        continue;
      }
      // before this item: what was before the last one, unless a group began since, and the last one's part
      std::memcpy(now, data.partial.data() + (slot - 1) * 2 * padded, 2 * padded * sizeof(float));
      if (!resets[slot - 1]) add_row(now, data.sums.data() + (slot - 1) * 2 * padded, 2 * padded);
    }
  // counts likewise, from the back because a slot's own count is replaced
  for (int64_t kv = 0; kv < data.num_kv; kv++) {
    float before = 0;
    for (int64_t i = 0; i < items; i++) {
      const int64_t slot = kv * items + i;
      const float own = data.rest_count[slot];
      if (i == 0 || data.tiling->items[i - 1].row != data.tiling->items[i].row) before = 0;
      data.rest_count[slot] = before;
      before = resets[slot] ? own : before + own;
    }
  }
}

}  // namespace
}  // namespace trilevel
