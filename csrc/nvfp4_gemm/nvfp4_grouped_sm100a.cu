#include "nvfp4_gemm/grouped.cuh"

namespace nemo::nvfp4_gemm {

using Sm100 = GroupedKernel<cutlass::arch::Sm100,
                            cute::Shape<cute::_128, cute::_128, cute::_256>,
                            cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmNvf4Sm100,
                            cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm>;

size_t workspace_sm100a(const Grouped& p) { return Sm100::workspace(p); }

const char* run_sm100a(const Grouped& p, void* workspace, Stream stream) {
  return Sm100::run(p, workspace, stream);
}

}  // namespace nemo::nvfp4_gemm
