// The two products of a tile, keys x queries and weights x values, in the arithmetic of the instruction set.
//
// Scores stand as rows of 16 lanes, a row an entry, a lane a query, so that softmax runs down the rows without any
// horizontal step. An engine says in which form entries and queries are kept.
#pragma once
#include "lanes.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(TRILEVEL_AMX_EMULATED)
#include "amx_emulated.h"
#elif defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace trilevel {
namespace {

#if defined(__AVX512F__)
constexpr int SCORE_ROWS = 8, MIX_QUERIES = 4, MIX_CHUNKS = 4;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int SCORE_ROWS = 4, MIX_QUERIES = 2, MIX_CHUNKS = 2;
#else
constexpr int SCORE_ROWS = 2, MIX_QUERIES = 2, MIX_CHUNKS = 1;
#endif

// rows of entries that the weights of queries 4g .. 4g+3 can reach
struct Reach {
  int begin[4], end[4];
};

template <int Q, int C>
inline void mix_block(const float* weights, int begin, int end, const float* values, int64_t stride, float* out, int dim) {
  lanes sum[Q][C];
#pragma GCC unroll 16
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) sum[q][c] = load(out + q * dim + c * LANES);
  for (int j = begin; j < end; j++) {
    lanes value[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) value[c] = load(values + j * stride + c * LANES);
#pragma GCC unroll 16
    for (int q = 0; q < Q; q++) {
      const lanes w = all(weights[j * LANES + q]);
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) sum[q][c] += w * value[c];
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) store(out + q * dim + c * LANES, sum[q][c]);
}

// out[q] += sum_j weights[j][q] * values[j], 16 queries; weights are rows of 16 lanes
inline void mix_f32(const float* weights, int rows, const Reach* reach, const float* values, int64_t stride, int dim,
                    float* out) {
  for (int q = 0; q < LANES; q += MIX_QUERIES) {
    const int begin = reach ? reach->begin[q / 4] : 0, end = reach ? reach->end[q / 4] : rows;
    int c = 0;
    for (; c + MIX_CHUNKS * LANES <= dim; c += MIX_CHUNKS * LANES)
      mix_block<MIX_QUERIES, MIX_CHUNKS>(weights + q, begin, end, values + c, stride, out + q * dim + c, dim);
    for (; c < dim; c += LANES) mix_block<MIX_QUERIES, 1>(weights + q, begin, end, values + c, stride, out + q * dim + c, dim);
  }
}

template <int R>
inline void score_block(const float* keys, int64_t stride, const float* queries, int dim, float* out) {
  lanes sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r] = lanes{};
  for (int c = 0; c < dim; c++) {
    const lanes q = load(queries + c * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[r] += q * keys[r * stride + c];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) store(out + r * LANES, sum[r]);
}

// out[j][q] = keys[j] . query q; queries are transposed, (dim, 16)
inline void score_f32(const float* keys, int64_t stride, int rows, const float* queries, int dim, float* out) {
  int j = 0;
  for (; j + SCORE_ROWS <= rows; j += SCORE_ROWS)
    score_block<SCORE_ROWS>(keys + j * stride, stride, queries, dim, out + j * LANES);
  for (; j < rows; j++) score_block<1>(keys + j * stride, stride, queries, dim, out + j * LANES);
}

// out[r] += sum_q weights[r][q] * queries[q] for rows of weights and 16 rows of `queries`, (16, dim)
inline void spread_f32(const float* weights, int rows, const float* queries, int dim, float* out, int64_t stride) {
  int j = 0;
  for (; j + MIX_QUERIES <= rows; j += MIX_QUERIES) {
    for (int c = 0; c < dim; c += LANES) {
      lanes sum[MIX_QUERIES];
#pragma GCC unroll 16
      for (int r = 0; r < MIX_QUERIES; r++) sum[r] = load(out + (j + r) * stride + c);
      for (int q = 0; q < LANES; q++) {
        const lanes x = load(queries + q * dim + c);
#pragma GCC unroll 16
        for (int r = 0; r < MIX_QUERIES; r++) sum[r] += x * weights[(j + r) * LANES + q];
      }
#pragma GCC unroll 16
      for (int r = 0; r < MIX_QUERIES; r++) store(out + (j + r) * stride + c, sum[r]);
    }
  }
  for (; j < rows; j++)
    for (int c = 0; c < dim; c += LANES) {
      lanes sum = load(out + j * stride + c);
      for (int q = 0; q < LANES; q++) sum += load(queries + q * dim + c) * weights[j * LANES + q];
      store(out + j * stride + c, sum);
    }
}

inline void transpose_rows(const float* rows, int64_t stride, int dim, float* out) {
  for (int c = 0; c < dim; c += LANES) transpose16(rows + c, stride, out + c * LANES, LANES);
}

