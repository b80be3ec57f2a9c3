// Collectives over all ranks, by MPI's own nonblocking ones.
#include "mpi/collectives.h"

#include <algorithm>
#include <complex>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "mpi/communicator.h"
#include "mpi/leaves.h"

namespace jfog::mpi {
namespace {

using Ints = ffi::Span<const std::int32_t>;
using Longs = ffi::Span<const std::int64_t>;

enum Reduction : std::int64_t {
  kSum = 0,
  kMean = 1,
  kMin = 2,
  kMax = 3,
  kProd = 4
};

// MPI counts elements in an int; longer vectors are reduced in pieces.
constexpr std::size_t kPiece = std::size_t{1} << 28;

// Minimum and maximum by our own functions: MPI leaves that of a NaN and a
// number open, where here a NaN wins as in NumPy, and MPICH 4.0.2 compares
// unsigned integers as signed ones.
template <typename T, bool kMaximum>
void Extremum(void* in, void* inout, int* length, MPI_Datatype*) {
  const T* a = static_cast<const T*>(in);
  T* b = static_cast<T*>(inout);
  for (int i = 0; i < *length; ++i) {
    if (a[i] != a[i] || (kMaximum ? a[i] > b[i] : a[i] < b[i])) b[i] = a[i];
  }
}

template <typename T, bool kMaximum>
MPI_Op ExtremumOp() {
  static const MPI_Op op = [] {
    MPI_Op made = MPI_OP_NULL;
    MPI_Op_create(&Extremum<T, kMaximum>, /*commute=*/1, &made);
    return made;
  }();
  return op;
}

template <bool kMaximum>
MPI_Op ExtremumOf(DataType type) {
  switch (type) {
    case DataType::PRED:
      return kMaximum ? MPI_LOR : MPI_LAND;
    case DataType::S8:
      return ExtremumOp<std::int8_t, kMaximum>();
    case DataType::U8:
      return ExtremumOp<std::uint8_t, kMaximum>();
    case DataType::S16:
      return ExtremumOp<std::int16_t, kMaximum>();
    case DataType::U16:
      return ExtremumOp<std::uint16_t, kMaximum>();
    case DataType::S32:
      return ExtremumOp<std::int32_t, kMaximum>();
    case DataType::U32:
      return ExtremumOp<std::uint32_t, kMaximum>();
    case DataType::S64:
      return ExtremumOp<std::int64_t, kMaximum>();
    case DataType::U64:
      return ExtremumOp<std::uint64_t, kMaximum>();
    case DataType::F32:
      return ExtremumOp<float, kMaximum>();
    case DataType::F64:
      return ExtremumOp<double, kMaximum>();
    default:
      return MPI_OP_NULL;
  }
}

// The type in which a leaf is reduced and travels: 16-bit floats in float32.
DataType WireType(DataType type) {
  return type == DataType::BF16 || type == DataType::F16 ? DataType::F32 : type;
}

MPI_Datatype MpiType(DataType type) {
  switch (type) {
    case DataType::PRED:
      return MPI_C_BOOL;
    case DataType::S8:
      return MPI_INT8_T;
    case DataType::U8:
      return MPI_UINT8_T;
    case DataType::S16:
      return MPI_INT16_T;
    case DataType::U16:
      return MPI_UINT16_T;
    case DataType::S32:
      return MPI_INT32_T;
    case DataType::U32:
      return MPI_UINT32_T;
    case DataType::S64:
      return MPI_INT64_T;
    case DataType::U64:
      return MPI_UINT64_T;
    case DataType::F32:
      return MPI_FLOAT;
    case DataType::F64:
      return MPI_DOUBLE;
    case DataType::C64:
      return MPI_C_FLOAT_COMPLEX;
    case DataType::C128:
      return MPI_C_DOUBLE_COMPLEX;
    default:
      return MPI_DATATYPE_NULL;
  }
}

// MPI_OP_NULL where the reduction has no meaning for the type.
MPI_Op MpiOp(Reduction reduction, DataType type) {
  const bool is_bool = type == DataType::PRED;
  switch (reduction) {
    case kSum:
    case kMean:
      return is_bool ? MPI_LOR : MPI_SUM;
    case kProd:
      return is_bool ? MPI_LAND : MPI_PROD;
    case kMin:
    case kMax: {
      const bool maximum = reduction == kMax;
      return maximum ? ExtremumOf<true>(type) : ExtremumOf<false>(type);
    }
  }
  return MPI_OP_NULL;
}

template <typename T>
void Widen(const void* x, std::size_t count, std::byte* wire) {
  const T* narrow = static_cast<const T*>(x);
  float* wide = reinterpret_cast<float*>(wire);
  for (std::size_t k = 0; k < count; ++k) wide[k] = narrow[k];
}

template <typename T>
void Narrow(const std::byte* wire, std::size_t count, void* y) {
  const float* wide = reinterpret_cast<const float*>(wire);
  T* narrow = static_cast<T*>(y);
  for (std::size_t k = 0; k < count; ++k) narrow[k] = T(wide[k]);
}

void Pack(DataType type, const void* x, std::size_t count, std::byte* wire) {
  if (type == DataType::BF16) {
    Widen<Bfloat16>(x, count, wire);
  } else if (type == DataType::F16) {
    Widen<Float16>(x, count, wire);
  } else {
    std::memcpy(wire, x, count * SizeOf(type));
  }
}

void Unpack(DataType type, const std::byte* wire, std::size_t count, void* y) {
  if (type == DataType::BF16) {
    Narrow<Bfloat16>(wire, count, y);
  } else if (type == DataType::F16) {
    Narrow<Float16>(wire, count, y);
  } else {
    std::memcpy(y, wire, count * SizeOf(type));
  }
}

template <typename T>
void Divide(std::byte* wire, std::size_t count, int size) {
  T* values = reinterpret_cast<T*>(wire);
  for (std::size_t k = 0; k < count; ++k) values[k] /= T(size);
}

void DivideBy(DataType wire_type, std::byte* wire, std::size_t count,
              int size) {
  // A complex number over a real one is two real divisions.
  switch (wire_type) {
    case DataType::F32:
      return Divide<float>(wire, count, size);
    case DataType::F64:
      return Divide<double>(wire, count, size);
    case DataType::C64:
      return Divide<float>(wire, 2 * count, size);
    case DataType::C128:
      return Divide<double>(wire, 2 * count, size);
    default:
      return;
  }
}

// The communicator of a call, ready for work.
ffi::ErrorOr<std::shared_ptr<Communicator>> Ready(std::int64_t context,
                                                  const char* name) {
  std::shared_ptr<Communicator> comm = Lookup(context);
  if (comm == nullptr) {
    return ffi::Unexpected(
        MakeError(ffi::ErrorCode::kFailedPrecondition,
                  std::string(name) + " on a communicator that was shut down"));
  }
  ffi::Error refusal = comm->Refusal();
  if (refusal.failure()) return ffi::Unexpected(refusal);
  return comm;
}

// A collective's payload is counted as what this rank contributes and gets,
// under this rank itself: which peers it crosses is the MPI library's secret.
void Count(Communicator& comm, std::size_t sent, std::size_t received) {
  comm.CountSent(comm.rank(), sent);
  comm.CountReceived(comm.rank(), received);
}

ffi::Error AllreduceImpl(ffi::Token, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>, ffi::RemainingRets results,
                         std::int64_t context, std::int64_t reduction) {
  auto comm = Ready(context, "allreduce");
  if (!comm) return comm.error();
  auto leaves_or = ReadLeaves(args, 0, results);
  if (!leaves_or) return leaves_or.error();
  const Leaves& leaves = *leaves_or;
  const auto op = static_cast<Reduction>(reduction);
  Operation operation(*comm, "allreduce", leaves.signature, reduction,
                      leaves.Describe());
  JFOG_RETURN_IF_ERROR(operation.Agree());

  // Leaves of one wire type form one vector, whatever their number.
  std::map<DataType, std::size_t> totals;
  std::vector<std::size_t> starts;
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    std::size_t& total = totals[WireType(leaves.types[i])];
    starts.push_back(total);
    total += leaves.counts[i];
  }
  std::map<DataType, std::byte*> vectors;
  for (const auto& [type, total] : totals) {
    const MPI_Op mpi_op = MpiOp(op, type);
    if (MpiType(type) == MPI_DATATYPE_NULL || mpi_op == MPI_OP_NULL) {
      return operation.Fail(
          ffi::ErrorCode::kInvalidArgument,
          std::string("has no such reduction of ") + NameOf(type));
    }
    const std::size_t width = SizeOf(type);
    std::byte* wire = operation.Allocate(total * width);
    vectors[type] = wire;
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      if (WireType(leaves.types[i]) != type) continue;
      Pack(leaves.types[i], leaves.inputs[i], leaves.counts[i],
           wire + starts[i] * width);
    }
    for (std::size_t start = 0; start < total; start += kPiece) {
      const int count = static_cast<int>(std::min(kPiece, total - start));
      MPI_Request* request = operation.AddCollective();
      JFOG_MPI_RETURN_IF_ERROR(
          operation,
          MPI_Iallreduce(MPI_IN_PLACE, wire + start * width, count,
                         MpiType(type), mpi_op, (*comm)->comm(), request));
    }
    Count(**comm, total * width, total * width);
  }
  JFOG_RETURN_IF_ERROR(operation.WaitAll());
  for (const auto& [type, total] : totals) {
    if (op == kMean) DivideBy(type, vectors[type], total, (*comm)->size());
  }
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    const DataType type = WireType(leaves.types[i]);
    Unpack(leaves.types[i], vectors[type] + starts[i] * SizeOf(type),
           leaves.counts[i], leaves.outputs[i]);
  }
  return ffi::Error::Success();
}

