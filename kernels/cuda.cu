// The fused operations on CUDA devices: see cxr/ops.py for what each computes. Here are the hosts
// of the kernels in the cuda_*.cuh beside.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <tuple>

#include "cuda_mod_act.cuh"
#include "tensors.h"

namespace cxrgan {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kBlocks = 528;  // to cut the work into, about: four for each of 132 processors

int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two from `n` up, at most `most`.
int power_of_two(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

template <class... P, class... Q>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, const Tensor& on, const Q&... arguments) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(P(arguments)...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "cxrgan: CUDA says ", cudaGetErrorString(error));
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls `run` with the channels of one access as a type: `most` where the channels and the tensors'
// addresses allow it, else one.
template <int most, class Run>
void vectors(int64_t channels, std::initializer_list<const void*> pointers, const Run& run) {
  if (most > 1 && channels % most == 0 && std::all_of(pointers.begin(), pointers.end(), aligned))
    run(std::integral_constant<int, most>());
  else
    run(std::integral_constant<int, 1>());
}

// Channels in 16 bytes; double, which serves the tests, goes one by one.
template <class T>
constexpr int kVector = std::is_same_v<T, double> ? 1 : 16 / int(sizeof(T));

// The block and how often it is repeated along the channels.
struct Lanes {
  int x, y;
  int64_t tiles;

  // `columns` is how many pixels a block may make use of. 8 lanes of 16 bytes fill a line of memory:
  // with fewer pixels there are more lanes, of more channels.
  Lanes(int64_t channels, int v, int64_t columns) {
    const int64_t wanted = divide(channels, v);
    y = power_of_two(columns, kThreads / power_of_two(wanted, 8));
    x = power_of_two(wanted, std::min(kWarp, kThreads / y));
    while (x > 8 && wanted % x) x /= 2;
    y = std::max(y, kWarp / x);
    tiles = divide(wanted, x);
  }
  dim3 block() const { return dim3(x, y); }
};

// A reduction's parts and their sums.
template <class A>
class Reduction {
 public:
  Reduction(const Tensor& like, int64_t images, int64_t blocks, int64_t tiles, int64_t kinds,
            int64_t channels)
      : like_(like), images_(images), blocks_(blocks), tiles_(tiles), kinds_(kinds),
        channels_(channels), vectors_(empty({images * blocks * kinds * channels}, kType<A>, like)),
        scalars_(empty({images * blocks * tiles}, kType<A>, like)) {}

  Parts<A> parts() const { return {mutable_data<A>(vectors_), mutable_data<A>(scalars_)}; }

  Tensor per_image(int64_t kind, bool wanted) {
    if (!wanted) return empty({0}, kType<A>, like_);
    Tensor out = empty({images_, channels_}, kType<A>, like_);
    return add(out, data<A>(vectors_) + kind * channels_, images_, blocks_, channels_, kinds_);
  }
  Tensor per_channel(int64_t kind, bool wanted) {
    if (!wanted) return empty({0}, kType<A>, like_);
    Tensor out = empty({channels_}, kType<A>, like_);
    const A* in = data<A>(vectors_) + kind * channels_;
    return add(out, in, 1, images_ * blocks_, channels_, kinds_);
  }
  Tensor one(bool wanted) {
    if (!wanted) return empty({0}, kType<A>, like_);
    Tensor out = empty({}, kType<A>, like_);
    return add(out, data<A>(scalars_), 1, images_ * blocks_ * tiles_, 1, 1);
  }
  // All that was asked for, in one launch.
  void run() const {
    int64_t width = 0, outer = 0;
    for (const Sum<A>& sum : all_.of) {
      width = std::max(width, sum.width);
      outer = std::max(outer, sum.outer);
    }
    if (width == 0 || outer == 0) return;
    const dim3 grid(divide(width, 32), std::min<int64_t>(outer, 65535), count_);
    launch(&sum_kernel<A>, grid, dim3(32, 32), like_, all_);
  }

 private:
  Tensor add(const Tensor& out, const A* in, int64_t outer, int64_t rows, int64_t width,
             int64_t kinds) {
    all_.of[count_++] = {in, mutable_data<A>(out), outer, rows, width, kinds * width};
    return out;
  }

