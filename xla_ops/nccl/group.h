// NCCL calls of one group.
#ifndef JFOG_XLA_OPS_NCCL_GROUP_H_
#define JFOG_XLA_OPS_NCCL_GROUP_H_

#include <cstddef>
#include <functional>

#include "nccl/device.h"

namespace jfog::nccl {

// NCCL calls that are posted as one group on one stream. After the first call
// that fails the rest is skipped.
class Group {
 public:
  Group(Comm comm, CudaStream stream) : comm_(comm), stream_(stream) {}

  void Send(DevicePointer from, std::size_t bytes, int peer);
  void Receive(DevicePointer to, std::size_t bytes, int peer);
  void AllReduce(DevicePointer from, DevicePointer to, std::size_t count,
                 ElementType type, ReductionKind kind);
  // `count` elements are those of one rank.
  void ReduceScatter(DevicePointer from, DevicePointer to, std::size_t count,
                     ElementType type, ReductionKind kind);
  void AllGather(DevicePointer from, DevicePointer to, std::size_t bytes);
  void Broadcast(DevicePointer from, DevicePointer to, std::size_t bytes,
                 int root);

  Result code() const { return code_; }
  const char* function() const { return function_; }

 private:
  template <typename Call>
  void Do(const char* function, Call call);

  const Comm comm_;
  const CudaStream stream_;
  Result code_ = kSuccess;
  const char* function_ = "";
};

using Post = std::function<void(Group&)>;

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_GROUP_H_
