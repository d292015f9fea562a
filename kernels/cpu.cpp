// The fused operations on the CPU: see cxr/ops.py for what each computes.
//
// Activations are [N, H, W, C] in memory (channels_last), so every inner loop runs over contiguous
// channels and vectorises. Work is cut into bands of rows by shape alone, and the reductions of
// each band are added up in order: results do not depend on the number of threads.

#include <numeric>
#include <tuple>

#include "cpu_blur.h"
#include "tensors.h"

namespace cxrgan {
namespace {

// A factor or term per image and channel; a constant where it is left out.
template <class A>
struct Vector {
  const A* given;
  int64_t stride;
  std::vector<A> constant;

  Vector(const Optional& x, int64_t stride, int64_t channels, A otherwise)
      : given(data<A>(x)), stride(stride), constant(given ? 0 : channels, otherwise) {}
  const A* at(int64_t n) const { return given ? given + n * stride : constant.data(); }
};

// What `mod_act` does to its convolution output, with everything left out filled in.
template <class A>
struct Epilogue {
  const Arguments& given;
  Vector<A> d, b, r, s;
  A strength = 0;

  Epilogue(const Arguments& given, int64_t c)
      : given(given), d(given.d, c, c, 1), b(given.b, 0, c, 0), r(given.r, c, c, 0),
        s(given.s, c, c, 1) {
    if (given.strength) strength = *data<A>(given.strength);
  }
  // The noise of an image from a pixel on, or null.
  const A* noise(int64_t n, int64_t pixel) const {
    return given.eps ? data<A>(given.eps) + n * given.eps_stride + pixel : nullptr;
  }
};

// Adds up the bands' sums [images, bands, kinds, channels], always in the same order.
template <class A>
struct Totals {
  const Tensor& like;
  const std::vector<A>& sums;
  int64_t images, bands, channels, kinds;

  Tensor per_image(int64_t kind, bool wanted) const {
    if (!wanted) return empty({0}, kType<A>, like);
    Tensor out = empty({images, channels}, kType<A>, like);
    add(kind, mutable_data<A>(out), channels);
    return out;
  }
  Tensor per_channel(int64_t kind, bool wanted) const {
    if (!wanted) return empty({0}, kType<A>, like);
    Tensor out = empty({channels}, kType<A>, like);
    add(kind, mutable_data<A>(out), 0);
    return out;
  }
  Tensor one(int64_t kind, bool wanted) const {
    if (!wanted) return empty({0}, kType<A>, like);
    std::vector<A> total(channels);
    add(kind, total.data(), 0);
    Tensor out = empty({}, kType<A>, like);
    *mutable_data<A>(out) = std::accumulate(total.begin(), total.end(), A(0));
    return out;
  }

