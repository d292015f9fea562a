// Reductions on CUDA devices: each block writes its parts, and `sum_kernel` adds the parts up in
// order: no atomics, the same bits every time.
#pragma once

#include "cuda_lanes.cuh"

namespace cxrgan {
namespace {

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
