// The fused operations on the CPU: see cxr/ops.py for what each computes.
//
// Activations are [N, H, W, C] in memory (channels_last), so every inner loop runs over contiguous
// channels and vectorises. Work is cut into bands of rows by shape alone, and the reductions of
// each band are added up in order: results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "epilogue.h"

namespace cxrgan {
namespace {

using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Half x) { return float(x); }
inline void narrow(float x, float& y) { y = x; }
inline void narrow(double x, double& y) { y = x; }
inline void narrow(float x, Half& y) { y = Half(x); }
inline void narrow(float x, BF16& y) { y = to_bf16(x); }

// The type arithmetic is done in, for a storage type.
template <class T>
using Wide = decltype(widen(T()));

template <class A>
constexpr ScalarType kType = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

constexpr int64_t kBand = 1 << 16;  // elements per unit of parallel work, about

struct Bands {
  int64_t height, rows, per_image;

  Bands(int64_t height, int64_t row_elements) : height(height) {
    rows = std::min(height, (kBand + row_elements - 1) / std::max<int64_t>(row_elements, 1));
    rows = std::max<int64_t>(rows, 1);
    per_image = (height + rows - 1) / rows;
  }
  int64_t first(int64_t band) const { return band % per_image * rows; }
  int64_t last(int64_t band) const { return std::min(height, first(band) + rows); }
};

// ---- rows of the blur ----

// y[i] = sum over the window of weight * x[j][i]; the weights are those of the blur times `scale`.
template <class A>
void combine(const A* const* x, const Window& w, A scale, A* __restrict y, int64_t n) {
  A t[4];
  for (int j = 0; j < w.count; ++j) t[j] = scale * A(tap_weight(w.tap + j * w.step));
  const A *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  if (w.count == 4)
    for (int64_t i = 0; i < n; ++i)
      y[i] = t[0] * x0[i] + t[1] * x1[i] + (t[2] * x2[i] + t[3] * x3[i]);
  else if (w.count == 3)
    for (int64_t i = 0; i < n; ++i) y[i] = t[0] * x0[i] + t[1] * x1[i] + t[2] * x2[i];
  else if (w.count == 2)
    for (int64_t i = 0; i < n; ++i) y[i] = t[0] * x0[i] + t[1] * x1[i];
  else if (w.count == 1)
    for (int64_t i = 0; i < n; ++i) y[i] = t[0] * x0[i];
  else
    std::fill(y, y + n, A(0));
}

// Outputs first .. first + length - 1 whose windows are alike and step on by one input each: in
// memory one long vector.
struct Run {
  int64_t first, length;
  Window window;
};

std::vector<Run> runs(const Axis& axis) {
  std::vector<Run> found;
  for (int64_t i = 0; i < axis.out; ++i) {
    const Window w = window(axis, i);
    if (!found.empty()) {
      Run& last = found.back();
      const Window& v = last.window;
      if (v.count == w.count && v.tap == w.tap && v.first + last.length == w.first) {
        ++last.length;
        continue;
      }
    }
    found.push_back({i, 1, w});
  }
  return found;
}

// Blurred rows of an image whose rows `source(i)` gives; rows have to be asked for in order.
// The last four rows, blurred horizontally, stay in a ring.
template <class A, class Source>
class Blur {
 public:
  Blur(const Axis& rows, const Axis& columns, int64_t channels, A gain, Source source)
      : rows_(rows), runs_(runs(columns)), channels_(channels), width_(columns.out * channels),
        gain_(gain / 64), source_(std::forward<Source>(source)), buffer_(5 * width_) {}

  void restart() { next_ = 0; }

  const A* operator()(int64_t i) {
    const Window w = window(rows_, i);
    for (next_ = std::max(next_, w.first); next_ < w.first + w.count; ++next_) fill(next_);
    const A* x[4] = {};
    for (int j = 0; j < w.count; ++j) x[j] = ring(w.first + j);
    A* y = &buffer_[4 * width_];
    combine(x, w, gain_, y, width_);
    return y;
  }

 private:
  A* ring(int64_t i) { return &buffer_[i % 4 * width_]; }

  void fill(int64_t i) {
    const A* row = source_(i);
    A* y = ring(i);
    for (const Run& run : runs_) {
      const A* x[4] = {};
      for (int j = 0; j < run.window.count; ++j) x[j] = row + (run.window.first + j) * channels_;
      combine(x, run.window, A(1), y + run.first * channels_, run.length * channels_);
    }
  }

