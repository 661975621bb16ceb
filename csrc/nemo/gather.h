// Rows that lie anywhere, brought to shared memory 128 bytes at a time by a warpgroup.
#pragma once

#include "nemo/warpgroup.h"

namespace nemo {

// Thread t copies piece t % 8 of lines t / 8, t / 8 + 16, ... to where TensorMap has them.
template <int kLines>
class Gather {
 public:
  // row_of(line) is where the row begins that belongs there. Null: the line stays as it is.
  template <class F>
  NEMO_DEVICE void point(F row_of) {
    each_thread([&](int t) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const void* row = row_of(t / kPieces + kApart * i);
        row_[i][t] = static_cast<const uint8_t*>(row);
      }
    });
  }

  // Bytes from `first` on of rows that are `size` long, zeros behind them. Of one thread.
  NEMO_DEVICE void copy(int t, uint8_t* to, int64_t first, int64_t size) {
    const int piece = t % kPieces;
    const int64_t byte = first + 16 * piece;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int line = t / kPieces + kApart * i;
      if (row_[i][t] == nullptr) continue;
      copy_16(to + kBoxBytes * line + 16 * (piece ^ line % 8), row_[i][t] + byte, byte < size);
    }
  }

 private:
  static constexpr int kPieces = kBoxBytes / 16, kApart = kWarpgroup / kPieces;
  static constexpr int kEach = kLines / kApart;

  PerThread<const uint8_t*> row_[kEach];
};

// Which stages' copies are under way: each is handed over when the second after it was asked for, so
// that the threads wait for copies that have had their time.
template <int kStages>
class Copies {
 public:
  static constexpr int kBehind = 2;
  static_assert(kBehind + 2 <= kStages, "else consumers would wait for a stage held back");

  // After a stage's copies.
  NEMO_DEVICE void asked(Barrier (&full)[kStages]) {
    commit_copies();
    if (under_way_ < kBehind) {
      ++under_way_;
    } else {
      wait_copies<kBehind>();
      publish_stores();
      arrive(full);
    }
  }

  // After the last.
  NEMO_DEVICE void finish(Barrier (&full)[kStages]) {
    wait_copies<0>();
    publish_stores();
    for (; under_way_ > 0; --under_way_) arrive(full);
  }

 private:
  NEMO_DEVICE void arrive(Barrier (&full)[kStages]) {
    each_thread([&](int) { full[next_.stage].arrive(); });
    next_.next();
  }

  Turn<kStages> next_;
  int under_way_ = 0;
};

}  // namespace nemo
