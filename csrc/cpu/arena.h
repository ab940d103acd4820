// Scratch memory that a thread keeps from call to call, so that a call costs no page faults.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace geot::cpu::GEOT_ISA {

class Arena {
 public:
  enum Purpose { kThread, kCall };  // what one thread works in; what all threads of a call share

  explicit Arena(Purpose purpose) : kept_(kept(purpose)) { kept_.reset(); }
  ~Arena() {
    if (kept_.total() > kMostKept) kept_.release();
  }
  Arena(const Arena&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(kept_.take((count * sizeof(T) + kAlign - 1) / kAlign * kAlign));
  }
  template <class T>
  T* take_zeros(int64_t count) {
    T* p = take<T>(count);
    std::memset(static_cast<void*>(p), 0, count * sizeof(T));
    return p;
  }

 private:
  static constexpr std::size_t kAlign = 64, kMostKept = std::size_t(64) << 20;
  static constexpr int kMostChunks = 48;  // each at least twice the one before

  struct Kept {
    char* chunk[kMostChunks];
    std::size_t size[kMostChunks], used = 0;
    int count = 0;

    std::size_t total() const {
      std::size_t sum = 0;
      for (int i = 0; i < count; ++i) sum += size[i];
      return sum;
    }
    void* take(std::size_t bytes) {
      if (count == 0 || used + bytes > size[count - 1]) {
        std::size_t grown = count ? 2 * size[count - 1] : std::size_t(1) << 18;
        grow(grown > bytes ? grown : (bytes + kAlign - 1) / kAlign * kAlign);
      }
      void* p = chunk[count - 1] + used;
      used += bytes;
      return p;
    }
    void grow(std::size_t bytes) {
      void* p = count < kMostChunks ? std::aligned_alloc(kAlign, bytes) : nullptr;
      if (p == nullptr) throw std::bad_alloc();
      chunk[count] = static_cast<char*>(p);
      size[count++] = bytes;
      used = 0;
    }
    void release() {
      while (count > 0) std::free(chunk[--count]);
      used = 0;
    }
    void reset() {
      if (count > 1) {
        const std::size_t all = total();
        release();
        if (all <= kMostKept) grow(all);
      }
      used = 0;
    }
    ~Kept() { release(); }
  };

  static Kept& kept(Purpose purpose) {
    thread_local Kept memory[2];
    return memory[purpose];
  }

  Kept& kept_;
};

}  // namespace geot::cpu::GEOT_ISA
