// Scores to weights, experts, counts, offsets and order in one launch. A warp chooses for a token;
// then the first block sorts the slots by expert, stably, by counting.
//
// Lane l of a warp holds experts l, l + 32, ... A token's experts are found one after the other,
// each by two reductions over the warp: the best score, and the lowest expert that has it.
#include "moe_route/moe_route.h"
#include "nemo/cluster.h"
#include "nemo/static_switch.h"
#include "nemo/warp.h"

namespace nemo::moe_route {
namespace {

constexpr int kWarps = 16;
constexpr int kChunks = kMostSlots / kLanes;  // a chunk has a slot per lane
constexpr int kBatch = 8;                     // chunks summed up at a time
constexpr int32_t kLast = INT32_MIN;          // behind every score, also -inf
constexpr int32_t kNone = INT32_MAX;          // no expert
constexpr float kSumEps = 1e-20f;

// int32 in the order of float32, NaN above every number. No score is -0: a sum with a sigmoid.
NEMO_HD int32_t rank_of(float score) {
  const int32_t bits = int32_t(float_to_bits(score));
  if (score != score) return INT32_MAX;
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

NEMO_HD float score_of(int32_t rank) {
  return bits_to_float(uint32_t(rank < 0 ? rank ^ INT32_MAX : rank));
}

// What a lane knows of its experts, and the best of them: ties go to the lower one.
template <int kPerLane>
struct Candidates {
  int32_t rank[kPerLane];
  int32_t best, expert;

  // Out of experts begin to end - 1, but not `but`.
  NEMO_HD void find_best(int lane, int32_t begin = 0, int32_t end = kNone, int32_t but = kNone) {
    best = kLast;
    expert = kNone;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t e = i * kLanes + lane;
      if (rank[i] > best && begin <= e && e < end && e != but) best = rank[i], expert = e;
    }
  }

  NEMO_HD void remove(int lane, int32_t begin, int32_t end) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t e = i * kLanes + lane;
      if (begin <= e && e < end) rank[i] = kLast;
    }
  }
};

template <int kPerLane>
struct Kernel {
  using Params = Route;
  using Lanes = PerLane<Candidates<kPerLane>>;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kSteps = 4;
  static constexpr int kExperts = kPerLane * kLanes;

  struct Shared {
    int32_t rows_of[kPerLane];           // of 32 experts each
    int32_t first_row[kExperts];         // of an expert, from the first row of its 32 on
    uint16_t before[kChunks][kExperts];  // a chunk's slots of an expert, then those of chunks before
    uint16_t expert[kMostSlots];
    uint8_t earlier[kMostSlots];  // slots of the same expert before this one, within its chunk
  };

  template <int kStep>
  static NEMO_HD void step(const Route& p, int block, int blocks, int thread, Shared& s) {
    if constexpr (kStep == 0) {
      choose_all(p, block, blocks, thread, s);
    } else if constexpr (kStep == 1) {
      count(p, thread, s);
    } else if constexpr (kStep == 2) {
      sum_chunks(p, thread, s);
    } else {
      place(p, thread, s);
    }
  }

  static NEMO_HD int slots(const Route& p) { return int(p.tokens) * p.top_k; }

  static NEMO_HD void choose_all(const Route& p, int block, int blocks, int thread, Shared& s) {
    if (block == 0) {
      const int chunks = int(ceil_div(slots(p), kLanes));
      for (int i = thread; i < chunks * kExperts; i += kThreads) {
        s.before[i / kExperts][i % kExperts] = 0;
      }
    }
    if (!leads_warp(thread)) return;
    const int64_t warps = int64_t(blocks) * kWarps;
    for (int64_t token = thread / kLanes * blocks + block; token < p.tokens; token += warps) {
      choose(p, token, thread);
    }
  }

  static NEMO_HD float logit(const Route& p, int64_t token, int32_t expert) {
    const int64_t at = offset(token, p.logits_row, expert, p.logits_column);
    return load_float(p.logits, p.logits_dtype, at);
  }

