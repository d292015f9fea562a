// Group normalisation and the ReLU after it on the CPU: see cxr/norm.py for what is computed.
//
// Either direction reads an image twice: band by band for the sums of its channels, which are added
// up in fp64 and in order, and then for the result. What a channel sums is less a pivot, so that a
// mean far from 0 costs no digits.

#include <cmath>
#include <tuple>

#include "cpu_blur.h"
#include "tensors.h"

namespace cxrgan {
namespace {

constexpr int kAtOnce = 4;  // pixels that are summed before they are added to a channel's sums

// An image's channels [c] in the wide type, one row for each of their `kinds` of numbers.
template <class A>
struct Rows {
  int64_t kinds, c;
  std::vector<A> numbers;

  Rows(int64_t images, int64_t kinds, int64_t c)
      : kinds(kinds), c(c), numbers(images * kinds * c) {}
  A* at(int64_t n, int64_t kind) { return numbers.data() + (n * kinds + kind) * c; }
};

// Adds `count` pixels' moments about the pivot to the channels' sums.
template <int count, class T, class A>
void add_moments(const T* __restrict x, const A* __restrict pivot, A* __restrict sum,
                 A* __restrict squares, int64_t c) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) {
    A s = 0, q = 0;
    for (int k = 0; k < count; ++k) {
      const A t = widen(x[k * c + i]) - pivot[i];
      s += t, q += t * t;
    }
    sum[i] += s, squares[i] += q;
  }
}

// Of a gradient, what the ReLU lets through.
template <class A>
inline A passed(A x, A scale, A shift, A g) {
  return x * scale + shift <= 0 ? A(0) : g;
}

// Adds the gradients of `count` pixels, and the same times x less the pivot, to the channels' sums.
template <int count, class T, class A>
void add_gradients(const T* __restrict g, const T* __restrict x, const A* __restrict scale,
                   const A* __restrict shift, const A* __restrict pivot, A* __restrict sum,
                   A* __restrict products, int64_t c) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) {
    A s = 0, p = 0;
    for (int k = 0; k < count; ++k) {
      const A xi = widen(x[k * c + i]);
      const A gi = passed<A>(xi, scale[i], shift[i], widen(g[k * c + i]));
      s += gi, p += gi * (xi - pivot[i]);
    }
    sum[i] += s, products[i] += p;
  }
}

// Calls `add` for the pixels [first, last), some at once.
template <class Add>
void by_pixels(int64_t first, int64_t last, const Add& add) {
  int64_t p = first;
  for (; p + kAtOnce <= last; p += kAtOnce) add(p, std::integral_constant<int, kAtOnce>());
  for (; p < last; ++p) add(p, std::integral_constant<int, 1>());
}

// Images [N, pixels, C] in groups of channels, cut into bands of pixels.
struct Groups {
  int64_t n, c, pixels, groups;
  Bands bands;

  Groups(const Tensor& x, int64_t groups)
      : n(x.size(0)), c(x.size(1)), pixels(x.size(2) * x.size(3)), groups(groups),
        bands(pixels, c) {
    STD_TORCH_CHECK(groups > 0 && c % groups == 0, c, " channels cannot be in ", groups, " groups");
    STD_TORCH_CHECK(pixels > 0, "images without pixels cannot be normalised");
  }
  // Calls `run(image, band, first pixel, last pixel)` for all.
  template <class Run>
  void each(const Run& run) const {
    torch::stable::parallel_for(0, n * bands.per_image, 1, [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band)
        run(band / bands.per_image, band, bands.first(band), bands.last(band));
    });
  }
  // The sum over an image's bands of a channel's numbers of one kind.
  template <class A>
  double total(Rows<A>& sums, int64_t image, int64_t kind, int64_t channel) const {
    double sum = 0;
    for (int64_t k = 0; k < bands.per_image; ++k)
      sum += sums.at(image * bands.per_image + k, kind)[channel];
    return sum;
  }
};

