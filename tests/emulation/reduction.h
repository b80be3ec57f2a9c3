// The arithmetic of NCCL's reductions.
#ifndef JFOG_TESTS_EMULATION_REDUCTION_H_
#define JFOG_TESTS_EMULATION_REDUCTION_H_

#include <cstddef>
#include <vector>

#include "nccl/api.h"

namespace jfog::emulation {

// Bytes of one element, 0 for an unknown type.
std::size_t SizeOf(nccl::ElementType type);

// Reduces `count` elements of each input, in the order of the ranks; `result`
// may be one of them.
void Reduce(nccl::ElementType type, nccl::ReductionKind kind, std::size_t count,
            const std::vector<const char*>& inputs, char* result);

}  // namespace jfog::emulation

#endif  // JFOG_TESTS_EMULATION_REDUCTION_H_
