// The same products as plain loops, for the build without CUDA: what is tested there is which
// sizes and addresses the kernels are given.
#pragma once

#include <cmath>

#include "nvfp4_gemm/nvfp4_gemm.h"

namespace nemo::nvfp4_gemm {

inline float e2m1(int code) {
  constexpr float kValues[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  return code & 8 ? -kValues[code & 7] : kValues[code & 7];
}

// Unsigned E4M3, as the matrix units read scales.
inline float e4m3(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return NAN;
  return exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
}

// Element k of a row, without alpha.
inline float element(const void* codes, const void* scales, int64_t row, int64_t k, int64_t depth) {
  const int pair = static_cast<const uint8_t*>(codes)[(row * depth + k) / 2];
  const int64_t block = k / 16;
  const int64_t tile = row / 128 * ceil_div(depth, 64) + block / 4;
  const int64_t inside = row % 32 * 16 + row % 128 / 32 * 4 + block % 4;
  const int scale = static_cast<const uint8_t*>(scales)[tile * 512 + inside];
  return e2m1(k % 2 ? pair >> 4 : pair & 15) * e4m3(scale);
}

inline void run_host(const Dense& p, bool squared_relu = false) {
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t c = 0; c < p.columns; ++c) {
      float sum = 0;
      for (int64_t k = 0; k < p.depth; ++k) {
        sum += element(p.a, p.a_scales, r, k, p.depth) * element(p.b, p.b_scales, c, k, p.depth);
      }
      sum *= *p.alpha;
      if (squared_relu) sum = sum < 0 ? 0 : sum * sum;
      static_cast<bf16*>(p.out)[r * p.columns + c] = from_float<bf16>(sum);
    }
  }
}

inline void run_host(const Grouped& p) {
  for (int64_t e = 0; e < p.experts; ++e) run_host(group(p, e), p.squared_relu);
}

}  // namespace nemo::nvfp4_gemm
