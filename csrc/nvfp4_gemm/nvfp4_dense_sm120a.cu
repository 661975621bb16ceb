#include "nvfp4_gemm/dense.cuh"

namespace nemo::nvfp4_gemm {

using Sm120 = DenseKernel<cutlass::arch::Sm120, cute::Shape<cute::_128, cute::_128, cute::_128>>;

size_t workspace_sm120a(const Dense& p) { return Sm120::workspace(p); }

const char* run_sm120a(const Dense& p, void* workspace, Stream stream) {
  return Sm120::run(p, workspace, stream);
}

}  // namespace nemo::nvfp4_gemm
