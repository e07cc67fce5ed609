// Atomic operations. Fibers give way at barriers only, so a plain read and write is atomic.

#pragma once

#include "builtins.h"

namespace emu {
template <typename T, typename Change>
T exchange(T* address, Change change) {
  const T old = *address;
  *address = change(old);
  return old;
}
}  // namespace emu

template <typename T>
  requires std::is_arithmetic_v<T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emu::exchange(address, [=](T old) { return static_cast<T>(old + value); });
}
inline float2 atomicAdd(float2* address, float2 value) {
  return emu::exchange(address, [=](float2 o) { return float2{o.x + value.x, o.y + value.y}; });
}
inline float4 atomicAdd(float4* address, float4 value) {
  return emu::exchange(address, [=](float4 o) {
    return float4{o.x + value.x, o.y + value.y, o.z + value.z, o.w + value.w};
  });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emu::exchange(address, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emu::exchange(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return emu::exchange(address, [=](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return emu::exchange(address, [=](T old) { return static_cast<T>(old & value); });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emu::exchange(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emu::exchange(address, [=](T old) { return old == expected ? value : old; });
}
