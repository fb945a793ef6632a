// Which part of a page-locked buffer the next upload may write, while copies out of it wait on a stream.
//
// Plain arithmetic: who owns the buffer puts the copies on the stream and waits for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace edgeprune {

// Hands out a buffer from its beginning to its end, and again from its beginning when all copies are done. Not for several
// threads at once.
class UploadStaging {
 public:
  explicit UploadStaging(size_t bytes) : bytes_(bytes) {}

  size_t bytes() const { return bytes_; }

  // The offset where so many bytes may be written; nothing: there is no room before the stream was waited for.
  std::optional<size_t> place(size_t bytes) {
    if (bytes > bytes_ - used_) return std::nullopt;
    const size_t offset = used_;
    used_ += bytes;
    ++placed_;
    return offset;
  }

  // To be taken before a wait for the stream, when every copy that has a place is on it.
  uint64_t mark() const { return placed_; }

  // The stream was waited for: all is free again, unless something was placed since the mark.
  void release(uint64_t mark) {
    if (mark == placed_) used_ = 0;
  }

 private:
  size_t bytes_;
  size_t used_ = 0;
  uint64_t placed_ = 0;
};

}  // namespace edgeprune