 private:
  void add(int64_t kind, A* out, int64_t stride) const {
    std::fill(out, out + (stride ? images * stride : channels), A(0));
    for (int64_t k = 0; k < images * bands; ++k)
      for (int64_t i = 0; i < channels; ++i)
        out[k / bands * stride + i] += sums[(k * kinds + kind) * channels + i];
  }
};

// ---- mod_act ----

// One row: x [width, c] to y [width, c] and image [width], whichever are asked for.
// `a` [c] is scratch.
template <bool Y, bool Image, class X, class T, class A>
void epilogue_row(const Epilogue<A>& e, int64_t n, int64_t pixel, const X* __restrict x,
                  T* __restrict y, A* __restrict image, A* __restrict a, int64_t width, int64_t c) {
  const A *d = e.d.at(n), *b = e.b.at(0), *r = e.r.at(n), *s = e.s.at(n);
  const A* noise = e.noise(n, pixel);
  for (int64_t p = 0; p < width; ++p, x += c) {
    const A shift = noise ? e.strength * noise[p] : A(0);
    for (int64_t i = 0; i < c; ++i) a[i] = activate(widen(x[i]) * d[i] + (shift + b[i]));
    if constexpr (Y) {
      for (int64_t i = 0; i < c; ++i) narrow(a[i] * s[i], y[i]);
      y += c;
    }
    if constexpr (Image) {
      A parts[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= c; i += kLanes)
#pragma omp simd
        for (int j = 0; j < kLanes; ++j) parts[j] += a[i + j] * r[i + j];
      for (; i < c; ++i) parts[0] += a[i] * r[i];
      image[p] = fold(parts);
    }
  }
}

// What a band of rows adds to the gradients of d, b, strength (still per channel), r and s.
constexpr int kSums = 5;

// One row backward: dx [width, c] from gy [width, c] and gimage [width]; what is absent is zero.
template <bool Y, bool Image, class X, class T, class O, class A>
void epilogue_row_bwd(const Epilogue<A>& e, int64_t n, int64_t pixel, const X* __restrict x,
                      const T* __restrict gy, const A* gimage, O* __restrict dx, A* sums,
                      int64_t width, int64_t c) {
  const A *d = e.d.at(n), *b = e.b.at(0), *r = e.r.at(n), *s = e.s.at(n);
  const A* noise = e.noise(n, pixel);
  A *__restrict sum_d = sums, *__restrict sum_b = sums + c, *__restrict sum_z = sums + 2 * c,
                *__restrict sum_r = sums + 3 * c, *__restrict sum_s = sums + 4 * c;
  for (int64_t p = 0; p < width; ++p, x += c, dx += c) {
    const A z = noise ? noise[p] : A(0), shift = e.strength * z;
#pragma omp simd
    for (int64_t i = 0; i < c; ++i) {
      const A xi = widen(x[i]), lin = xi * d[i] + (shift + b[i]), a = activate(lin);
      A ga = 0;
      if constexpr (Y) {
        const A g = widen(gy[i]);
        ga += g * s[i];
        sum_s[i] += g * a;
      }
      if constexpr (Image) {
        ga += gimage[p] * r[i];
        sum_r[i] += gimage[p] * a;
      }
      const A gl = ga * activate_slope(lin);
      narrow(gl * d[i], dx[i]);
      sum_d[i] += gl * xi;
      sum_b[i] += gl;
      sum_z[i] += gl * z;
    }
    if constexpr (Y) gy += c;
  }
}

// Rows of the convolution output of image n, as they lie in memory.
template <class T>
struct Plain {
  const Shape& k;
  const T* x;
  const int64_t& n;
  const T* operator()(int64_t i, Wide<T>* = nullptr) const {
    return x + (n * k.x_height + i) * k.x_width * k.c;
  }
  void restart() {}
};

// The rows that `mod_act` reads.
template <bool Blurred, class T, class A = Wide<T>>
auto argument_rows(const Shape& k, const T* x, const int64_t& n) {
  const Plain<T> plain{k, x, n};
  if constexpr (Blurred)
    return Blur<T>(k.rows(false), k.columns(false), k.c, A(4), plain);
  else
    return plain;
}

template <bool Blurred, bool Y, bool Image, class T, class A = Wide<T>>
void mod_act_bands(const Epilogue<A>& e, const Shape& k, const T* x, T* y, A* image) {
  const Bands bands(k.y_height, k.y_width * k.c);
  torch::stable::parallel_for(0, k.n * bands.per_image, 1, [&](int64_t begin, int64_t end) {
    int64_t n = 0;
    auto source = argument_rows<Blurred>(k, x, n);
    std::vector<A> a(k.c);
    for (int64_t band = begin; band < end; ++band) {
      n = band / bands.per_image;
      source.restart();
      for (int64_t i = bands.first(band); i < bands.last(band); ++i) {
        const int64_t pixel = i * k.y_width, at = n * k.y_height * k.y_width + pixel;
        epilogue_row<Y, Image>(e, n, pixel, source(i), Y ? y + at * k.c : nullptr,
                               Image ? image + at : nullptr, a.data(), k.y_width, k.c);
      }
    }
  });
}

template <bool Blurred, bool Y, bool Image, class T, class A = Wide<T>>
void mod_act_bands_bwd(const Epilogue<A>& e, const Shape& k, const T* gy, const A* gimage,
                       const T* x, T* dx, A* sums) {
  const Bands bands(k.x_height, k.x_width * k.c);
  torch::stable::parallel_for(0, k.n * bands.per_image, 1, [&](int64_t begin, int64_t end) {
    int64_t n = 0;
    auto source = argument_rows<Blurred>(k, x, n);
    // Row i of the gradient of what `source` gives, to `out`.
    const auto gradient = [&](int64_t i, auto* out, A* into) {
      const int64_t pixel = i * k.y_width, at = n * k.y_height * k.y_width + pixel;
      epilogue_row_bwd<Y, Image>(e, n, pixel, source(i), Y ? gy + at * k.c : nullptr,
                                 Image ? gimage + at : nullptr, out, into, k.y_width, k.c);
    };
    const auto dx_row = [&](int64_t i) { return dx + (n * k.x_height + i) * k.x_width * k.c; };
    const auto band_sums = [&](int64_t band) { return sums + band * kSums * k.c; };

    if constexpr (!Blurred) {
      for (int64_t band = begin; band < end; ++band) {
        n = band / bands.per_image;
        for (int64_t i = bands.first(band); i < bands.last(band); ++i)
          gradient(i, dx_row(i), band_sums(band));
      }
    } else {
      // Neighbouring bands both need the rows between them; one of them counts these rows.
      std::vector<A> uncounted(kSums * k.c);
      int64_t band = begin;
      const auto gradient_row = [&](int64_t i, A* row) -> const A* {
        const bool counts = bands.first(band) <= i && i < bands.last(band);
        gradient(i, row, counts ? band_sums(band) : uncounted.data());
        return row;
      };
      Blur<A> blur(k.rows(true), k.columns(true), k.c, A(4), gradient_row);
      for (; band < end; ++band) {
        n = band / bands.per_image;
        source.restart(), blur.restart();
        for (int64_t i = bands.first(band); i < bands.last(band); ++i)
          blur.write(i, dx_row(i));
      }
    }
  });
}

template <bool Blurred>
std::tuple<Tensor, Tensor> mod_act(Tensor c, Optional d, Optional eps, Optional strength,
                                   Optional b, Optional r, Optional s_next) {
  const Tensor x = channels_last(c);
  const Shape k(x, Blurred);
  const bool with_y = !r || s_next;
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Arguments given(x, kType<A>, k.y_height, k.y_width, d, eps, strength, b, r, s_next);
    const Epilogue<A> e(given, k.c);
    Tensor y = with_y ? empty_image({k.n, k.c, k.y_height, k.y_width}, x.scalar_type(), x)
                      : empty({0}, x.scalar_type(), x);
    Tensor image = r ? empty({k.n, 1, k.y_height, k.y_width}, kType<A>, x)
                     : empty({0}, kType<A>, x);
    const auto run = [&](auto with_y, auto with_image) {
      mod_act_bands<Blurred, with_y, with_image>(e, k, data<T>(x), mutable_data<T>(y),
                                                 mutable_data<A>(image));
    };
    choose(with_y, bool(r), run);
    return std::make_tuple(y, image);
  });
}

