#include "moe_experts/product.cuh"

namespace nemo::moe_experts {

#define NEMO_PRODUCT(columns, part, across)                                      \
  template const char* run_product<nemo::fp16, columns, Part::part, across>(     \
      Product&, const Operands&, Stream);
NEMO_PRODUCT(192, kUp, false)
NEMO_PRODUCT(224, kUp, false)
NEMO_PRODUCT(232, kUp, false)
NEMO_PRODUCT(256, kUp, false)
NEMO_PRODUCT(192, kSlots, false)
NEMO_PRODUCT(224, kSlots, false)
NEMO_PRODUCT(232, kSlots, false)
NEMO_PRODUCT(256, kSlots, false)
NEMO_PRODUCT(192, kSlots, true)
NEMO_PRODUCT(256, kSlots, true)
NEMO_PRODUCT(192, kDHidden, true)
#undef NEMO_PRODUCT

}  // namespace nemo::moe_experts
