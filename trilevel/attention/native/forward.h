// The forward pass of a tile of queries: near block, dense tail, folded remainder.
#pragma once
#include <exception>

#include "walk.h"

namespace trilevel {
namespace {

constexpr int TAIL_CHUNK = 64;
constexpr float LOWEST = -3e38f;  // below every finite logit, so that the first maximum needs no special case

// how many tokens the remainder of each query stands for
inline lanes rest_count(const TileView& view, const Rest& rest, bool in_past) {
  const ilanes has_base = in_past ? view.rest < all_int(view.begin) : (ilanes{} - 1);
  lanes number = select(has_base, all(rest.count), lanes{});
  if (!view.has_flags) {
    const ilanes past = larger(view.low - larger(view.rest, all_int(view.begin)), ilanes{});
    return in_past ? number + to_float(past) : number - to_float(view.high - view.low);
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

// all heads of some tokens before the next tokens: in a fused projection they share pages of memory
template <class E>
std::vector<Work> list_work(const Prepared<E>& made) {
  int64_t most = 0;
  for (const HeadClassData<E>& data : made.classes) most = std::max(most, int64_t(data.tiling->items.size()));
  std::vector<Work> work;
  for (int64_t item = 0; item < most; item++)
    for (int i = 0; i < int(made.classes.size()); i++)
      for (int64_t kv = 0; kv < made.classes[i].num_kv && item < int64_t(made.classes[i].tiling->items.size()); kv++)
        work.push_back({i, kv, item});
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