template <bool Blurred>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mod_act_bwd(
    Optional gy, Optional gimage, Tensor c, Optional d, Optional eps, Optional strength, Optional b,
    Optional r, Optional s_next) {
  const Tensor x = channels_last(c);
  const Shape k(x, Blurred);
  STD_TORCH_CHECK(gy || gimage, "mod_act_bwd needs a gradient");
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Arguments given(x, kType<A>, k.y_height, k.y_width, d, eps, strength, b, r, s_next);
    const Epilogue<A> e(given, k.c);
    const int64_t pixels = k.n * k.y_height * k.y_width;
    const Optional g = gradient(gy, x, x.scalar_type(), pixels * k.c);
    const Optional gi = gradient(gimage, x, kType<A>, pixels);
    Tensor dx = empty_image({k.n, k.c, k.x_height, k.x_width}, x.scalar_type(), x);
    const int64_t bands = Bands(k.x_height, k.x_width * k.c).per_image;
    std::vector<A> sums(k.n * bands * kSums * k.c);
    choose(bool(gy), bool(gimage), [&](auto with_y, auto with_image) {
      mod_act_bands_bwd<Blurred, with_y, with_image>(e, k, data<T>(g), data<A>(gi), data<T>(x),
                                                     mutable_data<T>(dx), sums.data());
    });
    const Totals<A> total{x, sums, k.n, bands, k.c, kSums};
    return std::make_tuple(dx, total.per_image(0, bool(d)), total.one(2, bool(strength)),
                           total.per_channel(1, bool(b)), total.per_image(3, bool(r)),
                           total.per_image(4, bool(s_next)));
  });
}

// ---- act_fir ----

// The activation, or its gradient, applied to one row.
template <class T, class A>
const A* activate_row(const T* __restrict x, const A* b, A* __restrict y, int64_t width,
                      int64_t c) {
  for (int64_t p = 0; p < width; ++p)
    for (int64_t i = 0; i < c; ++i) y[p * c + i] = activate(widen(x[p * c + i]) + b[i]);
  return y;
}

