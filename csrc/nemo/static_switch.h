// Turning a run-time value into a template argument.
#pragma once

#include <type_traits>

namespace nemo {

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// Calls f(Int<k>) for the k among kChoices that equals value; false if none does.
template <int... kChoices, class F>
bool static_switch(int value, F&& f) {
  return ((value == kChoices && (f(Int<kChoices>{}), true)) || ...);
}

}  // namespace nemo
