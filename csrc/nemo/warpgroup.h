// Code for a warpgroup, 128 threads, that the host can run: values per thread, a loop over the
// threads, and what Hopper adds to move tiles into shared memory and to multiply them there.
//
// Barriers, copies and products are asynchronous. On the host (warpgroup_host.h) each warpgroup is
// a thread of its own, and what is asynchronous happens as late as the order that was asked for
// allows, so that a missing wait or fence shows.
#pragma once

#include "nemo/tensor_map.h"
#include "nemo/warp.h"

#ifdef USE_CUDA
#define NEMO_DEVICE __device__ __forceinline__
#else
#define NEMO_DEVICE inline
#endif

namespace nemo {

inline constexpr int kWarpgroup = 128;
inline constexpr int kProductBytes = 32;  // of the depth that a product takes

template <class T>
struct PerThread {
#ifdef USE_CUDA
  T value;
  NEMO_DEVICE T& operator[](int) { return value; }
#else
  T value[kWarpgroup];
  T& operator[](int thread) { return value[thread]; }
#endif
};

// f(thread) for the threads of the warpgroup that this thread runs.
template <class F>
NEMO_DEVICE void each_thread(F f) {
#ifdef USE_CUDA
  f(int(threadIdx.x) % kWarpgroup);
#else
  for (int thread = 0; thread < kWarpgroup; ++thread) f(thread);
#endif
}

// Sums of a product of 64 rows by kColumns columns. Thread t holds, of rows 16 * (t / 32) + t % 32 /
// 4 (and 8 further), columns 2 * (t % 4) and the next of every 8: in the order first row, second row
// of the first 8 columns, then of the next.
template <int kColumns>
struct Sums {
  float value[kColumns / 2];
};

// Which of kStages comes next, and the parity of its barriers' phase.
template <int kStages>
struct Turn {
  int stage = 0, parity = 0;

  NEMO_DEVICE void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Whether this thread runs what the first thread of its warpgroup does. A thread that waits for a
// barrier must be one that the barrier waits for: else it may miss two phases, which look like none.
NEMO_DEVICE bool is_first() {
#ifdef USE_CUDA
  return threadIdx.x % kWarpgroup == 0;
#else
  return true;
#endif
}

// Where a product reads an operand in shared memory, in lines of 128 bytes as TensorMap lays them.
// Along the depth: a line is 64 of it for one row. Across: a line is 64 rows at one depth, and
// `apart` bytes lie between blocks of 64 rows.
NEMO_DEVICE uint64_t operand(uint32_t address, int apart = 16) {
  constexpr uint64_t kEightLines = 8 * kBoxBytes / 16, kSwizzle128 = uint64_t{1} << 62;
  return (address >> 4 & 0x3FFF) | uint64_t(apart >> 4) << 16 | kEightLines << 32 | kSwizzle128;
}

}  // namespace nemo

#ifdef USE_CUDA

#ifdef __CUDACC__

namespace nemo {

NEMO_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Counts arrivals, and bytes that are announced and delivered. A phase ends when both are complete;
// parity is that of the phase's number.
struct Barrier {
  uint64_t state;

  NEMO_DEVICE void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals));
  }
  NEMO_DEVICE void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Arrives and announces bytes.
  NEMO_DEVICE void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(this)), "r"(bytes) : "memory");
  }
  NEMO_DEVICE void wait(int parity) {
    uint32_t done;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(done) : "r"(shared_address(this)), "r"(parity) : "memory");
    } while (!done);
  }
};

// Makes initialised barriers visible to the accelerator; a barrier of the block must follow.
NEMO_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A box of a tensor from (x, y, z) on; its bytes are delivered to the barrier.
NEMO_DEVICE void load_box(void* to, const TensorMap& map, Barrier& barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z) : "memory");
}

