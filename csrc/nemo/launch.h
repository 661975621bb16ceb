// Launching a kernel that is written as two functions of (params, block, thread, shared memory).
//
//   struct Kernel {
//     using Params = ...;                 // plain data: pointers, sizes, strides
//     struct Shared { ... };              // one per block
//     static constexpr int kThreads;      // per block
//     static constexpr int kMinBlocks;    // per multiprocessor, bounds the registers
//     static constexpr bool kReduces;     // whether finish() runs, after a barrier
//     static NEMO_HD void walk(const Params&, int64_t block, int thread, Shared&);
//     static NEMO_HD void finish(const Params&, int64_t block, int thread, Shared&);
//   };
//
// Compiled as CUDA this is a grid of blocks. Compiled as plain C++ (without USE_CUDA) it is a loop
// over the same blocks and threads: index arithmetic, tails and sequence logic can be tested
// without a GPU.
#pragma once

#include "nemo/core.h"

#ifdef USE_CUDA
#include <cuda_runtime.h>
#endif

namespace nemo {

struct Empty {};

// How two kernels that follow each other on a stream overlap: the first lets the second start once
// all of its blocks have called, and the second, launched with kEarly, waits for the whole of the
// first, and its writes, before it reads what that has written. The first itself must not be early:
// all before it is then complete for both. Elsewhere neither does anything.
NEMO_HD void let_next_start() {
#ifdef __CUDA_ARCH__
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

NEMO_HD void wait_for_previous() {
#ifdef __CUDA_ARCH__
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifdef USE_CUDA
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif

#ifdef __CUDACC__

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    run(const __grid_constant__ typename Kernel::Params params) {
  __shared__ typename Kernel::Shared shared;
  Kernel::walk(params, blockIdx.x, threadIdx.x, shared);
  if constexpr (Kernel::kReduces) {
    __syncthreads();
    Kernel::finish(params, blockIdx.x, threadIdx.x, shared);
  }
}

template <class Kernel, bool kEarly = false>
void launch(const typename Kernel::Params& params, int64_t blocks, Stream stream) {
  if (blocks <= 0) return;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(Kernel::kThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = kEarly ? 1 : 0;
  cudaLaunchKernelEx(&config, run<Kernel>, params);  // whoever launches asks for the last error
}

#elif !defined(USE_CUDA)

template <class Kernel, bool kEarly = false>
void launch(const typename Kernel::Params& params, int64_t blocks, Stream) {
  for (int64_t block = blocks; block-- > 0;) {  // a block that writes another's part shows
    typename Kernel::Shared shared;
    for (int thread = 0; thread < Kernel::kThreads; ++thread) {
      Kernel::walk(params, block, thread, shared);
    }
    if constexpr (Kernel::kReduces) {
      for (int thread = 0; thread < Kernel::kThreads; ++thread) {
        Kernel::finish(params, block, thread, shared);
      }
    }
  }
}

#endif

}  // namespace nemo
