// The only bridge to torch: its stable C++ ABI, so that one binary serves torch 2.11 and later.
//
// Schemas of the namespace nemokernels_C are defined in Python; C++ implements them under
// NEMO_DEVICE_KEY. Compiled without USE_CUDA the key is CPU and the kernels are loops (see
// nemo/launch.h).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "nemo/launch.h"

#ifdef USE_CUDA
#define NEMO_DEVICE_KEY CUDA
#else
#define NEMO_DEVICE_KEY CPU
#endif

namespace nemo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device current and carries torch's current stream on it.
class OnDevice {
 public:
#ifdef USE_CUDA
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<Stream>(stream);
  }
  // Throws what a launch reported.
  void check() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }
#else
  explicit OnDevice(const Tensor&) {}
  void check() const {}
#endif
  Stream stream() const { return stream_; }

 private:
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
};

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kF32;
    case ScalarType::BFloat16: return Dtype::kBF16;
    case ScalarType::Half: return Dtype::kF16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// Calls f with a value of the kernel's type for this tensor's dtype.
template <class F>
void with_dtype(const Tensor& tensor, F&& f) {
  switch (dtype_of(tensor)) {
    case Dtype::kF32: return f(float{});
    case Dtype::kBF16: return f(bf16{});
    case Dtype::kF16: return f(fp16{});
  }
}

inline const int32_t* int32_data(const std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Int, "expected int32");
  return static_cast<const int32_t*>(tensor->data_ptr());
}

}  // namespace nemo
