#pragma once
// Weights of a window along one axis (docs/formulas.md: LCC), on the host.
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastreg {

enum class Window : int { box, gaussian, triangular };

// tap[i] weighs the two samples i voxels from the centre, tail[i] is the weight of all samples of one side
// from the i-th on, total that of the axis.
struct LccTapList {
  std::vector<double> tap, tail;
  double total = 0.0;
};

// Less the taps that are 0 and, but for what they weigh, those from the `longest`-th on.
inline LccTapList lcc_taps(Window kind, int64_t window, double sigma, int64_t longest) {
  const int64_t half = (window + 1) / 2, f = half - (half % 2 == 0);
  LccTapList t;
  double beyond = 0.0;
  if (kind == Window::box) {
    t.tap.assign(half < longest ? half : longest, 1.0);
    beyond = double(half) - double(t.tap.size());
  } else {
    const int64_t length = kind == Window::gaussian ? half : f;
    for (int64_t x = 0; x < length; ++x) {
      const double weight = kind == Window::gaussian ? std::exp(-0.5 * std::pow(double(x) / sigma, 2))
                                                     : double(f - x) / (double(f) * double(f));
      if (!(weight > 0.0)) break;
      if (x < longest)
        t.tap.push_back(weight);
      else
        beyond += weight;
    }
  }
  t.tail.assign(t.tap.size() + 1, beyond);
  for (int64_t x = int64_t(t.tap.size()) - 1; x >= 0; --x) t.tail[x] = t.tail[x + 1] + t.tap[x];
  t.total = t.tap[0] + 2.0 * t.tail[1];
  return t;
}

}  // namespace fastreg
