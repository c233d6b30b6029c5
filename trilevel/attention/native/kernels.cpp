// One library for each instruction set: this file, compiled with its flags.
#include <exception>
#include <string>

#include "backward.h"
#include "isa.h"
#include "ort_op.h"

namespace {

thread_local std::string last_error;

template <class Run>
int32_t guarded(Run run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

int32_t trilevel_abi_version(void) { return TRILEVEL_ABI_VERSION; }

const char* trilevel_error(void) { return last_error.c_str(); }

int32_t trilevel_forward(const trilevel_call* call) {
  return guarded([&] {
#if defined(__AVX512BF16__)
    if (call->dtype == TRILEVEL_BF16) return trilevel::forward<trilevel::Bf16>(*call);
#endif
    trilevel::forward<trilevel::F32>(*call);
  });
}

int32_t trilevel_backward(const trilevel_call* call, const trilevel_grads* grads) {
  return guarded([&] { trilevel::backward(*call, *grads); });
}

void trilevel_set_threads(int32_t threads) { trilevel::ort::num_threads = threads; }

// what ONNX Runtime looks for in a library of operators
TRILEVEL_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return trilevel::ort::add_operators(options, base);
}
}