// float32 everywhere; entries are plain rows
struct F32 {
  static constexpr int GRANULE = 1;  // row ranges start at multiples of it and are padded to it
  typedef float Key;
  typedef float Value;
  static int padded_dim(int dim) { return (dim + 15) / 16 * 16; }
  static void put(Key* keys, Value* values, int row, int dim, const float* key, const float* value) {
    std::memcpy(keys + int64_t(row) * dim, key, dim * sizeof(float));
    std::memcpy(values + int64_t(row) * dim, value, dim * sizeof(float));
  }
  static void clear(Key* keys, Value* values, int row, int dim) {
    std::memset(keys + int64_t(row) * dim, 0, dim * sizeof(float));
    std::memset(values + int64_t(row) * dim, 0, dim * sizeof(float));
  }
  static int64_t value_floats(int rows, int dim) { return int64_t(rows) * dim; }
  static int64_t key_floats(int rows, int dim) { return int64_t(rows) * dim; }
  // rows: (16, dim) float32
  static void put_queries(float* queries, const float* rows, int64_t stride, int dim) { transpose_rows(rows, stride, dim, queries); }
  static void score(const Key* keys, int row, int rows, const float* queries, int dim, float* out) {
    score_f32(keys + int64_t(row) * dim, dim, rows, queries, dim, out);
  }
  static void mix(const float* weights, int rows, const Reach* reach, const Value* values, int row, int dim, float* out,
                  float*) {
    mix_f32(weights, rows, reach, values + int64_t(row) * dim, dim, dim, out);
  }
};

#if defined(__AVX512BF16__)

inline __m512i to_m512i(lanes x) { return _mm512_castps_si512((__m512)x); }

// dword r of row c: bfloat16 pair (2c, 2c + 1) of row r; `packed` holds 16 rows of `dim` bfloat16, `stride` dwords apart
inline void pair_queries(float* queries, const float* packed, int64_t stride, int dim) {
  const int half = dim / 2;
  int c = 0;
  for (; c + 16 <= half; c += 16) transpose16(packed + c, stride, queries + c * LANES, LANES);
  for (; c < half; c++)
    for (int q = 0; q < LANES; q++) std::memcpy(queries + c * LANES + q, packed + q * stride + c, 4);
}

// pairs of weight rows as bfloat16 pairs: dword q of row j is (weights[2j][q], weights[2j + 1][q])
inline void pair_weights(const float* weights, int rows, float* out) {
  for (int j = 0; j < rows; j += 2) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(weights + (j + 1) * LANES), (__m512)load(weights + j * LANES));
    const __m512i x = (__m512i)both;
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1));
    _mm512_storeu_si512(out + j / 2 * LANES, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// entries in bfloat16: keys as rows, values as pairs of rows (row 2j in the low, 2j + 1 in the high half of a dword)
struct PairedEntries {
  typedef uint16_t Key;
  typedef uint16_t Value;
  static int64_t key_floats(int rows, int dim) { return (int64_t(rows) * dim + 1) / 2; }
  static int64_t value_floats(int rows, int dim) { return int64_t(rows + 1) / 2 * dim; }
  static void put(Key* keys, Value* values, int row, int dim, const float* key, const float* value) {
    Value* pair = values + int64_t(row / 2) * 2 * dim + (row & 1);
    for (int c = 0; c < dim; c += LANES) {
      const __m256bh k = _mm512_cvtneps_pbh(_mm512_loadu_ps(key + c)), v = _mm512_cvtneps_pbh(_mm512_loadu_ps(value + c));
      std::memcpy(keys + int64_t(row) * dim + c, &k, 32);
      uint16_t x[16];
      std::memcpy(x, &v, 32);
      for (int i = 0; i < LANES; i++) pair[2 * (c + i)] = x[i];
    }
  }
  static void clear(Key* keys, Value* values, int row, int dim) {
    std::memset(keys + int64_t(row) * dim, 0, 2 * dim);
    Value* pair = values + int64_t(row / 2) * 2 * dim + (row & 1);
    for (int c = 0; c < dim; c++) pair[2 * c] = 0;
  }
  // two rows that are bfloat16 already; `row` is even
  static void put_pair(Key* keys, Value* values, int row, int dim, const uint16_t* k0, const uint16_t* k1, const uint16_t* v0,
                       const uint16_t* v1) {
    std::memcpy(keys + int64_t(row) * dim, k0, 2 * dim);
    std::memcpy(keys + int64_t(row + 1) * dim, k1, 2 * dim);
    for (int c = 0; c < dim; c += LANES) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v0 + c)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v1 + c)));
      _mm512_storeu_si512(values + int64_t(row) * dim + 2 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  static void put_queries(float* queries, const float* rows, int64_t, int dim) {
    alignas(64) float packed[LANES * 128];
    for (int q = 0; q < LANES; q++)
      for (int c = 0; c < dim; c += 16) {
        const __m256bh x = _mm512_cvtneps_pbh(_mm512_loadu_ps(rows + q * dim + c));
        std::memcpy(packed + q * (dim / 2) + c / 2, &x, 32);
      }
    pair_queries(queries, packed, dim / 2, dim);
  }
};

#endif

#if defined(__AVX512BF16__) && !defined(TRILEVEL_USE_AMX)

