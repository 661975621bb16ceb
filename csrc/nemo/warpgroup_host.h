// The host's side of warpgroup.h and wgmma.h. A rule that is broken ends the process.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <functional>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "nemo/vec.h"

namespace nemo {

inline void require(bool holds, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "nemokernels: %s\n", rule);
  std::abort();
}

// What a warpgroup has asked for, and what is not done yet: copies and products in groups.
struct Asked {
  uint8_t* shared_memory;
  std::vector<std::function<void()>> copies, products;
  std::deque<std::vector<std::function<void()>>> copy_groups, product_groups;
  bool unpublished = false, begun = false;

  static Asked& here() {
    static thread_local Asked asked;
    return asked;
  }
  static void close(std::vector<std::function<void()>>& open,
                    std::deque<std::vector<std::function<void()>>>& groups) {
    groups.push_back(std::move(open));
    open.clear();
  }
  static bool finish(std::deque<std::vector<std::function<void()>>>& groups, size_t left) {
    const bool some = groups.size() > left;
    for (; groups.size() > left; groups.pop_front()) {
      for (auto& one : groups.front()) one();
    }
    return some;
  }
};

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const uint8_t*>(p) - Asked::here().shared_memory);
}

// Where the byte lies that a line-by-line layout has at this address.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

class Barrier {
 public:
  ~Barrier() { require(missing_ == arrivals_ && bytes_ == 0, "a phase was left unfinished"); }

  void init(int arrivals) { arrivals_ = missing_ = arrivals; }
  void arrive() { change(1, 0); }
  void expect(int bytes) { change(1, bytes); }
  void deliver(int bytes) { change(0, -bytes); }
  void wait(int parity) {
    std::unique_lock lock(mutex_);
    const bool ended = changed_.wait_for(lock, std::chrono::seconds(60),
                                         [&] { return phase_ % 2 != parity; });
    require(ended, "a barrier was waited for in vain");
  }