// 16 bytes, zeros unless inside.
NEMO_DEVICE void copy_16(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(inside ? 16 : 0) : "memory");
}
NEMO_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last kLeft groups of this thread's copies are complete.
template <int kLeft>
NEMO_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
// What this thread has stored in shared memory becomes visible to products.
NEMO_DEVICE void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers per thread of this warpgroup.
template <int kCount>
NEMO_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
NEMO_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Before the first product of a group: the sums are ready.
NEMO_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
NEMO_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the last kLeft groups of products are complete.
template <int kLeft>
NEMO_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// 16 bytes or a multiple; they are delivered to the barrier.
NEMO_DEVICE void copy_bulk(void* to, const void* from, int bytes, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(&barrier)) : "memory");
}

// Element (i, j) of a block whose thread 4 i + j / 2 of a warp holds pairs of 16 bits becomes (j, i).
NEMO_DEVICE void turn_8_by_8(PerThread<uint32_t>& value) {
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(value.value));
}

// The sums of finished products: nothing that reads them may move up past the wait.
template <int kColumns, int kMost>
NEMO_DEVICE void settle(PerThread<Sums<kMost>>& sums) {
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) asm volatile("" : "+f"(sums.value.value[i])::"memory");
}

// One arrival per warp, for all its threads.
NEMO_DEVICE void release(Barrier& empty) {
  __syncwarp();
  if (threadIdx.x % kLanes == 0) empty.arrive();
}

// The value of the thread whose number differs in these bits, below 32.
NEMO_DEVICE void exchange(PerThread<uint32_t>& value, int bits) {
  value.value = __shfl_xor_sync(0xFFFFFFFFu, value.value, bits);
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kWarpgroups* kWarpgroup, 1)
    run_warpgroups(const __grid_constant__ typename Kernel::Params params) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(memory);
  if (threadIdx.x == 0) {
    Kernel::setup(shared);
    publish_barriers();
  }
  __syncthreads();
  const int which = __shfl_sync(0xFFFFFFFFu, int(threadIdx.x) / kWarpgroup, 0);
  Kernel::run(params, blockIdx.x, gridDim.x, which, shared);
#else
  asm volatile("trap;");
#endif
}

inline int device_attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

// Before a tensor map is made, too, which needs the context that this sees to. Returns why the
// device cannot run the kernel, or null.
template <class Kernel>
const char* prepare_warpgroups() {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9 ||
      device_attribute(cudaDevAttrComputeCapabilityMinor) != 0) {
    return "needs a device of compute capability 9.0";
  }
  const cudaError_t status =
      cudaFuncSetAttribute(run_warpgroups<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           int(sizeof(typename Kernel::Shared)));
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// One block per multiprocessor, at most `most`.
template <class Kernel>
void launch_warpgroups(const typename Kernel::Params& params, int64_t most, Stream stream) {
  if (most <= 0) return;
  constexpr int kBytes = sizeof(typename Kernel::Shared);
  const int count = device_attribute(cudaDevAttrMultiProcessorCount);
  run_warpgroups<Kernel><<<unsigned(smaller<int64_t>(count, most)),
                           Kernel::kWarpgroups * kWarpgroup, kBytes, stream>>>(params);
}

}  // namespace nemo

#endif  // __CUDACC__
#else
#include "nemo/warpgroup_host.h"
#endif

#if defined(__CUDACC__) || !defined(USE_CUDA)

namespace nemo {

// Value i of thread j of four becomes value j of thread i.
NEMO_DEVICE void transpose(PerThread<uint32_t> (&value)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      PerThread<uint32_t> sent;
      each_thread([&](int t) { sent[t] = t & bit ? value[i][t] : value[i + bit][t]; });
      exchange(sent, bit);
      each_thread([&](int t) { (t & bit ? value[i][t] : value[i + bit][t]) = sent[t]; });
    }
  }
}

NEMO_DEVICE float squared_relu(float v) {
#ifdef USE_CUDA
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(v));
#else
  v = v < 0.0f ? 0.0f : v;  // NaN stays
#endif
  return v * v;
}

}  // namespace nemo

#endif
