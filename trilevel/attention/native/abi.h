// The plain C interface of the native kernels: one struct in, tensors as pointers with strides, no libtorch.
#pragma once
#include <stdint.h>

#define TRILEVEL_ABI_VERSION 2

#define TRILEVEL_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { TRILEVEL_F32 = 0, TRILEVEL_BF16 = 1 } trilevel_dtype;

// (batch, heads, tokens, dim) with the last dimension contiguous; strides in elements
typedef struct {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
} trilevel_tensor;

// arguments of `multi_level_attention` after validation; field order is mirrored in ../impl/native.py
typedef struct {
  int64_t batch, heads, kv_heads, tokens, dim;
  trilevel_tensor query, key, value, out;
  float* lse;                // (batch, heads, tokens) or null
  const float* pool_weight;  // (kv_heads, dim) or null
  const float* score;        // (batch, tokens) or null
  const float* rope_cos;     // (rope_batch, tokens, dim / 2) or null: query and key are rotated on the way in
  const float* rope_sin;
  const uint8_t* forced;   // (batch, tokens) or null
  const uint8_t* valid;    // (batch, tokens) or null, 1 = real token
  const int64_t* segment;  // (batch, tokens), non-decreasing, or null
  int32_t rope_batch;
  int32_t dtype;     // of query, key, value and out
  int32_t split[3];  // query heads: local, regional, global
  int32_t radius;
  int32_t region_size, num_regions;  // exactly one is > 0
  int32_t num_global, num_sinks, chunk;
  int32_t is_union, has_gate_bias, is_causal, is_strict;
  int32_t threads;
  float scale;
} trilevel_call;

// gradients, float32 and contiguous, zeroed by the caller; `score`, `pool_weight` may be null
typedef struct {
  trilevel_tensor grad_out;  // of the call's type
  const float* grad_lse;     // (batch, heads, tokens) or null
  float *query, *key, *value;  // (batch, heads or kv_heads, tokens, dim)
  float* pool_weight;          // (kv_heads, dim)
  float* score;                // (batch, tokens)
} trilevel_grads;

TRILEVEL_EXPORT int32_t trilevel_abi_version(void);
// 0, or 1 with the reason in `trilevel_error` (of this thread)
TRILEVEL_EXPORT int32_t trilevel_forward(const trilevel_call* call);
TRILEVEL_EXPORT int32_t trilevel_backward(const trilevel_call* call, const trilevel_grads* grads);
TRILEVEL_EXPORT const char* trilevel_error(void);
// threads of the operators that a runtime calls in this thread; 0: one a core
TRILEVEL_EXPORT void trilevel_set_threads(int32_t threads);
// whether this processor and kernel run the path of that name; portable library only
TRILEVEL_EXPORT int32_t trilevel_supports(const char* isa);

#ifdef __cplusplus
}
#endif
