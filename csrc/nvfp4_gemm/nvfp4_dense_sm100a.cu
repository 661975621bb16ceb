#include "nvfp4_gemm/dense.cuh"

namespace nemo::nvfp4_gemm {

using Sm100 = DenseKernel<cutlass::arch::Sm100, cute::Shape<cute::_128, cute::_128, cute::_256>>;

size_t workspace_sm100a(const Dense& p) { return Sm100::workspace(p); }

const char* run_sm100a(const Dense& p, void* workspace, Stream stream) {
  return Sm100::run(p, workspace, stream);
}

}  // namespace nemo::nvfp4_gemm
