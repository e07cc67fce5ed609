// Included by kernels.h, once for each instruction set.

namespace d2det::D2DET_ISA {}