  const Tensor& like_;
  int64_t images_, blocks_, tiles_, kinds_, channels_;
  Tensor vectors_, scalars_;
  AllSums<A> all_ = {};
  int count_ = 0;
};

// Chunks of an image's pixels, such that there are enough blocks and each has work.
struct Chunks {
  int64_t size, count;

  Chunks(int64_t images, int64_t pixels, int64_t tiles, int64_t least) {
    count = divide(kBlocks, std::max<int64_t>(images * tiles, 1));
    count = std::max<int64_t>(std::min(count, divide(pixels, least)), 1);
    size = divide(pixels, count);
    count = std::max<int64_t>(divide(pixels, std::max<int64_t>(size, 1)), 1);
  }
};

// The same for columns of `own` pixels and strips of at least 8 rows.
Cut cut(int64_t images, int64_t height, int64_t width, int64_t own, int64_t tiles) {
  const int64_t columns = divide(width, own);
  const Chunks strips(images * columns, height, tiles, 8);
  return {columns, strips.size, strips.count};
}

template <class A>
Epilogue<A> epilogue(const Arguments& of) {
  return {data<A>(of.d),   data<A>(of.b),        data<A>(of.r), data<A>(of.s),
          data<A>(of.eps), data<A>(of.strength), of.eps_stride};
}

// ---- the blur ----

template <int V, int Factor, bool Transposed, class T, class Op, class A = Wide<T>>
void run_blur(const Op& op, const Tensor& x, const Axis& rows, const Axis& columns, double gain,
              const Lanes& lanes, const Cut& pieces, int64_t tiles) {
  const dim3 grid(x.size(0) * pieces.columns * pieces.strips, tiles);
  launch(&blur_kernel<V, Factor, Transposed, Op, T>, grid, lanes.block(), x, op, data<T>(x), rows,
         columns, pieces, x.size(1), A(gain));
}

// Calls `run` with the factor of 1 or 2 and the direction as types.
template <class Run>
void directions(int64_t factor, bool transposed, const Run& run) {
  STD_TORCH_CHECK(factor == 1 || factor == 2, "resampling by ", factor, " is not supported");
  const auto choose_direction = [&](auto factor) {
    transposed ? run(factor, std::true_type()) : run(factor, std::false_type());
  };
  factor == 1 ? choose_direction(std::integral_constant<int, 1>())
              : choose_direction(std::integral_constant<int, 2>());
}

Tensor fir(Tensor input, int64_t factor, bool transposed, int64_t pad, int64_t height,
           int64_t width, double gain) {
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  const int64_t n = x.size(0), c = x.size(1);
  Tensor y = empty_image({n, c, height, width}, x.scalar_type(), x);
  if (y.numel() == 0) return y;
  const Axis rows{x.size(2), height, factor, pad, transposed};
  const Axis columns{x.size(3), width, factor, pad, transposed};
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    directions(factor, transposed, [&](auto factor, auto transposed) {
      vectors<kVector<T>>(c, {x.const_data_ptr()}, [&](auto v) {
        const Lanes lanes(c, v, width);
        const Cut pieces = cut(n, height, width, lanes.y, lanes.tiles);
        run_blur<v, factor, transposed, T>(Fir<T>{mutable_data<T>(y)}, x, rows, columns, gain,
                                           lanes, pieces, lanes.tiles);
      });
    });
  });
  return y;
}

