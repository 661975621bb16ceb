// Instances for 16-bit operands: NEMO_HALVES(T) in a source of its own for each type.
#pragma once

#include "moe_experts/product.cuh"

#define NEMO_PRODUCT(T, columns, part, across)                           \
  template const char* run_product<T, columns, Part::part, across>(      \
      Product&, const Operands&, Stream);
#define NEMO_HALVES(T)                                                   \
  NEMO_PRODUCT(T, 192, kUp, false)                                       \
  NEMO_PRODUCT(T, 224, kUp, false)                                       \
  NEMO_PRODUCT(T, 232, kUp, false)                                       \
  NEMO_PRODUCT(T, 256, kUp, false)                                       \
  NEMO_PRODUCT(T, 192, kSlots, false)                                    \
  NEMO_PRODUCT(T, 224, kSlots, false)                                    \
  NEMO_PRODUCT(T, 232, kSlots, false)                                    \
  NEMO_PRODUCT(T, 256, kSlots, false)                                    \
  NEMO_PRODUCT(T, 192, kSlots, true)                                     \
  NEMO_PRODUCT(T, 256, kSlots, true)                                     \
  NEMO_PRODUCT(T, 192, kDHidden, true)
