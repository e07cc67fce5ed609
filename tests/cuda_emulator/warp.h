// Warp collectives, all of them made from one exchange of values.

#pragma once

#include <array>
#include <type_traits>

#include "scheduler.h"

namespace emu {

// What every lane of `mask` gave, by lane; 0 for others. All of the lanes in `mask`, the calling
// one among them, must get here. mma.sync and ldmatrix are emulated with it.
template <typename T>
std::array<T, 32> warp_exchange(const T& value, uint32_t mask = 0xffffffffu,
                                Site site = Site::here()) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::array<T, 32> results{};
  wait_for_warp({mask, &value, results.data(), sizeof(T)}, site);
  return results;
}

// The value of lane `source`, or the own one if that lies outside of the own segment of `width`.
template <typename T>
T shuffle(uint32_t mask, T value, int source, bool inside, Site site) {
  const std::array<T, 32> values = warp_exchange(value, mask, site);
  if (!inside) return value;
  if (!(mask >> source & 1u)) fail("shuffle from a lane that is not in the mask", site);
  return values[source];
}

}  // namespace emu

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              emu::Site site = emu::Site::here()) {
  const int lane = static_cast<int>(emu::lane());
  return emu::shuffle(mask, value, (lane & ~(width - 1)) + (source & (width - 1)), true, site);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 emu::Site site = emu::Site::here()) {
  const int lane = static_cast<int>(emu::lane());
  const int source = lane - static_cast<int>(delta);
  return emu::shuffle(mask, value, source, source >= (lane & ~(width - 1)), site);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   emu::Site site = emu::Site::here()) {
  const int lane = static_cast<int>(emu::lane());
  const int source = lane + static_cast<int>(delta);
  return emu::shuffle(mask, value, source, source < (lane & ~(width - 1)) + width, site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32,
                  emu::Site site = emu::Site::here()) {
  const int lane = static_cast<int>(emu::lane());
  const int source = lane ^ lanes;
  return emu::shuffle(mask, value, source, source < (lane & ~(width - 1)) + width, site);
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, emu::Site site = emu::Site::here()) {
  emu::warp_exchange(char(0), mask, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, emu::Site site = emu::Site::here()) {
  const auto values = emu::warp_exchange(predicate != 0, mask, site);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<uint32_t>(values[i]) << i;
  return result;
}
inline int __any_sync(uint32_t mask, int predicate, emu::Site site = emu::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, emu::Site site = emu::Site::here()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value, emu::Site site = emu::Site::here()) {
  const auto values = emu::warp_exchange(value, mask, site);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= ((mask >> i & 1u) && values[i] == value ? 1u : 0u) << i;
  return result;
}

namespace emu {
template <typename T, typename Combine>
T reduce(uint32_t mask, T value, Site site, Combine combine) {
  const auto values = warp_exchange(value, mask, site);
  T result = value;
  bool first = true;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1u)) continue;
    result = first ? values[i] : combine(result, values[i]);
    first = false;
  }
  return result;
}
}  // namespace emu

template <typename T>
T __reduce_add_sync(uint32_t mask, T value, emu::Site site = emu::Site::here()) {
  return emu::reduce(mask, value, site, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value, emu::Site site = emu::Site::here()) {
  return emu::reduce(mask, value, site, [](T a, T b) { return a < b ? b : a; });
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value, emu::Site site = emu::Site::here()) {
  return emu::reduce(mask, value, site, [](T a, T b) { return b < a ? b : a; });
}
