#include "causal_conv1d/backward.cuh"
#include "causal_conv1d/forward.cuh"
#include "causal_conv1d/states.cuh"
#include "causal_conv1d/update.cuh"

namespace nemo::conv1d {

template void run_forward<float>(const Forward&, Stream);
template void run_states<float>(const Forward&, Stream);
template void run_backward<float>(const Backward&, Stream);
template void run_update<float>(const Update&, Stream);

}  // namespace nemo::conv1d
