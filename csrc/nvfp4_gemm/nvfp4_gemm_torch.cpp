// nemokernels_C::nvfp4_product and nvfp4_grouped_product: tensors to parameters. Callers have
// checked shapes and dtypes and allocated the output.
#include <torch/csrc/stable/ops.h>

#include "nvfp4_gemm/nvfp4_gemm.h"
#include "torch_stable.h"

#ifndef USE_CUDA
#include "nvfp4_gemm/host.h"
#endif

namespace nemo::nvfp4_gemm {
namespace {

const void* bytes(const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.is_contiguous() && t.numel() == count,
                  "expected contiguous bytes, as many as the sizes say");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % kAlignment == 0,
                  "expected operands aligned to 16 bytes");
  return t.data_ptr();
}

const float* alphas(const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count,
                  "expected one float32 factor per product");
  return static_cast<const float*>(t.data_ptr());
}

template <class Problem>
void fill(Problem& p, const Tensor& a, const Tensor& out) {
  p.rows = out.size(0);
  p.columns = out.size(1);
  p.depth = a.size(1) * 2;
  for (int64_t size : {p.rows, p.columns, p.depth}) {
    STD_TORCH_CHECK(0 < size && size < (int64_t{1} << 31), "expected sizes from 1 to 2^31 - 1");
  }
  STD_TORCH_CHECK(p.depth % kDepthUnit == 0 && p.columns % kColumnUnit == 0,
                  "expected K in multiples of 32 and N in multiples of 8");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::BFloat16 && out.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(out.data_ptr()) % kAlignment == 0,
                  "expected a contiguous bfloat16 result aligned to 16 bytes");
  p.a = bytes(a, p.rows * p.depth / 2);
  p.out = out.data_ptr();
}

#ifdef USE_CUDA
template <class Problem>
void launch(const Problem& p, const Tensor& like, const OnDevice& device,
            size_t (*workspace)(const Problem&),
            const char* (*run)(const Problem&, void*, Stream)) {
  const Tensor scratch = torch::stable::new_empty(
      like, {static_cast<int64_t>(workspace(p))}, ScalarType::Byte);
  const char* refused = run(p, scratch.data_ptr(), device.stream());
  STD_TORCH_CHECK(refused == nullptr, "CUTLASS: ", refused ? refused : "");
  device.check();
}
#endif

template <class Problem>
void dispatch(const Problem& p, const Tensor& like, const OnDevice& device) {
#ifdef USE_CUDA
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, like.get_device_index());
#ifdef NEMO_SM100A
  if (major == 10) return launch<Problem>(p, like, device, workspace_sm100a, run_sm100a);
#endif
#ifdef NEMO_SM120A
  if (major == 12) return launch<Problem>(p, like, device, workspace_sm120a, run_sm120a);
#endif
  STD_TORCH_CHECK(false, "this library has no NVFP4 products for this device");
#else
  run_host(p);
#endif
}

void product(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor alpha, Tensor out) {
  const OnDevice device(a);
  Dense p{};
  fill(p, a, out);
  p.a_scales = bytes(a_scales, scale_bytes(p.rows, p.depth));
  p.b = bytes(b, p.columns * p.depth / 2);
  p.b_scales = bytes(b_scales, scale_bytes(p.columns, p.depth));
  p.alpha = alphas(alpha, 1);
  dispatch(p, a, device);
}

void grouped(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor alpha, Tensor offsets,
             bool squared_relu, int64_t first, Tensor out) {
  const OnDevice device(a);
  Grouped p{};
  fill(p, a, out);
  p.experts = offsets.numel();
  STD_TORCH_CHECK(0 < p.experts && offsets.scalar_type() == ScalarType::Int &&
                      offsets.is_contiguous(),
                  "expected int32 ends of the rows of one expert or more");
  p.offsets = static_cast<const int32_t*>(offsets.data_ptr());
  // Every expert that has rows may leave all but one row of a tile empty.
  const int64_t used = p.experts < p.rows ? p.experts : p.rows;
  p.a_scales = bytes(a_scales, scale_bytes((p.rows + 127 * used) / 128 * 128, p.depth));
  p.b_columns = b.dim() == 3 ? b.size(1) : 0;
  p.first_column = first;
  STD_TORCH_CHECK(first >= 0 && first % 128 == 0 && first + p.columns <= p.b_columns,
                  "expected columns of b, from a multiple of 128 on");
  p.b = bytes(b, p.experts * p.b_columns * p.depth / 2);
  p.b_scales = bytes(b_scales, p.experts * scale_bytes(p.b_columns, p.depth));
  p.alpha = alphas(alpha, p.experts);
  p.squared_relu = squared_relu;
  dispatch(p, a, device);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nemokernels_C, NEMO_DEVICE_KEY, m) {
  m.impl("nvfp4_product", TORCH_BOX(&product));
  m.impl("nvfp4_grouped_product", TORCH_BOX(&grouped));
}

}  // namespace nemo::nvfp4_gemm
