// Where tokens stand: segments, regions, selected tokens and tiles of queries, as small arrays of integers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "abi.h"

namespace trilevel {
namespace {

constexpr int TILE = 16;
constexpr int TILES_PER_ITEM = 16;
constexpr int64_t SUM_CHUNK = 1024;

enum HeadClass { LOCAL = 0, REGIONAL = 1, GLOBAL = 2 };

// positions [begin, end) of a run of equal segment ids; `count` of them are real, the first at `first_real`
struct Segment {
  int begin, end, count, first_real;
  int first_region, num_regions, region_size;
  int first_set;
};

// real tokens of a region: positions [begin, end), padding between them included
struct Region {
  int begin, end, count;
  bool is_full;
};

// tokens that global heads (or sinks) read one by one, ascending positions
typedef std::vector<int> TokenSet;

struct Row {
  const uint8_t* valid = nullptr;  // null: every token is real
  int tokens = 0;
  std::vector<Segment> segments;
  std::vector<Region> regions;
  std::vector<int> before;    // real tokens before a position; empty when all are real
  std::vector<int> place;     // position of the token of a rank; empty when all are real
  std::vector<TokenSet> sets; // global tokens: one set a segment, or (causal) one a selection chunk
  std::vector<TokenSet> sinks;
  std::vector<uint8_t> chosen;  // bidirectional: 1 where a token is global
  std::vector<uint8_t> sunk;    // 1 where a token is a sink

  bool is_real(int position) const { return !valid || valid[position]; }
  int rank(int position) const { return before.empty() ? position : before[position]; }
  int position(int rank) const { return place.empty() ? rank : place[rank]; }
};

// up to TILE queries of one segment that read one set of tokens (-1: none)
struct Tile {
  int begin, end, segment, set;
};

// tiles of one row that one thread walks in order
struct Item {
  int row, first, last;
};

struct Tiling {
  std::vector<Tile> tiles;
  std::vector<Item> items;
};

struct Plan {
  std::vector<Row> rows;
  Tiling plain, by_set;  // by_set: also cut where the set changes (causal global heads)
  int max_region = 1;

