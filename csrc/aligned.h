// Memory on a 64-byte boundary, as the vector kernels want it.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace pkt {

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

template <class T>
struct Aligned {
  int64_t rows, width;  // row-major
  std::unique_ptr<T[], AlignedDelete> storage;

  Aligned() : rows(0), width(0) {}
  // Zeroed, unless all of it will be written before it is read.
  Aligned(int64_t rows, int64_t width, bool zeroed = true)
      : rows(rows),
        width(width),
        storage(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(rows * width), std::align_val_t{64}))) {
    if (zeroed) clear();
  }
  T* row(int64_t i) const { return storage.get() + i * width; }
  T& operator()(int64_t i, int64_t j) const { return storage[i * width + j]; }
  void clear() const { std::memset(storage.get(), 0, sizeof(T) * static_cast<size_t>(rows * width)); }
};

}  // namespace pkt
