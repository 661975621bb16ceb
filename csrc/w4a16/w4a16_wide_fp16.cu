#include "w4a16/wide.cuh"

namespace nemo::w4a16 {

template const char* run_wide<nemo::fp16, Part::kPlain>(Product&, Stream);
template const char* run_wide<nemo::fp16, Part::kUp>(Product&, Stream);
template const char* run_wide<nemo::fp16, Part::kSlots>(Product&, Stream);

}  // namespace nemo::w4a16