template <int R>
inline void score_pairs(const uint16_t* keys, int64_t stride, const float* queries, int half, float* out) {
  __m512 sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
  for (int c = 0; c < half; c++) {
    const __m512bh q = (__m512bh)_mm512_loadu_si512(queries + c * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      int32_t pair;
      std::memcpy(&pair, keys + r * stride + 2 * c, 4);
      sum[r] = _mm512_dpbf16_ps(sum[r], q, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * LANES, sum[r]);
}

template <int C>
inline void mix_pairs(const float* weights, int begin, int end, const uint16_t* values, int64_t stride, float* out, int dim) {
  constexpr int Q = 4;
  __m512 sum[Q][C];
#pragma GCC unroll 16
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) sum[q][c] = _mm512_loadu_ps(out + q * dim + c * LANES);
  for (int j = begin; j < end; j++) {
    __m512bh value[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) value[c] = (__m512bh)_mm512_loadu_si512(values + j * stride + 2 * c * LANES);
#pragma GCC unroll 16
    for (int q = 0; q < Q; q++) {
      int32_t pair;
      std::memcpy(&pair, weights + j * LANES + q, 4);
      const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) sum[q][c] = _mm512_dpbf16_ps(sum[q][c], w, value[c]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) _mm512_storeu_ps(out + q * dim + c * LANES, sum[q][c]);
}

// VDPBF16PS: two products a lane
struct Bf16 : PairedEntries {
  static constexpr int GRANULE = 2;
  static int padded_dim(int dim) { return (dim + 15) / 16 * 16; }
  static void score(const Key* keys, int row, int rows, const float* queries, int dim, float* out) {
    keys += int64_t(row) * dim;
    int j = 0;
    for (; j + 8 <= rows; j += 8) score_pairs<8>(keys + j * dim, dim, queries, dim / 2, out + j * LANES);
    for (; j < rows; j += 2) score_pairs<2>(keys + j * dim, dim, queries, dim / 2, out + j * LANES);
  }
  static void mix(const float* weights, int rows, const Reach* reach, const Value* values, int row, int dim, float* out,
                  float* scratch) {
    pair_weights(weights, rows, scratch);
    values += int64_t(row) * dim;
    for (int q = 0; q < LANES; q += 4) {
      const int begin = reach ? reach->begin[q / 4] / 2 : 0, end = reach ? (reach->end[q / 4] + 1) / 2 : rows / 2;
      int c = 0;
      for (; c + 64 <= dim; c += 64) mix_pairs<4>(scratch + q, begin, end, values + 2 * c, 2 * dim, out + q * dim + c, dim);
      for (; c < dim; c += 16) mix_pairs<1>(scratch + q, begin, end, values + 2 * c, 2 * dim, out + q * dim + c, dim);
    }
  }
};

#elif defined(TRILEVEL_USE_AMX)

// AMX: keys are the left operand as they lie in memory, queries and values the right one in pairs
struct Bf16 : PairedEntries {
  static constexpr int GRANULE = 32;
  static int padded_dim(int dim) { return (dim + 31) / 32 * 32; }
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; t++) config.row_bytes[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
  }
  static void release() { _tile_release(); }
  static void score(const Key* keys, int row, int rows, const float* queries, int dim, float* out) {
    keys += int64_t(row) * dim;
    for (int j = 0; j < rows; j += 32) {
      _tile_zero(0);
      _tile_zero(1);
      for (int c = 0; c < dim; c += 32) {
        _tile_loadd(2, queries + c / 2 * LANES, 64);
        _tile_loadd(3, keys + j * dim + c, 2 * dim);
        _tile_loadd(4, keys + (j + 16) * dim + c, 2 * dim);
        _tile_dpbf16ps(0, 3, 2);
        _tile_dpbf16ps(1, 4, 2);
      }
      _tile_stored(0, out + j * LANES, 64);
      _tile_stored(1, out + (j + 16) * LANES, 64);
    }
  }
  static void mix(const float* weights, int rows, const Reach*, const Value* values, int row, int dim, float* out,
                  float* scratch) {
    float* pairs = scratch;
    float* turned = scratch + rows / 2 * LANES;
    pair_weights(weights, rows, pairs);
    for (int j = 0; j < rows; j += 32) transpose16(pairs + j / 2 * LANES, LANES, turned + j / 2 * LANES, LANES);
    values += int64_t(row) * dim;
    for (int c = 0; c < dim; c += 32) {
      _tile_loadd(0, out + c, 4 * dim);
      _tile_loadd(1, out + c + 16, 4 * dim);
      for (int j = 0; j < rows; j += 32) {
        _tile_loadd(2, turned + j / 2 * LANES, 64);
        _tile_loadd(3, values + int64_t(j) * dim + 2 * c, 4 * dim);
        _tile_loadd(4, values + int64_t(j) * dim + 2 * c + 32, 4 * dim);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      _tile_stored(0, out + c, 4 * dim);
      _tile_stored(1, out + c + 16, 4 * dim);
    }
  }
};

#endif

}  // namespace
}  // namespace trilevel
