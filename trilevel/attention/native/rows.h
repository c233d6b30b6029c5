// Reading and writing rows of the caller's tensors: type, stride, padding of the head dimension, rotary positions.
#pragma once
#include <cstdlib>
#include <new>

#include "abi.h"
#include "engine.h"

namespace trilevel {
namespace {

// memory for vector loads, 64-byte aligned, grown and never shrunk, not initialised
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  ~Buffer() { std::free(data_); }
  T* get(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = 0;
      const size_t bytes = (size_t(size) * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

inline void convert_bf16(const uint16_t* in, int count, float* out) {
  typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));
  typedef uint32_t u32x16 __attribute__((vector_size(64)));
  int c = 0;
  for (; c + LANES <= count; c += LANES) {
    const u16x16 x = *reinterpret_cast<const u16x16*>(in + c);
    const u32x16 y = __builtin_convertvector(x, u32x16) << 16;
    std::memcpy(out + c, &y, sizeof y);
  }
  for (; c < count; c++) out[c] = bf16_to_float(in[c]);
}

// rows of one head of one sequence
struct Source {
  const char* base;
  int64_t stride;  // bytes from token to token
  int dtype, dim, padded;
  const float *cos, *sin;  // of the sequence, or null

  const void* row(int64_t token) const { return base + token * stride; }

  void read(int64_t token, float* out) const {
    if (dtype == TRILEVEL_BF16)
      convert_bf16(static_cast<const uint16_t*>(row(token)), dim, out);
    else
      std::memcpy(out, row(token), dim * sizeof(float));
    for (int c = dim; c < padded; c++) out[c] = 0;
    if (cos) rotate(token, out);
  }

  // a page of 4 KiB holds 16 rows of 64 floats, and the hardware does not look beyond it
  void expect(int64_t begin, int64_t end) const {
    const int bytes = dim * (dtype == TRILEVEL_BF16 ? 2 : 4);
    for (int64_t i = begin; i < end; i++)
      for (int c = 0; c < bytes; c += 64) __builtin_prefetch(static_cast<const char*>(row(i)) + c);
  }

  // the row itself where it can be read as it is, else `temp`
  const float* view(int64_t token, float* temp) const {
    if (dtype == TRILEVEL_F32 && dim == padded && !cos) return static_cast<const float*>(row(token));
    read(token, temp);
    return temp;
  }

