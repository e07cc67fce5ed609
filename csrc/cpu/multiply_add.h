// a * b + c in one rounding wherever the instruction set has that: left to the compiler, it would
// depend on the surrounding code, and the same sum would come out differently in two places.

namespace d2det::D2DET_ISA {

#if D2DET_VECTOR_BYTES == 64
inline __attribute__((always_inline)) Vec<float>::type multiply_add(Vec<float>::type a,
                                                                    Vec<float>::type b,
                                                                    Vec<float>::type c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline __attribute__((always_inline)) Vec<double>::type multiply_add(Vec<double>::type a,
                                                                     Vec<double>::type b,
                                                                     Vec<double>::type c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif D2DET_VECTOR_BYTES == 32
inline __attribute__((always_inline)) Vec<float>::type multiply_add(Vec<float>::type a,
                                                                    Vec<float>::type b,
                                                                    Vec<float>::type c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline __attribute__((always_inline)) Vec<double>::type multiply_add(Vec<double>::type a,
                                                                     Vec<double>::type b,
                                                                     Vec<double>::type c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
inline __attribute__((always_inline)) Vec<float>::type multiply_add(Vec<float>::type a,
                                                                    Vec<float>::type b,
                                                                    Vec<float>::type c) {
  return a * b + c;
}
inline __attribute__((always_inline)) Vec<double>::type multiply_add(Vec<double>::type a,
                                                                     Vec<double>::type b,
                                                                     Vec<double>::type c) {
  return a * b + c;
}
#endif

#if D2DET_VECTOR_BYTES > 16
inline __attribute__((always_inline)) float multiply_add(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline __attribute__((always_inline)) double multiply_add(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
#else
inline __attribute__((always_inline)) float multiply_add(float a, float b, float c) {
  return a * b + c;
}
inline __attribute__((always_inline)) double multiply_add(double a, double b, double c) {
  return a * b + c;
}
#endif

}  // namespace d2det::D2DET_ISA
