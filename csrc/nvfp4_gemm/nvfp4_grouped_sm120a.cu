#include "nvfp4_gemm/grouped.cuh"

namespace nemo::nvfp4_gemm {

using Sm120 = GroupedKernel<cutlass::arch::Sm120,
                            cute::Shape<cute::_128, cute::_128, cute::_128>,
                            cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative,
                            cutlass::epilogue::collective::EpilogueScheduleAuto>;

size_t workspace_sm120a(const Grouped& p) { return Sm120::workspace(p); }

const char* run_sm120a(const Grouped& p, void* workspace, Stream stream) {
  return Sm120::run(p, workspace, stream);
}

}  // namespace nemo::nvfp4_gemm
