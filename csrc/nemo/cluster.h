// Launching one cluster of blocks that works in steps.
//
//   struct Kernel {
//     using Params = ...;                 // plain data: pointers, sizes, strides
//     struct Shared { ... };              // one per block
//     static constexpr int kThreads;      // per block
//     static constexpr int kSteps;
//     template <int kStep>
//     static NEMO_HD void step(const Params&, int block, int blocks, int thread, Shared&);
//   };
//
// All blocks do step 0. The first block does the others, and each thread sees in them what all
// threads wrote to global memory before. A cluster needs compute capability 9.0, and no counter that
// somebody must have cleared.
//
// Compiled as plain C++ (without USE_CUDA) this is a loop over the same steps, blocks and threads,
// last block and thread first: what one of them needs from another must lie in an earlier step.
#pragma once

#include <memory>

#include "nemo/launch.h"

namespace nemo {

inline constexpr int kMostBlocks = 8;  // of a cluster that any device can run

#ifdef __CUDACC__

template <class Kernel, int kStep>
__device__ void steps_from(const typename Kernel::Params& params, typename Kernel::Shared& shared) {
  if constexpr (kStep < Kernel::kSteps) {
    Kernel::template step<kStep>(params, 0, gridDim.x, threadIdx.x, shared);
    __syncthreads();
    steps_from<Kernel, kStep + 1>(params, shared);
  }
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    run_cluster(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(memory);
  Kernel::template step<0>(params, blockIdx.x, gridDim.x, threadIdx.x, shared);
  if (gridDim.x == 1) {
    __syncthreads();
  } else {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (blockIdx.x > 0) return;
  }
  steps_from<Kernel, 1>(params, shared);
}

// Returns why the device cannot run it, or null.
template <class Kernel>
const char* launch_cluster(const typename Kernel::Params& params, int blocks, Stream stream) {
  constexpr int kBytes = sizeof(typename Kernel::Shared);
  cudaError_t status = cudaFuncSetAttribute(
      run_cluster<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&config, run_cluster<Kernel>, params);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

#elif !defined(USE_CUDA)

template <class Kernel, int kStep>
void run_steps(const typename Kernel::Params& params, int blocks,
               typename Kernel::Shared* shared) {
  if constexpr (kStep < Kernel::kSteps) {
    for (int block = kStep == 0 ? blocks : 1; block-- > 0;) {
      for (int thread = Kernel::kThreads; thread-- > 0;) {
        Kernel::template step<kStep>(params, block, blocks, thread, shared[block]);
      }
    }
    run_steps<Kernel, kStep + 1>(params, blocks, shared);
  }
}

template <class Kernel>
const char* launch_cluster(const typename Kernel::Params& params, int blocks, Stream) {
  using Shared = typename Kernel::Shared;
  const auto shared = std::make_unique<Shared[]>(blocks);
  std::memset(static_cast<void*>(shared.get()), 0xA5, blocks * sizeof(Shared));  // nobody's zeros
  run_steps<Kernel, 0>(params, blocks, shared.get());
  return nullptr;
}

#endif

}  // namespace nemo
