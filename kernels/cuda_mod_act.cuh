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
      A z[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t p = p0 + u * blockDim.y;
        if (p < end && c < channels) packs[u] = load<V>(x + (n * pixels + p) * channels + c);
        z[u] = p < end ? e.noise(n, p) : A(0);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t p = p0 + u * blockDim.y;
        const bool inside = p < end && c < channels;
        A a[V] = {}, part = 0;
        if (inside) {
          widen<V>(packs[u], a);
          part = k.forward(z[u], a);
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
  constexpr int kAtOnce = 4;
  const int64_t n = blockIdx.x / chunks;
  const int begin = int(blockIdx.x % chunks * chunk);
  const int end = int(begin + chunk < pixels ? begin + chunk : pixels);
  const int64_t first = int64_t(blockIdx.y) * blockDim.x * V, c = first + threadIdx.x * V;
  const Factors<V, A> k(e, n, channels, c);
  Sums<V, A> sums;
  for (int p0 = begin + threadIdx.y; p0 < end && c < channels; p0 += kAtOnce * blockDim.y) {
    Pack<T, V> xs[kAtOnce], gs[kAtOnce];
    A z[kAtOnce] = {}, gi[kAtOnce] = {};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int p = p0 + u * blockDim.y;
      const int64_t at = (n * pixels + p) * channels + c;
      if (p >= end) break;
      xs[u] = load<V>(x + at);
      if (gy) gs[u] = load<V>(gy + at);
      if (gimage) gi[u] = gimage[n * pixels + p];
      z[u] = e.noise(n, p);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int p = p0 + u * blockDim.y;
      if (p >= end) break;
      A a[V], g[V] = {}, out[V];
      widen<V>(xs[u], a);
      if (gy) widen<V>(gs[u], g);
      sums.backward(k, z[u], a, g, gi[u], true, out);
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
  __shared__ Pack<T, V> staged[kRows][kThreads + 3 * kWarp];
  __shared__ A lines[2][kThreads * V];
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

  const int64_t base = left > 3 ? left - 3 : 0;  // of the columns of x that the block reads
  const int64_t past = left + blockDim.y < width + 1 ? left + blockDim.y : width + 1;
  const Band<T, V> band = {x + (n * (height + 1) * (width + 1) + base) * channels + c,
                           end + 3 < height + 1 ? end + 3 : height + 1, channels,
                           (width + 1) * channels, c < channels ? int(past - base) : 0};
  const int at = int(across.first - base) * lanes + threadIdx.x;
  const Factors<V, A> k(e, n, channels, c);
  Sums<V, A> sums;
  Ring<V, A> blurred, gradients;
  Queue<Pack<T, V>> gys;
  Queue<A> gis, zs;
  const Window whole = {0, 4, 0, 1};
  const auto ahead = [&](int64_t row, Pack<T, V>& g, A& gi, A& z) {  // what `row` needs
    Pack<T, V> pack = {};
    A image = 0, noise = 0;
    row += Queue<A>::kAhead;
    if (has_g && row >= begin - 2 && row >= 0 && row < height && row <= end) {
      const int64_t pixel = (n * height + row) * width + of_g;
      if (gy) pack = load<V>(gy + pixel * channels + c);
      if (gimage) image = gimage[pixel];
      noise = e.noise(n, row * width + of_g);
    }
    g = gys.next(pack), gi = gis.next(image), z = zs.next(noise);
  };
  for (int64_t row = begin - 3; row < begin - 3 + kRows - 1; ++row) band.begin(row, staged[row & 3]);
  for (int64_t row = begin - 5; row <= end; ++row) {  // of g; first the ring is filled
    const bool has_x = has_g && row + 2 >= 0 && row + 2 <= height;
    const bool inside = has_g && row >= begin - 2 && row >= 0 && row < height;
    Pack<T, V> pack;
    A gi, z;
    ahead(row, pack, gi, z);
    __pipeline_wait_prior(kRows - 2);
    __syncthreads();
    band.begin(row + 1 + kRows, staged[(row + 1 + kRows) & 3]);
    A* into = blurred.push();
    across_row(staged[(row + 2) & 3] + at, has_x ? across.count : 0, across, [](A(&)[V]) {}, into);
    if (row < begin - 2) continue;
    A g[V] = {};
    if (inside) {
      A a[V], gs[V];
      blurred.combine(whole, kScale, a);
      widen<V>(pack, gs);
      sums.backward(k, z, a, gs, gi, counted && row >= begin && row < end, g);
    }
    A* line = lines[row & 1];
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