ffi::Error BroadcastImpl(ffi::Token, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>, ffi::RemainingRets results,
                         std::int64_t context, std::int64_t root) {
  auto comm = Ready(context, "broadcast");
  if (!comm) return comm.error();
  auto leaves_or = ReadLeaves(args, 0, results);
  if (!leaves_or) return leaves_or.error();
  const Leaves& leaves = *leaves_or;
  Operation operation(*comm, "broadcast", leaves.signature, root,
                      leaves.Describe());
  JFOG_RETURN_IF_ERROR(operation.Agree());
  const bool is_root = (*comm)->rank() == root;
  std::byte* packed = operation.Allocate(leaves.message_bytes);
  if (is_root) {
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      std::memcpy(packed + leaves.offsets[i], leaves.inputs[i],
                  leaves.bytes(i));
    }
  }
  for (std::size_t start = sizeof(Header); start < leaves.message_bytes;
       start += kPiece) {
    const int count =
        static_cast<int>(std::min(kPiece, leaves.message_bytes - start));
    MPI_Request* request = operation.AddCollective();
    JFOG_MPI_RETURN_IF_ERROR(
        operation,
        MPI_Ibcast(packed + start, count, MPI_BYTE, static_cast<int>(root),
                   (*comm)->comm(), request));
  }
  const std::size_t bytes = leaves.message_bytes - sizeof(Header);
  Count(**comm, is_root ? bytes : 0, is_root ? 0 : bytes);
  JFOG_RETURN_IF_ERROR(operation.WaitAll());
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    std::memcpy(leaves.outputs[i], packed + leaves.offsets[i], leaves.bytes(i));
  }
  return ffi::Error::Success();
}

