// Sixteen float lanes, one for each query of a tile, in GCC/Clang vector extensions: one source for every ISA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace trilevel {
namespace {

constexpr int LANES = 16;
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t ilanes __attribute__((vector_size(64)));
typedef float lanes_u __attribute__((vector_size(64), aligned(4)));
typedef int32_t ilanes_u __attribute__((vector_size(64), aligned(4)));

inline lanes load(const float* p) { return *reinterpret_cast<const lanes_u*>(p); }
inline void store(float* p, lanes x) { *reinterpret_cast<lanes_u*>(p) = x; }
// not `lanes{} + x`, which is an addition: 0 + -0 is 0
inline lanes all(float x) { return lanes{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline ilanes all_int(int32_t x) { return ilanes{} + x; }
inline lanes select(ilanes mask, lanes a, lanes b) { return mask ? a : b; }
inline lanes larger(lanes a, lanes b) { return a > b ? a : b; }

inline float sum(lanes x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

inline bool any(ilanes mask) {
  int32_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= mask[i];
  return bits != 0;
}

inline float bf16_to_float(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// round to nearest even; NaN stays NaN
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x for x <= 0; exactly 0 for -inf and below the smallest normal number. Cephes polynomial, error about 1 ulp
inline lanes exp_neg(lanes x) {
  const lanes low = all(-87.33654f);
  const ilanes gone = x < low;
  const lanes c = select(gone, low, x);
#if defined(__AVX512F__)
  const lanes n = (lanes)_mm512_roundscale_ps((__m512)(c * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const lanes magic = all(12582912.0f);
  const lanes n = (c * 1.44269504088896341f + magic) - magic;
#endif
  lanes f = c - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;
  lanes p = all(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
#if defined(__AVX512F__)
  return select(gone, lanes{}, (lanes)_mm512_scalef_ps((__m512)p, (__m512)n));
#else
  const ilanes k = __builtin_convertvector(n, ilanes);
  const ilanes power = (k + 127) << 23;
  lanes scale;
  std::memcpy(&scale, &power, sizeof scale);
  return select(gone, lanes{}, p * scale);
#endif
}

// ln(x) for positive normal x. Cephes polynomial, error about 1 ulp
inline lanes log_pos(lanes x) {
  ilanes bits;
  std::memcpy(&bits, &x, sizeof bits);
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
  ilanes e = ((bits - 0x3f3504f3) >> 23);
  bits -= e << 23;
  lanes m;
  std::memcpy(&m, &bits, sizeof m);
  const lanes f = m - 1.0f, n = __builtin_convertvector(e, lanes);
  lanes p = all(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  lanes y = f * f * f * p - 2.12194440e-4f * n - 0.5f * f * f;
  return f + y + 0.693359375f * n;
}

// out[c][r] = in[r][c] for 16 x 16 values of 4 bytes; rows are `stride` apart on both sides
inline void transpose16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  lanes a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) a[r] = load(in + r * in_stride);
  // four rounds that swap the off-diagonal blocks of 8, 4, 2 and 1
  const ilanes lo8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const ilanes hi8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
#pragma GCC unroll 16
  for (int r = 0; r < 8; r++) {
    b[r] = __builtin_shuffle(a[r], a[r + 8], lo8);
    b[r + 8] = __builtin_shuffle(a[r], a[r + 8], hi8);
  }
  const ilanes lo4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  const ilanes hi4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++)
    if (!(r & 4)) {
      a[r] = __builtin_shuffle(b[r], b[r + 4], lo4);
      a[r + 4] = __builtin_shuffle(b[r], b[r + 4], hi4);
    }
  const ilanes lo2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const ilanes hi2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++)
    if (!(r & 2)) {
      b[r] = __builtin_shuffle(a[r], a[r + 2], lo2);
      b[r + 2] = __builtin_shuffle(a[r], a[r + 2], hi2);
    }
  const ilanes lo1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
  const ilanes hi1 = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++)
    if (!(r & 1)) {
      store(out + r * out_stride, __builtin_shuffle(b[r], b[r + 1], lo1));
      store(out + (r + 1) * out_stride, __builtin_shuffle(b[r], b[r + 1], hi1));
    }
#else
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) out[c * out_stride + r] = in[r * in_stride + c];
#endif
}

}  // namespace
}  // namespace trilevel
