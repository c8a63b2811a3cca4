#pragma once
// CUDA under g++: what csrc/cuda/ uses of it, checked. Each thread of a block is a fiber; blocks run one
// after the other in shuffled order, and so do the threads of a block between two barriers. It fails, with
// the line, on
//   - a read or write of shared memory that no barrier orders with another thread's write (or read),
//   - a read of shared memory that nothing has written, and any access outside an array of it,
//   - a barrier or warp operation that not all its threads reach at the same line,
//   - vector accesses that are not aligned, blocks and shared memory beyond the limits,
//   - a read or write past the end of a tensor's memory (every tensor ends at a page that may not be
//   touched).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
using cudaStream_t = void*;

// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

using Where = std::source_location;

[[noreturn]] void fail(const std::string& what, Where where);

// Runs `thread` once per thread of the grid. Throws std::runtime_error on the first failure.
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);

// Byte offset of a static array in the block's shared memory; `id` tells the arrays of a kernel apart.
uint32_t static_array(const void* id, size_t bytes, Where where);
uint32_t dynamic_array();
uint32_t dynamic_bytes();

// The bytes, after the checks.
const void* read(int64_t offset, size_t bytes, int64_t begin, int64_t end, Where where);
void* write(int64_t offset, size_t bytes, int64_t begin, int64_t end, Where where);
void copy_begin(int64_t offset, const void* from, size_t bytes, int64_t begin, int64_t end, bool valid,
                Where where);
void copy_commit();
void copy_wait(int groups);

// Waits for all threads of the block; the sum of `value` over them.
int64_t barrier(int64_t value, Where where);
// Waits for the lanes of `mask`; `value` of lane `source`.
uint64_t exchange(unsigned mask, uint64_t value, int source, Where where);
// Waits for the lanes of `mask`; bit l is set where lane l gave true.
unsigned vote(unsigned mask, bool value, Where where);

// An index with the line it was written at.
struct Index {
  int64_t i;
  Where where;
  template <class I>
    requires std::is_integral_v<I>
  Index(I i, Where where = Where::current()) : i(int64_t(i)), where(where) {}
};

// What an access to shared memory gives: reading and writing are told apart.
template <class T>
class Element {
 public:
  Element(int64_t offset, int64_t begin, int64_t end, Where where)
      : offset_(offset), begin_(begin), end_(end), where_(where) {}
  operator T() const {
    T value;
    std::memcpy(&value, read(offset_, sizeof(T), begin_, end_, where_), sizeof(T));
    return value;
  }
  const Element& operator=(T value) const {
    std::memcpy(write(offset_, sizeof(T), begin_, end_, where_), &value, sizeof(T));
    return *this;
  }
  const Element& operator=(const Element& other) const { return *this = T(other); }
  Element(const Element&) = default;
  const Element& operator+=(T x) const { return *this = T(*this) + x; }
  const Element& operator-=(T x) const { return *this = T(*this) - x; }
  const Element& operator*=(T x) const { return *this = T(*this) * x; }

 private:
  int64_t offset_, begin_, end_;
  Where where_;
};

template <class T>
class SharedPointer {
  static_assert(sizeof(T) % 4 == 0, "shared memory is tracked in words of 4 bytes");

 public:
  SharedPointer() = default;
  SharedPointer(int64_t offset, int64_t begin, int64_t end) : offset_(offset), begin_(begin), end_(end) {}
  Element<T> operator[](Index i) const { return {offset_ + i.i * int64_t(sizeof(T)), begin_, end_, i.where}; }
  SharedPointer operator+(int64_t n) const { return {offset_ + n * int64_t(sizeof(T)), begin_, end_}; }
  SharedPointer operator-(int64_t n) const { return *this + -n; }
  SharedPointer& operator+=(int64_t n) { return *this = *this + n; }

  SharedPointer part(int64_t from, int64_t count, Where where) const {
    const int64_t begin = offset_ + from * int64_t(sizeof(T)), end = begin + count * int64_t(sizeof(T));
    if (begin < begin_ || end > end_) fail("a part of shared memory outside its array", where);
    return {begin, begin, end};
  }
  template <class U>
  SharedPointer<U> as() const {
    return {offset_, begin_, end_};
  }
  void copy(const T* from, bool valid, Where where) const {
    copy_begin(offset_, from, sizeof(T), begin_, end_, valid, where);
  }