 private:
  void rotate(int64_t token, float* out) const {
    const int half = dim / 2;
    const float *a = cos + token * half, *b = sin + token * half;
    int c = 0;
    for (; c + LANES <= half; c += LANES) {
      const lanes left = load(out + c), right = load(out + c + half);
      store(out + c, left * load(a + c) - right * load(b + c));
      store(out + c + half, right * load(a + c) + left * load(b + c));
    }
    for (; c < half; c++) {
      const float left = out[c], right = out[c + half];
      out[c] = left * a[c] - right * b[c];
      out[c + half] = right * a[c] + left * b[c];
    }
  }
};

inline Source source(const trilevel_call& call, const trilevel_tensor& x, int64_t b, int64_t head, int padded, bool rotated) {
  const int64_t size = call.dtype == TRILEVEL_BF16 ? 2 : 4;
  const int64_t tables = (call.rope_batch > 1 ? b : 0) * call.tokens * (call.dim / 2);
  return {static_cast<const char*>(x.data) + (b * x.batch_stride + head * x.head_stride) * size,
          x.token_stride * size,
          call.dtype,
          int(call.dim),
          padded,
          rotated && call.rope_cos ? call.rope_cos + tables : nullptr,
          rotated && call.rope_sin ? call.rope_sin + tables : nullptr};
}

inline char* row_address(const trilevel_call& call, const trilevel_tensor& x, int64_t b, int64_t head, int64_t token) {
  const int64_t at = b * x.batch_stride + head * x.head_stride + token * x.token_stride;
  return static_cast<char*>(x.data) + at * (call.dtype == TRILEVEL_BF16 ? 2 : 4);
}

// outputs larger than this are written past the caches: tokens before heads, a head's rows are far apart, and reading
// lines in order to overwrite them costs more than a fifth of a local head
constexpr int64_t STREAMED_BYTES = int64_t(4) << 20;

inline bool is_streamed(const trilevel_call& call) {
  const int64_t row = call.dim * (call.dtype == TRILEVEL_BF16 ? 2 : 4);
  const int64_t unit = 64, strides = call.out.batch_stride | call.out.head_stride | call.out.token_stride;
  const int64_t bytes = strides * (call.dtype == TRILEVEL_BF16 ? 2 : 4);
  return row % unit == 0 && bytes % unit == 0 && reinterpret_cast<uintptr_t>(call.out.data) % unit == 0 &&
         row * call.heads * call.tokens * call.batch > STREAMED_BYTES;
}

inline void end_streaming() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// write a row times a factor (0: zeros, whatever the row holds); returns lanes that are not 0 where anything is not finite
inline lanes write_row(const trilevel_call& call, const trilevel_tensor& x, int64_t b, int64_t head, int64_t token, const float* row,
                       float factor, bool streamed) {
  char* at = row_address(call, x, b, head, token);
  const int dim = int(call.dim);
  lanes doubt{};
  int c = 0;
#if defined(__AVX512F__)
  if (streamed && call.dtype == TRILEVEL_F32) {
    for (; c < dim; c += LANES) {
      const lanes y = factor != 0 ? load(row + c) * factor : lanes{};
      doubt += y * 0.0f;
      _mm512_stream_ps(reinterpret_cast<float*>(at) + c, (__m512)y);
    }
    return doubt;
  }
#endif
#if defined(__AVX512BF16__)
  if (streamed) {
    for (; c < dim; c += 2 * LANES) {
      const lanes y = factor != 0 ? load(row + c) * factor : lanes{}, z = factor != 0 ? load(row + c + LANES) * factor : lanes{};
      doubt += (y + z) * 0.0f;
      _mm512_stream_si512(reinterpret_cast<__m512i*>(at + 2 * c), (__m512i)_mm512_cvtne2ps_pbh((__m512)z, (__m512)y));
    }
    return doubt;
  }
#endif
  (void)streamed;
  for (; c < dim; c += LANES) {
    const lanes y = factor != 0 ? load(row + c) * factor : lanes{};
    const int n = dim - c < LANES ? dim - c : LANES;
    doubt += y * 0.0f;
    if (call.dtype == TRILEVEL_F32) {
      if (n == LANES)
        store(reinterpret_cast<float*>(at) + c, y);
      else
        std::memcpy(at + c * sizeof(float), &y, n * sizeof(float));
      continue;
    }
#if defined(__AVX512BF16__)
    const __m256bh z = _mm512_cvtneps_pbh((__m512)y);
    if (n == LANES) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 2 * c), (__m256i)z);
      continue;
    }
#else
    uint16_t z[LANES];
    for (int i = 0; i < LANES; i++) z[i] = float_to_bf16(y[i]);
#endif
    std::memcpy(at + 2 * c, &z, 2 * n);
  }
  return doubt;
}

inline void add_row(float* total, const float* row, int padded) {
  for (int c = 0; c < padded; c += LANES) store(total + c, load(total + c) + load(row + c));
}

inline void add_scaled(float* total, float factor, const float* row, int padded) {
  for (int c = 0; c < padded; c += LANES) store(total + c, load(total + c) + factor * load(row + c));
}

// ask for the cache lines of rows that will be written
inline void expect_rows(const trilevel_call& call, const trilevel_tensor& x, int64_t b, int64_t head, int begin, int end) {
  const int bytes = int(call.dim) * (call.dtype == TRILEVEL_BF16 ? 2 : 4);
  for (int i = begin; i < end; i++) {
    const char* at = row_address(call, x, b, head, i);
    for (int c = 0; c < bytes; c += 64) __builtin_prefetch(at + c, 1);
  }
}

inline float dot(const float* a, const float* b, int padded) {
  lanes total{};
  for (int c = 0; c < padded; c += LANES) total += load(a + c) * load(b + c);
  return sum(total);
}

}  // namespace
}  // namespace trilevel
