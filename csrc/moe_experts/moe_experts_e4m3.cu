#include "moe_experts/product.cuh"

namespace nemo::moe_experts {

#define NEMO_PRODUCT(columns, part)                                             \
  template const char* run_product<nemo::e4m3, columns, Part::part, false>(    \
      Product&, const Operands&, Stream);
NEMO_PRODUCT(128, kUp)
NEMO_PRODUCT(160, kUp)
NEMO_PRODUCT(128, kSlots)
NEMO_PRODUCT(160, kSlots)
#undef NEMO_PRODUCT

}  // namespace nemo::moe_experts
