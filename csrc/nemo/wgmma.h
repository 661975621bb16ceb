// The matrix product of a warpgroup: sums (64, kColumns) += a (64, 16) b^T (kColumns, 16), both in
// shared memory. Instructions name each register, hence the macros.
#pragma once

#include "nemo/warpgroup.h"

#ifdef __CUDACC__

#define NEMO_R8(a, b, c, d, e, f, g, h) \
  "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define NEMO_R96                                                                             \
  NEMO_R8(0, 1, 2, 3, 4, 5, 6, 7)                                                            \
  ", " NEMO_R8(8, 9, 10, 11, 12, 13, 14, 15) ", " NEMO_R8(16, 17, 18, 19, 20, 21, 22, 23)    \
  ", " NEMO_R8(24, 25, 26, 27, 28, 29, 30, 31) ", " NEMO_R8(32, 33, 34, 35, 36, 37, 38, 39)  \
  ", " NEMO_R8(40, 41, 42, 43, 44, 45, 46, 47) ", " NEMO_R8(48, 49, 50, 51, 52, 53, 54, 55)  \
  ", " NEMO_R8(56, 57, 58, 59, 60, 61, 62, 63) ", " NEMO_R8(64, 65, 66, 67, 68, 69, 70, 71)  \
  ", " NEMO_R8(72, 73, 74, 75, 76, 77, 78, 79) ", " NEMO_R8(80, 81, 82, 83, 84, 85, 86, 87)  \
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
#define NEMO_D96 \
  NEMO_D16(0), NEMO_D16(16), NEMO_D16(32), NEMO_D16(48), NEMO_D16(64), NEMO_D16(80)
#define NEMO_D112 NEMO_D96, NEMO_D16(96)
#define NEMO_D116 NEMO_D112, NEMO_D4(112)
#define NEMO_D128 NEMO_D112, NEMO_D16(112)

// The operands after `count` registers: a, b, whether to add, the axis of b.
#define NEMO_WGMMA(type, columns, registers, places, a, b, add, axis)                              \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " add                                               \
               ", 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type           \
               " {" registers "}, " a ", " b ", p, 1, 1, 0, " axis "; }"                           \
               : places                                                                            \
               : "l"(left), "l"(right), "r"(int(adds)), "n"(int(kAcross)))
#define NEMO_WGMMA_ANY(type)                                                                       \
  if constexpr (kColumns == 192) {                                                                 \
    NEMO_WGMMA(type, "192", NEMO_R96, NEMO_D96, "%96", "%97", "%98", "%99");                       \
  } else if constexpr (kColumns == 224) {                                                          \
    NEMO_WGMMA(type, "224", NEMO_R112, NEMO_D112, "%112", "%113", "%114", "%115");                 \
  } else if constexpr (kColumns == 232) {                                                          \
    NEMO_WGMMA(type, "232", NEMO_R116, NEMO_D116, "%116", "%117", "%118", "%119");                 \
  } else {                                                                                         \
    static_assert(kColumns == 256);                                                                \
    NEMO_WGMMA(type, "256", NEMO_R128, NEMO_D128, "%128", "%129", "%130", "%131");                 \
  }

namespace nemo {

// Adds to the sums, or replaces them. kAcross: b is stored across its depth.
template <class T, bool kAcross, int kColumns>
NEMO_DEVICE void multiply(PerThread<Sums<kColumns>>& sums, uint64_t left, uint64_t right,
                          bool adds) {
  float* d = sums.value.value;
  if constexpr (std::is_same_v<T, bf16>) {
    NEMO_WGMMA_ANY("bf16")
  } else {
    NEMO_WGMMA_ANY("f16")
  }
}

}  // namespace nemo

#undef NEMO_WGMMA_ANY
#undef NEMO_WGMMA
#undef NEMO_D128
#undef NEMO_D116
#undef NEMO_D112
#undef NEMO_D96
#undef NEMO_D16
#undef NEMO_D4
#undef NEMO_R128
#undef NEMO_R116
#undef NEMO_R112
#undef NEMO_R96
#undef NEMO_R8

#endif
