// Philox-4x32-10 (Salmon et al., 2011) for host and device, the same stream as pkt/ops/rsvd_reference.py: key = seed,
// counter = (row, row >> 32, stream, group).
#pragma once

#include <cstdint>

#include "team.h"

namespace pkt {

struct Philox4 {
  uint32_t word[4];
  // word[i] without an index at run time, which would move the words from registers to memory on a GPU.
  PKT_MEMBER uint32_t pick(uint32_t i) const {
    return i < 2 ? (i == 0 ? word[0] : word[1]) : (i == 2 ? word[2] : word[3]);
  }
};

PKT_INLINE Philox4 philox(int64_t seed, int64_t row, uint32_t stream, uint32_t group) {
  uint32_t c0 = static_cast<uint32_t>(row), c1 = static_cast<uint32_t>(row >> 32), c2 = stream, c3 = group;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Random signs for columns 0 … count − 1 of a row: column j reads one bit of the row's words, 128 columns to a group.
PKT_INLINE void philox_signs(int64_t seed, int64_t row, uint32_t stream, int64_t count, float* to) {
  for (int64_t first = 0; first < count; first += 128) {
    const Philox4 words = philox(seed, row, stream, static_cast<uint32_t>(first / 128));
    for (int64_t j = first; j < count && j < first + 128; ++j) {
      to[j] = 1.0f - 2.0f * static_cast<float>(words.word[j / 32 % 4] >> j % 32 & 1u);
    }
  }
}

PKT_INLINE float philox_sign(int64_t seed, int64_t row, uint32_t stream, uint32_t column) {
  const Philox4 words = philox(seed, row, stream, column / 128);
  return 1.0f - 2.0f * static_cast<float>(words.pick(column / 32 % 4) >> column % 32 & 1u);
}

// Uniform in (-1, 1): what replaces a dependent column, where signs could repeat themselves in a tiny space.
PKT_INLINE float philox_uniform(int64_t seed, int64_t row, uint32_t stream, uint32_t column) {
  const Philox4 words = philox(seed, row, stream, column / 4);
  return (static_cast<float>(words.pick(column % 4) >> 8) - 8388607.5f) * 1.1920929e-7f;
}

}  // namespace pkt