template <class T, class A>
void activate_row_bwd(const A* __restrict g, const T* __restrict x, const A* b, T* __restrict dx,
                      A* __restrict sum_b, int64_t width, int64_t c) {
  for (int64_t p = 0; p < width; ++p, g += c, x += c, dx += c)
    for (int64_t i = 0; i < c; ++i) {
      const A gx = g[i] * activate_slope(widen(x[i]) + b[i]);
      narrow(gx, dx[i]);
      sum_b[i] += gx;
    }
}

Tensor act_fir(Tensor c, Tensor b, int64_t down) {
  const Tensor x = channels_last(c);
  const int64_t n = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t oh = blurred_size(h, down), ow = blurred_size(w, down);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Optional wide = checked(b, "b", x, kType<A>, channels, channels);
    const A* bias = data<A>(wide);
    Tensor out = empty_image({n, channels, oh, ow}, x.scalar_type(), x);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    blur_bands<A>(
        {h, oh, down, 1, false}, {w, ow, down, 1, false}, n, channels, A(1),
        [&](int64_t image, int64_t i, A* row) {
          return activate_row(from + (image * h + i) * w * channels, bias, row, w, channels);
        },
        [&](int64_t, int64_t image, int64_t i, auto& blur) {
          blur.write(i, to + (image * oh + i) * ow * channels);
        });
    return out;
  });
}

std::tuple<Tensor, Tensor> act_fir_bwd(Tensor g, Tensor c, Tensor b, int64_t down) {
  const Tensor x = channels_last(c);
  const int64_t n = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t oh = blurred_size(h, down), ow = blurred_size(w, down);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Optional wide = checked(b, "b", x, kType<A>, channels, channels);
    const A* bias = data<A>(wide);
    const Optional given = gradient(g, x, x.scalar_type(), n * channels * oh * ow);
    const T* from = data<T>(given);
    Tensor dx = empty_image({n, channels, h, w}, x.scalar_type(), x);
    const int64_t bands = Bands(h, w * channels).per_image;
    std::vector<A> sums(n * bands * channels);
    const T* at = data<T>(x);
    T* to = mutable_data<T>(dx);
    blur_bands<T>(
        {oh, h, down, 1, true}, {ow, w, down, 1, true}, n, channels, A(1),
        [&](int64_t image, int64_t i, A*) { return from + (image * oh + i) * ow * channels; },
        [&](int64_t band, int64_t image, int64_t i, auto& blur) {
          const int64_t offset = (image * h + i) * w * channels;
          activate_row_bwd(blur(i), at + offset, bias, to + offset, &sums[band * channels], w,
                           channels);
        });
    return std::make_tuple(dx, Totals<A>{x, sums, n, bands, channels, 1}.per_channel(0, true));
  });
}

// ---- fir ----

Tensor fir(Tensor input, int64_t factor, bool transposed, int64_t pad, int64_t height,
           int64_t width, double gain) {
  const Tensor x = channels_last(input);
  const int64_t n = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    Tensor out = empty_image({n, channels, height, width}, x.scalar_type(), x);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    blur_bands<T>(
        {h, height, factor, pad, transposed}, {w, width, factor, pad, transposed}, n, channels,
        A(gain),
        [&](int64_t image, int64_t i, A*) { return from + (image * h + i) * w * channels; },
        [&](int64_t, int64_t image, int64_t i, auto& blur) {
          blur.write(i, to + (image * height + i) * width * channels);
        });
    return out;
  });
}

}  // namespace
}  // namespace cxrgan

STABLE_TORCH_LIBRARY_IMPL(cxrgan, CPU, m) {
  m.impl("mod_act", TORCH_BOX(&cxrgan::mod_act<false>));
  m.impl("mod_act_bwd", TORCH_BOX(&cxrgan::mod_act_bwd<false>));
  m.impl("fir_mod_act", TORCH_BOX(&cxrgan::mod_act<true>));
  m.impl("fir_mod_act_bwd", TORCH_BOX(&cxrgan::mod_act_bwd<true>));
  m.impl("act_fir", TORCH_BOX(&cxrgan::act_fir));
  m.impl("act_fir_bwd", TORCH_BOX(&cxrgan::act_fir_bwd));
  m.impl("fir", TORCH_BOX(&cxrgan::fir));
}
