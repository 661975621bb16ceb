// Words shared by all kernels: number formats, 64-bit offsets, small integer helpers.
//
// Everything here compiles as CUDA and as plain C++: kernels are written as functions of a block
// and a thread index, so that the host can run the very same code (see launch.h).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define NEMO_HD __host__ __device__ __forceinline__
#else
#define NEMO_HD inline
#endif

namespace nemo {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

struct e4m3 {
  uint8_t bits;
};

// Number format of an operand whose type is chosen at run time (weights, biases).
enum class Dtype : int32_t { kF32, kBF16, kF16 };

NEMO_HD float bits_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

NEMO_HD uint32_t float_to_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

NEMO_HD float to_float(float value) { return value; }
NEMO_HD float to_float(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
NEMO_HD float to_float(fp16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  _Float16 half;
  std::memcpy(&half, &value.bits, sizeof half);
  return half;
#endif
}

NEMO_HD float to_float(e4m3 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(value.bits, __NV_E4M3)));
#else
  const uint32_t magnitude = value.bits & 0x7F;
  float out = magnitude < 8 ? float(magnitude) * 0x1p-9f
                            : bits_to_float((magnitude << 20) + (120u << 23));
  if (magnitude == 0x7F) out = NAN;
  return value.bits & 0x80 ? -out : out;
#endif
}

// Round to nearest, ties to even. E4M3 saturates at 448.
template <class T>
NEMO_HD T from_float(float value);

template <>
NEMO_HD float from_float<float>(float value) {
  return value;
}

template <>
NEMO_HD bf16 from_float<bf16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
#endif
}

template <>
NEMO_HD fp16 from_float<fp16>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const _Float16 half = static_cast<_Float16>(value);
  fp16 out;
  std::memcpy(&out.bits, &half, sizeof out.bits);
  return out;
#endif
}

template <>
NEMO_HD e4m3 from_float<e4m3>(float value) {
#ifdef __CUDA_ARCH__
  return {__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
#else
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float size = std::fabs(value);
  if (value != value) return {uint8_t(sign | 0x7F)};
  if (size >= 448.0f) return {uint8_t(sign | 0x7E)};
  if (size < 0x1p-6f) return {uint8_t(sign | uint8_t(std::nearbyint(size * 0x1p9f)))};
  const uint32_t bits = float_to_bits(size);
  return {uint8_t(sign | ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3))};
#endif
}

NEMO_HD float load_float(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBF16: return to_float(static_cast<const bf16*>(data)[i]);
    case Dtype::kF16: return to_float(static_cast<const fp16*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

NEMO_HD void store_float(void* data, Dtype dtype, int64_t i, float value) {
  switch (dtype) {
    case Dtype::kBF16: static_cast<bf16*>(data)[i] = from_float<bf16>(value); break;
    case Dtype::kF16: static_cast<fp16*>(data)[i] = from_float<fp16>(value); break;
    default: static_cast<float*>(data)[i] = value;
  }
}

// Element offset from (index, stride) pairs. 64-bit on both sides: a product of two 32-bit values
// is silently wrong from 2^31 elements on.
NEMO_HD int64_t offset() { return 0; }
template <class... Rest>
NEMO_HD int64_t offset(int64_t index, int64_t stride, Rest... rest) {
  return index * stride + offset(rest...);
}

NEMO_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
NEMO_HD constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
NEMO_HD constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

NEMO_HD int ones(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return std::popcount(bits);
#endif
}

// The compiler may not choose between a fused and a separate product per call site: packed and
// separate sequences must agree bit for bit.
NEMO_HD float fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// 1 / (1 + exp(-v)); with a 16-bit result the fast exponential and reciprocal are exact enough
// (relative error below 2^-20 wherever the sigmoid is above the smallest normal number).
template <class Result>
NEMO_HD float sigmoid(float v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Result) == 2) return __frcp_rn(1.0f + __expf(-v));
  return 1.0f / (1.0f + expf(-v));
#else
  return 1.0f / (1.0f + std::exp(-v));
#endif
}

// Within 2^-23 of the root, relative; numbers below 2^-126 count as zero. The host errs no less.
NEMO_HD float approximate_sqrt(float v) {
#ifdef __CUDA_ARCH__
  float out;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#else
  return 0.0f <= v && v < 0x1p-126f ? 0.0f : std::sqrt(v) * (1.0f + 0x1p-23f);
#endif
}

}  // namespace nemo