 private:
  int64_t offset_ = 0, begin_ = 0, end_ = 0;
};

}  // namespace emulation

namespace fastreg {

template <class T>
using Shared = emulation::SharedPointer<T>;

#define FASTREG_SHARED(T, name, count)                                                                 \
  static const char name##_id = 0;                                                                     \
  const int64_t name##_at =                                                                            \
      emulation::static_array(&name##_id, sizeof(T) * size_t(count), std::source_location::current()); \
  ::fastreg::Shared<T> name(name##_at, name##_at, name##_at + int64_t(sizeof(T)) * int64_t(count))

#define FASTREG_DYNAMIC_SHARED(T, name)                                             \
  ::fastreg::Shared<T> name(emulation::dynamic_array(), emulation::dynamic_array(), \
                            emulation::dynamic_array() + emulation::dynamic_bytes())

template <class T>
Shared<T> part(Shared<T> memory, int64_t begin, int64_t count,
               emulation::Where where = emulation::Where::current()) {
  return memory.part(begin, count, where);
}
template <class U, class T>
Shared<U> shared_as(Shared<T> memory) {
  return memory.template as<U>();
}

template <class T>
void copy_async(Shared<T> to, const T* from, bool valid = true,
                emulation::Where where = emulation::Where::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  if (valid && reinterpret_cast<uintptr_t>(from) % sizeof(T))
    emulation::fail("a copy that is not aligned", where);
  to.copy(from, valid, where);
}
inline void copy_commit() { emulation::copy_commit(); }
template <int kGroups>
void copy_wait() {
  emulation::copy_wait(kGroups);
}

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};
template <int kCount, class T>
Pack<T, kCount> load_pack(const T* from, emulation::Where where = emulation::Where::current()) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pack<T, kCount>))
    emulation::fail("a load that is not aligned", where);
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}
template <int kCount, class T>
void store_pack(T* to, const Pack<T, kCount>& pack, emulation::Where where = emulation::Where::current()) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(pack)) emulation::fail("a store that is not aligned", where);
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
            const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulation::run(grid, block, shared, [&] { kernel(args...); });
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

}  // namespace fastreg

inline void __syncthreads(emulation::Where where = emulation::Where::current()) {
  emulation::barrier(0, where);
}
inline int __syncthreads_count(int value, emulation::Where where = emulation::Where::current()) {
  return int(emulation::barrier(value != 0, where));
}
inline int __syncthreads_or(int value, emulation::Where where = emulation::Where::current()) {
  return emulation::barrier(value != 0, where) > 0;
}
inline int __syncthreads_and(int value, emulation::Where where = emulation::Where::current()) {
  return emulation::barrier(value == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff, emulation::Where where = emulation::Where::current()) {
  emulation::vote(mask, true, where);
}
inline unsigned __ballot_sync(unsigned mask, int value,
                              emulation::Where where = emulation::Where::current()) {
  return emulation::vote(mask, value != 0, where);
}
inline int __any_sync(unsigned mask, int value, emulation::Where where = emulation::Where::current()) {
  return emulation::vote(mask, value != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int value, emulation::Where where = emulation::Where::current()) {
  return emulation::vote(mask, value != 0, where) == mask;
}

namespace emulation {
int lane();
template <class T>
T shuffle(unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulation

// Lanes that would read beyond their group of `width` read themselves.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32,
              emulation::Where where = emulation::Where::current()) {
  const int lane = emulation::lane(), first = lane / width * width;
  return emulation::shuffle(mask, value, first + (from % width + width) % width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   emulation::Where where = emulation::Where::current()) {
  const int lane = emulation::lane(), from = lane + int(by);
  return emulation::shuffle(mask, value, from / width == lane / width ? from : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                 emulation::Where where = emulation::Where::current()) {
  const int lane = emulation::lane(), from = lane - int(by);
  return emulation::shuffle(mask, value, from >= 0 && from / width == lane / width ? from : lane, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  emulation::Where where = emulation::Where::current()) {
  const int lane = emulation::lane(), from = lane ^ bits;
  return emulation::shuffle(mask, value, from / width == lane / width ? from : lane, where);
}

// One thread runs at a time: an atomic operation is the operation.
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  if (value > old) *at = value;
  return old;
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = old | value;
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline unsigned __float_as_uint(float x) { return unsigned(__float_as_int(x)); }
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(int(bits)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
