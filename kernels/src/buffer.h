// Scratch memory of one call, on cache lines, not zeroed; given back when the call is over. Throws std::bad_alloc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

namespace corral {

// What each thread keeps for its calls: asking the system for a few kilobytes takes longer than a small model's product.
// It fills up until every buffer on it has been given back.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }
  ~Scratch() { std::free(memory_); }

  // Null where there is no room.
  void* take(size_t bytes) {
    if (!memory_) memory_ = static_cast<char*>(std::aligned_alloc(kLine, kBytes));
    if (!memory_ || bytes > kBytes - used_) return nullptr;
    void* const taken = memory_ + used_;
    used_ += bytes;
    buffers_++;
    return taken;
  }

  void give_back() {
    if (!--buffers_) used_ = 0;
  }

  static constexpr size_t kLine = 64;

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kBytes = 0;  // so that each buffer has ends that are watched
#else
  static constexpr size_t kBytes = 256 << 10;
#endif

  char* memory_ = nullptr;
  size_t used_ = 0;
  int64_t buffers_ = 0;
};

// Belongs to the thread that made it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    constexpr size_t line = Scratch::kLine;
    if (count < 0 || size_t(count) > (std::numeric_limits<size_t>::max() - line) / sizeof(T)) throw std::bad_alloc();
    const size_t bytes = (size_t(count) * sizeof(T) / line + 1) * line;
    data_ = static_cast<T*>(Scratch::of_this_thread().take(bytes));
    kept_ = data_;
    if (!data_) data_ = static_cast<T*>(std::aligned_alloc(line, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { kept_ ? Scratch::of_this_thread().give_back() : std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
  bool kept_;  // the thread keeps it
};

}  // namespace corral
