// The CUDA kernels: see cxr/ops.py for what each computes, cuda.cu for how they are launched.
//
// Activations are [N, H, W, C] in memory. A block has X lanes along the channels, each lane V of
// them in one access, times Y pixels of a row; X * Y is a multiple of the warp and X a power of two
// no larger. Blocks walk down the pixels with a lane's channels, and so its factors, terms and sums,
// in registers. Each block writes its part of a reduction, and `sum_kernel` adds the parts up in
// order: no atomics, the same bits every time.
#pragma once

#include "epilogue.h"

namespace cxrgan {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
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
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool there = c + i < channels;
      d[i] = there && e.d ? e.d[at + i] : A(1);
      b[i] = there && e.b ? e.b[c + i] : A(0);
      r[i] = there && e.r ? e.r[at + i] : A(0);
      s[i] = there && e.s ? e.s[at + i] : A(1);
    }
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

// The sum over the block's pixels of each lane's V values, to out[channel of the block].
template <int V, class A>
__device__ void sum_pixels(A (&value)[V], A* out, int64_t channels) {
  __shared__ A warps[kThreads / kWarp * kWarp * V];
  const int lanes = blockDim.x, thread = threadIdx.y * lanes + threadIdx.x;
#pragma unroll
  for (int i = 0; i < V; ++i)
    for (int offset = kWarp / 2; offset >= lanes; offset /= 2)
      value[i] += __shfl_xor_sync(kAll, value[i], offset);
  __syncthreads();  // whoever still reads the last sums
  if (thread % kWarp < lanes) {
#pragma unroll
    for (int i = 0; i < V; ++i) warps[(thread / kWarp * lanes + threadIdx.x) * V + i] = value[i];
  }
  __syncthreads();
  const int threads = lanes * blockDim.y;
  for (int j = thread; j < lanes * V && j < channels; j += threads) {
    A sum = 0;
    for (int warp = 0; warp < threads / kWarp; ++warp) sum += warps[warp * lanes * V + j];
    out[j] = sum;
  }
}

// One number a lane, the sum to out[0].
template <class A>
__device__ void sum_block(A value, A* out) {
  for (int offset = int(blockDim.x) / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAll, value, offset);
  A one[1] = {threadIdx.x == 0 ? value : A(0)};
  sum_pixels<1>(one, out, 1);
}

// Where the parts of reductions go: [block, kind, channel], and one number for each block and tile
// of channels.
template <class A>
struct Parts {
  A *vectors, *scalars;

  template <int V>
  __device__ void write(Sums<V, A>& sums, int64_t first, int64_t channels) const {
    A* out = vectors + int64_t(blockIdx.x) * kSums * channels + first;
    sum_pixels(sums.d, out, channels - first);
    sum_pixels(sums.b, out + channels, channels - first);
    sum_pixels(sums.r, out + 2 * channels, channels - first);
    sum_pixels(sums.s, out + 3 * channels, channels - first);
    sum_block(sums.strength, scalars + int64_t(blockIdx.x) * gridDim.y + blockIdx.y);
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

// ---- mod_act ----

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

// ---- the blur ----

// The last four rows that a lane has blurred along the columns, the newest in [3].
template <int V, class A>
struct Ring {
  A row[4][V] = {};

  __device__ __forceinline__ A* push() {
#pragma unroll
    for (int j = 0; j < 3; ++j)
#pragma unroll
      for (int i = 0; i < V; ++i) row[j][i] = row[j + 1][i];
    return row[3];
  }
  // The blur down the rows of a window that ends with the newest.
  __device__ __forceinline__ void combine(const Window& w, A scale, A (&y)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j >= w.count) continue;
      const A t = scale * A(tap_weight(w.tap + (w.count - 1 - j) * w.step));
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] += t * row[3 - j][i];
    }
  }
};

// What a blurring kernel does to each input before the blur and with each output after it, in one
// tile of channels: `Fir` nothing, `ActFir` the activation before, `ActFirBwd` its gradient after,
// `FirModAct` the epilogue after.
template <class T, class A = Wide<T>>
struct Fir {
  T* y;

