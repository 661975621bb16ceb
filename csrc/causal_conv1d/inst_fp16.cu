#include "causal_conv1d/backward.cuh"
#include "causal_conv1d/forward.cuh"
#include "causal_conv1d/states.cuh"
#include "causal_conv1d/update.cuh"

namespace nemo::conv1d {

template void run_forward<nemo::fp16>(const Forward&, Stream);
template void run_states<nemo::fp16>(const Forward&, Stream);
template void run_backward<nemo::fp16>(const Backward&, Stream);
template void run_update<nemo::fp16>(const Update&, Stream);

}  // namespace nemo::conv1d