  static NEMO_HD void choose(const Route& p, int64_t token, int thread) {
    Lanes lanes;
    each_lane(thread, [&](int lane) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int32_t e = i * kLanes + lane;
        lanes[lane].rank[i] = kLast;
        if (e >= p.experts) continue;
        float score = sigmoid<float>(logit(p, token, e));
        if (p.bias) score += load_float(p.bias, p.bias_dtype, offset(e, p.bias_stride));
        lanes[lane].rank[i] = rank_of(score);
      }
    });
    if (p.topk_group < p.n_group) keep_groups(p, thread, lanes);
    each_lane(thread, [&](int lane) { lanes[lane].find_best(lane); });
    PerLane<int32_t> mine;
    for (int slot = 0; slot < p.top_k; ++slot) {
      const int32_t e = best(thread, lanes);
      each_lane(thread, [&](int lane) {
        if (lane == slot) mine[lane] = e;
        if (lane == e % kLanes) {
          lanes[lane].remove(lane, e, e + 1);
          lanes[lane].find_best(lane);
        }
      });
    }
    PerLane<float> score, total;
    each_lane(thread, [&](int lane) {
      score[lane] = lane < p.top_k ? sigmoid<float>(logit(p, token, mine[lane])) : 0.0f;
      total[lane] = score[lane];
    });
    if (p.normalise) sum(total);
    each_lane(thread, [&](int lane) {
      if (lane >= p.top_k) return;
      const int64_t at = offset(token, p.top_k) + lane;
      const float weight = p.normalise ? score[lane] / (total[lane] + kSumEps) : score[lane];
      p.weights[at] = weight * p.scale;
      p.chosen[at] = mine[lane];
    });
  }

  // The expert of the highest rank in the warp.
  static NEMO_HD int32_t best(int thread, Lanes& lanes) {
    PerLane<int32_t> rank, expert;
    each_lane(thread, [&](int lane) { rank[lane] = lanes[lane].best; });
    const int32_t most = largest(rank);
    each_lane(thread, [&](int lane) {
      expert[lane] = lanes[lane].best == most ? lanes[lane].expert : kNone;
    });
    return smallest(expert);
  }

  // Puts the experts of all but the best groups behind every other.
  static NEMO_HD void keep_groups(const Route& p, int thread, Lanes& lanes) {
    const int32_t size = p.experts / p.n_group;
    PerLane<int32_t> rank;  // lane g has that of group g
    each_lane(thread, [&](int lane) { rank[lane] = kLast; });
    for (int32_t g = 0; g < p.n_group; ++g) {
      float score = 0.0f;
      int32_t taken = kNone;
      for (int i = 0; i < smaller(size, 2); ++i) {
        each_lane(thread, [&](int lane) {
          lanes[lane].find_best(lane, g * size, (g + 1) * size, taken);
        });
        PerLane<int32_t> top;
        each_lane(thread, [&](int lane) { top[lane] = lanes[lane].best; });
        score += score_of(largest(top));
        taken = best(thread, lanes);
      }
      each_lane(thread, [&](int lane) {
        if (lane == g) rank[lane] = rank_of(score);
      });
    }
    uint32_t dropped = ~0u;
    for (int i = 0; i < p.topk_group; ++i) {
      const int32_t most = largest(rank);
      PerLane<int32_t> group;
      each_lane(thread, [&](int lane) { group[lane] = rank[lane] == most ? lane : kNone; });
      const int32_t g = smallest(group);
      dropped &= ~(1u << g);
      each_lane(thread, [&](int lane) {
        if (lane == g) rank[lane] = kLast;
      });
    }
    for (int32_t g = 0; g < p.n_group; ++g) {
      if (!(dropped >> g & 1)) continue;
      each_lane(thread, [&](int lane) { lanes[lane].remove(lane, g * size, (g + 1) * size); });
    }
  }

  static NEMO_HD void count(const Route& p, int thread, Shared& s) {
    if (!leads_warp(thread)) return;
    for (int chunk = thread / kLanes; chunk * kLanes < slots(p); chunk += kWarps) {
      PerLane<int32_t> expert;
      each_lane(thread, [&](int lane) {
        const int slot = chunk * kLanes + lane;
        expert[lane] = slot < slots(p) ? p.chosen[slot] : -1;
      });
      PerLane<uint32_t> same = equal_lanes(expert);
      each_lane(thread, [&](int lane) {
        if (expert[lane] < 0) return;
        const int slot = chunk * kLanes + lane;
        const int earlier = ones(same[lane] & ((1u << lane) - 1));
        s.expert[slot] = uint16_t(expert[lane]);
        s.earlier[slot] = uint8_t(earlier);
        if (earlier == 0) s.before[chunk][expert[lane]] = uint16_t(ones(same[lane]));
      });
    }
  }

  // A thread per expert: rows of the chunks before each chunk, then of the experts before.
  static NEMO_HD void sum_chunks(const Route& p, int thread, Shared& s) {
    if (!leads_warp(thread)) return;
    const int chunks = int(ceil_div(slots(p), kLanes));
    for (int group = thread / kLanes; group < kPerLane; group += kWarps) {
      PerLane<int32_t> total, before;
      each_lane(thread, [&](int lane) {
        const int e = group * kLanes + lane;
        total[lane] = 0;
        for (int first = 0; first < chunks; first += kBatch) {
          int32_t here[kBatch];  // loads do not wait for the stores of others
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            here[i] = first + i < chunks ? s.before[first + i][e] : 0;
          }
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            if (first + i < chunks) s.before[first + i][e] = uint16_t(total[lane]);
            total[lane] += here[i];
          }
        }
        before[lane] = total[lane];
      });
      sum_before(before);
      each_lane(thread, [&](int lane) {
        const int e = group * kLanes + lane;
        s.first_row[e] = before[lane];
        if (e < p.experts) p.counts[e] = total[lane];
        if (lane == kLanes - 1) s.rows_of[group] = before[lane] + total[lane];
      });
    }
  }

  static NEMO_HD int32_t first_row(const Shared& s, int e) {
    int32_t first = s.first_row[e];
#pragma unroll
    for (int group = 0; group < kPerLane; ++group) {
      if (group < e / kLanes) first += s.rows_of[group];
    }
    return first;
  }

  static NEMO_HD void place(const Route& p, int thread, Shared& s) {
    for (int e = thread; e < p.experts; e += kThreads) {
      p.offsets[e] = e + 1 < kExperts ? first_row(s, e + 1) : slots(p);
    }
    for (int slot = thread; slot < slots(p); slot += kThreads) {
      const int e = s.expert[slot];
      p.order[first_row(s, e) + s.before[slot / kLanes][e] + s.earlier[slot]] = slot;
    }
  }
};

}  // namespace

const char* run(const Route& p, Stream stream) {
  // Up to four tokens per block, one per scheduler of a multiprocessor. Not measured.
  const int blocks = int(larger<int64_t>(smaller<int64_t>(ceil_div(p.tokens, 4), kMostBlocks), 1));
  const char* refused = nullptr;
  const int per_lane = int(std::bit_ceil(uint32_t(ceil_div(p.experts, kLanes))));
  static_switch<1, 2, 4, 8, 16>(per_lane, [&](auto n) {
    refused = launch_cluster<Kernel<n>>(p, blocks, stream);
  });
  return refused;
}

}  // namespace nemo::moe_route