  template <int V>
  struct Tile {
    const Fir& op;
    __device__ Tile(const Fir& op, int64_t, int64_t, int64_t, int64_t) : op(op) {}
    __device__ void before(A (&)[V]) const {}
    __device__ void after(A (&x)[V], int64_t, int64_t pixel, int64_t at, bool inside) {
      if (inside) store<V>(x, op.y + at);
    }
    __device__ void end(int64_t) {}
  };
};

template <class T, class A = Wide<T>>
struct ActFir {
  T* y;
  const A* b;

  template <int V>
  struct Tile {
    const ActFir& op;
    A b[V];
    __device__ Tile(const ActFir& op, int64_t, int64_t channels, int64_t, int64_t c) : op(op) {
#pragma unroll
      for (int i = 0; i < V; ++i) b[i] = c + i < channels ? op.b[c + i] : A(0);
    }
    __device__ void before(A (&x)[V]) const {
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = activate(x[i] + b[i]);
    }
    __device__ void after(A (&x)[V], int64_t, int64_t, int64_t at, bool inside) {
      if (inside) store<V>(x, op.y + at);
    }
    __device__ void end(int64_t) {}
  };
};

template <class T, class A = Wide<T>>
struct ActFirBwd {
  const T* c;
  T* dc;
  const A* b;
  A* parts;  // [block, channel]

  template <int V>
  struct Tile {
    const ActFirBwd& op;
    A b[V], sum[V] = {};
    int64_t first;
    __device__ Tile(const ActFirBwd& op, int64_t, int64_t channels, int64_t first, int64_t c)
        : op(op), first(first) {
#pragma unroll
      for (int i = 0; i < V; ++i) b[i] = c + i < channels ? op.b[c + i] : A(0);
    }
    __device__ void before(A (&)[V]) const {}
    __device__ void after(A (&g)[V], int64_t, int64_t, int64_t at, bool inside) {
      if (!inside) return;
      A x[V];
      widen<V>(load<V>(op.c + at), x);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x[i] = g[i] * activate_slope(x[i] + b[i]);
        sum[i] += x[i];
      }
      store<V>(x, op.dc + at);
    }
    __device__ void end(int64_t channels) {
      sum_pixels(sum, op.parts + int64_t(blockIdx.x) * channels + first, channels - first);
    }
  };
};

template <class T, class A = Wide<T>>
struct FirModAct {
  Epilogue<A> e;
  T* y;  // or null, or
  A* image;
  int64_t pixels;

  template <int V>
  struct Tile {
    const FirModAct& op;
    Factors<V, A> k;
    bool begin;
    __device__ Tile(const FirModAct& op, int64_t n, int64_t channels, int64_t first, int64_t c)
        : op(op), k(op.e, n, channels, c), begin(first == 0) {}
    __device__ void before(A (&)[V]) const {}
    __device__ void after(A (&x)[V], int64_t n, int64_t pixel, int64_t at, bool inside) {
      A part = 0;
      if (inside) {
        part = k.forward(op.e.noise(n, pixel), x);
        if (op.y) store<V>(x, op.y + at);
      }
      if (op.image) add_image(part, op.image + n * op.pixels + pixel, inside, begin);
    }
    __device__ void end(int64_t) {}
  };
};

// How an image is cut: columns x strips of `strip` rows, a block each.
struct Cut {
  int64_t columns, strip, strips;
};