  Axis rows_;
  std::vector<Run> runs_;
  int64_t channels_, width_, next_ = 0;
  A gain_;
  Source source_;
  std::vector<A> buffer_;
};

template <class T, class A>
void widen_row(const T* __restrict x, A* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = widen(x[i]);
}

template <class T, class A>
void narrow_row(const A* __restrict x, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(x[i], y[i]);
}

// Blurs every image in bands of rows: `load(image, i, row)` writes input row i, `store(band, image,
// i, row)` takes output row i.
template <class T, class Load, class Store, class A = Wide<T>>
void blur_bands(const Axis& rows, const Axis& columns, int64_t images, int64_t channels, A gain,
                const Load& load, const Store& store) {
  const Bands bands(rows.out, columns.out * channels);
  torch::stable::parallel_for(0, images * bands.per_image, 1, [&](int64_t begin, int64_t end) {
    int64_t n = 0;
    std::vector<A> row(columns.in * channels);
    auto source = [&](int64_t i) -> const A* {
      load(n, i, row.data());
      return row.data();
    };
    Blur<A, decltype(source)&> blur(rows, columns, channels, gain, source);
    for (int64_t band = begin; band < end; ++band) {
      n = band / bands.per_image;
      blur.restart();
      for (int64_t i = bands.first(band); i < bands.last(band); ++i) store(band, n, i, blur(i));
    }
  });
}

// ---- tensors ----

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls `run` with a zero of the storage type of `x`.
template <class Run>
auto dispatch(const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Double:
      return run(double());
    case ScalarType::BFloat16:
      return run(BF16());
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "unsupported dtype");
      return run(Half());
  }
}

// Calls `run` with two booleans, not both false, as types.
template <class Run>
void choose(bool a, bool b, const Run& run) {
  if (a && b)
    run(std::true_type(), std::true_type());
  else if (a)
    run(std::true_type(), std::false_type());
  else
    run(std::false_type(), std::true_type());
}

Tensor channels_last(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "expected [N, C, H, W], got ", x.dim(), " dimensions");
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

Tensor empty_image(std::array<int64_t, 4> shape, ScalarType type) {
  return torch::stable::empty({shape.data(), 4}, type, std::nullopt, std::nullopt, std::nullopt,
                              MemoryFormat::ChannelsLast);
}

Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty({shape.begin(), shape.size()}, type);
}

// A factor or term per image and channel, in the wide type; a constant where it is left out.
template <class A>
struct Vector {
  Optional tensor;
  std::vector<A> constant;
  int64_t stride = 0;

  Vector(const Optional& given, int64_t images, int64_t channels, A otherwise) {
    if (!given) {
      constant.assign(channels, otherwise);
      return;
    }
    STD_TORCH_CHECK(given->numel() == images * channels && given->size(-1) == channels,
                    "expected ", images, " x ", channels, " numbers, got ", given->numel());
    tensor = torch::stable::contiguous(torch::stable::to(*given, kType<A>));
    stride = images == 1 ? 0 : channels;
  }
  const A* at(int64_t n) const {
    return tensor ? data<A>(*tensor) + n * stride : constant.data();
  }
};

// What `mod_act` does to its convolution output, with everything left out filled in.
template <class A>
struct Epilogue {
  Vector<A> d, b, r, s;
  Optional eps;
  A strength = 0;
  int64_t eps_stride = 0;

  Epilogue(const Optional& d, const Optional& eps_, const Optional& strength_, const Optional& b,
           const Optional& r, const Optional& s, int64_t n, int64_t c, int64_t pixels)
      : d(d, n, c, 1), b(b, 1, c, 0), r(r, n, c, 0), s(s, n, c, 1) {
    STD_TORCH_CHECK(bool(eps_) == bool(strength_), "eps and strength go together");
    if (!eps_) return;
    eps_stride = eps_->size(0) == 1 ? 0 : pixels;
    STD_TORCH_CHECK(eps_->numel() == (eps_stride ? n * pixels : pixels), "eps: expected ", n,
                    " x ", pixels, " numbers");
    STD_TORCH_CHECK(strength_->numel() == 1, "strength: expected one number");
    eps = torch::stable::contiguous(torch::stable::to(*eps_, kType<A>));
    const Tensor wide = torch::stable::to(*strength_, kType<A>);
    strength = *data<A>(wide);
  }
  // The noise of an image from a pixel on, or null.
  const A* noise(int64_t n, int64_t pixel) const {
    return eps ? data<A>(*eps) + n * eps_stride + pixel : nullptr;
  }
};

