// Blurred rows on the CPU, and the bands of rows that work is cut into.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "epilogue.h"

namespace cxrgan {
namespace {

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

}  // namespace
}  // namespace cxrgan
