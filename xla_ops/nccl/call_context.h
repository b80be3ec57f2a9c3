// Context of an XLA call: its leaves, memory and stream, shared by all
// handlers.
#ifndef JFOG_XLA_OPS_NCCL_CALL_CONTEXT_H_
#define JFOG_XLA_OPS_NCCL_CALL_CONTEXT_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/status.h"
#include "nccl/handles.h"
#include "nccl/operation.h"
#include "nccl/plan.h"

namespace jfog::nccl {

// A leaf on the device, and the memory of its result.
struct Leaf {
  DataType type;
  std::size_t count;  // elements of the input
  std::size_t bytes;
  DevicePointer input;
  DevicePointer output;
  std::size_t output_bytes;

  std::size_t width() const { return ffi::ByteWidth(type); }
};

// One call. A start copies the leaves, launches on the communicator's second
// stream, and keeps its operations for a wait.
class Call {
 public:
  Call(const Plan& plan, CudaStream stream);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // An error, if the communicator is not ready for work or not on the stream's
  // device.
  ffi::Error Check();
  // Reads int32 operands from the device, which waits for the stream.
  ffi::Error ReadInts(const ffi::AnyBuffer& operand,
                      std::vector<std::int32_t>* values);
  // The bytes that are received for a leaf, if the attributes do not give them.
  using Received = std::function<std::size_t(const Leaf&)>;

  // Reads the leaves; a start switches `stream` to the second stream.
  ffi::Error ReadLeaves(ffi::RemainingArgs args, ffi::RemainingRets results,
                        const Received& received);
  // Memory of its own, in a start.
  ffi::Error Take(std::size_t bytes, DevicePointer* address);
  ffi::Error Copy(DevicePointer to, DevicePointer from, std::size_t bytes);

  // Posts one operation.
  ffi::Error Launch(std::shared_ptr<Communicator> comm, OperationSpec spec,
                    const Post& post);
  // Ends the call: a start writes its handle.
  ffi::Error Finish(ffi::RemainingRets results);

  CudaStream stream() const { return stream_; }
  bool is_start() const { return started_ != nullptr; }
  std::vector<Leaf>& leaves() { return leaves_; }
  // The spec of the call, with equal leaves on all ranks.
  OperationSpec MakeOperationSpec() const;
  // "name on rank r failed in ..."; fails the communicator.
  ffi::Error CheckCuda(int code, const char* function);

 private:
  ffi::Error Stage();

  const Plan& plan_;
  const CudaStream program_;  // XLA's
  CudaStream stream_;         // that it works on
  std::optional<ContextGuard> guard_;
  std::vector<Leaf> leaves_;
  std::shared_ptr<Started> started_;  // null in a whole call
};

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_CALL_CONTEXT_H_
