// What soft_nms.cpp asks of its kernel.

#pragma once

#include "../soft_nms.h"
#include "isa.h"

namespace d2det {

// The boxes of one class in rising order of `index`, each field an array with room for whole
// vectors of any instruction set (kNmsRoom). A box that has fallen away has a score of -1.
template <typename T>
struct NmsBoxes {
  T *x1, *y1, *x2, *y2, *area, *score;
  int64_t* index;
  int64_t count;
};

constexpr int64_t kNmsRoom = 16;

// Takes the boxes by falling score and writes what is left of their scores to decayed[index].
D2DET_FOR_EACH_ISA(template <typename T> void suppress_class(NmsBoxes<T> boxes,
                                                             const NmsSettings<T>& settings,
                                                             T* decayed);)

}  // namespace d2det