 private:
  void change(int arrivals, int64_t bytes) {
    require(!Asked::here().unpublished || arrivals == 0 || bytes != 0,
            "a thread arrived before it published its stores");
    const std::lock_guard lock(mutex_);
    require(missing_ >= arrivals, "too many arrivals in a phase");
    missing_ -= arrivals;
    bytes_ += bytes;
    if (missing_ == 0 && bytes_ == 0) {
      missing_ = arrivals_;
      ++phase_;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int arrivals_ = 0, missing_ = 0, phase_ = 0;
  int64_t bytes_ = 0;
};

inline void load_box(void* to, const TensorMap& map, Barrier& barrier, int x, int y, int z) {
  const int width = kBoxBytes / map.itemsize;
  uint8_t* memory = Asked::here().shared_memory;
  const uint32_t first = shared_address(to);
  require(first % 1024 == 0, "a box needs shared memory aligned to 1024 bytes");
  const auto inside = [](int64_t i, int64_t size) { return 0 <= i && i < size; };
  for (int line = 0; line < map.lines; ++line) {
    for (int i = 0; i < width; ++i) {
      uint8_t* at = memory + swizzled(first + kBoxBytes * line + map.itemsize * i);
      std::memset(at, 0, map.itemsize);
      if (!inside(x + i, map.size[0]) || !inside(y + line, map.size[1]) ||
          !inside(z, map.size[2])) {
        continue;
      }
      const int64_t from = offset(x + i, map.itemsize, y + line, map.stride[0], z, map.stride[1]);
      std::memcpy(at, static_cast<const uint8_t*>(map.data) + from, map.itemsize);
    }
  }
  barrier.deliver(kBoxBytes * map.lines);
}

inline void copy_bulk(void* to, const void* from, int bytes, Barrier& barrier) {
  check_aligned(from, 16);
  check_aligned(to, 16);
  require(bytes % 16 == 0, "bulk copies move multiples of 16 bytes");
  std::memcpy(to, from, bytes);
  barrier.deliver(bytes);
}

inline void copy_16(void* to, const void* from, bool inside) {
  if (inside) check_aligned(from, 16);
  check_aligned(to, 16);
  Asked::here().copies.push_back([=] {
    std::memset(to, 0, 16);
    if (inside) std::memcpy(to, from, 16);
  });
}
inline void commit_copies() {
  Asked& asked = Asked::here();
  Asked::close(asked.copies, asked.copy_groups);
}
template <int kLeft>
void wait_copies() {
  Asked& asked = Asked::here();
  asked.unpublished |= Asked::finish(asked.copy_groups, kLeft);
}
inline void publish_stores() { Asked::here().unpublished = false; }

template <int>
void take_registers() {}
template <int>
void give_registers() {}

inline void begin_products() { Asked::here().begun = true; }
inline void commit_products() {
  Asked& asked = Asked::here();
  Asked::close(asked.products, asked.product_groups);
  asked.begun = false;
}
template <int kLeft>
void wait_products() {
  Asked::finish(Asked::here().product_groups, kLeft);
}

// Element (row, k) of an operand, as the matrix units address it.
template <class T, bool kAcross>
float element(uint64_t operand, int row, int k) {
  const uint32_t start = (operand & 0x3FFF) << 4, apart = (operand >> 16 & 0x3FFF) << 4;
  const uint32_t eight = (operand >> 32 & 0x3FFF) << 4;
  require(operand >> 62 == 1, "an operand is not laid out in swizzled lines of 128 bytes");
  const uint32_t address =
      kAcross ? start + row / 64 * apart + k / 8 * eight + k % 8 * kBoxBytes + row % 64 * 2
              : start + row / 8 * eight + row % 8 * kBoxBytes + k * int(sizeof(T));
  T value;
  std::memcpy(&value, Asked::here().shared_memory + swizzled(address), sizeof value);
  return to_float(value);
}

// sums (64, kColumns) of element a(row, k) times the elements of b.
template <class T, bool kAcross, int kColumns, class A, class S>
void ask_for_product(S& sums, A a, uint64_t right, bool adds) {
  Asked& asked = Asked::here();
  require(asked.begun, "a product was asked for before begin_products");
  asked.products.push_back([&sums, a, right, adds] {
    constexpr int kDepth = kProductBytes / int(sizeof(T));
    static thread_local float left[64][kDepth], b[256][kDepth];
    for (int k = 0; k < kDepth; ++k) {
      for (int row = 0; row < 64; ++row) left[row][k] = a(row, k);
      for (int c = 0; c < kColumns; ++c) b[c][k] = element<T, kAcross>(right, c, k);
    }
    for (int row = 0; row < 64; ++row) {
      for (int c = 0; c < kColumns; ++c) {
        const int thread = row / 16 * 32 + row % 8 * 4 + c % 8 / 2;
        float& sum = sums[thread].value[c / 8 * 4 + row % 16 / 8 * 2 + c % 2];
        float total = adds ? sum : 0.0f;
        for (int k = 0; k < kDepth; ++k) total += left[row][k] * b[c][k];
        sum = total;
      }
    }
  });
}

template <class T, bool kAcross, int kColumns>
void multiply(PerThread<Sums<kColumns>>& sums, uint64_t left, uint64_t right, bool adds) {
  ask_for_product<T, kAcross, kColumns>(
      sums, [left](int row, int k) { return element<T, false>(left, row, k); }, right, adds);
}

template <class T, int kColumns, int kMost>
void multiply(PerThread<Sums<kMost>>& sums, PerThread<FragmentA>& left, uint64_t right, bool adds) {
  ask_for_product<T, false, kColumns>(
      sums,
      [&left](int row, int k) {
        const uint32_t pair = left[row / 16 * 32 + row % 8 * 4 + k % 8 / 2]
                                  .pair[k / 8 * 2 + row % 16 / 8];
        return k % 2 ? high_half<T>(pair) : low_half<T>(pair);
      },
      right, adds);
}

inline void turn_8_by_8(PerThread<uint32_t>& value) {
  const PerThread<uint32_t> before = value;
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const int row = thread % kLanes / 4, column = thread % 4 * 2, warp = thread / kLanes * kLanes;
    uint32_t out = 0;
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = before.value[warp + (column + i) * 4 + row / 2];
      out |= (row % 2 ? pair >> 16 : pair & 0xFFFF) << 16 * i;
    }
    value[thread] = out;
  }
}

template <int, int kMost>
void settle(PerThread<Sums<kMost>>&) {}

inline void release(Barrier& empty) {
  for (int warp = 0; warp < kWarpgroup / kLanes; ++warp) empty.arrive();
}

inline void exchange(PerThread<uint32_t>& value, int bits) {
  const PerThread<uint32_t> before = value;
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    value[thread] = before.value[thread ^ bits];
  }
}

template <class Kernel>
const char* prepare_warpgroups() {
  return nullptr;
}

// Three blocks, so that each has several tiles to do.
template <class Kernel>
void launch_warpgroups(const typename Kernel::Params& params, int64_t most, Stream) {
  using Shared = typename Kernel::Shared;
  const int64_t blocks = smaller<int64_t>(3, most);
  std::vector<uint8_t> room(sizeof(Shared) + 1024);
  uint8_t* memory = room.data() + -reinterpret_cast<uintptr_t>(room.data()) % 1024;
  for (int64_t block = 0; block < blocks; ++block) {
    std::memset(memory, 0xFF, sizeof(Shared));  // NaN in every format
    Shared& shared = *new (memory) Shared;
    Kernel::setup(shared);
    std::vector<std::thread> warpgroups;
    for (int which = 0; which < Kernel::kWarpgroups; ++which) {
      warpgroups.emplace_back([&, which] {
        Asked& asked = Asked::here();
        asked.shared_memory = memory;
        Kernel::run(params, block, blocks, which, shared);
        require(asked.copies.empty() && asked.copy_groups.empty() && asked.products.empty() &&
                    asked.product_groups.empty(),
                "a warpgroup ended before what it had asked for");
      });
    }
    for (std::thread& one : warpgroups) one.join();
    shared.~Shared();
  }
}

}  // namespace nemo