  const Tiling& tiling(const trilevel_call& call, int head_class) const {
    return call.is_causal && head_class == GLOBAL ? by_set : plain;
  }
};

inline void add_segments(const trilevel_call& call, int64_t b, Row& row) {
  const int n = int(call.tokens);
  const int64_t* ids = call.segment ? call.segment + b * n : nullptr;
  if (call.valid) {
    row.valid = call.valid + b * n;
    row.before.resize(n + 1);
    row.place.reserve(n);
    for (int i = 0; i < n; i++) {
      row.before[i] = int(row.place.size());
      if (row.valid[i]) row.place.push_back(i);
    }
    row.before[n] = int(row.place.size());
  }
  for (int begin = 0; begin < n;) {
    int end = ids ? begin + 1 : n;
    while (ids && end < n && ids[end] == ids[begin]) end++;
    Segment s{};
    s.begin = begin;
    s.end = end;
    s.count = row.rank(end) - row.rank(begin);
    s.first_real = s.count ? row.position(row.rank(begin)) : end;
    row.segments.push_back(s);
    begin = end;
  }
}

inline void add_regions(const trilevel_call& call, Row& row, int& max_region) {
  for (Segment& s : row.segments) {
    s.region_size = call.region_size > 0 ? call.region_size
                                         : int(std::max<int64_t>(1, (int64_t(s.count) + call.num_regions - 1) / call.num_regions));
    s.first_region = int(row.regions.size());
    s.num_regions = int((int64_t(s.count) + s.region_size - 1) / s.region_size);
    const int first = row.rank(s.begin);
    for (int r = 0; r < s.num_regions; r++) {
      const int low = first + r * s.region_size, high = std::min(low + s.region_size, first + s.count);
      row.regions.push_back({row.position(low), row.position(high - 1) + 1, high - low, high - low == s.region_size});
      max_region = std::max(max_region, high - low);
    }
  }
}

// order of selection: forced first, then by score, ties by position
struct Better {
  const float* score;
  const uint8_t* forced;
  bool operator()(int a, int b) const {
    if (forced && forced[a] != forced[b]) return forced[a] > forced[b];
    if (score && score[a] != score[b]) return score[a] > score[b];
    return a < b;
  }
};

inline void add_sets(const trilevel_call& call, int64_t b, Row& row) {
  const int64_t n = call.tokens;
  // a NaN has no place in an order: it counts as 0, and the rows that see it are NaN anyway
  std::vector<float> clean;
  const float* score = call.score ? call.score + b * n : nullptr;
  if (score) {
    clean.assign(score, score + n);
    for (float& x : clean)
      if (!std::isfinite(x)) x = 0;
    score = clean.data();
  }
  const Better better{score, call.forced ? call.forced + b * n : nullptr};
  const int p = int(std::min<int64_t>(call.num_global, n));
  std::vector<int> ranked;
  for (Segment& s : row.segments) {
    s.first_set = int(row.sets.size());
    ranked.clear();
    if (!call.is_causal) {
      for (int i = s.begin; i < s.end; i++)
        if (row.is_real(i)) ranked.push_back(i);
      if (int(ranked.size()) > p) {
        std::nth_element(ranked.begin(), ranked.begin() + p, ranked.end(), better);
        ranked.resize(p);
      }
      std::sort(ranked.begin(), ranked.end());
      row.sets.push_back(ranked);
      continue;
    }
    // the best p of all complete chunks so far, kept in order of selection
    const int first = row.rank(s.begin);
    for (int done = call.chunk; done <= s.count; done += call.chunk) {
      for (int r = done - call.chunk; r < done; r++) {
        const int i = row.position(first + r);
        ranked.insert(std::lower_bound(ranked.begin(), ranked.end(), i, better), i);
        if (int(ranked.size()) > p) ranked.pop_back();
      }
      row.sets.push_back(ranked);
      std::sort(row.sets.back().begin(), row.sets.back().end());
    }
  }
  if (call.is_causal) return;
  row.chosen.assign(n, 0);
  for (const TokenSet& set : row.sets)
    for (int i : set) row.chosen[i] = 1;
}

inline void add_sinks(const trilevel_call& call, Row& row) {
  row.sunk.assign(call.tokens, 0);
  for (const Segment& s : row.segments) {
    TokenSet set;
    for (int i = s.begin; i < s.end && int(set.size()) < call.num_sinks; i++)
      if (row.is_real(i)) set.push_back(i);
    for (int i : set) row.sunk[i] = 1;
    row.sinks.push_back(set);
  }
}

// the set that the query at a position reads, -1 for none
inline int set_of(const trilevel_call& call, const Row& row, int segment, int position) {
  const Segment& s = row.segments[segment];
  if (!call.is_causal) return segment;
  // padding reads what the last real token does
  const int complete = std::min(row.rank(position) - row.rank(s.begin) + 1, s.count) / call.chunk;
  return complete > 0 ? s.first_set + complete - 1 : -1;
}

inline void add_tiles(const trilevel_call& call, const Plan& plan, int row_index, bool by_set, Tiling& tiling) {
  const Row& row = plan.rows[row_index];
  const int from = int(tiling.tiles.size());
  for (int k = 0; k < int(row.segments.size()); k++) {
    const Segment& s = row.segments[k];
    for (int begin = s.begin; begin < s.end;) {
      int end = std::min(begin + TILE, s.end);
      int set = by_set ? set_of(call, row, k, begin) : k;
      for (int i = begin + 1; by_set && i < end; i++)
        if (set_of(call, row, k, i) != set) end = i;
      tiling.tiles.push_back({begin, end, k, set});
      begin = end;
    }
  }
  const int stop = int(tiling.tiles.size());
  for (int first = from; first < stop; first += TILES_PER_ITEM)
    tiling.items.push_back({row_index, first, std::min(first + TILES_PER_ITEM, stop)});
}

inline Plan make_plan(const trilevel_call& call) {
  Plan plan;
  plan.rows.resize(call.batch);
  const bool has_global = call.split[GLOBAL] > 0;
  for (int64_t b = 0; b < call.batch; b++) {
    // rows without masks differ in their selected tokens alone
    Row& row = plan.rows[b];
    row.tokens = int(call.tokens);
    add_segments(call, b, row);
    add_regions(call, row, plan.max_region);
    if (has_global) add_sets(call, b, row);
    if (call.num_sinks && call.split[LOCAL]) add_sinks(call, row);
    add_tiles(call, plan, int(b), false, plan.plain);
    if (has_global && call.is_causal) add_tiles(call, plan, int(b), true, plan.by_set);
  }
  return plan;
}

// first position that the sums of a causal query's remainder may hold, INT32_MAX for an empty remainder
inline int rest_begin(const Row& row, const Segment& s, bool by_region, int position) {
  if (!by_region) return s.first_real;
  const int rank = row.rank(position) - row.rank(s.begin);
  const Region& r = row.regions[s.first_region + rank / s.region_size];
  const bool is_whole = r.is_full && position + 1 >= r.end;
  return is_whole ? INT32_MAX : r.begin;
}

}  // namespace
}  // namespace trilevel