// An incoming gradient in channels_last, or nothing.
template <class T>
struct Gradient {
  Optional tensor;
  const T* data = nullptr;

  Gradient(const Optional& given, ScalarType type, int64_t numel) {
    if (!given) return;
    STD_TORCH_CHECK(given->numel() == numel, "gradient: expected ", numel, " numbers");
    tensor = channels_last(torch::stable::to(*given, type));
    data = cxrgan::data<T>(*tensor);
  }
};

// Adds up the bands' sums [images, bands, kinds, channels], always in the same order.
template <class A>
struct Totals {
  const std::vector<A>& sums;
  int64_t images, bands, channels, kinds;

  Tensor per_image(int64_t kind, bool wanted) const {
    if (!wanted) return empty({0}, kType<A>);
    Tensor out = empty({images, channels}, kType<A>);
    add(kind, mutable_data<A>(out), channels);
    return out;
  }
  Tensor per_channel(int64_t kind, bool wanted) const {
    if (!wanted) return empty({0}, kType<A>);
    Tensor out = empty({channels}, kType<A>);
    add(kind, mutable_data<A>(out), 0);
    return out;
  }
  Tensor one(int64_t kind, bool wanted) const {
    if (!wanted) return empty({0}, kType<A>);
    std::vector<A> total(channels);
    add(kind, total.data(), 0);
    Tensor out = empty({}, kType<A>);
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
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < c; ++i) sum += a[i] * r[i];
      image[p] = sum;
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

// The shape of a `mod_act`: x is the convolution output, y what comes out, smaller by one where
// the blur stands between.
struct Shape {
  int64_t n, c, x_height, x_width, y_height, y_width;

  Shape(const Tensor& x, bool blur)
      : n(x.size(0)), c(x.size(1)), x_height(x.size(2)), x_width(x.size(3)),
        y_height(x_height - blur), y_width(x_width - blur) {
    STD_TORCH_CHECK(!blur || (y_height > 0 && y_width > 0), "too small an image to blur");
  }
  Axis rows(bool transposed) const { return axis(x_height, y_height, transposed); }
  Axis columns(bool transposed) const { return axis(x_width, y_width, transposed); }

