// bf16 and fp16 entries as fp32. fp64 is for sensitivities alone.
#pragma once

#include "team.h"

namespace pkt {

enum class Dtype { bf16, fp16, fp32, fp64 };

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

PKT_INLINE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
#endif
}
PKT_INLINE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
#endif
}

PKT_INLINE float widened(float x) { return x; }
PKT_INLINE double widened(double x) { return x; }
PKT_INLINE float widened(Bf16 x) { return float_of(uint32_t{x.bits} << 16); }
// The exponent is moved by a multiplication, which also normalises subnormals; Inf and NaN are put back by hand.
PKT_INLINE float widened(Fp16 x) {
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of((magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite) | sign);
}

}  // namespace pkt