Tensor act_fir(Tensor input, Tensor b, int64_t down) {
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t height = blurred_size(h, down), width = blurred_size(w, down);
  Tensor y = empty_image({n, c, height, width}, x.scalar_type(), x);
  const Axis rows{h, height, down, 1, false}, columns{w, width, down, 1, false};
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Optional bias = checked(b, "b", x, kType<A>, c, c);
    if (y.numel() == 0) return;
    const ActFir<T> op{mutable_data<T>(y), data<A>(bias)};
    directions(down, false, [&](auto factor, auto) {
      vectors<kVector<T>>(c, {x.const_data_ptr(), data<A>(bias)}, [&](auto v) {
        const Lanes lanes(c, v, width);
        const Cut pieces = cut(n, height, width, lanes.y, lanes.tiles);
        run_blur<v, factor, false, T>(op, x, rows, columns, 1, lanes, pieces, lanes.tiles);
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> act_fir_bwd(Tensor given, Tensor input, Tensor b, int64_t down) {
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t height = blurred_size(h, down), width = blurred_size(w, down);
  const Tensor g = *gradient(given, x, x.scalar_type(), n * c * height * width);
  Tensor dx = empty_image({n, c, h, w}, x.scalar_type(), x), db;
  const Axis rows{height, h, down, 1, true}, columns{width, w, down, 1, true};
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Optional bias = checked(b, "b", x, kType<A>, c, c);
    directions(down, true, [&](auto factor, auto) {
      vectors<kVector<T>>(c, {x.const_data_ptr(), data<T>(g), data<A>(bias)}, [&](auto v) {
        const Lanes lanes(c, v, w);
        const Cut pieces = cut(n, h, w, lanes.y, lanes.tiles);
        Reduction<A> sums(x, n, pieces.columns * pieces.strips, 0, 1, c);
        const ActFirBwd<T> op{data<T>(x), mutable_data<T>(dx), data<A>(bias),
                              sums.parts().vectors};
        if (dx.numel())
          run_blur<v, factor, true, T>(op, g, rows, columns, 1, lanes, pieces, lanes.tiles);
        db = sums.per_channel(0, true);
        sums.run();
      });
    });
  });
  return {dx, db};
}

// ---- mod_act ----

template <bool Blurred, int V, class T, class A = Wide<T>>
void run_mod_act(const Epilogue<A>& e, const Shape& k, const Tensor& x, T* y, A* image) {
  const int64_t pixels = k.y_height * k.y_width;
  if constexpr (Blurred) {
    const Lanes lanes(k.c, V, k.y_width);
    const int64_t tiles = image ? 1 : lanes.tiles;
    const FirModAct<T> op{e, y, image, pixels};
    run_blur<V, 1, false, T>(op, x, k.rows(false), k.columns(false), 4, lanes,
                             cut(k.n, k.y_height, k.y_width, lanes.y, tiles), tiles);
  } else {
    const Lanes lanes(k.c, V, pixels);
    const int64_t tiles = image ? 1 : lanes.tiles;
    const Chunks chunks(k.n, pixels, tiles, 4 * lanes.y);
    launch(&mod_act_kernel<V, T>, dim3(k.n * chunks.count, tiles), lanes.block(), x, e,
           data<T>(x), y, image, k.c, pixels, chunks.size, chunks.count);
  }
}

template <bool Blurred>
std::tuple<Tensor, Tensor> mod_act(Tensor c, Optional d, Optional eps, Optional strength,
                                   Optional b, Optional r, Optional s_next) {
  const DeviceGuard guard(c.get_device_index());
  const Tensor x = channels_last(c);
  const Shape k(x, Blurred);
  const bool with_y = !r || s_next;
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Arguments given(x, kType<A>, k.y_height, k.y_width, d, eps, strength, b, r, s_next);
    Tensor y = with_y ? empty_image({k.n, k.c, k.y_height, k.y_width}, x.scalar_type(), x)
                      : empty({0}, x.scalar_type(), x);
    Tensor image = r ? empty({k.n, 1, k.y_height, k.y_width}, kType<A>, x)
                     : empty({0}, kType<A>, x);
    if (x.numel() == 0) return std::make_tuple(y, image);
    const Epilogue<A> e = epilogue<A>(given);
    vectors<kVector<T>>(k.c, {x.const_data_ptr(), e.d, e.b, e.r, e.s}, [&](auto v) {
      run_mod_act<Blurred, v>(e, k, x, with_y ? mutable_data<T>(y) : nullptr,
                              r ? mutable_data<A>(image) : nullptr);
    });
    return std::make_tuple(y, image);
  });
}

// The grid of a backward pass.
struct Pieces {
  Lanes lanes;
  Cut cut;

  Pieces(const Shape& k, bool blurred, int v)
      : lanes(k.c, v, blurred ? k.x_width + 3 : k.y_height * k.y_width), cut(pieces(k, blurred)) {}

 private:
  Cut pieces(const Shape& k, bool blurred) const {
    if (blurred) return cxrgan::cut(k.n, k.x_height, k.x_width, lanes.y - 3, lanes.tiles);
    const Chunks chunks(k.n, k.y_height * k.y_width, lanes.tiles, 4 * lanes.y);
    return {1, chunks.size, chunks.count};
  }
};

template <bool Blurred, int V, class T, class A = Wide<T>>
void run_mod_act_bwd(const Epilogue<A>& e, const Shape& k, const Pieces& pieces, const T* gy,
                     const A* gimage, const Tensor& x, T* dx, const Parts<A>& parts) {
  const Cut& cut = pieces.cut;
  const dim3 grid(k.n * cut.columns * cut.strips, pieces.lanes.tiles);
  if constexpr (Blurred)
    launch(&fir_mod_act_bwd_kernel<V, T>, grid, pieces.lanes.block(), x, e, gy, gimage,
           data<T>(x), dx, parts, k.c, k.y_height, k.y_width, cut);
  else
    launch(&mod_act_bwd_kernel<V, T>, grid, pieces.lanes.block(), x, e, gy, gimage,
           data<T>(x), dx, parts, k.c, k.y_height * k.y_width, cut.strip, cut.strips);
}

template <bool Blurred>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mod_act_bwd(
    Optional gy, Optional gimage, Tensor c, Optional d, Optional eps, Optional strength, Optional b,
    Optional r, Optional s_next) {
  const DeviceGuard guard(c.get_device_index());
  const Tensor x = channels_last(c);
  const Shape k(x, Blurred);
  STD_TORCH_CHECK(gy || gimage, "mod_act_bwd needs a gradient");
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Arguments given(x, kType<A>, k.y_height, k.y_width, d, eps, strength, b, r, s_next);
    const int64_t pixels = k.n * k.y_height * k.y_width;
    const Optional g = gradient(gy, x, x.scalar_type(), pixels * k.c);
    const Optional gi = gradient(gimage, x, kType<A>, pixels);
    Tensor dx = empty_image({k.n, k.c, k.x_height, k.x_width}, x.scalar_type(), x);
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> found;
    constexpr int most = std::min(kVector<T>, 4);  // sums and factors of 8 do not fit in registers
    const Epilogue<A> e = epilogue<A>(given);
    vectors<most>(k.c, {x.const_data_ptr(), data<T>(g), e.d, e.b, e.r, e.s}, [&](auto v) {
      const Pieces pieces(k, Blurred, v);
      Reduction<A> sums(x, k.n, pieces.cut.columns * pieces.cut.strips, pieces.lanes.tiles, kSums,
                        k.c);
      if (x.numel())
        run_mod_act_bwd<Blurred, v>(e, k, pieces, data<T>(g), data<A>(gi), x,
                                    mutable_data<T>(dx), sums.parts());
      found = std::make_tuple(dx, sums.per_image(0, bool(d)), sums.one(bool(strength)),
                              sums.per_channel(1, bool(b)), sums.per_image(2, bool(r)),
                              sums.per_image(3, bool(s_next)));
      sums.run();
    });
    return found;
  });
}

}  // namespace
}  // namespace cxrgan

STABLE_TORCH_LIBRARY_IMPL(cxrgan, CUDA, m) {
  m.impl("mod_act", TORCH_BOX(&cxrgan::mod_act<false>));
  m.impl("mod_act_bwd", TORCH_BOX(&cxrgan::mod_act_bwd<false>));
  m.impl("fir_mod_act", TORCH_BOX(&cxrgan::mod_act<true>));
  m.impl("fir_mod_act_bwd", TORCH_BOX(&cxrgan::mod_act_bwd<true>));
  m.impl("act_fir", TORCH_BOX(&cxrgan::act_fir));
  m.impl("act_fir_bwd", TORCH_BOX(&cxrgan::act_fir_bwd));
  m.impl("fir", TORCH_BOX(&cxrgan::fir));
}