 private:
  static Axis axis(int64_t x, int64_t y, bool transposed) {
    return transposed ? Axis{y, x, 1, 1, true} : Axis{x, y, 1, 1, false};
  }
};

// Rows of the convolution output of image n, as they lie in memory.
template <class T>
struct Plain {
  const Shape& k;
  const T* x;
  const int64_t& n;
  const T* operator()(int64_t i) const { return x + (n * k.x_height + i) * k.x_width * k.c; }
  void restart() {}
};

// The same rows in the wide type, for the blur to read.
template <class T, class A = Wide<T>>
struct Widened {
  Plain<T> plain;
  std::vector<A> row;
  const A* operator()(int64_t i) {
    widen_row(plain(i), row.data(), int64_t(row.size()));
    return row.data();
  }
};

// The rows that `mod_act` reads.
template <bool Blurred, class T, class A = Wide<T>>
auto argument_rows(const Shape& k, const T* x, const int64_t& n) {
  const Plain<T> plain{k, x, n};
  if constexpr (Blurred)
    return Blur<A, Widened<T>>(k.rows(false), k.columns(false), k.c, A(4),
                               {plain, std::vector<A>(k.x_width * k.c)});
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
      std::vector<A> row(k.y_width * k.c), uncounted(kSums * k.c);
      int64_t band = begin;
      const auto gradient_row = [&](int64_t i) -> const A* {
        const bool counts = bands.first(band) <= i && i < bands.last(band);
        gradient(i, row.data(), counts ? band_sums(band) : uncounted.data());
        return row.data();
      };
      Blur<A, decltype(gradient_row)&> blur(k.rows(true), k.columns(true), k.c, A(4),
                                            gradient_row);
      for (; band < end; ++band) {
        n = band / bands.per_image;
        source.restart(), blur.restart();
        for (int64_t i = bands.first(band); i < bands.last(band); ++i)
          narrow_row(blur(i), dx_row(i), k.x_width * k.c);
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
    const Epilogue<A> e(d, eps, strength, b, r, s_next, k.n, k.c, k.y_height * k.y_width);
    Tensor y = with_y ? empty_image({k.n, k.c, k.y_height, k.y_width}, x.scalar_type())
                      : empty({0}, x.scalar_type());
    Tensor image = r ? empty({k.n, 1, k.y_height, k.y_width}, kType<A>) : empty({0}, kType<A>);
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
    const Epilogue<A> e(d, eps, strength, b, r, s_next, k.n, k.c, k.y_height * k.y_width);
    const Gradient<T> g(gy, x.scalar_type(), k.n * k.c * k.y_height * k.y_width);
    const Gradient<A> gi(gimage, kType<A>, k.n * k.y_height * k.y_width);
    Tensor dx = empty_image({k.n, k.c, k.x_height, k.x_width}, x.scalar_type());
    const int64_t bands = Bands(k.x_height, k.x_width * k.c).per_image;
    std::vector<A> sums(k.n * bands * kSums * k.c);
    choose(bool(gy), bool(gimage), [&](auto with_y, auto with_image) {
      mod_act_bands_bwd<Blurred, with_y, with_image>(e, k, g.data, gi.data, data<T>(x),
                                                     mutable_data<T>(dx), sums.data());
    });
    const Totals<A> total{sums, k.n, bands, k.c, kSums};
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

int64_t blurred_size(int64_t size, int64_t down, int64_t pad) {
  const int64_t out = floor_div(size + 2 * pad - 4, down) + 1;
  STD_TORCH_CHECK(down > 0 && out > 0, "too small an image to blur");
  return out;
}

Tensor act_fir(Tensor c, Tensor b, int64_t down) {
  const Tensor x = channels_last(c);
  const int64_t n = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t oh = blurred_size(h, down, 1), ow = blurred_size(w, down, 1);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Vector<A> bias(b, 1, channels, 0);
    Tensor out = empty_image({n, channels, oh, ow}, x.scalar_type());
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    blur_bands<T>(
        {h, oh, down, 1, false}, {w, ow, down, 1, false}, n, channels, A(1),
        [&](int64_t image, int64_t i, A* row) {
          activate_row(from + (image * h + i) * w * channels, bias.at(0), row, w, channels);
        },
        [&](int64_t, int64_t image, int64_t i, const A* row) {
          narrow_row(row, to + (image * oh + i) * ow * channels, ow * channels);
        });
    return out;
  });
}

std::tuple<Tensor, Tensor> act_fir_bwd(Tensor g, Tensor c, Tensor b, int64_t down) {
  const Tensor x = channels_last(c);
  const int64_t n = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t oh = blurred_size(h, down, 1), ow = blurred_size(w, down, 1);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Vector<A> bias(b, 1, channels, 0);
    const Gradient<T> from(g, x.scalar_type(), n * channels * oh * ow);
    Tensor dx = empty_image({n, channels, h, w}, x.scalar_type());
    const int64_t bands = Bands(h, w * channels).per_image;
    std::vector<A> sums(n * bands * channels);
    const T* at = data<T>(x);
    T* to = mutable_data<T>(dx);
    blur_bands<T>(
        {oh, h, down, 1, true}, {ow, w, down, 1, true}, n, channels, A(1),
        [&](int64_t image, int64_t i, A* row) {
          widen_row(from.data + (image * oh + i) * ow * channels, row, ow * channels);
        },
        [&](int64_t band, int64_t image, int64_t i, const A* row) {
          const int64_t offset = (image * h + i) * w * channels;
          activate_row_bwd(row, at + offset, bias.at(0), to + offset, &sums[band * channels], w,
                           channels);
        });
    return std::make_tuple(dx, Totals<A>{sums, n, bands, channels, 1}.per_channel(0, true));
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
    Tensor out = empty_image({n, channels, height, width}, x.scalar_type());
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    blur_bands<T>(
        {h, height, factor, pad, transposed}, {w, width, factor, pad, transposed}, n, channels,
        A(gain),
        [&](int64_t image, int64_t i, A* row) {
          widen_row(from + (image * h + i) * w * channels, row, w * channels);
        },
        [&](int64_t, int64_t image, int64_t i, const A* row) {
          narrow_row(row, to + (image * height + i) * width * channels, width * channels);
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
