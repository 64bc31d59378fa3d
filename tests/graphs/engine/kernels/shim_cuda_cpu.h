// CUDA C++ on a CPU: every thread of a block is a fiber, and a barrier is where fibers take turns.
//
// Blocks run one after the other, so `__shared__` is `static`. Between two barriers a fiber runs undisturbed, and which
// fiber goes next is drawn from a seed: a kernel that lacks a barrier gives other bytes for another seed. A copy to
// shared memory happens when it is waited for, and until then its destination holds NaN: a kernel that waits too little
// sees it. Fibers that wait for each other forever end the program with a message.
//
// Not shown here: speed, bank conflicts, registers, the rounding inside a tensor core (sums here are plain fp32), and
// races between blocks (ours share nothing).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include <vector_functions.h>
#include <vector_types.h>

#include <cuda_fp16.h>

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t turn = 0;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool started = false, done = false;
  const Barrier* waits_for = nullptr;
  uint64_t waits_turn = 0;
  uint64_t exchanges = 0;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first; the last is still open
};

// What the lanes of a warp show each other; two of them in turn, so that one barrier an exchange is enough.
struct Exchange {
  uint32_t word[kWarp][6];
};

static std::vector<Fiber> fibers;
static std::vector<Barrier> warp_barriers;
static std::vector<Exchange> exchanges;
static Barrier block_barrier;
static jmp_buf scheduler;
static unsigned current;
static std::function<void()> body;
static uint64_t random_state;

inline uint32_t random_below(uint32_t bound) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t((random_state >> 33) % bound);
}

__attribute__((noinline)) inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.turn;
    return;
  }
  Fiber& me = fibers[current];
  me.waits_for = &barrier;
  me.waits_turn = barrier.turn;
  if (_setjmp(me.here) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(unsigned index) {
  current = index;
  threadIdx = dim3(index);
  Fiber& fiber = fibers[index];
  fiber.waits_for = nullptr;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_block(unsigned threads) {
  block_barrier = Barrier{threads};
  warp_barriers.assign(threads / kWarp, Barrier{kWarp});
  exchanges.assign(2 * threads / kWarp, Exchange{});
  fibers.resize(threads);
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.exchanges = 0;
    fiber.groups.assign(1, {});
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
    order[i] = i;
  }
  for (unsigned left = threads; left > 0;) {
    for (unsigned i = threads - 1; i > 0; --i) std::swap(order[i], order[random_below(i + 1)]);
    bool moved = false;
    for (unsigned index : order) {
      Fiber& fiber = fibers[index];
      if (fiber.done || (fiber.waits_for && fiber.waits_for->turn == fiber.waits_turn)) continue;
      resume(index);
      moved = true;
      left -= fibers[index].done;
    }
    if (!moved) {
      std::fprintf(stderr, "%u threads of a block wait at a barrier that the others never reach\n", left);
      std::abort();
    }
  }
}

template <typename... Arguments, size_t... kIndex>
void launch(void (*kernel)(Arguments...), dim3 grid, dim3 block, void** arguments, std::index_sequence<kIndex...>) {
  gridDim = grid;
  blockDim = block;
  body = [=] { kernel(*static_cast<std::remove_reference_t<Arguments>*>(arguments[kIndex])...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(block.x);
      }
}

// As cuLaunchKernel takes them: `arguments[i]` points at the i-th argument.
template <typename... Arguments>
void launch(void (*kernel)(Arguments...), dim3 grid, dim3 block, void** arguments, unsigned seed) {
  random_state = seed;
  launch(kernel, grid, block, arguments, std::index_sequence_for<Arguments...>{});
}

// Show this lane's words to its warp and see everybody's.
inline const Exchange& exchange(std::initializer_list<uint32_t> words) {
  const unsigned warp = current / kWarp, lane = current % kWarp;
  Exchange& shown = exchanges[2 * warp + fibers[current].exchanges++ % 2];
  std::copy(words.begin(), words.end(), shown.word[lane]);
  wait(warp_barriers[warp]);
  return shown;
}

inline float half_at(uint32_t pair, int i) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (unsigned bits = 0; bits < values.size(); ++bits) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(bits);
      values[bits] = __half2float(__half(raw));
    }
    return values;
  }();
  return table[(pair >> (16 * i)) & 0xffff];
}

}  // namespace cpu

inline void __syncthreads() { cpu::wait(cpu::block_barrier); }
inline void __syncwarp(unsigned = ~0u) { cpu::wait(cpu::warp_barriers[cpu::current / cpu::kWarp]); }

inline unsigned __ballot_sync(unsigned, int predicate) {
  const cpu::Exchange& seen = cpu::exchange({uint32_t(predicate != 0)});
  unsigned votes = 0;
  for (unsigned lane = 0; lane < cpu::kWarp; ++lane) votes |= seen.word[lane][0] << lane;
  return votes;
}
inline int __shfl_sync(unsigned, int value, int lane) { return int(cpu::exchange({uint32_t(value)}).word[lane][0]); }
inline int __shfl_up_sync(unsigned, int value, unsigned distance) {
  const unsigned lane = cpu::current % cpu::kWarp;
  const cpu::Exchange& seen = cpu::exchange({uint32_t(value)});
  return int(seen.word[lane < distance ? lane : lane - distance][0]);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// In place of device.cuh.
#define CORRAL_DEVICE_CUH
typedef unsigned int u32;
constexpr u32 kWholeWarp = 0xffffffffu;

inline void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const unsigned lane = cpu::current % cpu::kWarp, g = lane / 4, t = lane % 4;
  const cpu::Exchange& seen = cpu::exchange({a[0], a[1], a[2], a[3], b0, b1});
  // The element of row `row` (0 ... 15) and input k, from the lane and register that hold it.
  auto left = [&](unsigned row, unsigned k) {
    return cpu::half_at(seen.word[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
  };
  auto right = [&](unsigned k, unsigned column) {
    return cpu::half_at(seen.word[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
  };
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 16; ++k) c[i] += left(g + i / 2 * 8, k) * right(k, 2 * t + i % 2);
}

inline u32 and_or(u32 bits, u32 mask, u32 more) { return (bits & mask) | more; }

inline void copy_async(void* shared, const void* global, bool present) {
  std::memset(shared, 0xff, 16);
  cpu::fibers[cpu::current].groups.back().push_back({shared, present ? global : nullptr});
}
inline void copy_commit() { cpu::fibers[cpu::current].groups.emplace_back(); }

template <int kPending>
inline void copy_wait() {
  auto& groups = cpu::fibers[cpu::current].groups;
  while (groups.size() > kPending + 1) {
    for (const cpu::Copy& copy : groups.front()) {
      if (copy.from) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

inline uint4 load_streaming(const uint4* global) { return *global; }
