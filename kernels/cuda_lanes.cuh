// What a lane of the CUDA kernels does: access to memory and the arithmetic of its channels.
//
// Activations are [N, H, W, C] in memory. A block has X lanes along the channels, each lane V of
// them in one access, times Y pixels of a row; X * Y is a multiple of the warp and X a power of two
// no larger. Blocks walk down the pixels with a lane's channels, and so its factors, terms and
// sums, in registers.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "epilogue.h"

namespace cxrgan {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T at[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, class T, class A>
__device__ __forceinline__ void widen(const Pack<T, V>& from, A (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = cxrgan::widen(from.at[i]);
}

template <int V, class T, class A>
__device__ __forceinline__ void store(const A (&from)[V], T* to) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(from[i], pack.at[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// V numbers from memory, or V times another where they are not there.
template <int V, class A>
__device__ __forceinline__ void fill(bool there, const A* from, A otherwise, A (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = otherwise;
  if (there) widen<V>(load<V>(from), to);
}

// Of an image, the columns and channels that a block works on, on their way through shared memory:
// of each row a group of copies that the threads begin and later wait for.
template <class T, int V>
struct Band {
  const T* at;            // the first row's first column, at the lane's channels
  int64_t rows, channels, stride;  // stride: from a row to the next
  int columns;            // 0 for a lane without channels

  __device__ __forceinline__ void begin(int64_t row, Pack<T, V>* to) const {
    if (row >= 0 && row < rows)
      for (int k = threadIdx.y; k < columns; k += blockDim.y) {
        const auto* from = reinterpret_cast<const Pack<T, V>*>(at + row * stride + k * channels);
        Pack<T, V>* there = to + k * blockDim.x + threadIdx.x;
        if constexpr (sizeof(*to) >= 4)
          __pipeline_memcpy_async(there, from, sizeof(*to));
        else
          *there = *from;
      }
    __pipeline_commit();
  }
};

constexpr int kRows = 4;  // of a band in shared memory: one is worked on, the others are on their way

// What a lane loads for its own pixel of a row, some rows ahead.
template <class P>
struct Queue {
  static constexpr int kAhead = 3;
  P of[kAhead] = {};

  __device__ __forceinline__ P next(P newest) {
    const P oldest = of[0];
#pragma unroll
    for (int i = 1; i < kAhead; ++i) of[i - 1] = of[i];
    of[kAhead - 1] = newest;
    return oldest;
  }
};

// The tensors of `mod_act` beside its convolution output; null where left out.
template <class A>
struct Epilogue {
  const A *d, *b, *r, *s, *eps, *strength;
  int64_t eps_stride;

  __device__ A noise(int64_t n, int64_t pixel) const {
    return eps ? eps[n * eps_stride + pixel] : A(0);
  }
};

// An image's factors and terms for the channels of a lane.
template <int V, class A>
struct Factors {
  A d[V], b[V], r[V], s[V], strength;

  __device__ Factors(const Epilogue<A>& e, int64_t n, int64_t channels, int64_t c) {
    const int64_t at = n * channels + c;
    strength = e.strength ? *e.strength : A(0);
    fill(c < channels && e.d, e.d + at, A(1), d);
    fill(c < channels && e.b, e.b + c, A(0), b);
    fill(c < channels && e.r, e.r + at, A(0), r);
    fill(c < channels && e.s, e.s + at, A(1), s);
  }

  // x becomes y; returns these channels' part of the image.
  __device__ __forceinline__ A forward(A z, A (&x)[V]) const {
    A image = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A a = activate(x[i] * d[i] + (strength * z + b[i]));
      image += a * r[i];
      x[i] = a * s[i];
    }
    return image;
  }
};

// What a lane adds to the gradients of d, b, r, s (one row of the parts each) and strength.
constexpr int kSums = 4;

template <int V, class A>
struct Sums {
  A d[V] = {}, b[V] = {}, r[V] = {}, s[V] = {}, strength = 0;

  // The gradient of x from those of y and the image; counted if `counts`.
  __device__ __forceinline__ void backward(const Factors<V, A>& k, A z, const A (&x)[V],
                                           const A (&gy)[V], A gimage, bool counts, A (&dx)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A argument = x[i] * k.d[i] + (k.strength * z + k.b[i]), a = activate(argument);
      const A g = (gy[i] * k.s[i] + gimage * k.r[i]) * activate_slope(argument);
      dx[i] = g * k.d[i];
      if (!counts) continue;
      s[i] += gy[i] * a;
      r[i] += gimage * a;
      d[i] += g * x[i];
      b[i] += g;
      strength += g * z;
    }
  }
};

// Adds the lanes' parts of an image up, and to what earlier tiles of channels left there.
template <class A>
__device__ __forceinline__ void add_image(A part, A* image, bool inside, bool begin) {
  for (int offset = int(blockDim.x) / 2; offset > 0; offset /= 2)
    part += __shfl_xor_sync(kAll, part, offset);
  if (inside && threadIdx.x == 0) *image = begin ? part : *image + part;
}

// Tiles of channels [first, first + X * V): with an image to add up, a block works through all.
#define CXR_FOR_TILES(first)                                                             \
  for (int64_t first = int64_t(blockIdx.y) * blockDim.x * V; first < channels;           \
       first += int64_t(gridDim.y) * blockDim.x * V)

}  // namespace
}  // namespace cxrgan
