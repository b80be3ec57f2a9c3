// NCCL and the CUDA driver, opened at run time: two tables of functions.
#ifndef JFOG_XLA_OPS_NCCL_DYNAMIC_LIBRARY_H_
#define JFOG_XLA_OPS_NCCL_DYNAMIC_LIBRARY_H_

#include <string>

#include "nccl/api.h"

namespace jfog::nccl {

#define JFOG_MEMBER(member, symbol, result, arguments) \
  result(*member) arguments = nullptr;

struct NcclFunctions {
  JFOG_NCCL_FUNCTIONS(JFOG_MEMBER)
};

struct CudaFunctions {
  JFOG_CUDA_FUNCTIONS(JFOG_MEMBER)
};

#undef JFOG_MEMBER

// Opens NCCL: the library at `path`, or if that is empty the one that this
// process has loaded already, else what the loader finds as libnccl.so.2; and
// fills in the table. Throws std::runtime_error if there is none, if it is
// older than kOldestVersion (with both versions), or if it lacks functions
// (with their names). Opening it again is free if it is the same one, and an
// error if it is another.
void OpenNccl(const std::string& path);

// The same for the CUDA driver, libcuda.so.1.
void OpenCuda(const std::string& path);

// The version of the open NCCL, e.g. 22803, and the file that it lies in.
int NcclVersion();
std::string NcclPath();

// The tables. Only after they are open.
const NcclFunctions& Nccl();
const CudaFunctions& Cuda();

// "2.28.3" of 22803.
std::string VersionText(int version);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_DYNAMIC_LIBRARY_H_
