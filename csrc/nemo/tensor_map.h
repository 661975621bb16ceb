// How the tensor memory accelerator finds a box of a tensor of up to three axes, the first of which
// runs along memory. Boxes are 128 bytes wide; 16-byte piece c of their line y goes to piece
// c ^ y % 8 of the same 128 bytes in shared memory. What lies outside the tensor arrives as zeros.
#pragma once

#include "nemo/launch.h"

#ifdef USE_CUDA
#include <cuda.h>
#endif

namespace nemo {

inline constexpr int kBoxBytes = 128;

// Sizes are in elements, strides in bytes and multiples of 16; `lines` is the box's second size.
struct TensorShape {
  const void* data;
  int64_t size[3], stride[2];
  int lines;
};

#ifdef USE_CUDA

using TensorMap = CUtensorMap;

// Of elements T. Returns why not, or null.
template <class T>
const char* make_tensor_map(const TensorShape& shape, TensorMap& map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                       &result) != cudaSuccess || found == nullptr) {
    return "the driver cannot describe tensors to the tensor memory accelerator";
  }
  constexpr auto kType = sizeof(T) == 1               ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                         : std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t size[] = {cuuint64_t(shape.size[0]), cuuint64_t(shape.size[1]),
                             cuuint64_t(shape.size[2])};
  const cuuint64_t stride[] = {cuuint64_t(shape.stride[0]), cuuint64_t(shape.stride[1])};
  const cuuint32_t box[] = {kBoxBytes / sizeof(T), cuuint32_t(shape.lines), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult status = reinterpret_cast<Encode>(found)(
      &map, kType, 3, const_cast<void*>(shape.data), size, stride, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "the driver refused a tensor's description";
}

#else

struct TensorMap : TensorShape {
  int itemsize;
};

template <class T>
const char* make_tensor_map(const TensorShape& shape, TensorMap& map) {
  map = {shape, int(sizeof(T))};
  const bool aligned = reinterpret_cast<uintptr_t>(shape.data) % 16 == 0 &&
                       shape.stride[0] % 16 == 0 && shape.stride[1] % 16 == 0;
  return aligned && shape.lines <= 256 ? nullptr : "a tensor's description is not one";
}

#endif

}  // namespace nemo
