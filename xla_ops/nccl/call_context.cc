// Context of an XLA call: its leaves, memory and stream, shared by all
// handlers.
#include "nccl/call_context.h"

#include <cstring>
#include <utility>

#include "common/hash.h"

namespace jfog::nccl {
namespace {

DevicePointer AddressOf(const ffi::AnyBuffer& buffer) {
  return reinterpret_cast<DevicePointer>(buffer.untyped_data());
}

}  // namespace

Call::Call(const Plan& plan, CudaStream stream)
    : plan_(plan), program_(stream), stream_(stream) {
  if (plan.mode != kStart) return;
  started_ = std::make_shared<Started>();
  started_->comm = plan.comm;
}

Call::~Call() = default;

ffi::Error Call::CheckCuda(int code, const char* function) {
  if (code == kCudaSuccess) return ffi::Error::Success();
  plan_.comm->Fail(ffi::ErrorCode::kInternal,
                   plan_.operation + " on rank " +
                       std::to_string(plan_.comm->rank()) + " failed in " +
                       function + ": " + CudaErrorText(code));
  return plan_.comm->Refusal();
}

ffi::Error Call::Check() {
  Communicator& comm = *plan_.comm;
  JFOG_RETURN_IF_ERROR(CheckReady(&comm, plan_.operation.c_str()));
  guard_.emplace(comm.device().context());
  JFOG_RETURN_IF_ERROR(CheckCuda(guard_->code(), "cuCtxPushCurrent"));
  CudaContext context = nullptr;
  JFOG_RETURN_IF_ERROR(CheckCuda(Cuda().stream_get_context(program_, &context),
                                 "cuStreamGetCtx"));
  if (context == comm.device().context()) return ffi::Error::Success();
  return MakeError(ffi::ErrorCode::kFailedPrecondition,
                   plan_.operation +
                       " on another device than that of its communicator; "
                       "jfog uses one GPU for a rank");
}

ffi::Error Call::ReadInts(const ffi::AnyBuffer& operand,
                          std::vector<std::int32_t>* values) {
  values->resize(operand.element_count());
  if (values->empty()) return ffi::Error::Success();
  const std::size_t bytes = values->size() * sizeof(std::int32_t);
  Buffer copy;
  JFOG_RETURN_IF_ERROR(
      CheckCuda(plan_.comm->device().pinned().Take(bytes, program_, &copy),
                "cuMemAllocHost"));
  ffi::Error error = CheckCuda(
      Cuda().copy_to_host(copy.host(), AddressOf(operand), bytes, program_),
      "cuMemcpyDtoHAsync");
  if (error.success()) {
    error =
        CheckCuda(Cuda().stream_synchronize(program_), "cuStreamSynchronize");
  }
  if (error.failure()) {
    copy.Leak();
    return error;
  }
  std::memcpy(values->data(), copy.host(), bytes);
  return error;
}

ffi::Error Call::ReadLeaves(ffi::RemainingArgs args, ffi::RemainingRets results,
                            const Received& received) {
  if (!is_start() && results.size() != args.size()) {
    return MakeError(ffi::ErrorCode::kInternal,
                     "got " + std::to_string(args.size()) + " operands for " +
                         std::to_string(results.size()) + " results");
  }
  leaves_.reserve(args.size());
  for (std::size_t i = 0; i < args.size(); ++i) {
    auto x = args.get<ffi::AnyBuffer>(i);
    if (!x) return x.error();
    Leaf leaf{x->element_type(),
              x->element_count(),
              x->size_bytes(),
              AddressOf(*x),
              0,
              x->size_bytes()};
    if (is_start()) {
      leaf.output_bytes = i < plan_.received_bytes.size()
                              ? plan_.received_bytes[i]
                              : received(leaf);
    } else {
      auto y = results.get<ffi::AnyBuffer>(i);
      if (!y) return y.error();
      leaf.output = AddressOf(**y);
      leaf.output_bytes = (*y)->size_bytes();
    }
    leaves_.push_back(leaf);
  }
  return is_start() ? Stage() : ffi::Error::Success();
}

// XLA may reuse the memory of the operands as soon as its stream has passed the
// call, so the copies are made on that stream.
ffi::Error Call::Stage() {
  for (Leaf& leaf : leaves_) {
    DevicePointer copy = 0;
    JFOG_RETURN_IF_ERROR(Take(leaf.bytes, &copy));
    JFOG_RETURN_IF_ERROR(Copy(copy, leaf.input, leaf.bytes));
    leaf.input = copy;
    JFOG_RETURN_IF_ERROR(Take(leaf.output_bytes, &leaf.output));
    started_->received.push_back({leaf.output, leaf.output_bytes});
  }
  const std::shared_ptr<Event> staged = plan_.comm->device().MakeEvent();
  JFOG_RETURN_IF_ERROR(
      CheckCuda(plan_.comm->SecondStream(&stream_), "cuStreamCreate"));
  JFOG_RETURN_IF_ERROR(CheckCuda(staged->Record(program_), "cuEventRecord"));
  return CheckCuda(staged->Delay(stream_), "cuStreamWaitEvent");
}

ffi::Error Call::Take(std::size_t bytes, DevicePointer* address) {
  Buffer buffer;
  JFOG_RETURN_IF_ERROR(
      CheckCuda(plan_.comm->device().memory().Take(bytes, stream_, &buffer),
                "cuMemAlloc"));
  *address = buffer.device();
  started_->buffers.push_back(std::move(buffer));
  return ffi::Error::Success();
}

ffi::Error Call::Copy(DevicePointer to, DevicePointer from, std::size_t bytes) {
  if (bytes == 0 || to == from) return ffi::Error::Success();
  return CheckCuda(Cuda().copy_on_device(to, from, bytes, stream_),
                   "cuMemcpyDtoDAsync");
}

OperationSpec Call::MakeOperationSpec() const {
  OperationSpec spec;
  spec.name = plan_.operation;
  spec.variant = plan_.variant;
  spec.signature = Mix(plan_.signature, leaves_.size());
  std::vector<Shape> shapes;
  for (const Leaf& leaf : leaves_) {
    spec.signature = Mix(spec.signature, static_cast<std::uint64_t>(leaf.type));
    spec.signature = Mix(spec.signature, leaf.count);
    shapes.push_back({leaf.type, leaf.count});
  }
  spec.leaves = Describe(shapes);
  return spec;
}

ffi::Error Call::Launch(std::shared_ptr<Communicator> comm, OperationSpec spec,
                        const Post& post) {
  auto operation =
      std::make_shared<Operation>(std::move(comm), std::move(spec));
  if (!is_start()) return operation->Launch(stream_, true, post);
  std::vector<std::shared_ptr<Operation>>& operations = started_->operations;
  if (!operations.empty()) operation->Follow(operations.back());
  JFOG_RETURN_IF_ERROR(operation->Launch(stream_, false, post));
  operations.push_back(std::move(operation));
  return ffi::Error::Success();
}

ffi::Error Call::Finish(ffi::RemainingRets results) {
  if (!is_start()) return ffi::Error::Success();
  auto number = results.get<ffi::BufferR1<ffi::U32>>(0);
  if (!number) return number.error();
  started_->ended = plan_.comm->device().MakeEvent();
  JFOG_RETURN_IF_ERROR(
      CheckCuda(started_->ended->Record(stream_), "cuEventRecord"));
  started_->last_use = started_->ended;
  const DevicePointer to =
      reinterpret_cast<DevicePointer>((*number)->untyped_data());
  const auto handle = Insert(std::move(started_));
  JFOG_RETURN_IF_ERROR(CheckCuda(Cuda().set_words(to, handle[0], 1, program_),
                                 "cuMemsetD32Async"));
  return CheckCuda(
      Cuda().set_words(to + sizeof(handle[0]), handle[1], 1, program_),
      "cuMemsetD32Async");
}

}  // namespace jfog::nccl
