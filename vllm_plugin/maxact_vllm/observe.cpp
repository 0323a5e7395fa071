// Hop 2/9 on a CPU: the kernel of `instrument`, built at the first start against torch's stable ABI.
//
// One pass over every row: max, min, sum of squares, sum of magnitudes, sixteen values at a time in float32.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int kLanes = 16;
constexpr int64_t kElementsPerTask = 1 << 15;
constexpr int kMax = 0, kMin = 1, kSumSquares = 2, kSumAbs = 3;  // maxact_proto.stats

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef _Float16 Float16s __attribute__((vector_size(2 * kLanes)));

struct Bfloat16 {
  uint16_t bits;
};

template <typename Vector, typename T>
Vector read(const T* x) {
  Vector loaded;
  __builtin_memcpy(&loaded, x, sizeof loaded);
  return loaded;
}

Floats load(const float* x) { return read<Floats>(x); }
Floats load(const _Float16* x) { return __builtin_convertvector(read<Float16s>(x), Floats); }
Floats load(const Bfloat16* x) { return (Floats)(__builtin_convertvector(read<Halves>(x), Words) << 16); }

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Lanes {
  Floats top = Floats{} - kInf, bottom = Floats{} + kInf, squares{}, magnitudes{};

  void take(Floats value) { take(value, value, value); }

  void take(Floats value, Floats upper, Floats lower) {
    top = upper > top ? upper : top;
    bottom = lower < bottom ? lower : bottom;
    squares += value * value;
    magnitudes += value < 0 ? -value : value;
  }
};

template <typename T>
void reduce_row(const T* x, int64_t width, float* out, int64_t stride_stat) {
  Lanes even, odd;  // two, so that one addition need not wait for the one before
  int64_t column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes) {
    even.take(load(x + column));
    odd.take(load(x + column + kLanes));
  }
  for (; column < width; column += kLanes) {
    T rest[kLanes] = {};
    const int64_t here = std::min<int64_t>(kLanes, width - column);
    std::copy_n(x + column, here, rest);
    const Floats value = load(rest);
    Floats upper = value, lower = value;
    for (int64_t lane = here; lane < kLanes; ++lane) upper[lane] = -kInf, lower[lane] = kInf;
    even.take(value, upper, lower);
  }
  float max = -kInf, min = kInf, sum_squares = 0, sum_abs = 0;
  for (const Lanes& lanes : {even, odd}) {
    for (int lane = 0; lane < kLanes; ++lane) {
      max = std::max(max, lanes.top[lane]);
      min = std::min(min, lanes.bottom[lane]);
      sum_squares += lanes.squares[lane];
      sum_abs += lanes.magnitudes[lane];
    }
  }
  // Comparisons ignore a NaN; the sum does not: let the row say so in its maximum, where the fold looks.
  out[kMax * stride_stat] = std::isnan(sum_abs) ? sum_abs : max;
  out[kMin * stride_stat] = min;
  out[kSumSquares * stride_stat] = sum_squares;
  out[kSumAbs * stride_stat] = sum_abs;
}

template <typename T>
void reduce(const Tensor& tensor, float* out, int64_t stride_stat) {
  const T* x = static_cast<const T*>(tensor.data_ptr());
  const int64_t width = tensor.size(1), stride = tensor.stride(0);
  const int64_t grain = kElementsPerTask / (width + 1) + 1;
  torch::stable::parallel_for(0, tensor.size(0), grain, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) reduce_row(x + token * stride, width, out + token, stride_stat);
  });
}

// tensors[k]: [tokens, width] of bfloat16, float16 or float32, rows contiguous; rows: float32 [sites, 4, padded tokens].
void observe(std::vector<Tensor> tensors, Tensor rows, std::vector<int64_t> sites) {
  float* block = static_cast<float*>(rows.data_ptr());
  for (size_t k = 0; k < tensors.size(); ++k) {
    float* out = block + sites[k] * rows.stride(0);
    switch (tensors[k].scalar_type()) {
      case ScalarType::BFloat16: reduce<Bfloat16>(tensors[k], out, rows.stride(1)); break;
      case ScalarType::Half: reduce<_Float16>(tensors[k], out, rows.stride(1)); break;
      case ScalarType::Float: reduce<float>(tensors[k], out, rows.stride(1)); break;
      default: STD_TORCH_CHECK(false, "maxact::observe takes bfloat16, float16 and float32");
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maxact, CPU, library) { library.impl("observe", TORCH_BOX(&observe)); }
