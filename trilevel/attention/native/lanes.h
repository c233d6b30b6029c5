// Sixteen float lanes, one for each query of a tile: one source for every ISA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace trilevel {
namespace {

// called for every row of scores: a call would pass its lanes through memory
#define TRILEVEL_INLINE inline __attribute__((always_inline))

constexpr int LANES = 16;
constexpr float INF = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t ilanes __attribute__((vector_size(64)));
typedef float lanes_u __attribute__((vector_size(64), aligned(4)));

inline lanes load(const float* p) { return *reinterpret_cast<const lanes_u*>(p); }
inline void store(float* p, lanes x) { *reinterpret_cast<lanes_u*>(p) = x; }
// not `lanes{} + x`, which is an addition: 0 + -0 is 0
inline lanes all(float x) { return lanes{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline ilanes all_int(int32_t x) { return ilanes{} + x; }
inline lanes select(ilanes mask, lanes a, lanes b) { return mask ? a : b; }
inline ilanes select(ilanes mask, ilanes a, ilanes b) { return mask ? a : b; }
inline lanes to_float(ilanes x) { return __builtin_convertvector(x, lanes); }
inline ilanes to_int(lanes x) { return __builtin_convertvector(x, ilanes); }
inline lanes as_float(ilanes x) { return (lanes)x; }
inline ilanes as_int(lanes x) { return (ilanes)x; }

#else

// A register of the processor. Compilers keep a vector type that is wider than one in memory, and compare it lane by lane.
#if defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
typedef float reg __attribute__((vector_size(REGISTER)));
typedef int32_t ireg __attribute__((vector_size(REGISTER)));
typedef float reg_u __attribute__((vector_size(REGISTER), aligned(4)));

// two registers, or two pairs of them
template <class Half>
struct Two {
  Half low, high;
  typedef typename std::remove_reference<decltype(std::declval<Half&>()[0])>::type Lane;

  Lane& operator[](int i) { return reinterpret_cast<Lane*>(this)[i]; }
  Lane operator[](int i) const { return reinterpret_cast<const Lane*>(this)[i]; }
  template <class Other>
  Two& operator+=(const Other& x) { return *this = *this + x; }
  template <class Other>
  Two& operator-=(const Other& x) { return *this = *this - x; }
  template <class Other>
  Two& operator*=(const Other& x) { return *this = *this * x; }
};

#define TRILEVEL_LANEWISE(op)                                                                                            \
  template <class Half>                                                                                                  \
  inline auto operator op(const Two<Half>& a, const Two<Half>& b)->Two<decltype(a.low op b.low)> {                       \
    return {a.low op b.low, a.high op b.high};                                                                           \
  }                                                                                                                      \
  template <class Half>                                                                                                  \
  inline auto operator op(const Two<Half>& a, typename Two<Half>::Lane b)->Two<decltype(a.low op b)> {                   \
    return {a.low op b, a.high op b};                                                                                    \
  }                                                                                                                      \
  template <class Half>                                                                                                  \
  inline auto operator op(typename Two<Half>::Lane a, const Two<Half>& b)->Two<decltype(a op b.low)> {                   \
    return {a op b.low, a op b.high};                                                                                    \
  }
TRILEVEL_LANEWISE(+)
TRILEVEL_LANEWISE(-)
TRILEVEL_LANEWISE(*)
TRILEVEL_LANEWISE(/)
TRILEVEL_LANEWISE(&)
TRILEVEL_LANEWISE(|)
TRILEVEL_LANEWISE(<<)
TRILEVEL_LANEWISE(>>)
TRILEVEL_LANEWISE(<)
TRILEVEL_LANEWISE(>)
TRILEVEL_LANEWISE(<=)
TRILEVEL_LANEWISE(>=)
TRILEVEL_LANEWISE(==)
TRILEVEL_LANEWISE(!=)
#undef TRILEVEL_LANEWISE

#if defined(__AVX2__)
typedef Two<reg> lanes;
typedef Two<ireg> ilanes;
#else
typedef Two<Two<reg>> lanes;
typedef Two<Two<ireg>> ilanes;
#endif

inline void read(const float* p, reg& x) { x = *reinterpret_cast<const reg_u*>(p); }
inline void write(float* p, reg x) { *reinterpret_cast<reg_u*>(p) = x; }
inline void fill(float value, reg& x) {
  // not `reg{} + value`, which is an addition: 0 + -0 is 0
#if defined(__AVX2__)
  x = reg{value, value, value, value, value, value, value, value};
#else
  x = reg{value, value, value, value};
#endif
}
inline void fill(int32_t value, ireg& x) { x = ireg{} + value; }
// a mask is 0 or -1: its sign is what a blend reads
inline reg select(ireg mask, reg a, reg b) { return mask < 0 ? a : b; }
inline ireg select(ireg mask, ireg a, ireg b) { return mask < 0 ? a : b; }
inline reg to_float(ireg x) { return __builtin_convertvector(x, reg); }
inline ireg to_int(reg x) { return __builtin_convertvector(x, ireg); }
// the same bits
inline reg as_float(ireg x) { return (reg)x; }
inline ireg as_int(reg x) { return (ireg)x; }

template <class Half>
inline void read(const float* p, Two<Half>& x) {
  read(p, x.low);
  read(p + sizeof(Half) / sizeof(float), x.high);
}
template <class Half>
inline void write(float* p, const Two<Half>& x) {
  write(p, x.low);
  write(p + sizeof(Half) / sizeof(float), x.high);
}
template <class Half>
inline void fill(typename Two<Half>::Lane value, Two<Half>& x) {
  fill(value, x.low);
  fill(value, x.high);
}
template <class Mask, class Half>
inline Two<Half> select(const Two<Mask>& mask, const Two<Half>& a, const Two<Half>& b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}
template <class Half>
inline auto to_float(const Two<Half>& x) -> Two<decltype(to_float(x.low))> {
  return {to_float(x.low), to_float(x.high)};
}
template <class Half>
inline auto to_int(const Two<Half>& x) -> Two<decltype(to_int(x.low))> {
  return {to_int(x.low), to_int(x.high)};
}

template <class Half>
inline auto as_float(const Two<Half>& x) -> Two<decltype(as_float(x.low))> {
  return {as_float(x.low), as_float(x.high)};
}
template <class Half>
inline auto as_int(const Two<Half>& x) -> Two<decltype(as_int(x.low))> {
  return {as_int(x.low), as_int(x.high)};
}

inline lanes load(const float* p) {
  lanes x;
  read(p, x);
  return x;
}
inline void store(float* p, const lanes& x) { write(p, x); }
inline lanes all(float value) {
  lanes x;
  fill(value, x);
  return x;
}
inline ilanes all_int(int32_t value) {
  ilanes x;
  fill(value, x);
  return x;
}

#endif

inline lanes larger(lanes a, lanes b) { return select(a > b, a, b); }
inline ilanes larger(ilanes a, ilanes b) { return select(a > b, a, b); }
inline ilanes smaller(ilanes a, ilanes b) { return select(a < b, a, b); }

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
TRILEVEL_INLINE lanes exp_neg(lanes x) {
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
  const ilanes k = to_int(n);
  return select(gone, lanes{}, p * as_float((k + 127) << 23));
#endif
}

// ln(x) for positive normal x. Cephes polynomial, error about 1 ulp
inline lanes log_pos(lanes x) {
  const ilanes bits = as_int(x);
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const ilanes e = (bits - 0x3f3504f3) >> 23;
  const lanes f = as_float(bits - (e << 23)) - 1.0f, n = to_float(e);
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
