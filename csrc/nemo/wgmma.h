// The matrix product of a warpgroup: sums (64, kColumns) += a (64, depth) b^T (kColumns, depth), 32
// bytes deep, both in shared memory. Instructions name each register, hence the macros.
#pragma once

#include "nemo/warpgroup.h"

#ifdef __CUDACC__

#define NEMO_R8(a, b, c, d, e, f, g, h) \
  "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define NEMO_R64                                                                            \
  NEMO_R8(0, 1, 2, 3, 4, 5, 6, 7)                                                            \
  ", " NEMO_R8(8, 9, 10, 11, 12, 13, 14, 15) ", " NEMO_R8(16, 17, 18, 19, 20, 21, 22, 23)    \
  ", " NEMO_R8(24, 25, 26, 27, 28, 29, 30, 31) ", " NEMO_R8(32, 33, 34, 35, 36, 37, 38, 39)  \
  ", " NEMO_R8(40, 41, 42, 43, 44, 45, 46, 47) ", " NEMO_R8(48, 49, 50, 51, 52, 53, 54, 55)  \
  ", " NEMO_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define NEMO_R80                                         \
  NEMO_R64 ", " NEMO_R8(64, 65, 66, 67, 68, 69, 70, 71)  \
  ", " NEMO_R8(72, 73, 74, 75, 76, 77, 78, 79)
#define NEMO_R96                                         \
  NEMO_R80 ", " NEMO_R8(80, 81, 82, 83, 84, 85, 86, 87)  \
  ", " NEMO_R8(88, 89, 90, 91, 92, 93, 94, 95)
#define NEMO_R112                                                      \
  NEMO_R96 ", " NEMO_R8(96, 97, 98, 99, 100, 101, 102, 103) ", "       \
           NEMO_R8(104, 105, 106, 107, 108, 109, 110, 111)
#define NEMO_R116 NEMO_R112 ", %112, %113, %114, %115"
#define NEMO_R128                                  \
  NEMO_R116 ", %116, %117, %118, %119, "           \
            NEMO_R8(120, 121, 122, 123, 124, 125, 126, 127)

#define NEMO_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NEMO_D16(i) NEMO_D4(i), NEMO_D4(i + 4), NEMO_D4(i + 8), NEMO_D4(i + 12)
#define NEMO_D64 NEMO_D16(0), NEMO_D16(16), NEMO_D16(32), NEMO_D16(48)
#define NEMO_D80 NEMO_D64, NEMO_D16(64)
#define NEMO_D96 NEMO_D80, NEMO_D16(80)
#define NEMO_D112 NEMO_D96, NEMO_D16(96)
#define NEMO_D116 NEMO_D112, NEMO_D4(112)
#define NEMO_D128 NEMO_D112, NEMO_D16(112)

// `shape` is columns, depth and types; after the registers come a, b and whether to add.
#define NEMO_WGMMA(shape, registers, places, a, b, add, axes, ...)                                 \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " add                                               \
               ", 0; wgmma.mma_async.sync.aligned.m64" shape " {" registers "}, " a ", " b         \
               ", p, 1, 1" axes "; }"                                                              \
               : places                                                                            \
               : "l"(left), "l"(right), "r"(int(adds)) __VA_OPT__(,) __VA_ARGS__)
#define NEMO_WGMMA_A(shape, registers, places, a, b, add)                                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " add                                               \
               ", 0; wgmma.mma_async.sync.aligned.m64" shape " {" registers "}, {" a "}, " b       \
               ", p, 1, 1, 0; }"                                                                   \
               : places                                                                            \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right),               \
                 "r"(int(adds)))
#define NEMO_WGMMA_HALVES(type)                                                                    \
  if constexpr (kColumns == 192) {                                                                 \
    NEMO_WGMMA("n192" type, NEMO_R96, NEMO_D96, "%96", "%97", "%98", ", 0, %99", "n"(kAxis));      \
  } else if constexpr (kColumns == 224) {                                                          \
    NEMO_WGMMA("n224" type, NEMO_R112, NEMO_D112, "%112", "%113", "%114", ", 0, %115",             \
               "n"(kAxis));                                                                        \
  } else if constexpr (kColumns == 232) {                                                          \
    NEMO_WGMMA("n232" type, NEMO_R116, NEMO_D116, "%116", "%117", "%118", ", 0, %119",             \
               "n"(kAxis));                                                                        \
  } else {                                                                                         \
    static_assert(kColumns == 256);                                                                \
    NEMO_WGMMA("n256" type, NEMO_R128, NEMO_D128, "%128", "%129", "%130", ", 0, %131",             \
               "n"(kAxis));                                                                        \
  }

namespace nemo {

// Adds to the sums, or replaces them. kAcross: b is stored across its depth.
template <class T, bool kAcross, int kColumns>
NEMO_DEVICE void multiply(PerThread<Sums<kColumns>>& sums, uint64_t left, uint64_t right,
                          bool adds) {
  float* d = sums.value.value;
  constexpr int kAxis = kAcross;
  if constexpr (std::is_same_v<T, bf16>) {
    NEMO_WGMMA_HALVES("k16.f32.bf16.bf16")
  } else if constexpr (std::is_same_v<T, fp16>) {
    NEMO_WGMMA_HALVES("k16.f32.f16.f16")
  } else if constexpr (kColumns == 128) {
    NEMO_WGMMA("n128k32.f32.e4m3.e4m3", NEMO_R64, NEMO_D64, "%64", "%65", "%66", "");
  } else {
    static_assert(kColumns == 160 && !kAcross);
    NEMO_WGMMA("n160k32.f32.e4m3.e4m3", NEMO_R80, NEMO_D80, "%80", "%81", "%82", "");
  }
}

// The same with a in registers, and of the sums' columns the first kColumns.
template <class T, int kColumns, int kMost>
NEMO_DEVICE void multiply(PerThread<Sums<kMost>>& sums, PerThread<FragmentA>& a, uint64_t right,
                          bool adds) {
  float* d = sums.value.value;
  const uint32_t* left = a.value.pair;
  if constexpr (std::is_same_v<T, bf16> && kColumns == 128) {
    NEMO_WGMMA_A("n128k16.f32.bf16.bf16", NEMO_R64, NEMO_D64, "%64, %65, %66, %67", "%68", "%69");
  } else if constexpr (std::is_same_v<T, bf16>) {
    static_assert(kColumns == 256);
    NEMO_WGMMA_A("n256k16.f32.bf16.bf16", NEMO_R128, NEMO_D128, "%128, %129, %130, %131", "%132",
                 "%133");
  } else if constexpr (kColumns == 128) {
    NEMO_WGMMA_A("n128k16.f32.f16.f16", NEMO_R64, NEMO_D64, "%64, %65, %66, %67", "%68", "%69");
  } else {
    static_assert(kColumns == 256);
    NEMO_WGMMA_A("n256k16.f32.f16.f16", NEMO_R128, NEMO_D128, "%128, %129, %130, %131", "%132",
                 "%133");
  }
}

}  // namespace nemo

#undef NEMO_WGMMA_HALVES
#undef NEMO_WGMMA_A
#undef NEMO_WGMMA
#undef NEMO_D128
#undef NEMO_D116
#undef NEMO_D112
#undef NEMO_D96
#undef NEMO_D80
#undef NEMO_D64
#undef NEMO_D16
#undef NEMO_D4
#undef NEMO_R128
#undef NEMO_R116
#undef NEMO_R112
#undef NEMO_R96
#undef NEMO_R80
#undef NEMO_R64
#undef NEMO_R8

#endif
