// nemokernels_C::causal_conv1d_*: tensors to parameters. Callers have checked shapes and dtypes and
// allocated the outputs (contiguous; dx may be a part of wider rows).
#include "causal_conv1d/causal_conv1d.h"
#include "torch_stable.h"

namespace nemo::conv1d {
namespace {

using Optional = std::optional<Tensor>;

// A (row, step, channel) tensor.
View view(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3, "expected three axes, got ", t.dim());
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

View view(const Optional& t) { return t ? view(*t) : View{}; }

bool aligned(const View& v, int64_t element_size) {
  const int64_t per_vector = 16 / element_size;
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.row % per_vector == 0 &&
         v.step % per_vector == 0;
}

template <class Params>
void set_filter(Params& p, const Tensor& weight, const Optional& bias, bool silu) {
  p.width = int32_t(weight.size(1));
  p.silu = silu;
  p.weight = weight.data_ptr();
  p.weight_channel = weight.stride(0);
  p.weight_tap = weight.stride(1);
  p.weight_dtype = dtype_of(weight);
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.bias_channel = bias ? bias->stride(0) : 0;
  p.bias_dtype = bias ? dtype_of(*bias) : p.weight_dtype;
}

template <class Params>
void set_inputs(Params& p, const Tensor& x, const Optional& seq_idx, const Optional& initial,
                const Optional& cu_seqlens, int64_t chunk) {
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.dim = x.size(2);
  p.chunk = chunk;
  p.x = view(x);
  p.initial = view(initial);
  p.cu_seqlens = int32_data(cu_seqlens);
  p.sequences = cu_seqlens ? cu_seqlens->size(0) - 1 : p.batch;
  p.seq_idx = p.tokens > 0 ? int32_data(seq_idx) : nullptr;
  p.seq_idx_row = seq_idx ? seq_idx->stride(0) : 0;
  p.seq_idx_step = seq_idx ? seq_idx->stride(1) : 0;
  STD_TORCH_CHECK(chunk > 0 && (p.x.channel == 1 || p.dim <= 1),
                  "expected channel-last x and a positive chunk");
}

void forward(Tensor x, Tensor weight, Optional bias, Optional seq_idx, Optional initial_states,
             Optional cu_seqlens, bool silu, int64_t chunk, Tensor y, Optional states) {
  const OnDevice device(x);
  Forward p{};
  set_filter(p, weight, bias, silu);
  set_inputs(p, x, seq_idx, initial_states, cu_seqlens, chunk);
  p.y = y.data_ptr();
  p.states = view(states);
  p.state_len = states ? states->size(1) : 0;
  with_dtype(x, [&](auto type) {
    using T = decltype(type);
    p.aligned = p.dim % int64_t(16 / sizeof(T)) == 0 && aligned(p.x, sizeof(T)) &&
                aligned(view(y), sizeof(T));
    run_forward<T>(p, device.stream());
    if (states) run_states<T>(p, device.stream());
  });
  device.check();
}

void backward(Tensor dy, Optional dfinal, Tensor x, Tensor weight, Optional bias, Optional seq_idx,
              Optional initial_states, Optional cu_seqlens, bool silu, int64_t chunk,
              Tensor partial, Tensor dx, Tensor dweight, Tensor dbias, Optional dinitial) {
  const OnDevice device(x);
  Backward p{};
  set_filter(p, weight, bias, silu);
  set_inputs(p, x, seq_idx, initial_states, cu_seqlens, chunk);
  p.dy = view(dy);
  p.dfinal = view(dfinal);
  p.dx = view(dx);
  p.dinitial = view(dinitial);
  p.partial = static_cast<float*>(partial.data_ptr());
  p.dweight = dweight.data_ptr();
  p.dbias = dbias.data_ptr();
  STD_TORCH_CHECK((p.dy.channel == 1 && p.dx.channel == 1) || p.dim <= 1,
                  "expected channel-last dy and dx");
  STD_TORCH_CHECK(partial.scalar_type() == ScalarType::Float && partial.size(1) == p.width + 1 &&
                      partial.size(0) >= token_blocks(p) && partial.size(2) == p.dim,
                  "expected a float32 workspace of (token blocks, W+1, dim)");
  with_dtype(x, [&](auto type) {
    using T = decltype(type);
    p.aligned = p.dim % int64_t(16 / sizeof(T)) == 0 && aligned(p.x, sizeof(T)) &&
                aligned(p.dy, sizeof(T)) && aligned(p.dx, sizeof(T));
    run_backward<T>(p, device.stream());
  });
  device.check();
}

void update(Tensor x, Tensor conv_state, Tensor weight, Optional bias, bool silu,
            Optional cache_seqlens, Optional conv_state_indices, Optional num_accepted_tokens,
            Tensor y) {
  const OnDevice device(x);
  Update p{};
  set_filter(p, weight, bias, silu);
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.dim = x.size(2);
  p.x = view(x);
  p.slots = conv_state.size(0);
  p.state_len = conv_state.size(2);
  p.state = {conv_state.data_ptr(), conv_state.stride(0), conv_state.stride(2),
             conv_state.stride(1)};
  p.y = y.data_ptr();
  p.cache_seqlens = int32_data(cache_seqlens);
  p.num_accepted = int32_data(num_accepted_tokens);
  p.slot = int32_data(conv_state_indices);
  with_dtype(x, [&](auto type) { run_update<decltype(type)>(p, device.stream()); });
  device.check();
}

void varlen_states(Tensor x, Tensor cu_seqlens, Tensor states) {
  const OnDevice device(x);
  Forward p{};
  p.batch = 1;
  p.tokens = x.size(0);
  p.dim = x.size(1);
  p.width = 1;
  p.x = {x.data_ptr(), 0, x.stride(0), x.stride(1)};
  p.cu_seqlens = int32_data(cu_seqlens);
  p.sequences = cu_seqlens.size(0) - 1;
  p.states = view(states);
  p.state_len = states.size(1);
  with_dtype(x, [&](auto type) { run_states<decltype(type)>(p, device.stream()); });
  device.check();
}

STABLE_TORCH_LIBRARY_IMPL(nemokernels_C, NEMO_DEVICE_KEY, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&backward));
  m.impl("causal_conv1d_update", TORCH_BOX(&update));
  m.impl("causal_conv1d_varlen_states", TORCH_BOX(&varlen_states));
}

}  // namespace
}  // namespace nemo::conv1d
