// Multi-level attention as an operator of ONNX Runtime: `MultiLevelAttention` of the domain `trilevel`.
//
// Inputs, (batch, tokens, heads, dim): query, key, value; optional: pool_weight (kv_heads, dim), score (batch, tokens),
// forced, valid (batch, tokens; bool), segment (batch, tokens; int64). Output as query. Bidirectional and calibrated.
#pragma once
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "abi.h"
#include "ort.h"

namespace trilevel {
namespace ort {

// of the operators that this thread runs; 0: one a core
inline thread_local int32_t num_threads = 0;

struct Tensor {
  void* data = nullptr;  // null: the input is left out
  std::vector<int64_t> shape;

  // (batch, tokens, heads, dim)
  trilevel_tensor rows() const {
    const int64_t token = shape[2] * shape[3];
    return {data, shape[1] * token, shape[3], token};
  }
};

class Kernel {
 public:
  Kernel(const OrtApi* api, const OrtKernelInfo* info) : api_(api) {
    const char* names[] = {"local", "regional", "global"};
    for (int i = 0; i < 3; i++) split_[i] = whole(info, names[i]);
    radius_ = whole(info, "radius");
    region_size_ = whole(info, "region_size");
    num_global_ = whole(info, "num_global_tokens");
    num_sinks_ = whole(info, "num_sinks");
    call(KERNEL_INFO_GET_ATTRIBUTE_FLOAT, info, "scale", &scale_);
  }

  void compute(OrtKernelContext* context) const {
    const Tensor query = input(context, 0), key = input(context, 1), value = input(context, 2);
    const bool is_right = query.shape.size() == 4 && key.shape.size() == 4 && key.shape == value.shape &&
                          query.shape[2] == split_[0] + split_[1] + split_[2] && query.shape[0] == key.shape[0] &&
                          query.shape[1] == key.shape[1] && query.shape[3] == key.shape[3];
    if (!is_right) throw std::runtime_error("trilevel: query, key and value are no (batch, tokens, heads, dim) of one size");
    Tensor out;
    out.shape = query.shape;
    OrtValue* made = nullptr;
    call(KERNEL_CONTEXT_GET_OUTPUT, context, size_t(0), query.shape.data(), query.shape.size(), &made);
    call(GET_TENSOR_MUTABLE_DATA, made, &out.data);

    trilevel_call given{};
    given.batch = query.shape[0], given.tokens = query.shape[1], given.heads = query.shape[2], given.dim = query.shape[3];
    given.kv_heads = key.shape[2];
    given.query = query.rows(), given.key = key.rows(), given.value = value.rows(), given.out = out.rows();
    const auto optional = [&](size_t index, int64_t rows, int64_t columns) {
      const Tensor found = input(context, index);
      const bool fits = !found.data || (found.shape.size() == 2 && found.shape[0] == rows && found.shape[1] == columns);
      const std::string wanted = "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
      if (!fits) throw std::runtime_error("trilevel: input " + std::to_string(index) + " is no " + wanted);
      return found.data;
    };
    given.pool_weight = static_cast<const float*>(optional(3, given.kv_heads, given.dim));
    given.score = static_cast<const float*>(optional(4, given.batch, given.tokens));
    given.forced = static_cast<const uint8_t*>(optional(5, given.batch, given.tokens));
    given.valid = static_cast<const uint8_t*>(optional(6, given.batch, given.tokens));
    given.segment = static_cast<const int64_t*>(optional(7, given.batch, given.tokens));
    // as ../impl/native.py: of one token more than there are no region is complete, as with any larger size
    const auto at_most = [](int64_t x, int64_t limit) { return int32_t(x < limit ? x : limit); };
    for (int i = 0; i < 3; i++) given.split[i] = int32_t(split_[i]);
    given.radius = at_most(radius_, given.tokens);
    given.region_size = given.chunk = at_most(region_size_, given.tokens + 1);
    given.num_global = at_most(num_global_, given.tokens);
    given.num_sinks = at_most(num_sinks_, given.tokens);
    given.threads = num_threads > 0 ? num_threads : int32_t(std::thread::hardware_concurrency());
    given.scale = scale_;
    if (trilevel_forward(&given)) throw std::runtime_error(std::string("trilevel: ") + trilevel_error());
  }

