// The dense product, for whichever architecture the including source names.
#pragma once

#include "nvfp4_gemm/cutlass_common.cuh"

namespace nemo::nvfp4_gemm {

// Tile: rows and columns of out, and depth, that a thread block works on at a time.
template <class Arch, class Tile>
struct DenseKernel {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, BlockScaled, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, void, RowMajor, kColumnUnit, Out, RowMajor, kColumnUnit,
      cutlass::epilogue::collective::EpilogueScheduleAuto>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, BlockScaled, Operand, RowMajor, kDepthUnit, Operand, ColumnMajor, kDepthUnit, float,
      Tile, Cluster, Stages<Epilogue>, cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, void>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Gemm::Arguments arguments(const Dense& p) {
    using Layout = typename Mainloop::Sm1xxBlkScaledConfig;
    const auto shape = cute::make_shape(int(p.rows), int(p.columns), int(p.depth), 1);
    typename Kernel::StrideA a_strides{};
    typename Kernel::StrideB b_strides{};
    typename Kernel::StrideD out_strides{};
    cute::get<0>(a_strides) = cute::get<0>(b_strides) = p.depth;
    cute::get<0>(out_strides) = p.columns;
    typename Gemm::Arguments args{
        cutlass::gemm::GemmUniversalMode::kGemm,
        shape,
        {static_cast<const Codes*>(p.a), a_strides, static_cast<const Codes*>(p.b), b_strides,
         static_cast<const Scale*>(p.a_scales), Layout::tile_atom_to_shape_SFA(shape),
         static_cast<const Scale*>(p.b_scales), Layout::tile_atom_to_shape_SFB(shape)},
        {{}, nullptr, {}, static_cast<Out*>(p.out), out_strides},
        this_device()};
    args.epilogue.thread.alpha_ptr = p.alpha;
    return args;
  }

  static size_t workspace(const Dense& p) { return Gemm::get_workspace_size(arguments(p)); }

  static const char* run(const Dense& p, void* workspace, Stream stream) {
    return launch<Gemm>(arguments(p), workspace, stream);
  }
};

}  // namespace nemo::nvfp4_gemm
