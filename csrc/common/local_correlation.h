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

// Mean and deviation of both maps of a sample, from sums of (x - shift) and (x - shift)^2 over `count`
// numbers. A single number has deviation 0.
FASTREG_HD void mean_and_deviation(double shift, double sum, double squares, double count, double out[2]) {
  const double mean = sum / count;
  const double variance = count > 1 ? (squares - sum * mean) / (count - 1) : squares * 0;
  out[0] = shift + mean;
  out[1] = std::sqrt(variance < 0 ? 0 : variance);
}

constexpr double kDeviationEpsilon = 1e-6;

// statistics: mean and deviation of fixed, mean and deviation of moving.
FASTREG_HD double shared_mean(const double* statistics) { return (statistics[0] + statistics[2]) / 2; }
FASTREG_HD double shared_deviation(const double* statistics) {
  return (statistics[1] + statistics[3]) / 2 + kDeviationEpsilon;
}

template <class A>
FASTREG_HD Normalization<A> normalization(const double* statistics) {
  const double mean = shared_mean(statistics);
  return {A(mean), A(mean - double(A(mean))), A(1 / shared_deviation(statistics))};
}

// dL/dx = gradient * dL/dx^ + constant + value * x^, with x^ the normalised x.
struct ThroughStatistics {
  double gradient, constant, value;
};

// sum: of dL/dx^ over both maps; products: of x^ dL/dx^ over both; map: 0 fixed, 1 moving. A deviation of 0
// has derivative 0.
FASTREG_HD ThroughStatistics through_statistics(const double* statistics, double sum, double products,
                                                double count, int map) {
  const double mean = statistics[2 * map], deviation = statistics[2 * map + 1];
  const double unit = shared_deviation(statistics);
  // dL/d deviation = -products / unit, and d deviation / dx = (x - mean) / ((count - 1) deviation), halved.
  const double slope = deviation == 0 ? 0 : -products / (2 * unit * (count - 1) * deviation);
  return {1 / unit, -sum / (2 * unit * count) + slope * (shared_mean(statistics) - mean), slope * unit};
}

}  // namespace fastreg
