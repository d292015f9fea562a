// The CUDA kernels of `mod_act`, forward and backward, and of the backward pass of `fir_mod_act`,
// which blurs twice.
#pragma once

#include "cuda_blur.cuh"

namespace cxrgan {
namespace {

// Grid: images x chunks of `chunk` pixels. y or image may be null.
template <int V, class T, class A = Wide<T>>
__global__ void __launch_bounds__(kThreads, 2)
    mod_act_kernel(Epilogue<A> e, const T* __restrict__ x, T* __restrict__ y,
                   A* __restrict__ image, int64_t channels, int64_t pixels, int64_t chunk,
                   int64_t chunks) {
  constexpr int kAtOnce = 4;
  const int64_t n = blockIdx.x / chunks, begin = blockIdx.x % chunks * chunk;
  const int64_t end = begin + chunk < pixels ? begin + chunk : pixels;
  CXR_FOR_TILES(first) {
    const int64_t c = first + threadIdx.x * V;
    const Factors<V, A> k(e, n, channels, c);
    for (int64_t p0 = begin + threadIdx.y; p0 - threadIdx.y < end; p0 += kAtOnce * blockDim.y) {
      Pack<T, V> packs[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t p = p0 + u * blockDim.y;
        if (p < end && c < channels) packs[u] = load<V>(x + (n * pixels + p) * channels + c);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t p = p0 + u * blockDim.y;
        const bool inside = p < end && c < channels;
        A a[V] = {}, part = 0;
        if (inside) {
          widen<V>(packs[u], a);
          part = k.forward(e.noise(n, p), a);
          if (y) store<V>(a, y + (n * pixels + p) * channels + c);
        }
        if (image) add_image(part, image + n * pixels + p, inside, first == 0);
      }
    }
  }
}

// Grid: images x chunks of `chunk` pixels, tiles of channels. gy or gimage may be null.
template <int V, class T, class A = Wide<T>>
__global__ void __launch_bounds__(kThreads, 2)
    mod_act_bwd_kernel(Epilogue<A> e, const T* __restrict__ gy, const A* __restrict__ gimage,
                       const T* __restrict__ x, T* __restrict__ dx, Parts<A> parts,
                       int64_t channels, int64_t pixels, int64_t chunk, int64_t chunks) {
  constexpr int kAtOnce = 2;
  const int64_t n = blockIdx.x / chunks, begin = blockIdx.x % chunks * chunk;
  const int64_t end = begin + chunk < pixels ? begin + chunk : pixels;
  const int64_t first = int64_t(blockIdx.y) * blockDim.x * V, c = first + threadIdx.x * V;
  const Factors<V, A> k(e, n, channels, c);
  Sums<V, A> sums;
  for (int64_t p0 = begin + threadIdx.y; p0 < end && c < channels; p0 += kAtOnce * blockDim.y) {
    Pack<T, V> xs[kAtOnce], gs[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t p = p0 + u * blockDim.y, at = (n * pixels + p) * channels + c;
      if (p < end) xs[u] = load<V>(x + at);
      if (gy && p < end) gs[u] = load<V>(gy + at);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t p = p0 + u * blockDim.y;
      if (p >= end) break;
      A a[V], g[V] = {}, out[V];
      widen<V>(xs[u], a);
      if (gy) widen<V>(gs[u], g);
      const A gi = gimage ? gimage[n * pixels + p] : A(0);
      sums.backward(k, e.noise(n, p), a, g, gi, true, out);
      store<V>(out, dx + (n * pixels + p) * channels + c);
    }
  }
  parts.write(sums, first, channels);
}

// The backward pass of `fir_mod_act`: the gradient g at every blurred pixel, in a row of shared
// memory, and its transposed blur. A block's threads compute g at Y columns and dx at Y - 3 of
// them. Grid: images x column blocks x strips of rows of dx, tiles of channels.
template <int V, class T, class A = Wide<T>>
__global__ void __launch_bounds__(kThreads, 2)
    fir_mod_act_bwd_kernel(Epilogue<A> e, const T* __restrict__ gy,
                           const A* __restrict__ gimage, const T* __restrict__ x,
                           T* __restrict__ dx, Parts<A> parts, int64_t channels, int64_t height,
                           int64_t width, Cut cut) {  // of the blurred image
  constexpr A kScale = A(4) / 64;
  __shared__ A shared[2][kThreads * V];
  const int lanes = blockDim.x, y = threadIdx.y;
  const int64_t n = blockIdx.x / (cut.columns * cut.strips);
  const int64_t begin = blockIdx.x % cut.strips * cut.strip;
  const int64_t end = begin + cut.strip < height + 1 ? begin + cut.strip : height + 1;
  const int64_t left = blockIdx.x / cut.strips % cut.columns * (blockDim.y - 3);
  const int64_t first = int64_t(blockIdx.y) * lanes * V, c = first + threadIdx.x * V;
  const int64_t of_g = left + y - 2, of_dx = left + y;  // columns
  const bool has_g = c < channels && of_g >= 0 && of_g < width;
  const bool has_dx = c < channels && y + 3 < int(blockDim.y) && of_dx <= width;
  const bool counted = y >= 2 && y + 1 < int(blockDim.y);  // elsewhere a neighbour counts g
  const Window across = window(Axis{width + 1, width, 1, 1, false}, of_g > 0 ? of_g : 0);

  const Factors<V, A> k(e, n, channels, c);
  Sums<V, A> sums;
  Ring<V, A> blurred, gradients;
  const Window whole = {0, 4, 0, 1};
  for (int64_t row = begin - 5; row <= end; ++row) {  // of g; first the ring is filled
    const bool has_x = has_g && row + 2 >= 0 && row + 2 <= height;
    const bool inside = has_g && row >= begin - 2 && row >= 0 && row < height;
    const int64_t pixel = (n * height + row) * width + of_g;
    Pack<T, V> packs[4], pack;  // all loads of a row before its arithmetic
    const T* from = x + ((n * (height + 1) + row + 2) * (width + 1) + across.first) * channels + c;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (has_x && j < across.count) packs[j] = load<V>(from + j * channels);
    if (gy && inside) pack = load<V>(gy + pixel * channels + c);
    const A gi = gimage && inside ? gimage[pixel] : A(0);
    const A z = inside ? e.noise(n, row * width + of_g) : A(0);
    A* into = blurred.push();
#pragma unroll
    for (int i = 0; i < V; ++i) into[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!has_x || j >= across.count) continue;
      A a[V];
      widen<V>(packs[j], a);
      const A t = A(tap_weight(across.tap + j));
#pragma unroll
      for (int i = 0; i < V; ++i) into[i] += t * a[i];
    }
    if (row < begin - 2) continue;
    A g[V] = {};
    if (inside) {
      A a[V], gs[V] = {};
      blurred.combine(whole, kScale, a);
      if (gy) widen<V>(pack, gs);
      const bool counts = counted && row >= begin && row < end;
      sums.backward(k, z, a, gs, gi, counts, g);
    }
    A* line = shared[row & 1];
#pragma unroll
    for (int i = 0; i < V; ++i) line[(y * lanes + threadIdx.x) * V + i] = g[i];
    __syncthreads();  // the other line is read until here, and written after
    into = gradients.push();
#pragma unroll
    for (int i = 0; i < V; ++i) into[i] = 0;
    if (has_dx) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < V; ++i)
          into[i] += A(tap_weight(j)) * line[((y + j) * lanes + threadIdx.x) * V + i];
    }
    if (!has_dx || row < begin + 1) continue;
    A out[V];
    gradients.combine(whole, kScale, out);
    store<V>(out, dx + ((n * (height + 1) + row - 1) * (width + 1) + of_dx) * channels + c);
  }
  parts.write(sums, first, channels);
}

}  // namespace
}  // namespace cxrgan
