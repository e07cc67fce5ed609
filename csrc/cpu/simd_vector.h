// The vector types of one instruction set; included by isa_*.cpp behind the target pragma.

namespace d2det::D2DET_ISA {

// Vec<float>::type holds Vec<float>::kSize floats; +, -, *, / and comparisons work elementwise,
// also with a scalar, and a * b + c becomes one instruction where there is one.
template <typename T>
struct Vec {
  typedef T type __attribute__((vector_size(D2DET_VECTOR_BYTES)));
  // For memory: no alignment, and may alias anything.
  typedef T stored __attribute__((vector_size(D2DET_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t kSize = D2DET_VECTOR_BYTES / sizeof(T);
};

template <typename T>
inline __attribute__((always_inline)) typename Vec<T>::type load(const T* from) {
  return *reinterpret_cast<const typename Vec<T>::stored*>(from);
}

template <typename T>
inline __attribute__((always_inline)) void store(T* to, typename Vec<T>::type value) {
  *reinterpret_cast<typename Vec<T>::stored*>(to) = value;
}

template <typename T>
inline __attribute__((always_inline)) typename Vec<T>::type splat(T value) {
  return value - typename Vec<T>::type{};  // -0.0 stays -0.0
}

}  // namespace d2det::D2DET_ISA
