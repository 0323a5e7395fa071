// Hops 2/9 and 3/9 on a CPU: the kernels of `observe` and `fold`, built at the first start against torch's stable ABI.
//
// One pass over every row: max, min, sum of squares, sum of magnitudes, sixteen values at a time in float32. Rows of the
// sample are counted into a histogram of magnitudes as well; under static scales a second pass counts what they saturate
// and zero. After the step one pass over what the rows gave.

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

constexpr int kLanes = __BIGGEST_ALIGNMENT__ / 4;  // a register's: gcc takes wider vectors apart, element by element
constexpr int64_t kElementsPerTask = 1 << 15;
// maxact_proto.stats
constexpr int kMax = 0, kMin = 1, kSumSquares = 2, kSumAbs = 3, kNonfinite = 4, kNumStats = 5, kNumPhases = 3;
constexpr int kNumRows = 4, kSaturated = 0, kZeroed = 1, kNumCounts = 2;
constexpr int kNumBins = 64, kLowestOctave = -22;
constexpr int kSamplingBits = 21;  // maxact_vllm.observe

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
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

// Elements beyond limit, and those up to zero: a comparison of lanes is -1 where it holds.
template <typename T>
void count_scaled(const T* x, int64_t width, float limit, float zero, float* out, int64_t stride_stat) {
  Integers saturated{}, zeroed{};
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    const Floats value = load(x + column), magnitude = value < 0 ? -value : value;
    saturated -= magnitude > limit;
    zeroed -= magnitude <= zero;
  }
  int64_t num_saturated = 0, num_zeroed = 0;
  for (int lane = 0; lane < kLanes; ++lane) num_saturated += saturated[lane], num_zeroed += zeroed[lane];
  if (column < width) {
    T rest[kLanes] = {};
    std::copy_n(x + column, width - column, rest);
    const Floats value = load(rest);
    for (int64_t lane = 0; lane < width - column; ++lane) {
      num_saturated += std::fabs(value[lane]) > limit;
      num_zeroed += std::fabs(value[lane]) <= zero;
    }
  }
  out[(kNumRows + kSaturated) * stride_stat] = num_saturated;
  out[(kNumRows + kZeroed) * stride_stat] = num_zeroed;
}

// Which rows are counted, and with what weight: one in every of the first num_tokens, from offset on (observe.packed).
struct Sampling {
  int64_t offset, every, num_tokens;

  explicit Sampling(int64_t packed)
      : offset(packed & kField), every(packed >> kSamplingBits & kField), num_tokens(packed >> 2 * kSamplingBits) {}

  static constexpr int64_t kField = (1 << kSamplingBits) - 1;
};

template <typename T>
void count_row(const T* x, int64_t width, int64_t weight, int64_t* histogram) {
  constexpr int32_t first = (127 + kLowestOctave) * 2;  // exponent and first bit of the mantissa, as in the bits
  for (int64_t column = 0; column < width; column += kLanes) {
    T part[kLanes] = {};
    const int64_t here = std::min<int64_t>(kLanes, width - column);
    std::copy_n(x + column, here, part);
    const Integers bits = (Integers)load(part) & 0x7fffffff;
    Integers bins = (bits >> 22) - first;
    bins = bins < 0 ? 0 : bins;
    bins = bins > kNumBins - 1 ? kNumBins - 1 : bins;
    for (int64_t lane = 0; lane < here; ++lane) histogram[bins[lane]] += weight;
  }
}

template <typename T>
void reduce(
    const Tensor& tensor, float* out, int64_t stride_stat, const float* scale, Sampling sampling, int64_t* histogram) {
  const T* x = static_cast<const T*>(tensor.data_ptr());
  const int64_t width = tensor.size(1), stride = tensor.stride(0);
  const int64_t grain = kElementsPerTask / (width + 1) + 1;
  torch::stable::parallel_for(0, tensor.size(0), grain, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      reduce_row(x + token * stride, width, out + token, stride_stat);
      if (scale) count_scaled(x + token * stride, width, scale[0], scale[1], out + token, stride_stat);
    }
  });
  const int64_t num_tokens = std::min(sampling.num_tokens, tensor.size(0));
  for (int64_t token = sampling.offset; token < num_tokens; token += sampling.every) {
    if (std::isfinite(out[kSumAbs * stride_stat + token])) {
      count_row(x + token * stride, width, sampling.every, histogram);
    }
  }
}

