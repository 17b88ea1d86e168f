// The clustered sensitivity kernel on an emulated Hopper: for the tests, by ctypes. The threads of a cluster's two blocks are fibers;
// shared memory starts as NaN; a copy lands when it is issued, swizzled as the copy engine does; a product reads its operands
// from the bytes of shared memory, by the layout its descriptor names, and no earlier than it is waited for.

#include <cstring>
#include <vector>

#include "clustered.h"
#include "export.h"

namespace {

using namespace pkt::clustered;
using pkt::emulation::yield;

// Rows of 16-bit entries as the copy engine sees them.
struct Map {
  const uint16_t* data;
  int64_t stride;
  int columns;
};

struct Barrier {
  int arrivals = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;
};

struct Product {
  int stage, which, k;
  bool add;
};

struct Stuck {};

// What two blocks share with whoever is in their cluster.
struct Cluster {
  std::vector<unsigned char> memory[cluster];
  Barrier fetched[cluster][stages], released[cluster][stages];
  pkt::emulation::Barrier all, groups[cluster][2];
  int64_t turns = 0;
  bool stuck = false;

  Cluster() {
    for (auto& m : memory) m.assign(stages * stage_bytes, 0xFF);
    for (int b = 0; b < cluster; ++b) {
      for (Barrier& f : fetched[b]) f.arrivals = f.pending = 1;
      for (Barrier& r : released[b]) r.arrivals = r.pending = releases;
      for (auto& g : groups[b]) g.members = group;
    }
    all.members = cluster * threads;
  }
  // Waits until ready() is true; so many turns of nobody getting anywhere are a deadlock.
  template <class Ready>
  void until(const Ready& ready) {
    while (!ready()) {
      if (stuck || ++turns > 4000000) stuck = true;
      if (stuck) throw Stuck{};
      yield();
    }
    turns = 0;
  }
  void meet(pkt::emulation::Barrier& barrier) {
    const int generation = barrier.generation;
    ++barrier.arrived;
    barrier.release_if_full();
    until([&] { return barrier.generation != generation; });
  }
  void change(Barrier& barrier, int arrivals, int bytes) {
    barrier.pending -= arrivals, barrier.bytes += bytes;
    if (barrier.pending < 0) stuck = true;  // more arrivals than are expected
    if (barrier.pending == 0 && barrier.bytes == 0) ++barrier.phase, barrier.pending = barrier.arrivals;
  }
};

template <class Element>
struct Emulated {
  Cluster* shared;
  Map x, dy;
  int first, apart, fiber;
  std::vector<Product> queue;

  int thread() const { return fiber % threads; }
  int rank() const { return fiber / threads; }
  int first_tile() const { return first; }
  int tiles_apart() const { return apart; }
  void begin() { shared->meet(shared->all); }
  void end() { shared->meet(shared->all); }
  void fewer_registers() {}
  void more_registers() {}

  void wait(const Barrier& barrier, uint32_t phase) {
    shared->until([&] { return (barrier.phase & 1) != phase; });
  }
  void wait_fetched(int stage, uint32_t phase) { wait(shared->fetched[rank()][stage], phase); }
  void wait_released(int stage, uint32_t phase) { wait(shared->released[rank()][stage], phase); }
  void expect(int stage) { shared->change(shared->fetched[rank()][stage], 1, stage_bytes); }
  void release(int stage, int to) { shared->change(shared->released[to][stage], 1, 0); }

  static size_t swizzled(size_t at) { return at ^ (at >> 7 & 7) << 4; }

