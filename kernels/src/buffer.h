// Scratch memory of one call, on cache lines, not zeroed; given back when the call is over. Throws std::bad_alloc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

namespace corral {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    constexpr size_t line = 64;
    if (count < 0 || size_t(count) > (std::numeric_limits<size_t>::max() - line) / sizeof(T)) throw std::bad_alloc();
    const size_t bytes = (size_t(count) * sizeof(T) / line + 1) * line;
    data_ = static_cast<T*>(std::aligned_alloc(line, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace corral
