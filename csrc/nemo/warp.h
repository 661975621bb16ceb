// Code for a warp that the host can run: per-lane values, a loop over the lanes, the matrix product
// of a warp. On the GPU a thread holds its own lane; on the host the first thread of each warp holds
// all 32 and the others return.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "nemo/core.h"

namespace nemo {

inline constexpr int kLanes = 32;

template <class T>
struct PerLane {
#ifdef __CUDA_ARCH__
  T value;
  NEMO_HD T& operator[](int) { return value; }
#else
  T value[kLanes];
  T& operator[](int lane) { return value[lane]; }
#endif
};

// Whether this thread runs code for its warp.
NEMO_HD bool leads_warp(int thread) {
#ifdef __CUDA_ARCH__
  return true;
#else
  return thread % kLanes == 0;
#endif
}

// f(lane) for the lanes this thread holds.
template <class F>
NEMO_HD void each_lane(int thread, F f) {
#ifdef __CUDA_ARCH__
  f(thread % kLanes);
#else
  for (int lane = 0; lane < kLanes; ++lane) f(lane);
#endif
}

// Over the lanes of a warp, all of which must call.
NEMO_HD int32_t largest(PerLane<int32_t>& v) {
#ifdef __CUDA_ARCH__
  return __reduce_max_sync(~0u, v.value);
#else
  return *std::max_element(v.value, v.value + kLanes);
#endif
}

NEMO_HD int32_t smallest(PerLane<int32_t>& v) {
#ifdef __CUDA_ARCH__
  return __reduce_min_sync(~0u, v.value);
#else
  return *std::min_element(v.value, v.value + kLanes);
#endif
}

// Always added in the same order.
NEMO_HD float sum(PerLane<float>& v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
#ifdef __CUDA_ARCH__
    v.value += __shfl_xor_sync(~0u, v.value, step);
#else
    PerLane<float> before = v;
    for (int lane = 0; lane < kLanes; ++lane) v[lane] += before[lane ^ step];
#endif
  }
  return v[0];
}

NEMO_HD int32_t sum(PerLane<int32_t>& v) {
#ifdef __CUDA_ARCH__
  return __reduce_add_sync(~0u, v.value);
#else
  return std::accumulate(v.value, v.value + kLanes, 0);
#endif
}

// Every lane's sum of the lanes before it.
NEMO_HD void sum_before(PerLane<int32_t>& v) {
#ifdef __CUDA_ARCH__
  const int lane = threadIdx.x % kLanes;
  int32_t total = v.value;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int32_t below = __shfl_up_sync(~0u, total, step);
    if (lane >= step) total += below;
  }
  v.value = total - v.value;
#else
  std::exclusive_scan(v.value, v.value + kLanes, v.value, 0);
#endif
}

// For every lane a bit for each lane with an equal value.
NEMO_HD PerLane<uint32_t> equal_lanes(PerLane<int32_t>& v) {
  PerLane<uint32_t> out;
#ifdef __CUDA_ARCH__
  out.value = __match_any_sync(~0u, v.value);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    out[lane] = 0;
    for (int other = 0; other < kLanes; ++other) {
      out[lane] |= uint32_t(v[other] == v[lane]) << other;
    }
  }
#endif
  return out;
}

// Two 16-bit numbers, the first in the low half.
template <class T>
NEMO_HD float low_half(uint32_t pair) {
  return to_float(T{uint16_t(pair)});
}
template <class T>
NEMO_HD float high_half(uint32_t pair) {
  return to_float(T{uint16_t(pair >> 16)});
}
template <class T>
NEMO_HD uint32_t pack_halves(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  }
  return out;
#else
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
#endif
}

// Two E4M3, the first in the low byte.
NEMO_HD uint32_t pack_bytes(float low, float high) {
#ifdef __CUDA_ARCH__
  return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);
#else
  return from_float<e4m3>(low).bits | uint32_t(from_float<e4m3>(high).bits) << 8;
#endif
}

// Element by element, each product rounded to T; subnormal numbers count.
template <class T>
NEMO_HD uint32_t multiply_halves(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  } else {
    asm("mul.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  }
  return out;
#else
  return pack_halves<T>(low_half<T>(a) * low_half<T>(b), high_half<T>(a) * high_half<T>(b));
#endif
}

// Fragments of mma.m16n8k16, in pairs of neighbouring columns (A) or rows (B). Lane 4 g + t holds of
// A (16 x 16) rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8; of B (16 x 8) column g at
// rows 2t, 2t + 8; of C (16 x 8) rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1.
struct FragmentA {
  uint32_t pair[4];
};
struct FragmentB {
  uint32_t pair[2];
};
struct FragmentC {
  float value[4];
};

// c += a b.
template <class T>
NEMO_HD void multiply_add(PerLane<FragmentC>& c, PerLane<FragmentA>& a, PerLane<FragmentB>& b) {
#ifdef __CUDA_ARCH__
  float* d = c.value.value;
  const uint32_t* p = a.value.pair;
  const uint32_t* q = b.value.pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q[0]), "r"(q[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q[0]), "r"(q[1]));
  }
#else
  float left[16][16], right[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* at = &left[g + i % 2 * 8][2 * t + i / 2 * 8];
      at[0] = low_half<T>(a[lane].pair[i]), at[1] = high_half<T>(a[lane].pair[i]);
    }
    for (int i = 0; i < 2; ++i) {
      right[2 * t + 8 * i][g] = low_half<T>(b[lane].pair[i]);
      right[2 * t + 8 * i + 1][g] = high_half<T>(b[lane].pair[i]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) c[lane].value[i] += left[row][k] * right[k][column];
    }
  }
#endif
}

}  // namespace nemo
