// What the dense and the grouped product share of CUTLASS.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "nvfp4_gemm/nvfp4_gemm.h"

namespace nemo::nvfp4_gemm {

using BlockScaled = cutlass::arch::OpClassBlockScaledTensorOp;
using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
using Operand = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
using Codes = Operand::DataType;
using Scale = Operand::ScaleFactorType;
using Out = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;  // of b^T: b's rows lie along the depth

// What shared memory the epilogue leaves holds stages of operands.
template <class Epilogue>
using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
    sizeof(typename Epilogue::SharedStorage))>;

inline cutlass::KernelHardwareInfo this_device() {
  cutlass::KernelHardwareInfo info;
  cudaGetDevice(&info.device_id);
  info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(info.device_id);
  return info;
}

template <class Gemm>
const char* launch(const typename Gemm::Arguments& args, void* workspace, Stream stream) {
  Gemm gemm;
  cutlass::Status status = Gemm::can_implement(args);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(args, workspace, stream);
  if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
  return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
}

}  // namespace nemo::nvfp4_gemm
