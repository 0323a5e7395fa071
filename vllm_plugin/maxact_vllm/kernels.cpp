// Hops 2/9 and 3/9 on a CPU: the kernels of `observe` and `fold`, built at the first start against torch's stable ABI.
//
// One pass over every row, a register at a time: max, min, sum of squares, sum of magnitudes, both sums in float32. Rows
// of the sample are counted into a histogram of magnitudes as well; under static scales a second pass counts what they
// saturate and zero. After the step one pass over what the rows gave.

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

// T in as many lanes as given.
template <typename T, int lanes>
struct In {
  typedef T Vector __attribute__((vector_size(sizeof(T) * lanes)));
};

using Floats = In<float, kLanes>::Vector;
using Integers = In<int32_t, kLanes>::Vector;
using Words = In<uint32_t, kLanes>::Vector;
using Halves = In<uint16_t, kLanes>::Vector;
using Float16s = In<_Float16, kLanes>::Vector;
using SignedPairs = In<int16_t, 2 * kLanes>::Vector;  // a register full of bfloat16
using Pairs = In<uint16_t, 2 * kLanes>::Vector;

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

constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto smaller = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto sum = [](auto a, auto b) { return a + b; };

// All lanes of a vector into one value, halves first.
template <typename T, int lanes, typename Vector, typename Operation>
T reduce_lanes(Vector x, Operation operation) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    typename In<T, lanes / 2>::Vector halves[2];
    __builtin_memcpy(halves, &x, sizeof halves);
    return reduce_lanes<T, lanes / 2>(operation(halves[0], halves[1]), operation);
  }
}

struct Row {
  float max, min, sum_squares, sum_abs;
};

// The lanes of a row of any type, and where it ends within a register.
template <typename T>
struct Lanes {
  static constexpr int kStep = kLanes;
  Floats top = Floats{} - kInf, bottom = Floats{} + kInf, squares{}, magnitudes{};

  void take(const T* x) { take(load(x), load(x), load(x)); }

  void take(const T* x, int64_t here) {
    const Floats value = load(x);
    Floats upper = value, lower = value;
    for (int64_t lane = here; lane < kLanes; ++lane) upper[lane] = -kInf, lower[lane] = kInf;
    take(value, upper, lower);
  }

  void take(Floats value, Floats upper, Floats lower) {
    top = larger(upper, top);
    bottom = smaller(lower, bottom);
    squares += value * value;
    magnitudes += (Floats)((Words)value & 0x7fffffff);
  }

  void take(const Lanes& other) {
    top = larger(other.top, top);
    bottom = smaller(other.bottom, bottom);
    squares += other.squares;
    magnitudes += other.magnitudes;
  }

  Row reduced() const {
    return {
        reduce_lanes<float, kLanes>(top, larger), reduce_lanes<float, kLanes>(bottom, smaller),
        reduce_lanes<float, kLanes>(squares, sum), reduce_lanes<float, kLanes>(magnitudes, sum)};
  }
};

// Bfloat16 is compared as it lies in memory, twice as many at a time: as integers with a sign, numbers from zero on are
// in order and those below zero in the reverse order; without a sign, the lowest of those is the largest of all.
template <>
struct Lanes<Bfloat16> {
  static constexpr int kStep = 2 * kLanes;
  static constexpr int16_t kLeast = -0x8000, kMost = 0x7fff;
  static constexpr uint16_t kMagnitude = 0x7fff;
  SignedPairs most = SignedPairs{} + kLeast, least = SignedPairs{} + kMost;
  Pairs largest{};
  Floats squares{}, magnitudes{};

  void take(const Bfloat16* x) {
    const Pairs bits = read<Pairs>(x);
    take(bits, (SignedPairs)bits, (SignedPairs)bits);
  }

  void take(const Bfloat16* x, int64_t here) {
    const Pairs bits = read<Pairs>(x);
    SignedPairs upper = (SignedPairs)bits, lower = (SignedPairs)bits;
    for (int64_t lane = here; lane < kStep; ++lane) upper[lane] = kLeast, lower[lane] = kMost;
    take(bits, upper, lower);
  }

  void take(Pairs bits, SignedPairs upper, SignedPairs lower) {
    most = larger(upper, most);
    least = smaller(lower, least);
    largest = larger(bits, largest);
    const Words two = (Words)(bits & kMagnitude);
    const Floats even = (Floats)(two << 16), odd = (Floats)(two & 0xffff0000);
    squares += even * even;
    squares += odd * odd;
    magnitudes += even + odd;
  }