// tensors[k]: [tokens, width] of bfloat16, float16 or float32, rows contiguous; rows: float32 [sites, 4 or 6, padded
// tokens]; histograms: int64 [sites, kNumBins], never reset; sampling: int64 [1], of observe.packed; scales: float32
// [sites, 4], (limit, zero) and two that are not used.
void observe(
    std::vector<Tensor> tensors, Tensor rows, Tensor histograms, Tensor sampling, Tensor scales,
    std::vector<int64_t> sites) {
  const bool counted = rows.size(1) > kNumRows;
  const Sampling sampled(*static_cast<const int64_t*>(sampling.data_ptr()));
  for (size_t k = 0; k < tensors.size(); ++k) {
    float* out = static_cast<float*>(rows.data_ptr()) + sites[k] * rows.stride(0);
    const float* scale = counted ? static_cast<const float*>(scales.data_ptr()) + sites[k] * scales.stride(0) : nullptr;
    int64_t* histogram = static_cast<int64_t*>(histograms.data_ptr()) + sites[k] * kNumBins;
    switch (tensors[k].scalar_type()) {
      case ScalarType::BFloat16: reduce<Bfloat16>(tensors[k], out, rows.stride(1), scale, sampled, histogram); break;
      case ScalarType::Half: reduce<_Float16>(tensors[k], out, rows.stride(1), scale, sampled, histogram); break;
      case ScalarType::Float: reduce<float>(tensors[k], out, rows.stride(1), scale, sampled, histogram); break;
      default: STD_TORCH_CHECK(false, "maxact::observe takes bfloat16, float16 and float32");
    }
  }
}

struct Totals {
  float max = -kInf, min = kInf;
  double sum_squares = 0, sum_abs = 0, nonfinite = 0;  // many rows in one step: float32 would lose the small ones
  int64_t counts[kNumCounts] = {};

  bool take(float top, float bottom, float squares, float magnitudes) {
    if (top == -kInf) return false;  // the site did not run
    if (!std::isfinite(top) || !std::isfinite(bottom)) {
      nonfinite += 1;
      return false;
    }
    max = std::max(max, top);
    min = std::min(min, bottom);
    sum_squares += squares;
    sum_abs += magnitudes;
    return true;
  }

  void merge_into(float* values) const {
    values[kMax] = std::max(values[kMax], max);
    values[kMin] = std::min(values[kMin], min);
    values[kSumSquares] += sum_squares;
    values[kSumAbs] += sum_abs;
    values[kNonfinite] += nonfinite;
  }
};

// block: float32 [4 or 6, sites, tokens], tokens contiguous; values: float32 [phases, sites, stats] and counts: int64
// [phases, sites, 0 or 2], contiguous; phases: int8 [num_tokens], or [1] where all rows are of one phase.
void fold(Tensor block, Tensor values, Tensor counts, Tensor phases, int64_t num_tokens) {
  const int64_t num_counts = counts.size(2);
  int64_t* counted = static_cast<int64_t*>(counts.data_ptr());
  const int64_t num_sites = block.size(1), stride_stat = block.stride(0);
  const int8_t* phase = static_cast<const int8_t*>(phases.data_ptr());
  const int64_t step = phases.size(0) == 1 ? 0 : 1;
  float* into = static_cast<float*>(values.data_ptr());
  for (int64_t site = 0; site < num_sites; ++site) {
    float* top = static_cast<float*>(block.data_ptr()) + site * block.stride(1);
    Totals totals[kNumPhases];
    for (int64_t token = 0; token < num_tokens; ++token) {
      Totals& total = totals[phase[token * step]];
      const bool finite = total.take(
          top[token], top[stride_stat * kMin + token], top[stride_stat * kSumSquares + token],
          top[stride_stat * kSumAbs + token]);
      for (int64_t k = 0; finite && k < num_counts; ++k) {
        total.counts[k] += static_cast<int64_t>(top[stride_stat * (kNumRows + k) + token]);
      }
    }
    std::fill_n(top, num_tokens, -kInf);
    for (int p = 0; p < kNumPhases; ++p) {
      totals[p].merge_into(into + (p * num_sites + site) * kNumStats);
      for (int64_t k = 0; k < num_counts; ++k) counted[(p * num_sites + site) * num_counts + k] += totals[p].counts[k];
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maxact, CPU, library) {
  library.impl("observe", TORCH_BOX(&observe));
  library.impl("fold", TORCH_BOX(&fold));
}
