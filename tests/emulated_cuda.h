// Enough of CUDA to run cuda.cu on the CPU: a block's threads are fibres that take turns.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  dim3 at;
  int waits = 0;  // 0 not at all, 1 for the warp, 2 for the block, 3 done
  int shuffles = 0;
  std::deque<std::vector<Copy>> groups;  // of copies under way, the last not committed yet
};

inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int now;
inline dim3 grid, size, block;
inline double slots[2][1024];

inline void wait(int kind) {
  Fibre& me = fibres[now];
  me.waits = kind;
  swapcontext(&me.context, &scheduler);
}

inline void start() {
  body();
  wait(3);
}

// Lets go on whoever of [first, last) waits for `kind`, if all who are not done do.
inline void release(int first, int last, int kind) {
  for (int i = first; i < last; ++i)
    if (fibres[i].waits != kind && fibres[i].waits != 3) return;
  for (int i = first; i < last; ++i)
    if (fibres[i].waits == kind) fibres[i].waits = 0;
}

inline void run_block() {
  const int threads = size.x * size.y;
  if (int(fibres.size()) < threads) fibres.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fibre& f = fibres[i];
    f.at = dim3(i % size.x, i / size.x), f.waits = 0, f.shuffles = 0, f.groups.assign(1, {});
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = 1 << 16;
    makecontext(&f.context, start, 0);
  }
  for (int done = 0; done < threads;) {
    int ran = 0;
    for (now = 0; now < threads; ++now)
      if (fibres[now].waits == 0) ++ran, swapcontext(&scheduler, &fibres[now].context);
    STD_TORCH_CHECK(ran, "the threads of a block wait for one another");
    for (int warp = 0; warp < threads; warp += 32) release(warp, std::min(warp + 32, threads), 1);
    release(0, threads, 2);
    done = 0;
    for (int i = 0; i < threads; ++i) done += fibres[i].waits == 3;
  }
}

template <class Kernel, class... P>
void launch(Kernel kernel, dim3 g, dim3 s, P... arguments) {
  STD_TORCH_CHECK(g.x && g.y && g.z && s.x * s.y <= 1024 && s.x * s.y % 32 == 0, "bad launch");
  grid = g, size = s;
  body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < g.z; ++z)
    for (unsigned y = 0; y < g.y; ++y)
      for (unsigned x = 0; x < g.x; ++x) block = dim3(x, y, z), run_block();
}

template <class A>
A shuffle(A value, int mask) {
  Fibre& me = fibres[now];
  double* slot = slots[me.shuffles++ & 1];
  slot[now] = value;
  wait(1);
  return A(slot[now ^ mask]);
}

// Copies come as late as they may, so that whoever does not wait for them reads what was there.
inline void copy_prior(size_t but) {
  auto& groups = fibres[now].groups;
  for (; groups.size() > but + 1; groups.pop_front())
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace emulated

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulated::fibres[emulated::now].groups.back().push_back({to, from, bytes});
}
inline void __pipeline_commit() { emulated::fibres[emulated::now].groups.emplace_back(); }
inline void __pipeline_wait_prior(size_t but) { emulated::copy_prior(but); }

#define threadIdx (emulated::fibres[emulated::now].at)
#define blockIdx emulated::block
#define blockDim emulated::size
#define gridDim emulated::grid
#define __syncthreads() emulated::wait(2)
#define __shfl_xor_sync(mask, value, offset) emulated::shuffle(value, offset)
