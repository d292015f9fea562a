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
    const Window bottom = window(rows, end - 1);
    const int64_t below = bottom.first + bottom.count, last = below < rows.in ? below : rows.in;
    Pack<T, V> ahead[4];  // of the row that comes next: loaded while this one is worked on
    const auto fetch = [&](int64_t row) {
      if (!inside || row >= last) return;
      const T* from = x + ((n * rows.in + row) * columns.in + across.first) * channels + c;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < across.count) ahead[j] = load<V>(from + j * channels);
    };
    Ring<V, A> ring;
    int64_t next = window(rows, begin).first;
    fetch(next);
#pragma unroll 1  // unrolled, it does not fit into the registers
    for (int64_t i = begin; i < end; ++i) {
      const Window down = window(rows, i);
#pragma unroll 1
      for (; next < down.first + down.count; ++next) {
        Pack<T, V> packs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) packs[j] = ahead[j];
        fetch(next + 1);
        A* into = ring.push();
#pragma unroll
        for (int j = 0; j < V; ++j) into[j] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!inside || j >= across.count) continue;
          A a[V];
          widen<V>(packs[j], a);
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

}  // namespace
}  // namespace cxrgan
