// The few instructions that CUDA C++ has no name for: all of them in PTX since 7.4, on sm_80 and newer.
//
// Tests compile the kernels for a CPU: tests/graphs/engine/kernels/shim_cuda_cpu.h defines this file's guard and its own
// versions of what is in it.
#ifndef CORRAL_DEVICE_CUH
#define CORRAL_DEVICE_CUH

#include <cuda_fp16.h>

typedef unsigned int u32;

constexpr u32 kWholeWarp = 0xffffffffu;

// c += a * b for a 16x16 tile of fp16 (row-major), a 16x8 tile of fp16 (column-major) and a 16x8 tile of fp32. With
// g = lane / 4 and t = lane % 4, a lane holds (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a[0] = A[g][2t, 2t+1]   a[1] = A[g+8][2t, 2t+1]   a[2] = A[g][2t+8, 2t+9]   a[3] = A[g+8][2t+8, 2t+9]
//   b0 = B[2t, 2t+1][g]     b1 = B[2t+8, 2t+9][g]     c = C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1]
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// (bits & mask) | more, as one instruction (its truth table is 0xea); the compiler makes two of constants.
__device__ __forceinline__ u32 and_or(u32 bits, u32 mask, u32 more) {
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(bits), "r"(mask), "r"(more));
  return result;
}

// Start copying 16 bytes to shared memory, or zeros where `present` is false (nothing is read then).
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(global),
               "r"(present ? 16 : 0)
               : "memory");
}

// Close a group of copies; wait until at most `kPending` of this thread's groups are still under way.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes of weights: read once by this kernel, so they need no place in the L1 cache.
__device__ __forceinline__ uint4 load_streaming(const uint4* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

#endif