  // A box of `rows` × 64 at coordinates {column, row, end, bound}, to `at` of each block in `to`.
  void copy(const Map& map, int rows, int column, int row, int end, size_t at, unsigned to, int stage) {
    for (int r = 0; r < rows; ++r) {
      // In bytes, as the engine adds them: modulo 2^64.
      const uint64_t stride = 2 * static_cast<uint64_t>(map.stride);
      const uint64_t offset = static_cast<uint64_t>(row + r) * stride + static_cast<uint64_t>(end) * stride +
                              static_cast<uint64_t>(bound) * ((uint64_t{1} << 35) - stride);
      for (int c = 0; c < panel; ++c) {
        uint16_t value = 0;
        if (row + r < bound && column + c < map.columns) {
          std::memcpy(&value, reinterpret_cast<const char*>(map.data) + offset + 2 * (column + c), 2);
        }
        for (int b = 0; b < cluster; ++b) {
          if (to >> b & 1) std::memcpy(&shared->memory[b][swizzled(at + (r * panel + c) * 2)], &value, 2);
        }
      }
    }
    for (int b = 0; b < cluster; ++b) {
      if (to >> b & 1) shared->change(shared->fetched[b][stage], 0, -rows * panel * 2);
    }
  }
  void load_dy(int stage, int p, int column, int row, int end) {
    copy(dy, step, column, row, end, stage * stage_bytes + p * panel_bytes, 1u << rank(), stage);
  }
  void load_x_for_both(int stage, int p, int column, int row, int end) {
    const size_t at = stage * stage_bytes + (dy_panels + p) * panel_bytes + rank() * (panel_bytes / cluster);
    copy(x, step / cluster, column, row, end, at, 3, stage);
  }

  float entry(size_t base, int row, int column) const {
    Element value;
    std::memcpy(&value, &shared->memory[rank()][swizzled(base + column / panel * panel_bytes + row * panel * 2 + column % panel * 2)],
                2);
    return pkt::widened(value);
  }
  void begin_products() {}
  void end_products() {}
  void product(float (&)[values], int stage, int which, int k, bool add) { queue.push_back({stage, which, k, add}); }
  // A step is one group of products, and a warpgroup's are done together.
  template <int left>
  void wait_products(float (&d)[values]) {
    constexpr size_t group_of = step / 16;
    const int lane = thread() % group;
    while (queue.size() > left * group_of) {
      const Product p = queue.front();
      queue.erase(queue.begin());
      const size_t dy_base = p.stage * stage_bytes + p.which * panel_bytes;
      const size_t x_base = p.stage * stage_bytes + dy_panels * panel_bytes;
      for (int i = 0; i < values; ++i) {
        const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int t = 16 * p.k; t < 16 * p.k + 16; ++t) sum += entry(dy_base, t, row) * entry(x_base, t, column);
        d[i] = p.add ? d[i] + sum : sum;
      }
    }
    shared->meet(shared->groups[rank()][thread() / group - 1]);
  }
};

template <int power, class Element>
bool emulated(const Map& x, const Map& dy, const Batch& batch, const Scores& scores, const void* w, int clusters) {
  for (int index = 0; index < clusters; ++index) {
    Cluster shared;
    pkt::emulation::run_block(cluster * threads, [&] {
      Emulated<Element> gpu{&shared, x, dy, index, clusters, static_cast<int>(threadIdx.x), {}};
      try {
        run<power>(gpu, batch, scores, static_cast<const Element*>(w));
      } catch (const Stuck&) {
      }
    });
    if (shared.stuck) return false;
  }
  return true;
}

}  // namespace

// Whether nobody waited for ever. `reversed` lets the threads take turns backwards.
PKT_EXPORT bool pkt_emulated_clustered(float* acc, int64_t acc_stride, const void* w, int64_t w_stride, const uint16_t* x,
                                       int64_t x_stride, const uint16_t* dy, int64_t dy_stride, const int64_t* starts,
                                       const int64_t* lens, int samples, int rows, int n, int m, int power, int fp16,
                                       int clusters, int reversed) {
  pkt::emulation::reversed = reversed != 0;
  const Batch batch{starts, lens, samples, rows};
  const Scores scores{acc, acc_stride, w_stride, n, m};
  const auto run = fp16 ? (power == 2 ? emulated<2, pkt::Fp16> : emulated<1, pkt::Fp16>)
                        : (power == 2 ? emulated<2, pkt::Bf16> : emulated<1, pkt::Bf16>);
  return run({x, x_stride, m}, {dy, dy_stride, n}, batch, scores, w, clusters);
}
