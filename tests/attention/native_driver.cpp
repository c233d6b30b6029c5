// Runs calls of the native kernels from a file: what a machine without Python, or an emulated one, can do.
//
//   native_driver CALLS RESULTS
//
// CALLS: for each call the fields of `read_call` (int64), the scale (double), then the tensors that the fields announce,
// contiguous. RESULTS: for each call out, log-sum-exp, the gradients of query, key, value, pool_weight and score.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "abi.h"

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "native_driver: %s\n", what);
  std::exit(1);
}

struct Reader {
  FILE* file;

  template <class T>
  bool try_read(T* to, int64_t count) {
    return std::fread(to, sizeof(T), size_t(count), file) == size_t(count);
  }
  template <class T>
  std::vector<T> read(int64_t count, bool is_there = true) {
    std::vector<T> values(is_there ? size_t(count) : 0);
    if (is_there && !try_read(values.data(), count)) fail("the file of calls is cut short");
    return values;
  }
};

template <class T>
void write(FILE* file, const std::vector<T>& values) {
  if (std::fwrite(values.data(), sizeof(T), values.size(), file) != values.size()) fail("results cannot be written");
}

template <class T>
T* address(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

trilevel_tensor tensor(std::vector<uint8_t>& bytes, const trilevel_call& call, int64_t heads) {
  return {bytes.data(), heads * call.tokens * call.dim, call.tokens * call.dim, call.dim};
}

enum Field {
  BATCH, HEADS, KV_HEADS, TOKENS, DIM, DTYPE, LOCAL, REGIONAL, GLOBAL, RADIUS, REGION_SIZE, NUM_REGIONS, NUM_GLOBAL,
  NUM_SINKS, CHUNK, IS_UNION, HAS_GATE_BIAS, IS_CAUSAL, THREADS, HAS_POOL_WEIGHT, HAS_SCORE, HAS_FORCED, HAS_VALID,
  HAS_SEGMENT, FIELDS
};

trilevel_call read_call(const int64_t* field, double scale) {
  trilevel_call call = {};
  call.batch = field[BATCH], call.heads = field[HEADS], call.kv_heads = field[KV_HEADS];
  call.tokens = field[TOKENS], call.dim = field[DIM], call.dtype = int32_t(field[DTYPE]);
  for (int i = 0; i < 3; i++) call.split[i] = int32_t(field[LOCAL + i]);
  call.radius = int32_t(field[RADIUS]);
  call.region_size = int32_t(field[REGION_SIZE]), call.num_regions = int32_t(field[NUM_REGIONS]);
  call.num_global = int32_t(field[NUM_GLOBAL]), call.num_sinks = int32_t(field[NUM_SINKS]);
  call.chunk = int32_t(field[CHUNK]), call.is_union = int32_t(field[IS_UNION]);
  call.has_gate_bias = int32_t(field[HAS_GATE_BIAS]), call.is_causal = int32_t(field[IS_CAUSAL]);
  call.threads = int32_t(field[THREADS]), call.rope_batch = 1, call.scale = float(scale);
  return call;
}

void run(const int64_t* field, Reader& in, FILE* out_file) {
  trilevel_call call = read_call(field, in.read<double>(1)[0]);
  const int64_t size = call.dtype == TRILEVEL_BF16 ? 2 : 4, plane = call.batch * call.tokens * call.dim;
  const int64_t queries = call.heads * plane, keys = call.kv_heads * plane, places = call.batch * call.tokens;
  auto query = in.read<uint8_t>(queries * size), key = in.read<uint8_t>(keys * size), value = in.read<uint8_t>(keys * size);
  auto grad_out = in.read<uint8_t>(queries * size);
  auto grad_lse = in.read<float>(call.heads * places);
  auto pool_weight = in.read<float>(call.kv_heads * call.dim, field[HAS_POOL_WEIGHT]);
  auto score = in.read<float>(places, field[HAS_SCORE]);
  auto forced = in.read<uint8_t>(places, field[HAS_FORCED]), valid = in.read<uint8_t>(places, field[HAS_VALID]);
  auto segment = in.read<int64_t>(places, field[HAS_SEGMENT]);
  std::vector<uint8_t> out(size_t(queries * size));
  std::vector<float> lse(size_t(call.heads * places));
  call.query = tensor(query, call, call.heads), call.out = tensor(out, call, call.heads);
  call.key = tensor(key, call, call.kv_heads), call.value = tensor(value, call, call.kv_heads);
  call.lse = lse.data(), call.pool_weight = address(pool_weight), call.score = address(score);
  call.forced = address(forced), call.valid = address(valid), call.segment = address(segment);
  if (trilevel_forward(&call)) fail(trilevel_error());

  std::vector<float> query_grad(size_t(queries), 0), key_grad(size_t(keys), 0), value_grad(size_t(keys), 0);
  std::vector<float> pool_grad(pool_weight.size(), 0), score_grad(score.size(), 0);
  trilevel_grads grads = {};
  grads.grad_out = tensor(grad_out, call, call.heads), grads.grad_lse = grad_lse.data();
  grads.query = query_grad.data(), grads.key = key_grad.data(), grads.value = value_grad.data();
  grads.pool_weight = address(pool_grad), grads.score = address(score_grad);
  if (trilevel_backward(&call, &grads)) fail(trilevel_error());

  write(out_file, out);
  for (const auto* values : {&lse, &query_grad, &key_grad, &value_grad, &pool_grad, &score_grad}) write(out_file, *values);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) fail("usage: native_driver CALLS RESULTS");
  Reader in{std::fopen(arguments[1], "rb")};
  FILE* out = std::fopen(arguments[2], "wb");
  if (!in.file || !out) fail("a file cannot be opened");
  if (trilevel_abi_version() != TRILEVEL_ABI_VERSION) fail("the kernels have another interface");
  int64_t field[FIELDS];
  while (in.try_read(field, FIELDS)) run(field, in, out);
  return std::fclose(out) ? 1 : 0;
}