// `rows[i * size + r]` is the length of axis 0 that rank r brings of leaf i.
// Ranks bring different lengths, so what must agree are the rows and results.
ffi::Error AllgatherImpl(ffi::Token, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>, ffi::RemainingRets results,
                         std::int64_t context, Longs rows) {
  auto comm = Ready(context, "allgather");
  if (!comm) return comm.error();
  auto leaves_or = ReadLeaves(args, 0, results);
  if (!leaves_or) return leaves_or.error();
  const Leaves& leaves = *leaves_or;
  const std::size_t size = (*comm)->size();
  std::uint64_t signature = leaves.size();
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    signature = Mix(signature, static_cast<std::uint64_t>(leaves.types[i]));
    signature = Mix(signature, leaves.output_counts[i]);
  }
  for (std::int64_t length : rows) signature = Mix(signature, length);
  Operation operation(*comm, "allgather", signature, 0, leaves.Describe());
  JFOG_RETURN_IF_ERROR(operation.Agree());
  std::vector<std::vector<int>> lengths(leaves.size()), starts(leaves.size());
  std::vector<std::byte*> gathered(leaves.size());
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    const std::size_t width = SizeOf(leaves.types[i]);
    std::size_t total_rows = 0;
    for (std::size_t r = 0; r < size; ++r) total_rows += rows[i * size + r];
    const std::size_t row_bytes =
        total_rows == 0 ? 0 : leaves.output_counts[i] / total_rows * width;
    std::size_t total = 0;
    for (std::size_t r = 0; r < size; ++r) {
      const std::size_t bytes = rows[i * size + r] * row_bytes;
      if (total + bytes > std::numeric_limits<int>::max()) {
        return operation.Fail(ffi::ErrorCode::kInvalidArgument,
                              "gathers more than 2 GiB of one leaf");
      }
      lengths[i].push_back(static_cast<int>(bytes));
      starts[i].push_back(static_cast<int>(total));
      total += bytes;
    }
    gathered[i] = operation.Allocate(total);
    std::memcpy(gathered[i] + starts[i][(*comm)->rank()], leaves.inputs[i],
                leaves.bytes(i));
    MPI_Request* request = operation.AddCollective();
    JFOG_MPI_RETURN_IF_ERROR(
        operation,
        MPI_Iallgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, gathered[i],
                        lengths[i].data(), starts[i].data(), MPI_BYTE,
                        (*comm)->comm(), request));
    Count(**comm, leaves.bytes(i), total - leaves.bytes(i));
  }
  JFOG_RETURN_IF_ERROR(operation.WaitAll());
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    std::memcpy(leaves.outputs[i], gathered[i],
                starts[i].back() + lengths[i].back());
  }
  return ffi::Error::Success();
}

ffi::Error BarrierImpl(ffi::Token, ffi::RemainingArgs, ffi::Result<ffi::Token>,
                       ffi::RemainingRets, std::int64_t context) {
  auto comm = Ready(context, "barrier");
  if (!comm) return comm.error();
  Operation operation(*comm, "barrier", 0, 0, "no leaves");
  // To agree is to have met.
  return operation.Agree();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Allreduce, AllreduceImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()  // order in
                                  .RemainingArgs()    // leaves
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets()    // leaves, like operands
                                  .Attr<std::int64_t>("context")
                                  .Attr<std::int64_t>("reduction"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Broadcast, BroadcastImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()  // order in
                                  .RemainingArgs()    // leaves
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets()    // leaves, like operands
                                  .Attr<std::int64_t>("context")
                                  .Attr<std::int64_t>("root"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Allgather, AllgatherImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()  // order in
                                  .RemainingArgs()    // leaves
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets()    // leaves, concatenated
                                  .Attr<std::int64_t>("context")
                                  .Attr<Longs>("rows"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Barrier, BarrierImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()  // order in
                                  .RemainingArgs()    // none
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets()    // none
                                  .Attr<std::int64_t>("context"));

}  // namespace jfog::mpi
