// The arithmetic that the CPU and the CUDA kernels share: per-element formulas and index maths.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define CXR_INLINE __host__ __device__ __forceinline__
#else
#define CXR_INLINE inline
#endif

namespace cxrgan {

// The leaky ReLU with gain and clamp of cxr/ops.py.
constexpr double kGain = 1.4142135623730951;
constexpr double kSlope = 0.2;
constexpr double kClamp = 256.0;

template <class A>
CXR_INLINE A slope_at(A x) {
  return x > A(0) ? A(kGain) : A(kGain * kSlope);
}

// A NaN passes through, as in torch.clamp. Each comparison is one instruction, a maximum or minimum.
template <class A>
CXR_INLINE A clamp(A x) {
  const A y = A(-kClamp) > x ? A(-kClamp) : x;
  return A(kClamp) < y ? A(kClamp) : y;
}

template <class A>
CXR_INLINE A activate(A x) {
  const A up = x * A(kGain), down = x * A(kGain * kSlope);
  return clamp(up > down ? up : down);
}

// The derivative of `activate`: nothing passes where it clamps.
template <class A>
CXR_INLINE A activate_slope(A x) {
  const A slope = slope_at(x), y = x * slope;
  return y >= A(kClamp) || y <= A(-kClamp) ? A(0) : slope;
}

// bfloat16 as its bits; rounds to nearest, ties to even.
struct BF16 {
  uint16_t bits;
};

CXR_INLINE float widen(BF16 x) {
  union {
    uint32_t bits;
    float value;
  } u = {uint32_t(x.bits) << 16};
  return u.value;
}

CXR_INLINE BF16 to_bf16(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  union {
    float value;
    uint32_t bits;
  } u = {x};
  const uint32_t rounded = (u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16;
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
#endif
}

using torch::headeronly::Half;

CXR_INLINE float widen(float x) { return x; }
CXR_INLINE double widen(double x) { return x; }
CXR_INLINE float widen(Half x) {
#ifdef __CUDA_ARCH__
  return float(x);
#else  // torch's own conversion does not vectorise
  union {
    uint32_t bits;
    float value;
  } u = {uint32_t(x.x & 0x7fff) << 13};
  u.value *= 0x1p112f;
  u.bits |= ((x.x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u) | uint32_t(x.x & 0x8000) << 16;
  return u.value;
#endif
}
CXR_INLINE void narrow(float x, float& y) { y = x; }
CXR_INLINE void narrow(double x, double& y) { y = x; }
CXR_INLINE void narrow(float x, Half& y) { y = Half(x); }
CXR_INLINE void narrow(float x, BF16& y) { y = to_bf16(x); }

// The type arithmetic is done in, for a storage type.
template <class T>
using Wide = decltype(widen(T()));

// One axis of the [1, 3, 3, 1] blur. Forward, output i reads inputs down * i - pad + k with tap k;
// transposed, it reads inputs o with i = down * o - pad + k.
struct Axis {
  int64_t in, out, down, pad;
  bool transposed;
};

// The inputs that one output reads: first .. first + count - 1, the j-th with tap
// `tap + j * step`.
struct Window {
  int64_t first;
  int count, tap, step;
};

CXR_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

CXR_INLINE Window window(const Axis& axis, int64_t i) {
  int64_t first, last;
  if (axis.transposed) {
    first = floor_div(i + axis.pad - 3 + axis.down - 1, axis.down);
    last = floor_div(i + axis.pad, axis.down);
  } else {
    first = axis.down * i - axis.pad;
    last = first + 3;
  }
  first = first < 0 ? 0 : first;
  last = last >= axis.in ? axis.in - 1 : last;
  const int count = last < first ? 0 : int(last - first + 1);
  return axis.transposed
             ? Window{first, count, int(i + axis.pad - axis.down * first), int(-axis.down)}
             : Window{first, count, int(first - axis.down * i + axis.pad), 1};
}

CXR_INLINE int tap_weight(int tap) { return tap == 1 || tap == 2 ? 3 : 1; }

}  // namespace cxrgan
