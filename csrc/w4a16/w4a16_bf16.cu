#include "w4a16/product.cuh"

namespace nemo::w4a16 {

template void run_product<nemo::bf16, 8, false>(const Product&, Stream);
template void run_product<nemo::bf16, 16, false>(const Product&, Stream);
template void run_product<nemo::bf16, 32, false>(const Product&, Stream);
template void run_product<nemo::bf16, 8, true>(const Product&, Stream);

}  // namespace nemo::w4a16
