// Spanning tree: the labels that are best for all cells of a grid together, where neighbours are tied along a
// tree (fastreg/_tree.py). No gradient.
//
// A cell tells its parent what each of the parent's labels costs the branch below at best, and then hears the
// same of all the rest: two min-convolutions a cell, with the square of the difference of displacements. That
// is separable: along each axis min over j of in(j) + alpha (j - i + t)^2, for all i.
//
// Work: cells of one depth, shared out; a cell writes its own messages alone, and adds those of its children
// in their order, so that bits do not depend on the number of threads. Memory: the costs, the result, a
// message a cell. Bytes a cell: nine times its labels, of 13^3 80 KB, 3 us at 25 GB/s. Arithmetic of its two
// messages: 3 x 13^4 sums and as many minima each, in vectors along the last axis of whose 16 lanes 13 are
// labels: 4 x 6,600 operations, 3.3 us at two a cycle and 4 GHz. Four rows share what they load.
#include <cstdint>

#include "cpu/isa.h"

namespace fastreg {

// Axes of labels are (z, y, x); 2D: one label along z. Messages go along `order`, sorted by depth.
struct TreeArgs {
  const float *cost, *previous;     // (cells, labels); (cells, 3)
  float *belief, *message;          // (cells, labels): the result, at the end; what a cell told its parent
  const int64_t *order, *parent;    // (cells); parent of the root: -1
  const int64_t *first, *children;  // of cell c: children[first[c]], ..., children[first[c + 1] - 1]
  int64_t window[3];
  float alpha;
};

// Work units are places in `order`, of one depth. Collect: from the deepest on; spread: from the root on.
FASTREG_KERNEL(void, tree_collect, const TreeArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, tree_spread, const TreeArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/vector.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace fastreg::FASTREG_ISA {
namespace {

// Beyond what any label costs; it may be added to without overflow.
constexpr float kFar = std::numeric_limits<float>::max() / 4;

template <class V>
FASTREG_HD V least(V a, V b) {
  return a < b ? a : b;
}

// Rows of labels in whole vectors: lanes that are no labels cost kFar.
template <int kBytes>
class MinConvolution {
  using V = Vector<float, kBytes>;
  static constexpr int64_t kWidth = kBytes / 4;
  static constexpr int kTogether = 4;  // rows that share what they read

 public:
  explicit MinConvolution(const TreeArgs& a)
      : a_(a),
        n_(a.window),
        pitch_((n_[2] + kWidth - 1) / kWidth * kWidth),
        penalty_x_(n_[2] * pitch_),
        along_x_(n_[0] * n_[1] * pitch_),
        along_y_(along_x_.size()) {
    for (int k = 0; k < 2; ++k) penalty_[k].resize(2 * n_[k] - 1);
  }

  // out(i) = min over j of in(j) + alpha |j - i + t|^2, less the least of all.
  void run(const float* in, const float* t, float* out) {
    set_penalties(t);
    const int64_t rows = n_[0] * n_[1], plane = n_[1] * pitch_;
    in_groups(rows,
              [&](auto count, int64_t r) { x_rows<count>(in + r * n_[2], along_x_.data() + r * pitch_); });
    for (int64_t z = 0; z < n_[0]; ++z)
      convolve(along_x_.data() + z * plane, along_y_.data() + z * plane, n_[1], pitch_, pitch_, penalty_[1]);
    convolve(along_y_.data(), along_x_.data(), n_[0], plane, plane, penalty_[0]);
    V lowest = V{} + kFar;
    for (int64_t x = 0; x < int64_t(along_x_.size()); x += kWidth)
      lowest = least(lowest, get(along_x_.data() + x));
    float low = kFar;
    for (int64_t i = 0; i < kWidth; ++i) low = std::min(low, lowest[i]);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t x = 0; x < n_[2]; ++x) out[r * n_[2] + x] = along_x_[r * pitch_ + x] - low;
  }

 private:
  static V get(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void put(float* p, V v) { std::memcpy(p, &v, sizeof v); }

  // Calls body(constant, first) for groups of kTogether, and then one by one.
  template <class Body>
  static void in_groups(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kTogether <= n; i += kTogether) body(std::integral_constant<int, kTogether>(), i);
    for (; i < n; ++i) body(std::integral_constant<int, 1>(), i);
  }

  void set_penalties(const float* t) {
    const auto penalty = [&](int64_t steps, int k) {
      const float d = float(steps) + t[k];
      return a_.alpha * d * d;
    };
    for (int k = 0; k < 2; ++k)
      for (int64_t s = 0; s < 2 * n_[k] - 1; ++s) penalty_[k][s] = penalty(s - (n_[k] - 1), k);
    for (int64_t j = 0; j < n_[2]; ++j)
      for (int64_t i = 0; i < pitch_; ++i) penalty_x_[j * pitch_ + i] = i < n_[2] ? penalty(j - i, 2) : kFar;
  }

  template <int kCount>
  void x_rows(const float* in, float* out) {
    for (int64_t x = 0; x < pitch_; x += kWidth) {
      V low[kCount];
      for (V& v : low) v = V{} + kFar;
      for (int64_t j = 0; j < n_[2]; ++j) {
        const V w = get(penalty_x_.data() + j * pitch_ + x);
        for (int r = 0; r < kCount; ++r) low[r] = least(in[r * n_[2] + j] + w, low[r]);
      }
      for (int r = 0; r < kCount; ++r) put(out + r * pitch_ + x, low[r]);
    }
  }

  // Of n rows of `length`, `pitch` apart.
  void convolve(const float* in, float* out, int64_t n, int64_t length, int64_t pitch,
                const std::vector<float>& penalty) {
    in_groups(n, [&](auto count, int64_t i) {
      for (int64_t x = 0; x < length; x += kWidth) {
        V low[count];
        for (V& v : low) v = V{} + kFar;
        for (int64_t j = 0; j < n; ++j) {
          const V v = get(in + j * pitch + x);
          for (int r = 0; r < count; ++r) low[r] = least(v + penalty[j - (i + r) + n - 1], low[r]);
        }
        for (int r = 0; r < count; ++r) put(out + (i + r) * pitch + x, low[r]);
      }
    });
  }

  const TreeArgs& a_;
  const int64_t (&n_)[3];
  int64_t pitch_;
  std::vector<float> penalty_x_, along_x_, along_y_, penalty_[2];
};

int64_t labels(const TreeArgs& a) { return a.window[0] * a.window[1] * a.window[2]; }

// Of the displacement of `from` less that of `to`.
void difference(const TreeArgs& a, int64_t from, int64_t to, float (&t)[3]) {
  for (int k = 0; k < 3; ++k) t[k] = a.previous[3 * from + k] - a.previous[3 * to + k];
}

// The least becomes 0, so that sums stay small.
void lower(float* x, int64_t n) {
  float low = x[0];
  for (int64_t i = 0; i < n; ++i) low = least(x[i], low);
  for (int64_t i = 0; i < n; ++i) x[i] -= low;
}

template <int kBytes>
void collect(const TreeArgs& a, int64_t begin, int64_t end) {
  MinConvolution<kBytes> convolution(a);
  const int64_t n = labels(a);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t c = a.order[k];
    float* belief = a.belief + c * n;
    std::copy_n(a.cost + c * n, n, belief);
    for (int64_t i = a.first[c]; i < a.first[c + 1]; ++i) {
      const float* message = a.message + a.children[i] * n;
      for (int64_t l = 0; l < n; ++l) belief[l] += message[l];
    }
    if (a.parent[c] < 0) {
      lower(belief, n);
      continue;
    }
    float t[3];
    difference(a, c, a.parent[c], t);
    convolution.run(belief, t, a.message + c * n);
  }
}

template <int kBytes>
void spread(const TreeArgs& a, int64_t begin, int64_t end) {
  MinConvolution<kBytes> convolution(a);
  const int64_t n = labels(a);
  std::vector<float> rest(n);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t c = a.order[k], p = a.parent[c];
    float *belief = a.belief + c * n, *message = a.message + c * n;
    const float* of_parent = a.belief + p * n;
    for (int64_t l = 0; l < n; ++l) rest[l] = of_parent[l] - message[l];
    float t[3];
    difference(a, p, c, t);
    convolution.run(rest.data(), t, message);
    for (int64_t l = 0; l < n; ++l) belief[l] += message[l];
    lower(belief, n);
  }
}

// The narrowest vectors that take fewest to a row.
template <class Body>
void with_width(int64_t n, Body body) {
  if (kVectorBytes >= 64 && n > 8)
    body(std::integral_constant<int, 64>());
  else if (kVectorBytes >= 32 && n > 4)
    body(std::integral_constant<int, 32>());
  else
    body(std::integral_constant<int, 16>());
}

}  // namespace