// The normalisation as scale * x + shift, in each image's rows 0 and 1; the group's mean in row 2.
template <class A>
Rows<A> lines(const Groups& k, const A* weight, const A* bias, const A* mean, const A* rstd) {
  Rows<A> found(k.n, 3, k.c);
  for (int64_t n = 0; n < k.n; ++n)
    for (int64_t i = 0; i < k.c; ++i) {
      const int64_t group = n * k.groups + i / (k.c / k.groups);
      const A scale = rstd[group] * weight[i];
      found.at(n, 0)[i] = scale;
      found.at(n, 1)[i] = bias[i] - mean[group] * scale;
      found.at(n, 2)[i] = mean[group];
    }
  return found;
}

template <class T, class A = Wide<T>>
void moments(const Groups& k, const T* x, double eps, A* mean, A* rstd) {
  Rows<A> pivots(k.n, 1, k.c), sums(k.n * k.bands.per_image, 2, k.c);
  for (int64_t n = 0; n < k.n; ++n)
    for (int64_t i = 0; i < k.c; ++i) pivots.at(n, 0)[i] = widen(x[n * k.pixels * k.c + i]);
  k.each([&](int64_t n, int64_t band, int64_t first, int64_t last) {
    const T* at = x + n * k.pixels * k.c;
    by_pixels(first, last, [&](int64_t p, auto count) {
      add_moments<count>(at + p * k.c, pivots.at(n, 0), sums.at(band, 0), sums.at(band, 1), k.c);
    });
  });
  const int64_t each = k.c / k.groups;
  std::vector<double> means(each);
  for (int64_t group = 0; group < k.n * k.groups; ++group) {
    const int64_t n = group / k.groups, channel = group % k.groups * each;
    double centre = 0, variance = 0;
    for (int64_t i = 0; i < each; ++i) {
      const double about = k.total(sums, n, 0, channel + i) / k.pixels;
      means[i] = pivots.at(n, 0)[channel + i] + about;
      centre += means[i] / each;
      variance += (k.total(sums, n, 1, channel + i) / k.pixels - about * about) / each;
    }
    for (double m : means) variance += (m - centre) * (m - centre) / each;
    mean[group] = A(centre);
    rstd[group] = A(1 / std::sqrt(std::max(variance, 0.0) + eps));
    if (std::isnan(variance)) rstd[group] = A(variance);  // which max leaves out
  }
}

std::tuple<Tensor, Tensor, Tensor> norm_relu(Tensor given, Tensor weight, Tensor bias,
                                             int64_t groups, double eps) {
  const Tensor x = channels_last(given);
  const Groups k(x, groups);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Optional w = checked(weight, "weight", x, kType<A>, k.c, k.c);
    const Optional b = checked(bias, "bias", x, kType<A>, k.c, k.c);
    Tensor y = empty_image({k.n, k.c, x.size(2), x.size(3)}, x.scalar_type(), x);
    Tensor mean = empty({k.n, groups}, kType<A>, x), rstd = empty({k.n, groups}, kType<A>, x);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    moments<T>(k, from, eps, mutable_data<A>(mean), mutable_data<A>(rstd));
    Rows<A> line = lines(k, data<A>(w), data<A>(b), data<A>(mean), data<A>(rstd));
    k.each([&](int64_t n, int64_t, int64_t first, int64_t last) {
      const A *__restrict scale = line.at(n, 0), *__restrict shift = line.at(n, 1);
      for (int64_t p = n * k.pixels + first; p < n * k.pixels + last; ++p)
#pragma omp simd
        for (int64_t i = 0; i < k.c; ++i) {
          const A value = widen(from[p * k.c + i]) * scale[i] + shift[i];
          narrow(value <= 0 ? A(0) : value, to[p * k.c + i]);
        }
    });
    return std::make_tuple(y, mean, rstd);
  });
}

