// Sums that do not depend on the order of their terms: numbers are added as 64-bit integers, in
// units of a power of two that a bound on the sum allows. The bound is found on the device, so that
// the host never waits.
//
//   1. zeroed Magnitudes; D2DET_LAUNCH((measure_magnitude<T>), ...) for each tensor in the bound
//   2. in the kernels: FixedPoint scale(bound), with a bound on the sum of |terms|;
//      scale.add(address, value), for finite values
//   3. scale.value(sum) to read it
//
// A term that is not finite cannot be added. Whoever adds calls poison(address) for it in a second
// kernel, after all others have added, which leaves kPoison there; value() makes a NaN of it. The
// second kernel may return at once where Magnitude::not_finite is 0.

#pragma once

#include "device.cuh"

namespace d2det {

constexpr unsigned long long kPoison = 0x8000000000000000ull;

// The largest |value| that is finite, by its bits as a double (they are ordered as the numbers
// are), and whether there are values that are not finite. An int64 tensor of two zeros.
struct Magnitude {
  unsigned long long largest_bits;
  unsigned long long not_finite;

  __device__ __forceinline__ double largest() const {
    return __longlong_as_double(static_cast<long long>(largest_bits));
  }
};

// Any block size that is a multiple of 32; any grid. Works on any dense tensor.
template <typename T>
__global__ void measure_magnitude(const T* values, int64_t count, Magnitude* magnitude) {
  double largest = 0;
  bool finite = true;
  D2DET_GRID_STRIDE(i, count) {
    const double value = fabs(static_cast<double>(to_float(values[i])));
    const bool usable = value <= 1.7976931348623157e308;  // NaN fails
    finite = finite && usable;
    if (usable && value > largest) largest = value;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, lanes));
  }
  const bool all_finite = __all_sync(kFullWarp, finite);
  if (threadIdx.x % 32 != 0) return;
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(largest));
  if (bits != 0) atomicMax(&magnitude->largest_bits, bits);
  if (!all_finite) atomicMax(&magnitude->not_finite, 1ull);
}

class FixedPoint {
 public:
  // `bound` is at least the sum of the |terms| of any one sum; 0 if all terms are 0. Two bits are
  // left for the rounding of the terms and the sign.
  __device__ __forceinline__ explicit FixedPoint(double bound) {
    int exponent = 0;
    frexp(fmin(bound, 1.7976931348623157e308), &exponent);  // bound < 2^exponent
    const int shift = 61 - exponent;
    // 2^shift as a product, either of which may be beyond a double's range by itself.
    up_ = ldexp(1.0, shift / 2);
    up_again_ = ldexp(1.0, shift - shift / 2);
  }

  __device__ __forceinline__ long long units(double value) const {
    return __double2ll_rn(value * up_ * up_again_);
  }

  __device__ __forceinline__ void add(unsigned long long* sum, double value) const {
    const long long amount = units(value);
    if (amount != 0) atomicAdd(sum, static_cast<unsigned long long>(amount));
  }

  __device__ __forceinline__ static void poison(unsigned long long* sum) {
    atomicExch(sum, kPoison);
  }

  __device__ __forceinline__ double value(unsigned long long sum) const {
    if (sum == kPoison) return __longlong_as_double(0x7ff8000000000000ll);
    return static_cast<double>(static_cast<long long>(sum)) / up_ / up_again_;
  }

 private:
  double up_, up_again_;
};

}  // namespace d2det