void tree_collect(const TreeArgs& a, int64_t b, int64_t e) {
  with_width(a.window[2], [&](auto bytes) { collect<bytes>(a, b, e); });
}

void tree_spread(const TreeArgs& a, int64_t b, int64_t e) {
  with_width(a.window[2], [&](auto bytes) { spread<bytes>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "cpu/binding.h"

namespace fastreg {
namespace {

// The forest of one set a cell, as it is joined.
class Sets {
 public:
  explicit Sets(int64_t n) : parent_(n) { std::iota(parent_.begin(), parent_.end(), int64_t(0)); }
  int64_t of(int64_t c) {
    while (parent_[c] != c) c = parent_[c] = parent_[parent_[c]];
    return c;
  }
  bool join(int64_t a, int64_t b) {
    const int64_t x = of(a), y = of(b);
    parent_[std::max(x, y)] = std::min(x, y);
    return x != y;
  }

 private:
  std::vector<int64_t> parent_;
};

// Cells in the order in which a walk from `root` meets them, neighbours by their index.
void walk(const std::vector<uint8_t> (&linked)[3], const int64_t (&step)[3], int64_t root, int64_t* order,
          int64_t* parent) {
  int64_t known = 0;
  order[known++] = root, parent[root] = -1;
  for (int64_t at = 0; at < known; ++at) {
    const int64_t c = order[at];
    const auto meet = [&](int64_t other) {
      if (other != parent[c]) order[known++] = other, parent[other] = c;
    };
    for (int k = 0; k < 3; ++k)
      if (c >= step[k] && linked[k][c - step[k]]) meet(c - step[k]);
    for (int k = 2; k >= 0; --k)
      if (linked[k][c]) meet(c + step[k]);
  }
}

// Kruskal: links by weight, those of one weight by cell and axis. The root is the middle of the longest path,
// so that the tree is shallow: a level is what threads share.
std::tuple<at::Tensor, at::Tensor> spanning_tree(const at::Tensor& given) {
  const int64_t nd = given.dim();
  FASTREG_CHECK(nd == 2 || nd == 3, "spanning_tree", "values must have 2 or 3 axes");
  const at::Tensor values = given.to(at::kDouble).contiguous();
  const double* value = values.const_data_ptr<double>();
  const int64_t n = values.numel();
  int64_t size[3] = {1, 1, 1};
  for (int64_t k = 0; k < nd; ++k) size[k + 3 - nd] = values.size(k);
  const int64_t step[3] = {size[1] * size[2], size[2], 1};
  struct Link {
    double weight;
    int64_t cell;
    int axis;
  };
  std::vector<Link> links;
  for (int64_t c = 0; c < n; ++c)
    for (int k = 0; k < 3; ++k)
      if (c / step[k] % size[k] + 1 < size[k]) {
        const double weight = std::abs(value[c] - value[c + step[k]]);
        links.push_back({std::isnan(weight) ? std::numeric_limits<double>::infinity() : weight, c, k});
      }
  std::stable_sort(links.begin(), links.end(), [](auto& a, auto& b) { return a.weight < b.weight; });
  std::vector<uint8_t> linked[3];
  for (auto& of_axis : linked) of_axis.resize(n);
  Sets sets(n);
  for (const Link& link : links)
    linked[link.axis][link.cell] = sets.join(link.cell, link.cell + step[link.axis]);
  const auto whole = at::TensorOptions().dtype(at::kLong);
  at::Tensor order = at::empty({n}, whole), parent = at::empty({n}, whole);
  if (n == 0) return {order, parent};
  int64_t *o = order.mutable_data_ptr<int64_t>(), *p = parent.mutable_data_ptr<int64_t>();
  walk(linked, step, 0, o, p);
  walk(linked, step, o[n - 1], o, p);
  int64_t length = 0, root = o[n - 1];
  for (int64_t c = root; p[c] >= 0; c = p[c]) ++length;
  for (int64_t k = 0; k < length / 2; ++k) root = p[root];
  walk(linked, step, root, o, p);
  return {order, parent};
}

// Places of `order` by depth, and where each depth begins.
struct Levels {
  std::vector<int64_t> order, begin;

  Levels(const char* op, const int64_t* given, const int64_t* parent, int64_t n) : order(n) {
    std::vector<int64_t> depth(n, -1);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t c = given[k];
      FASTREG_CHECK(c >= 0 && c < n && depth[c] < 0, op, "order must name each cell once");
      const int64_t p = parent[c];
      FASTREG_CHECK(k == 0 ? p == -1 : p >= 0 && p < n && depth[p] >= 0, op,
                    "order must begin with the root, of parent -1, and name a cell after its parent");
      depth[c] = k == 0 ? 0 : depth[p] + 1;
      if (int64_t(begin.size()) <= depth[c] + 1) begin.resize(depth[c] + 2);
      ++begin[depth[c] + 1];
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    auto next = begin;
    for (int64_t k = 0; k < n; ++k) order[next[depth[given[k]]]++] = given[k];
  }
};

at::Tensor min_marginals(const at::Tensor& given, const at::Tensor& previous_, const at::Tensor& order_,
                         const at::Tensor& parent_, at::IntArrayRef radius, double alpha) {
  const char* op = "min_marginals";
  const int64_t nd = radius.size(), n = given.size(0);
  FASTREG_CHECK(nd == 2 || nd == 3, op, "radius must have 2 or 3 numbers");
  TreeArgs a{};
  for (int64_t k = 0; k < 3; ++k) {
    const int64_t r = k < 3 - nd ? 0 : radius[k - (3 - nd)];
    FASTREG_CHECK(r >= 0 && r < (1 << 15), op, "radius must be in [0, 2^15)");
    a.window[k] = 2 * r + 1;
  }
  FASTREG_CHECK(given.dim() == 2 && given.size(1) == a.window[0] * a.window[1] * a.window[2], op,
                "cost must have shape (cells, prod(2 radius + 1))");
  FASTREG_CHECK(previous_.sizes() == at::IntArrayRef({n, nd}), op, "previous must have shape (cells, nd)");
  FASTREG_CHECK(order_.sizes() == at::IntArrayRef({n}) && parent_.sizes() == at::IntArrayRef({n}), op,
                "order and parent must have shape (cells,)");
  const at::Tensor cost = given.to(at::kFloat).contiguous(),
                   previous = at::constant_pad_nd(previous_.to(at::kFloat), {3 - nd, 0}).contiguous(),
                   order = order_.to(at::kLong).contiguous(), parent = parent_.to(at::kLong).contiguous();
  at::Tensor belief = at::empty_like(cost);
  if (n == 0) return belief;
  at::Tensor message = at::empty_like(cost);
  const Levels levels(op, order.const_data_ptr<int64_t>(), parent.const_data_ptr<int64_t>(), n);
  a.cost = cost.const_data_ptr<float>(), a.previous = previous.const_data_ptr<float>();
  a.belief = belief.mutable_data_ptr<float>(), a.message = message.mutable_data_ptr<float>();
  a.order = levels.order.data(), a.parent = parent.const_data_ptr<int64_t>();
  a.alpha = float(alpha);
  std::vector<int64_t> first(n + 1), children(n);
  for (int64_t c = 0; c < n; ++c)
    if (a.parent[c] >= 0) ++first[a.parent[c] + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  auto next = first;
  for (const int64_t c : levels.order)
    if (a.parent[c] >= 0) children[next[a.parent[c]]++] = c;
  a.first = first.data(), a.children = children.data();
  const auto at_depth = [&](int64_t d, auto kernel) {
    at::parallel_for(levels.begin[d], levels.begin[d + 1], 2,
                     [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  };
  const int64_t depths = levels.begin.size() - 1;
  for (int64_t d = depths - 1; d >= 0; --d) at_depth(d, FASTREG_PICK(tree_collect));
  for (int64_t d = 1; d < depths; ++d) at_depth(d, FASTREG_PICK(tree_spread));
  return belief;
}

// Not of the ops that have gradients and GPUs.
FASTREG_LIBRARY_IMPL(fastreg_tree, m) {
  m.impl("spanning_tree", spanning_tree);
  m.impl("min_marginals", min_marginals);
}

}  // namespace
}  // namespace fastreg

#endif
