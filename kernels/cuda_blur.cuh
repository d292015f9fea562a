// The CUDA kernel of every operation that blurs once.
#pragma once

#include "cuda_sums.cuh"

namespace cxrgan {
namespace {

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

// The blur along a row: `from` is the first of the staged inputs, `before` what is done to each.
template <int V, class T, class A, class Before>
__device__ __forceinline__ void across_row(const Pack<T, V>* from, int count, const Window& across,
                                           const Before& before, A* into) {
#pragma unroll
  for (int i = 0; i < V; ++i) into[i] = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= count) continue;
    A a[V];
    widen<V>(from[j * blockDim.x], a);
    before(a);
    const A t = A(tap_weight(across.tap + j * across.step));
#pragma unroll
    for (int i = 0; i < V; ++i) into[i] += t * a[i];
  }
}

// What a blurring kernel does to each input before the blur and with each output after it, in one
// tile of channels: `Fir` nothing, `ActFir` the activation before, `ActFirBwd` its gradient after,
// `FirModAct` the epilogue after. `ahead` loads what `after` needs some rows later.
template <class T, class A = Wide<T>>
struct Fir {
  T* y;

  template <int V>
  struct Tile {
    const Fir& op;
    __device__ Tile(const Fir& op, int64_t, int64_t, int64_t, int64_t) : op(op) {}
    __device__ void before(A (&)[V]) const {}
    __device__ void ahead(int64_t, int64_t, int64_t, bool) {}
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
      fill(c < channels, op.b + c, A(0), b);
    }
    __device__ void before(A (&x)[V]) const {
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = activate(x[i] + b[i]);
    }
    __device__ void ahead(int64_t, int64_t, int64_t, bool) {}
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
    Queue<Pack<T, V>> inputs;
    Pack<T, V> input;
    int64_t first;
    __device__ Tile(const ActFirBwd& op, int64_t, int64_t channels, int64_t first, int64_t c)
        : op(op), first(first) {
      fill(c < channels, op.b + c, A(0), b);
    }
    __device__ void before(A (&)[V]) const {}
    __device__ void ahead(int64_t, int64_t, int64_t at, bool inside) {
      input = inputs.next(inside ? load<V>(op.c + at) : Pack<T, V>{});
    }
    __device__ void after(A (&g)[V], int64_t, int64_t, int64_t at, bool inside) {
      if (!inside) return;
      A x[V];
      widen<V>(input, x);
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
    Queue<A> noises;
    A noise;
    bool begin;
    __device__ Tile(const FirModAct& op, int64_t n, int64_t channels, int64_t first, int64_t c)
        : op(op), k(op.e, n, channels, c), begin(first == 0) {}
    __device__ void before(A (&)[V]) const {}
    __device__ void ahead(int64_t n, int64_t pixel, int64_t, bool inside) {
      noise = noises.next(inside ? op.e.noise(n, pixel) : A(0));
    }
    __device__ void after(A (&x)[V], int64_t n, int64_t pixel, int64_t at, bool inside) {
      A part = 0;
      if (inside) {
        part = k.forward(noise, x);
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
  __shared__ Pack<T, V> staged[kRows][(Transposed ? 1 : Factor) * kThreads + 3 * kWarp];
  rows.down = columns.down = Factor;
  rows.transposed = columns.transposed = Transposed;
  const int64_t n = blockIdx.x / (cut.columns * cut.strips);
  const int begin = int(blockIdx.x % cut.strips * cut.strip);
  const int end = int(begin + cut.strip < rows.out ? begin + cut.strip : rows.out);
  const int64_t left = blockIdx.x / cut.strips % cut.columns * blockDim.y;
  const int64_t column = left + threadIdx.y;
  const int64_t right = left + blockDim.y < columns.out ? left + blockDim.y : columns.out;
  const Window across = window(columns, column), bottom = window(rows, end - 1);
  const Window leftmost = window(columns, left), rightmost = window(columns, right - 1);
  const int at = int(across.first - leftmost.first) * blockDim.x + threadIdx.x;
  CXR_FOR_TILES(first) {
    const int64_t c = first + threadIdx.x * V;
    const bool inside = column < columns.out && c < channels;
    typename Op::template Tile<V> tile(op, n, channels, first, c);
    const Band<T, V> band = {
        x + (n * rows.in * columns.in + leftmost.first) * channels + c,
        bottom.first + bottom.count, channels, columns.in * channels,
        c < channels ? int(rightmost.first + rightmost.count - leftmost.first) : 0};
    const auto ahead = [&](int i) {
      const int64_t pixel = i * columns.out + column;
      tile.ahead(n, pixel, (n * rows.out * columns.out + pixel) * channels + c, inside && i < end);
    };
    int next = int(window(rows, begin).first);
    __syncthreads();  // whoever still reads rows of the tile before
    for (int k = 0; k < kRows - 1; ++k) band.begin(next + k, staged[(next + k) & 3]);
    for (int k = 0; k < Queue<A>::kAhead; ++k) ahead(begin + k);
    Ring<V, A> ring;
#pragma unroll 1  // unrolled, it does not fit into the registers
    for (int i = begin; i < end; ++i) {
      const Window down = window(rows, i);
      ahead(i + Queue<A>::kAhead);
#pragma unroll 1
      for (; next < down.first + down.count; ++next) {
        __pipeline_wait_prior(kRows - 2);
        __syncthreads();
        band.begin(next + kRows - 1, staged[(next + kRows - 1) & 3]);
        across_row(staged[next & 3] + at, inside ? across.count : 0, across,
                   [&](A(&a)[V]) { tile.before(a); }, ring.push());
      }
      A y[V];
      ring.combine(down, gain / 64, y);
      const int64_t pixel = i * columns.out + column;
      tile.after(y, n, pixel, (n * rows.out * columns.out + pixel) * channels + c, inside);
    }
    tile.end(channels);
  }
}

}  // namespace
}  // namespace cxrgan
