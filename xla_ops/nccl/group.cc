// NCCL calls of one group.
#include "nccl/group.h"

#include <cstdint>

namespace jfog::nccl {
namespace {

const void* Input(DevicePointer address) {
  return reinterpret_cast<const void*>(address);
}

void* Output(DevicePointer address) { return reinterpret_cast<void*>(address); }

}  // namespace

template <typename Call>
void Group::Do(const char* function, Call call) {
  if (code_ != kSuccess) return;
  const Result code = call();
  if (code == kSuccess || code == kInProgress) return;
  code_ = code;
  function_ = function;
}

void Group::Send(DevicePointer from, std::size_t bytes, int peer) {
  Do("ncclSend", [&] {
    return Nccl().send(Input(from), bytes, kUint8, peer, comm_, stream_);
  });
}

void Group::Receive(DevicePointer to, std::size_t bytes, int peer) {
  Do("ncclRecv", [&] {
    return Nccl().recv(Output(to), bytes, kUint8, peer, comm_, stream_);
  });
}

void Group::AllReduce(DevicePointer from, DevicePointer to, std::size_t count,
                      ElementType type, ReductionKind kind) {
  Do("ncclAllReduce", [&] {
    return Nccl().all_reduce(Input(from), Output(to), count, type, kind, comm_,
                             stream_);
  });
}

void Group::ReduceScatter(DevicePointer from, DevicePointer to,
                          std::size_t count, ElementType type,
                          ReductionKind kind) {
  Do("ncclReduceScatter", [&] {
    return Nccl().reduce_scatter(Input(from), Output(to), count, type, kind,
                                 comm_, stream_);
  });
}

void Group::AllGather(DevicePointer from, DevicePointer to, std::size_t bytes) {
  Do("ncclAllGather", [&] {
    return Nccl().all_gather(Input(from), Output(to), bytes, kUint8, comm_,
                             stream_);
  });
}

void Group::Broadcast(DevicePointer from, DevicePointer to, std::size_t bytes,
                      int root) {
  Do("ncclBroadcast", [&] {
    return Nccl().broadcast(Input(from), Output(to), bytes, kUint8, root, comm_,
                            stream_);
  });
}

}  // namespace jfog::nccl
