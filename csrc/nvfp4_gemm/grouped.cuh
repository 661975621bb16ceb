// The grouped product, for whichever architecture the including source names. What each expert
// multiplies is known on the device alone: a first, small kernel writes its sizes and addresses.
#pragma once

#include <cutlass/gemm/group_array_problem_shape.hpp>

#include "nvfp4_gemm/cutlass_common.cuh"

namespace nemo::nvfp4_gemm {

// relu(x)^2, or x: one kernel serves both projections of an expert. NaN stays NaN.
template <class T>
struct SquaredRelu {
  struct Arguments {
    bool on = false;
  };
  CUTLASS_HOST_DEVICE T operator()(const T& x, const Arguments& args) const {
    return args.on ? (x < T(0) ? T(0) : x * x) : x;
  }
};
template <class T, int N>
struct SquaredRelu<cutlass::Array<T, N>> {
  using Arguments = typename SquaredRelu<T>::Arguments;
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(const cutlass::Array<T, N>& x,
                                                      const Arguments& args) const {
    cutlass::Array<T, N> y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) y[i] = SquaredRelu<T>{}(x[i], args);
    return y;
  }
};

template <class Table>
__global__ void fill_table(Table table, Grouped p) {
  for (int64_t e = threadIdx.x; e < p.experts; e += blockDim.x) {
    table.set(e, group(p, e));
  }
}

template <class Arch, class Tile, class MainloopSchedule, class EpilogueSchedule>
struct GroupedKernel {
  using Fusion = cutlass::epilogue::fusion::LinCombEltAct<SquaredRelu, Out, float, void, float>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, BlockScaled, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, void, RowMajor*, kColumnUnit, Out, RowMajor*, kColumnUnit, EpilogueSchedule,
      Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, BlockScaled, Operand, RowMajor*, kDepthUnit, Operand, ColumnMajor*, kDepthUnit, float,
      Tile, Cluster, Stages<Epilogue>, MainloopSchedule>::CollectiveOp;
  using Shape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Layout = typename Mainloop::Sm1xxBlkScaledConfig;

  // One entry per expert in each; in the workspace, before CUTLASS's own part of it.
  struct Table {
    typename Shape::UnderlyingProblemShape* shape;
    const Codes** a;
    const Codes** b;
    const Scale** a_scales;
    const Scale** b_scales;
    Out** out;
    typename Kernel::InternalStrideA* a_strides;
    typename Kernel::InternalStrideB* b_strides;
    typename Kernel::InternalStrideD* out_strides;
    typename Mainloop::InternalLayoutSFA* a_layout;
    typename Mainloop::InternalLayoutSFB* b_layout;

    // Lays the arrays out from `base` on and returns how many bytes they take.
    size_t place(char* base, int64_t experts) {
      size_t used = 0;
      const auto next = [&](auto*& array) {
        array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(base + used);
        used += (experts * sizeof(*array) + 255) / 256 * 256;
      };
      next(shape), next(a), next(b), next(a_scales), next(b_scales), next(out);
      next(a_strides), next(b_strides), next(out_strides), next(a_layout), next(b_layout);
      return used;
    }

    __device__ void set(int64_t e, const Dense& d) const {
      const auto size = cute::make_shape(int(d.rows), int(d.columns), int(d.depth), 1);
      shape[e] = {int(d.rows), int(d.columns), int(d.depth)};
      a[e] = static_cast<const Codes*>(d.a);
      b[e] = static_cast<const Codes*>(d.b);
      a_scales[e] = static_cast<const Scale*>(d.a_scales);
      b_scales[e] = static_cast<const Scale*>(d.b_scales);
      out[e] = static_cast<Out*>(d.out);
      a_strides[e] = {};
      b_strides[e] = {};
      out_strides[e] = {};
      cute::get<0>(a_strides[e]) = cute::get<0>(b_strides[e]) = d.depth;
      cute::get<0>(out_strides[e]) = d.columns;
      a_layout[e] = Layout::tile_atom_to_shape_SFA(size);
      b_layout[e] = Layout::tile_atom_to_shape_SFB(size);
    }
  };

  static typename Gemm::Arguments arguments(const Grouped& p, const Table& t) {
    typename Gemm::Arguments args{
        cutlass::gemm::GemmUniversalMode::kGrouped,
        {int(p.experts), t.shape, nullptr},
        {t.a, t.a_strides, t.b, t.b_strides, t.a_scales, t.a_layout, t.b_scales, t.b_layout},
        {{}, nullptr, nullptr, t.out, t.out_strides},
        this_device()};
    args.epilogue.thread.alpha_ptr = p.alpha;
    args.epilogue.thread.dAlpha = {cute::_0{}, cute::_0{}, 1};
    args.epilogue.thread.activation.on = p.squared_relu;
    return args;
  }

  static size_t workspace(const Grouped& p) {
    Table table;
    const size_t used = table.place(nullptr, p.experts);
    return used + Gemm::get_workspace_size(arguments(p, table));
  }

  static const char* run(const Grouped& p, void* workspace, Stream stream) {
    Table table;
    const size_t used = table.place(static_cast<char*>(workspace), p.experts);
    fill_table<<<1, 256, 0, stream>>>(table, p);
    return launch<Gemm>(arguments(p, table), static_cast<char*>(workspace) + used, stream);
  }
};

}  // namespace nemo::nvfp4_gemm
