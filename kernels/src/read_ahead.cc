#include "read_ahead.h"

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace corral {

void read_ahead(const Weights& weights, int64_t expert) {
  const Tile first = weights.tile(expert, 0), next = weights.tile(expert + 1, 0);
  read_ahead(first.codes, next.codes - first.codes);
  read_ahead(first.scales, (next.scales - first.scales) * int64_t(sizeof *first.scales));
  if (first.zeros) read_ahead(first.zeros, next.zeros - first.zeros);
}

#if defined(__linux__)

namespace {

// Less is read in one go by the first page that is touched.
constexpr int64_t kLeastBytes = 256 << 10;
// Of a longer request Linux reads only the beginning: as much as the device's read-ahead, by default this.
constexpr int64_t kRequestBytes = 128 << 10;

// One call for all pages: a call takes longer than looking at a thousand pages.
bool is_in_memory(uintptr_t begin, int64_t bytes, int64_t page) {
  std::vector<unsigned char> states((bytes + page - 1) / page);
  return !mincore(reinterpret_cast<void*>(begin), size_t(bytes), states.data()) &&
         std::all_of(states.begin(), states.end(), [](unsigned char state) { return state & 1; });
}

}  // namespace

void read_ahead(const void* begin, int64_t bytes) {
  static const int64_t page = sysconf(_SC_PAGESIZE);
  if (bytes < kLeastBytes || page <= 0) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / page * page;
  const int64_t length = int64_t(reinterpret_cast<uintptr_t>(begin) + bytes - first);
  if (is_in_memory(first, length, page)) return;
  for (int64_t done = 0; done < length; done += kRequestBytes) {
    madvise(reinterpret_cast<void*>(first + done), size_t(std::min(kRequestBytes, length - done)), MADV_WILLNEED);
  }
}

#else

void read_ahead(const void*, int64_t) {}

#endif

}  // namespace corral
