// Blurred rows on the CPU, and the bands of rows that work is cut into.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "epilogue.h"

namespace cxrgan {
namespace {

constexpr int kLanes = 16;  // numbers that are summed side by side

// The sum of the lanes, by halves.
template <class A>
[[gnu::always_inline]] inline A fold(A (&part)[kLanes]) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma omp simd
    for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  return part[0];
}

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

// Where sums are taken: `n` in a line, and as many in each of `times` lines, which begin `in`
// inputs and `out` outputs apart.
struct Lines {
  int64_t n, times = 1, in = 0, out = 0;
};

// y[Out * i] = sum(In * i). Inlined, so that each use has loads of its own: the processor learns
// the stride of each load and fetches ahead.
template <int In, int Out, class Y, class Sum>
[[gnu::always_inline]] inline void each(const Lines& of, Y* __restrict y, const Sum& sum) {
  for (int64_t p = 0; p < of.times; ++p, y += of.out)
#pragma omp simd
    for (int64_t i = 0; i < of.n; ++i) narrow(sum(p * of.in + In * i), y[Out * i]);
}

// The sum over the window of weight * x[j][i]; the weights are those of the blur times `scale`.
template <int In, int Out, class X, class Y, class A>
[[gnu::always_inline]] inline void combine(const X* const* x, const Window& w, A scale, Y* y,
                                           const Lines& of) {
  A t[4] = {};
  for (int j = 0; j < w.count; ++j) t[j] = scale * A(tap_weight(w.tap + j * w.step));
  const auto a = [t = t[0], x = x[0]](int64_t i) { return t * widen(x[i]); };
  const auto b = [t = t[1], x = x[1]](int64_t i) { return t * widen(x[i]); };
  const auto c = [t = t[2], x = x[2]](int64_t i) { return t * widen(x[i]); };
  const auto d = [t = t[3], x = x[3]](int64_t i) { return t * widen(x[i]); };
  if (w.count == 4)
    each<In, Out>(of, y, [&](int64_t i) { return a(i) + b(i) + (c(i) + d(i)); });
  else if (w.count == 3)
    each<In, Out>(of, y, [&](int64_t i) { return a(i) + b(i) + c(i); });
  else if (w.count == 2)
    each<In, Out>(of, y, [&](int64_t i) { return a(i) + b(i); });
  else if (w.count == 1)
    each<In, Out>(of, y, a);
  else
    each<In, Out>(of, y, [](int64_t) { return A(0); });
}

// Outputs whose windows are alike: `length` of them, from `first` and its `window` on.
struct Run {
  int64_t first, length;
  Window window;
};

// The runs of an axis; an output is `out` after the one before it in its run, its window `in`.
inline std::vector<Run> runs(const Axis& axis, int64_t in, int64_t out) {
  std::vector<Run> found;
  for (int64_t i = 0; i < axis.out; ++i) {
    const Window w = window(axis, i);
    const auto run = std::find_if(found.begin(), found.end(), [&](const Run& run) {
      return run.window.count == w.count && run.window.tap == w.tap &&
             run.window.first + run.length * in == w.first && run.first + run.length * out == i;
    });
    if (run == found.end())
      found.push_back({i, 1, w});
    else
      ++run->length;
  }
  return found;
}

// A cache line. Rows begin on one: a vector's access never meets two.
template <class A>
struct alignas(64) Line {
  static constexpr int64_t kLength = 64 / sizeof(A);
  A at[kLength];
};

// Blurred rows of an image, first along the columns, then along the row. `source(i, scratch)` gives
// input row i, for which it may use the memory `scratch`; rows have to be asked for in order, so
// that each is got once.
template <class T, class A = Wide<T>>
class Blur {
 public:
  using Source = std::function<const T*(int64_t, A*)>;

  Blur(const Axis& rows, const Axis& columns, int64_t channels, A gain, Source source)
      : rows_(rows), in_(columns.transposed ? 1 : columns.down),
        out_(columns.transposed ? columns.down : 1), runs_(runs(columns, in_, out_)),
        channels_(channels), in_width_(columns.in * channels), gain_(gain / 64),
        source_(std::move(source)),
        lines_(std::max(columns.in, columns.out) * channels / Line<A>::kLength + 1),
        buffer_(new Line<A>[6 * lines_]) {}

  void restart() { next_ = 0; }

  // Row i, until the next is asked for.
  const A* operator()(int64_t i) {
    write(i, buffer(5));
    return buffer(5);
  }

  template <class Y>
  void write(int64_t i, Y* y) {
    const Window w = window(rows_, i);
    for (next_ = std::max(next_, w.first); next_ < w.first + w.count; ++next_)
      kept_[next_ % 4] = source_(next_, buffer(next_ % 4));
    const T* x[4] = {};
    for (int j = 0; j < w.count; ++j) x[j] = kept_[(w.first + j) % 4];
    combine<1, 1>(x, w, gain_, buffer(4), {in_width_});
    for (const Run& run : runs_) along(buffer(4), run, y + run.first * channels_);
  }

 private:
  A* buffer(int64_t i) { return buffer_[i * lines_].at; }

  template <class Y>
  void along(const A* row, const Run& run, Y* y) const {
    const int64_t n = run.length, c = channels_;
    const A* x[4] = {};
    for (int j = 0; j < run.window.count; ++j) x[j] = row + (run.window.first + j) * c;
    if (c == 1 && in_ == 2)
      combine<2, 1>(x, run.window, A(1), y, {n});
    else if (c == 1 && out_ == 2)
      combine<1, 2>(x, run.window, A(1), y, {n});
    else  // without resampling the run is one long vector in memory
      combine<1, 1>(x, run.window, A(1), y,
                    in_ == out_ ? Lines{n * c} : Lines{c, n, in_ * c, out_ * c});
  }

  Axis rows_;
  int64_t in_, out_;
  std::vector<Run> runs_;
  int64_t channels_, in_width_, next_ = 0;
  A gain_;
  Source source_;
  const T* kept_[4] = {};
  int64_t lines_;
  std::unique_ptr<Line<A>[]> buffer_;
};

// Blurs every image in bands of rows: `source(image, i, scratch)` gives input row i, `store(band,
// image, i, blur)` takes output row i from the `blur`.
template <class T, class Get, class Store, class A = Wide<T>>
void blur_bands(const Axis& rows, const Axis& columns, int64_t images, int64_t channels, A gain,
                const Get& source, const Store& store) {
  const Bands bands(rows.out, columns.out * channels);
  torch::stable::parallel_for(0, images * bands.per_image, 1, [&](int64_t begin, int64_t end) {
    int64_t n = 0;
    Blur<T> blur(rows, columns, channels, gain,
                 [&](int64_t i, A* scratch) { return source(n, i, scratch); });
    for (int64_t band = begin; band < end; ++band) {
      n = band / bands.per_image;
      blur.restart();
      for (int64_t i = bands.first(band); i < bands.last(band); ++i) store(band, n, i, blur);
    }
  });
}

}  // namespace
}  // namespace cxrgan
