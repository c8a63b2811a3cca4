#pragma once
// Local correlation: what normalisation does to a value, and what its statistics send back to it.
#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

// x becomes (x - mean) * inverse. The mean is split in two so that a large one costs x - mean no digits.
template <class A>
struct Normalization {
  A high = A(0), low = A(0), inverse = A(1);
};

template <class A, class V>
FASTREG_HD V normalized(const Normalization<A>& s, V x) {
  return ((x - s.high) - s.low) * s.inverse;
}

// Mean of `count` numbers and the sum of their squared deviations from it.
struct Moments {
  double count, mean, squares;
};

// Of two sets together. Equal numbers stay at deviation 0 exactly.
FASTREG_HD Moments merged(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  const double count = a.count + b.count, apart = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

// A single number has deviation 0.
FASTREG_HD double deviation(const Moments& m) {
  return m.count > 1 ? std::sqrt(m.squares / (m.count - 1)) : m.squares * 0;
}

constexpr double kDeviationEpsilon = 1e-6;

// statistics: mean and deviation of fixed, mean and deviation of moving.
FASTREG_HD double shared_mean(const double* statistics) { return (statistics[0] + statistics[2]) / 2; }
FASTREG_HD double shared_deviation(const double* statistics) {
  return (statistics[1] + statistics[3]) / 2 + kDeviationEpsilon;
}

// About the shared mean, or about that of one map: 0 fixed, 1 moving.
template <class A>
FASTREG_HD Normalization<A> normalization(const double* statistics, int own = -1) {
  const double mean = own < 0 ? shared_mean(statistics) : statistics[2 * own];
  return {A(mean), A(mean - double(A(mean))), A(1 / shared_deviation(statistics))};
}

// dL/dx = gradient * dL/dx^ + constant + value * x', with x^ the normalised x and x' the same about its map's
// own mean: about the shared one, value and constant would cancel where the two means lie apart.
struct ThroughStatistics {
  double gradient, constant, value;
};

// sum: of dL/dx^ over both maps; products: of x^ dL/dx^ over both; map: 0 fixed, 1 moving. A deviation of 0
// has derivative 0.
FASTREG_HD ThroughStatistics through_statistics(const double* statistics, double sum, double products,
                                                double count, int map) {
  const double deviation = statistics[2 * map + 1];
  const double unit = shared_deviation(statistics);
  // dL/d deviation = -products / unit, and d deviation / dx = (x - mean) / ((count - 1) deviation), halved.
  const double slope = deviation == 0 ? 0 : -products / (2 * unit * (count - 1) * deviation);
  return {1 / unit, -sum / (2 * unit * count), slope * unit};
}

// A deviation so small that its slope lies beyond the arithmetic type counts as 0: an infinite slope would
// meet zeros.
template <class A>
FASTREG_HD A value_of(const ThroughStatistics& t) {
  const A value = A(t.value);
  return value - value == A(0) || t.value != t.value ? value : A(0);
}

}  // namespace fastreg