  void take(const Lanes& other) {
    most = larger(other.most, most);
    least = smaller(other.least, least);
    largest = larger(other.largest, largest);
    squares += other.squares;
    magnitudes += other.magnitudes;
  }

  static float number(int32_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &word, sizeof value);
    return value;
  }

  Row reduced() const {
    const int16_t up = reduce_lanes<int16_t, kStep>(most, larger);
    const uint16_t beyond = reduce_lanes<uint16_t, kStep>(largest, larger);
    const bool positive = up >= 0, negative = beyond > kMagnitude;
    const int16_t down = positive && negative ? 0 : reduce_lanes<int16_t, kStep>(least, smaller);
    return {
        number(positive ? up : down), number(negative ? beyond : down), reduce_lanes<float, kLanes>(squares, sum),
        reduce_lanes<float, kLanes>(magnitudes, sum)};
  }
};

// Where a site's rows are: [stats, tokens].
struct Rows {
  float* data;
  int64_t stride_stat, stride_token;

  float& at(int stat, int64_t token) const { return data[stat * stride_stat + token * stride_token]; }
};

template <typename T>
void reduce_row(const T* x, int64_t width, Rows rows, int64_t token) {
  constexpr int kStep = Lanes<T>::kStep;
  Lanes<T> even, odd;  // two, so that one addition need not wait for the one before
  int64_t column = 0;
  for (; column + 2 * kStep <= width; column += 2 * kStep) {
    even.take(x + column);
    odd.take(x + column + kStep);
  }
  for (; column < width; column += kStep) {
    T rest[kStep] = {};
    const int64_t here = std::min<int64_t>(kStep, width - column);
    std::copy_n(x + column, here, rest);
    even.take(rest, here);
  }
  even.take(odd);
  const Row row = even.reduced();
  // Comparisons of floats ignore a NaN; the sum does not: let the row say so in its maximum, where the fold looks.
  rows.at(kMax, token) = std::isnan(row.sum_abs) ? row.sum_abs : row.max;
  rows.at(kMin, token) = row.min;
  rows.at(kSumSquares, token) = row.sum_squares;
  rows.at(kSumAbs, token) = row.sum_abs;
}

// Elements beyond limit, and those up to zero: a comparison of lanes is -1 where it holds.
template <typename T>
void count_scaled(const T* x, int64_t width, float limit, float zero, Rows rows, int64_t token) {
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
  rows.at(kNumRows + kSaturated, token) = num_saturated;
  rows.at(kNumRows + kZeroed, token) = num_zeroed;
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
  constexpr int kCopies = 4;  // neighbours often share a bin: an addition need not wait for the one before
  int32_t counts[kCopies][kNumBins] = {};
  for (int64_t column = 0; column < width; column += kLanes) {
    T part[kLanes] = {};
    const int64_t here = std::min<int64_t>(kLanes, width - column);
    std::copy_n(x + column, here, part);
    const Integers bits = (Integers)load(part) & 0x7fffffff;
    Integers bins = (bits >> 22) - first;
    bins = bins < 0 ? 0 : bins;
    bins = bins > kNumBins - 1 ? kNumBins - 1 : bins;
    for (int64_t lane = 0; lane < here; ++lane) ++counts[lane % kCopies][bins[lane]];
  }
  for (const auto& own : counts) {
    for (int bin = 0; bin < kNumBins; ++bin) histogram[bin] += own[bin] * weight;
  }
}

// One tensor of a call and what becomes of it. What torch says of a tensor is asked once: every question is a call.
struct Site {
  const void* data;
  ScalarType type;
  int64_t num_tokens, width, stride;
  Rows rows;
  const float* scale;
  int64_t* histogram;

  template <typename T>
  const T* row(int64_t token) const {
    return static_cast<const T*>(data) + token * stride;
  }
};

template <typename T>
void reduce(const Site& site, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    reduce_row(site.row<T>(token), site.width, site.rows, token);
    if (site.scale) count_scaled(site.row<T>(token), site.width, site.scale[0], site.scale[1], site.rows, token);
  }
}

template <typename T>
void count(const Site& site, Sampling sampling) {
  const int64_t num_tokens = std::min(sampling.num_tokens, site.num_tokens);
  for (int64_t token = sampling.offset; token < num_tokens; token += sampling.every) {
    if (std::isfinite(site.rows.at(kSumAbs, token))) {
      count_row(site.row<T>(token), site.width, sampling.every, site.histogram);
    }
  }
}

void reduce(const Site& site, int64_t first, int64_t last) {
  switch (site.type) {
    case ScalarType::BFloat16: return reduce<Bfloat16>(site, first, last);
    case ScalarType::Half: return reduce<_Float16>(site, first, last);
    default: return reduce<float>(site, first, last);
  }
}

