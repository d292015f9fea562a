// What the hosts of the CPU and the CUDA kernels share: tensors checked, converted and made.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <type_traits>

#include "epilogue.h"

namespace cxrgan {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class A>
constexpr ScalarType kType = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* data(const Optional& x) {
  return x ? data<T>(*x) : nullptr;
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

inline Tensor channels_last(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "expected [N, C, H, W], got ", x.dim(), " dimensions");
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

inline Tensor empty_image(std::array<int64_t, 4> shape, ScalarType type, const Tensor& like) {
  return torch::stable::empty({shape.data(), 4}, type, std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, const Tensor& like) {
  return torch::stable::empty({shape.begin(), shape.size()}, type, std::nullopt, like.device());
}

// A tensor of `numel` numbers, the last axis `channels` of them, as contiguous numbers of `type`.
inline Optional checked(const Optional& given, const char* name, const Tensor& like,
                        ScalarType type, int64_t numel, int64_t channels) {
  if (!given) return std::nullopt;
  STD_TORCH_CHECK(given->numel() == numel && (given->dim() == 0 || given->size(-1) == channels),
                  name, ": expected ", numel, " numbers, got ", given->numel());
  STD_TORCH_CHECK(given->device() == like.device(), name, " is on another device");
  if (given->scalar_type() == type && given->is_contiguous()) return given;  // the usual case: fast
  return torch::stable::contiguous(torch::stable::to(*given, type));
}

// The arguments of `mod_act` beside its convolution output, in the wide type.
struct Arguments {
  Optional d, eps, strength, b, r, s;
  int64_t eps_stride = 0;  // from image to image

  Arguments(const Tensor& x, ScalarType type, int64_t height, int64_t width, const Optional& d_,
            const Optional& eps_, const Optional& strength_, const Optional& b_,
            const Optional& r_, const Optional& s_) {
    const int64_t n = x.size(0), c = x.size(1), pixels = height * width;
    d = checked(d_, "d", x, type, n * c, c);
    b = checked(b_, "b", x, type, c, c);
    r = checked(r_, "r", x, type, n * c, c);
    s = checked(s_, "s_next", x, type, n * c, c);
    STD_TORCH_CHECK(bool(eps_) == bool(strength_), "eps and strength go together");
    if (!eps_) return;
    eps_stride = eps_->size(0) == 1 ? 0 : pixels;
    eps = checked(eps_, "eps", x, type, eps_stride ? n * pixels : pixels, width);
    strength = checked(strength_, "strength", x, type, 1, 1);
  }
};

// An incoming gradient in channels_last, or nothing.
inline Optional gradient(const Optional& given, const Tensor& like, ScalarType type,
                         int64_t numel) {
  if (!given) return std::nullopt;
  STD_TORCH_CHECK(given->numel() == numel, "gradient: expected ", numel, " numbers");
  STD_TORCH_CHECK(given->device() == like.device(), "gradient is on another device");
  return channels_last(torch::stable::to(*given, type));
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

inline int64_t blurred_size(int64_t size, int64_t down) {
  STD_TORCH_CHECK(down > 0, "down: expected a positive number");
  const int64_t out = floor_div(size - 2, down) + 1;
  STD_TORCH_CHECK(out > 0, "too small an image to blur");
  return out;
}

}  // namespace
}  // namespace cxrgan
