// Moving kVec neighbouring elements between memory and float registers.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "nemo/core.h"

namespace nemo {

// kVec elements as 32-bit words. Kept packed until they are used: as an array of 16-bit elements
// the compiler gives each its own register, as soon as the load returns.
template <class T, int kVec>
struct Vec {
  static constexpr int kWords = kVec * sizeof(T) / 4, kPerWord = 4 / sizeof(T);
  static_assert(kWords * kPerWord == kVec);
  uint32_t word[kWords];
};

template <class T, int kVec>
NEMO_HD void to_floats(const Vec<T, kVec>& in, float (&out)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const uint32_t word = in.word[i / in.kPerWord];
    const bool high = i % in.kPerWord == 1;
    if constexpr (sizeof(T) == 4) {
      out[i] = bits_to_float(word);
    } else if constexpr (std::is_same_v<T, bf16>) {
      out[i] = bits_to_float(high ? word & 0xFFFF0000u : word << 16);
    } else {
      out[i] = to_float(T{uint16_t(high ? word >> 16 : word)});
    }
  }
}

template <class T, int kVec>
NEMO_HD Vec<T, kVec> from_floats(const float (&in)[kVec]) {
  Vec<T, kVec> out;
#pragma unroll
  for (int w = 0; w < out.kWords; ++w) {
    if constexpr (sizeof(T) == 4) {
      out.word[w] = float_to_bits(in[w]);
    } else {
      const uint32_t low = from_float<T>(in[2 * w]).bits, high = from_float<T>(in[2 * w + 1]).bits;
      out.word[w] = low | high << 16;
    }
  }
  return out;
}

// A GPU faults on such an access; so does the host.
inline void check_aligned(const void* p, size_t size) {
  if (reinterpret_cast<uintptr_t>(p) % size != 0) std::abort();
}

// kVec elements from p as one access if aligned, else the first `valid` one by one, zeros after.
// The memory must not change while the kernel runs; before it is read it may, where kChanges.
template <bool kAligned, int kVec, bool kChanges = false, class T>
NEMO_HD Vec<T, kVec> load_vec(const T* p, int valid) {
  Vec<T, kVec> out;
  if constexpr (kAligned) {
    static_assert(sizeof out == 16 || sizeof out == 8 || sizeof out == 4);
#ifdef __CUDA_ARCH__
    if constexpr (sizeof out == 4) {
      out.word[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
    } else if constexpr (sizeof out == 16) {
      const uint4* from = reinterpret_cast<const uint4*>(p);
      const uint4 in = kChanges ? *from : __ldg(from);
      out.word[0] = in.x, out.word[1] = in.y, out.word[2] = in.z, out.word[3] = in.w;
    } else {
      const uint2* from = reinterpret_cast<const uint2*>(p);
      const uint2 in = kChanges ? *from : __ldg(from);
      out.word[0] = in.x, out.word[1] = in.y;
    }
#else
    check_aligned(p, sizeof out);
    std::memcpy(&out, p, sizeof out);
#endif
  } else {
    float values[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = i < valid ? to_float(p[i]) : 0.0f;
    out = from_floats<T>(values);
  }
  return out;
}

// Four words as one access, which the compiler takes apart where they come from shuffles.
NEMO_HD void store_words(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef __CUDA_ARCH__
  __stwb(static_cast<uint4*>(p), make_uint4(a, b, c, d));
#else
  const uint32_t words[] = {a, b, c, d};
  check_aligned(p, sizeof words);
  std::memcpy(p, words, sizeof words);
#endif
}

template <bool kAligned, int kVec, class T>
NEMO_HD void store_vec(T* p, const float (&values)[kVec], int valid) {
  if constexpr (kAligned) {
    const Vec<T, kVec> out = from_floats<T>(values);
#ifdef __CUDA_ARCH__
    if constexpr (sizeof out == 16) {
      *reinterpret_cast<uint4*>(p) = {out.word[0], out.word[1], out.word[2], out.word[3]};
    } else {
      *reinterpret_cast<uint2*>(p) = {out.word[0], out.word[1]};
    }
#else
    check_aligned(p, sizeof out);
    std::memcpy(p, &out, sizeof out);
#endif
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i < valid) p[i] = from_float<T>(values[i]);
    }
  }
}

// The first `valid` of kVec elements at any stride, zeros after.
template <int kVec, class T>
NEMO_HD void load_floats(const T* from, int64_t first, int64_t stride, int valid,
                         float (&out)[kVec]) {
  from += first;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    out[i] = i < valid ? to_float(*from) : 0.0f;
    from += stride;
  }
}

template <int kVec>
NEMO_HD void load_floats(const void* from, Dtype dtype, int64_t first, int64_t stride, int valid,
                         float (&out)[kVec]) {
  switch (dtype) {
    case Dtype::kBF16:
      return load_floats(static_cast<const bf16*>(from), first, stride, valid, out);
    case Dtype::kF16:
      return load_floats(static_cast<const fp16*>(from), first, stride, valid, out);
    default: return load_floats(static_cast<const float*>(from), first, stride, valid, out);
  }
}

}  // namespace nemo
