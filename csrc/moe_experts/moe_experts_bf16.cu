#include "moe_experts/halves.cuh"

namespace nemo::moe_experts {

NEMO_HALVES(bf16)

}  // namespace nemo::moe_experts