void count(const Site& site, Sampling sampling) {
  switch (site.type) {
    case ScalarType::BFloat16: return count<Bfloat16>(site, sampling);
    case ScalarType::Half: return count<_Float16>(site, sampling);
    default: return count<float>(site, sampling);
  }
}

// tensors[k]: [tokens, width] of bfloat16, float16 or float32, rows contiguous; rows: float32 [padded tokens, sites,
// 4 or 6]; histograms: int64 [sites, kNumBins], never reset; sampling: int64 [1], of observe.packed; scales: float32
// [sites, 4], (limit, zero) and two that are not used.
void observe(
    std::vector<Tensor> tensors, Tensor rows, Tensor histograms, Tensor sampling, Tensor scales,
    std::vector<int64_t> places) {
  float* const all_rows = static_cast<float*>(rows.data_ptr());
  const int64_t stride_token = rows.stride(0), stride_site = rows.stride(1);
  const float* const limits = rows.size(2) > kNumRows ? static_cast<const float*>(scales.data_ptr()) : nullptr;
  const int64_t stride_scale = scales.stride(0);
  int64_t* const counts = static_cast<int64_t*>(histograms.data_ptr());
  std::vector<Site> sites;
  sites.reserve(tensors.size());
  int64_t most_tokens = 0, row_width = 0;
  for (size_t k = 0; k < tensors.size(); ++k) {
    const Tensor& x = tensors[k];
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float,
        "maxact::observe takes bfloat16, float16 and float32");
    const int64_t place = places[k], num_tokens = x.size(0), width = x.size(1);
    sites.push_back(
        {x.data_ptr(), type, num_tokens, width, x.stride(0), {all_rows + place * stride_site, 1, stride_token},
         limits ? limits + place * stride_scale : nullptr, counts + place * kNumBins});
    most_tokens = std::max(most_tokens, num_tokens);
    row_width += width;
  }
  // All rows of all tensors are one range, so that the one row of a decode step keeps every thread busy, too; token
  // after token, so that a thread reads of a large step the tokens that the same thread has made.
  const int64_t num_sites = sites.size();
  const int64_t grain = kElementsPerTask / (row_width / std::max<int64_t>(num_sites, 1) + 1) + 1;
  torch::stable::parallel_for(0, most_tokens * num_sites, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = 0; k < num_sites; ++k) {
      // the tokens for which first <= token * num_sites + k < last
      const int64_t begin = (first - k + num_sites - 1) / num_sites, end = (last - k + num_sites - 1) / num_sites;
      reduce(sites[k], begin, std::min(end, sites[k].num_tokens));
    }
  });
  const Sampling sampled(*static_cast<const int64_t*>(sampling.data_ptr()));
  if (sampled.every > 0) {
    torch::stable::parallel_for(0, sites.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) count(sites[k], sampled);
    });
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

// block: float32 [4 or 6, sites, tokens]; values: float32 [phases, sites, stats] and counts: int64 [phases, sites, 0 or
// 2], contiguous; phases: int8 [num_tokens], or [1] where all rows are of one phase.
void fold(Tensor block, Tensor values, Tensor counts, Tensor phases, int64_t num_tokens) {
  const int64_t num_counts = counts.size(2), num_sites = block.size(1);
  int64_t* counted = static_cast<int64_t*>(counts.data_ptr());
  const int8_t* phase = static_cast<const int8_t*>(phases.data_ptr());
  const int64_t step = phases.size(0) == 1 ? 0 : 1;
  float* into = static_cast<float*>(values.data_ptr());
  for (int64_t site = 0; site < num_sites; ++site) {
    const Rows rows{static_cast<float*>(block.data_ptr()) + site * block.stride(1), block.stride(0), block.stride(2)};
    Totals totals[kNumPhases];
    bool ran[kNumPhases] = {};
    for (int64_t token = 0; token < num_tokens; ++token) {
      const int8_t own = phase[token * step];
      const bool finite = totals[own].take(
          rows.at(kMax, token), rows.at(kMin, token), rows.at(kSumSquares, token), rows.at(kSumAbs, token));
      for (int64_t k = 0; finite && k < num_counts; ++k) {
        totals[own].counts[k] += static_cast<int64_t>(rows.at(kNumRows + k, token));
      }
      rows.at(kMax, token) = -kInf;
      ran[own] = true;
    }
    for (int p = 0; p < kNumPhases; ++p) {
      if (!ran[p]) continue;
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