// Of each image's channels, a, b and c of dx = a x + b g + c; adds to the gradients of weight and
// bias.
template <class A>
Rows<A> gradient_lines(const Groups& k, Rows<A>& sums, const A* weight, const A* mean,
                       const A* rstd, A* dweight, A* dbias) {
  Rows<A> found(k.n, 3, k.c);
  const int64_t each = k.c / k.groups;
  std::vector<double> of_weight(k.c), of_bias(k.c);
  for (int64_t group = 0; group < k.n * k.groups; ++group) {
    const int64_t n = group / k.groups, channel = group % k.groups * each;
    const double r = rstd[group], size = double(k.pixels) * each;
    double shift = 0, scale = 0;
    for (int64_t i = channel; i < channel + each; ++i) {
      const double sum = k.total(sums, n, 0, i), products = k.total(sums, n, 1, i) * r;
      of_bias[i] += sum, of_weight[i] += products;
      shift += weight[i] * sum / size, scale += weight[i] * products / size;
    }
    for (int64_t i = channel; i < channel + each; ++i) {
      found.at(n, 0)[i] = A(-r * r * scale);
      found.at(n, 1)[i] = A(r * weight[i]);
      found.at(n, 2)[i] = A(r * (mean[group] * r * scale - shift));
    }
  }
  std::copy(of_weight.begin(), of_weight.end(), dweight);
  std::copy(of_bias.begin(), of_bias.end(), dbias);
  return found;
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_bwd(Tensor incoming, Tensor given, Tensor weight,
                                                 Tensor bias, Tensor mean, Tensor rstd) {
  const Tensor x = channels_last(given);
  const Groups k(x, mean.size(1));
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t means = k.n * k.groups;
    const Optional w = checked(weight, "weight", x, kType<A>, k.c, k.c);
    const Optional b = checked(bias, "bias", x, kType<A>, k.c, k.c);
    const Optional m = checked(mean, "mean", x, kType<A>, means, k.groups);
    const Optional r = checked(rstd, "rstd", x, kType<A>, means, k.groups);
    const Optional gradients = gradient(incoming, x, x.scalar_type(), k.n * k.c * k.pixels);
    Tensor dx = empty_image({k.n, k.c, x.size(2), x.size(3)}, x.scalar_type(), x);
    Tensor dweight = empty({k.c}, kType<A>, x), dbias = empty({k.c}, kType<A>, x);
    const T *from = data<T>(x), *g = data<T>(gradients);
    T* to = mutable_data<T>(dx);
    Rows<A> line = lines(k, data<A>(w), data<A>(b), data<A>(m), data<A>(r));
    Rows<A> sums(k.n * k.bands.per_image, 2, k.c);
    k.each([&](int64_t n, int64_t band, int64_t first, int64_t last) {
      by_pixels(first, last, [&](int64_t p, auto count) {
        const int64_t at = (n * k.pixels + p) * k.c;
        add_gradients<count>(g + at, from + at, line.at(n, 0), line.at(n, 1), line.at(n, 2),
                             sums.at(band, 0), sums.at(band, 1), k.c);
      });
    });
    Rows<A> of = gradient_lines(k, sums, data<A>(w), data<A>(m), data<A>(r),
                                mutable_data<A>(dweight), mutable_data<A>(dbias));
    k.each([&](int64_t n, int64_t, int64_t first, int64_t last) {
      const A *__restrict scale = line.at(n, 0), *__restrict shift = line.at(n, 1);
      const A *__restrict a = of.at(n, 0), *__restrict b = of.at(n, 1), *__restrict c = of.at(n, 2);
      for (int64_t p = n * k.pixels + first; p < n * k.pixels + last; ++p)
#pragma omp simd
        for (int64_t i = 0; i < k.c; ++i) {
          const A xi = widen(from[p * k.c + i]);
          const A gi = passed<A>(xi, scale[i], shift[i], widen(g[p * k.c + i]));
          narrow(a[i] * xi + (b[i] * gi + c[i]), to[p * k.c + i]);
        }
    });
    return std::make_tuple(dx, dweight, dbias);
  });
}

}  // namespace
}  // namespace cxrgan

STABLE_TORCH_LIBRARY_IMPL(cxrgan, CPU, m) {
  m.impl("norm_relu", TORCH_BOX(&cxrgan::norm_relu));
  m.impl("norm_relu_bwd", TORCH_BOX(&cxrgan::norm_relu_bwd));
}