 private:
  template <class... Arguments>
  void call(Place place, Arguments... arguments) const {
    OrtStatus* status = at<OrtStatus* (*)(Arguments...)>(api_, place)(arguments...);
    if (!status) return;
    const std::string said = at<const char* (*)(const OrtStatus*)>(api_, GET_ERROR_MESSAGE)(status);
    at<void (*)(OrtStatus*)>(api_, RELEASE_STATUS)(status);
    throw std::runtime_error(said);
  }

  int64_t whole(const OrtKernelInfo* info, const char* name) const {
    int64_t value = 0;
    call(KERNEL_INFO_GET_ATTRIBUTE_INT64, info, name, &value);
    return value;
  }

  Tensor input(const OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    call(KERNEL_CONTEXT_GET_INPUT, context, index, &value);
    Tensor found;
    if (!value) return found;
    OrtTensorTypeAndShapeInfo* shape = nullptr;
    size_t count = 0;
    call(GET_TENSOR_TYPE_AND_SHAPE, value, &shape);
    call(GET_DIMENSIONS_COUNT, static_cast<const OrtTensorTypeAndShapeInfo*>(shape), &count);
    found.shape.resize(count);
    call(GET_DIMENSIONS, static_cast<const OrtTensorTypeAndShapeInfo*>(shape), found.shape.data(), count);
    at<void (*)(OrtTensorTypeAndShapeInfo*)>(api_, RELEASE_TENSOR_TYPE_AND_SHAPE)(shape);
    call(GET_TENSOR_MUTABLE_DATA, const_cast<OrtValue*>(value), &found.data);
    return found;
  }

  const OrtApi* api_;
  int64_t split_[3] = {}, radius_ = 0, region_size_ = 0, num_global_ = 0, num_sinks_ = 0;
  float scale_ = 0;
};

inline const OrtCustomOp OPERATOR{
    VERSION,
    [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info) -> void* { return new Kernel(api, info); },
    [](const OrtCustomOp*) { return "MultiLevelAttention"; },
    [](const OrtCustomOp*) { return "CPUExecutionProvider"; },
    [](const OrtCustomOp*, size_t index) { return index < 5 ? FLOAT : index < 7 ? BOOL : INT64; },
    [](const OrtCustomOp*) { return size_t(8); },
    [](const OrtCustomOp*, size_t) { return FLOAT; },
    [](const OrtCustomOp*) { return size_t(1); },
    [](void* kernel, OrtKernelContext* context) { static_cast<Kernel*>(kernel)->compute(context); },
    [](void* kernel) { delete static_cast<Kernel*>(kernel); },
    [](const OrtCustomOp*, size_t index) { return index < 3 ? REQUIRED : OPTIONAL; },
    [](const OrtCustomOp*, size_t) { return REQUIRED; },
};

inline OrtStatus* add_operators(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->get_api(VERSION);
  // it lives as long as the process: sessions do not say when they end
  static OrtCustomOpDomain* domain = nullptr;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  OrtStatus* failed = nullptr;
  if (!domain) {
    failed = at<OrtStatus* (*)(const char*, OrtCustomOpDomain**)>(api, CREATE_CUSTOM_OP_DOMAIN)("trilevel", &domain);
    if (!failed) failed = at<OrtStatus* (*)(OrtCustomOpDomain*, const OrtCustomOp*)>(api, CUSTOM_OP_DOMAIN_ADD)(domain, &OPERATOR);
  }
  if (failed) return failed;
  return at<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(api, ADD_CUSTOM_OP_DOMAIN)(options, domain);
}

}  // namespace ort
}  // namespace trilevel
