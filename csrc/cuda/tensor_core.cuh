// Warp-wide matrix instructions and asynchronous copies of Ampere and later GPUs, each with its
// emulation, so that everything above this file is the same code on a GPU and in the emulator.

#pragma once

#include <cstdint>
#include <cstring>

#include "device.cuh"

#if defined(D2DET_EMULATE_CUDA)
#include <vector>
#endif

namespace d2det {

// float32 values of which the tensor cores use 10 bits of the mantissa.
struct Tf32 {
  float value;
};

// Fragments of one mma.sync: A is 16 rows, B is 8 columns, and both are 32 bytes deep (16 values of
// 16 bits, or 8 of 32). Lane l holds of the accumulators: rows l / 4 and l / 4 + 8, columns
// 2 * (l % 4) and the next.
struct FragmentA {
  uint32_t word[4];
};
struct FragmentB {
  uint32_t word[2];
};

#if !defined(D2DET_EMULATE_CUDA)

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, of 8 x 8 matrices of 16 bits, each transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

#define D2DET_MMA(shape_and_types)                                                               \
  asm volatile("mma.sync.aligned." shape_and_types                                               \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                          \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), \
                 "r"(b.word[1]))

__device__ __forceinline__ void matrix_multiply(float (&sum)[4], FragmentA a, FragmentB b, Half) {
  D2DET_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
__device__ __forceinline__ void matrix_multiply(float (&sum)[4], FragmentA a, FragmentB b,
                                                BFloat16) {
  D2DET_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
__device__ __forceinline__ void matrix_multiply(float (&sum)[4], FragmentA a, FragmentB b, Tf32) {
  D2DET_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef D2DET_MMA

// Copies 16 bytes from global to shared memory, past the registers; zeros where `valid` is false
// (the source is not read then). Complete after commit_copies and wait_for_copies, for the calling
// thread; for others after a barrier as well.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kStillRunning>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kStillRunning) : "memory");
}

// The same value, of which the compiler forgets where it came from: what is computed from it is
// computed where it is used, and not kept in registers from outside of a loop.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ float round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, Half) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, BFloat16) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

#else  // the emulator: warps exchange what their lanes hold

template <bool kTransposed>
inline void emulate_load_matrices(uint32_t (&out)[4], const void* row) {
  const auto rows = emu::warp_exchange(row);
  const unsigned lane = emu::lane();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const auto at = [&](unsigned r, unsigned c) {  // one value of 16 bits
      uint16_t value;
      std::memcpy(&value, static_cast<const char*>(rows[8 * matrix + r]) + 2 * c, 2);
      return static_cast<uint32_t>(value);
    };
    const unsigned first = lane / 4, second = 2 * (lane % 4);
    out[matrix] = kTransposed ? at(second, first) | at(second + 1, first) << 16
                              : at(first, second) | at(first, second + 1) << 16;
  }
  __syncwarp();  // nobody overwrites the matrices before all have read them
}
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  emulate_load_matrices<false>(out, row);
}
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  emulate_load_matrices<true>(out, row);
}

inline float element(uint32_t word, int which, Half) {
  return Half(static_cast<uint16_t>(word >> 16 * which), Half::from_bits());
}
inline float element(uint32_t word, int which, BFloat16) {
  return BFloat16(static_cast<uint16_t>(word >> 16 * which), BFloat16::from_bits());
}
inline float element(uint32_t word, int, Tf32) { return __uint_as_float(word & 0xffffe000u); }

template <typename Element>
inline void matrix_multiply(float (&sum)[4], FragmentA a, FragmentB b, Element tag) {
  constexpr int kPerWord = sizeof(Element) == 2 ? 2 : 1;
  const auto all_a = emu::warp_exchange(a);
  const auto all_b = emu::warp_exchange(b);
  const unsigned group = emu::lane() / 4, place = emu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const unsigned column = 2 * place + i % 2;
    float total = 0;
    for (int half = 0; half < 2; ++half) {
      for (unsigned k = 0; k < 4; ++k) {
        const uint32_t word_a = all_a[4 * group + k].word[2 * half + i / 2];
        const uint32_t word_b = all_b[4 * column + k].word[half];
        for (int e = 0; e < kPerWord; ++e) {
          total += element(word_a, e, tag) * element(word_b, e, tag);
        }
      }
    }
    sum[i] += total;
  }
}

// Copies happen when they are waited for, not before: a missing wait shows.
struct PendingCopy {
  void* to;
  const void* from;
  bool valid;
};
inline std::vector<std::vector<PendingCopy> >& pending_copies() {
  static std::vector<std::vector<PendingCopy> > groups[1024];
  auto& own = groups[threadIdx.x];
  if (own.empty()) own.emplace_back();
  return own;
}
inline void copy_async(void* shared, const void* global, bool valid) {
  pending_copies().back().push_back({shared, global, valid});
}
inline void commit_copies() { pending_copies().emplace_back(); }
template <int kStillRunning>
inline void wait_for_copies() {
  auto& groups = pending_copies();
  while (groups.size() > kStillRunning + 1) {
    for (const PendingCopy& copy : groups.front()) {
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      if (!copy.valid) std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

inline int opaque(int value) { return value; }

inline float round_to_tf32(float value) {  // to nearest, ties away from zero
  const uint32_t bits = __float_as_uint(value);
  return value - value == 0 ? __uint_as_float((bits + 0x1000u) & 0xffffe000u) : value;
}

template <typename Element>
inline uint32_t pack_pair(float low, float high, Element) {
  return Element(low).x | static_cast<uint32_t>(Element(high).x) << 16;
}

#endif

__device__ __forceinline__ void unpack_pair(uint32_t word, float& low, float& high, BFloat16) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_pair(uint32_t word, float& low, float& high, Half) {
  low = static_cast<float>(Half(static_cast<uint16_t>(word), Half::from_bits()));
  high = static_cast<float>(Half(static_cast<uint16_t>(word >> 16), Half::from_bits()));
}

}  // namespace d2det