// Grid: images x column blocks x strips of rows of the result, tiles of channels.
template <int V, int Factor, bool Transposed, class Op, class T, class A = Wide<T>>
__global__ void __launch_bounds__(kThreads, 2)
    blur_kernel(Op op, const T* __restrict__ x, Axis rows, Axis columns, Cut cut, int64_t channels,
                A gain) {
  rows.down = columns.down = Factor;
  rows.transposed = columns.transposed = Transposed;
  const int64_t n = blockIdx.x / (cut.columns * cut.strips);
  const int64_t begin = blockIdx.x % cut.strips * cut.strip;
  const int64_t end = begin + cut.strip < rows.out ? begin + cut.strip : rows.out;
  const int64_t column = blockIdx.x / cut.strips % cut.columns * blockDim.y + threadIdx.y;
  const Window across = window(columns, column);
  CXR_FOR_TILES(first) {
    const int64_t c = first + threadIdx.x * V;
    const bool inside = column < columns.out && c < channels;
    typename Op::template Tile<V> tile(op, n, channels, first, c);
    Ring<V, A> ring;
    int64_t next = 0;
#pragma unroll 1  // unrolled, it does not fit into the registers
    for (int64_t i = begin; i < end; ++i) {
      const Window down = window(rows, i);
#pragma unroll 1
      for (next = next > down.first ? next : down.first; next < down.first + down.count; ++next) {
        A* into = ring.push();
#pragma unroll
        for (int j = 0; j < V; ++j) into[j] = 0;
        const T* from =
            x + ((n * rows.in + next) * columns.in + across.first) * channels + c;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!inside || j >= across.count) continue;
          A a[V];
          widen<V>(load<V>(from + j * channels), a);
          tile.before(a);
          const A t = A(tap_weight(across.tap + j * across.step));
#pragma unroll
          for (int v = 0; v < V; ++v) into[v] += t * a[v];
        }
      }
      A y[V];
      ring.combine(down, gain / 64, y);
      const int64_t pixel = i * columns.out + column;
      tile.after(y, n, pixel, (n * rows.out * columns.out + pixel) * channels + c, inside);
    }
    tile.end(channels);
  }
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
    A* into = blurred.push();
#pragma unroll
    for (int i = 0; i < V; ++i) into[i] = 0;
    if (has_g && row + 2 >= 0 && row + 2 <= height) {
      const T* from =
          x + ((n * (height + 1) + row + 2) * (width + 1) + across.first) * channels + c;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= across.count) continue;
        A a[V];
        widen<V>(load<V>(from + j * channels), a);
        const A t = A(tap_weight(across.tap + j));
#pragma unroll
        for (int i = 0; i < V; ++i) into[i] += t * a[i];
      }
    }
    if (row < begin - 2) continue;
    A g[V] = {};
    if (has_g && row >= 0 && row < height) {
      const int64_t pixel = (n * height + row) * width + of_g;
      A a[V], gs[V] = {};
      blurred.combine(whole, kScale, a);
      if (gy) widen<V>(load<V>(gy + pixel * channels + c), gs);
      const A gi = gimage ? gimage[pixel] : A(0);
      const bool counts = counted && row >= begin && row < end;
      sums.backward(k, e.noise(n, row * width + of_g), a, gs, gi, counts, g);
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

// ---- adding up ----

// Sums over `rows` rows of `width` numbers, `stride` apart, for each of `outer` results.
template <class A>
struct Sum {
  const A* in;
  A* out;  // null where nobody asked
  int64_t outer, rows, width, stride;
};

template <class A>
struct AllSums {
  Sum<A> of[5];
};

// Grid: 32 columns a block, results, sums. The rows are shared out over threadIdx.y.
template <class A>
__global__ void __launch_bounds__(1024) sum_kernel(AllSums<A> all) {
  __shared__ A shared[32][33];
  const Sum<A> sum = all.of[blockIdx.z];
  const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x;
  for (int64_t o = blockIdx.y; o < sum.outer && sum.out; o += gridDim.y) {
    A total = 0;
    if (column < sum.width) {
#pragma unroll 8
      for (int64_t row = threadIdx.y; row < sum.rows; row += 32)
        total += sum.in[(o * sum.rows + row) * sum.stride + column];
    }
    shared[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y == 0 && column < sum.width) {
      for (int row = 1; row < 32; ++row) total += shared[row][threadIdx.x];
      sum.out[o * sum.width + column] = total;
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace cxrgan
