// Collectives over all ranks, by MPI's own nonblocking ones.
#include "mpi/collectives.h"

#include <algorithm>
#include <complex>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "common/weighted_sum.h"
#include "mpi/buffer_pool.h"
#include "mpi/call.h"
#include "mpi/operation.h"

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

void Copy(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void Pack(DataType type, const void* x, std::size_t count, std::byte* wire) {
  if (type == DataType::BF16) {
    Widen<Bfloat16>(x, count, wire);
  } else if (type == DataType::F16) {
    Widen<Float16>(x, count, wire);
  } else {
    Copy(wire, x, count * SizeOf(type));
  }
}

void Unpack(DataType type, const std::byte* wire, std::size_t count, void* y) {
  if (type == DataType::BF16) {
    Narrow<Bfloat16>(wire, count, y);
  } else if (type == DataType::F16) {
    Narrow<Float16>(wire, count, y);
  } else {
    Copy(y, wire, count * SizeOf(type));
  }
}

// A collective over all ranks: they agree on what they are about to do, and
// then the data moves by one of MPI's own. Of one communicator one is under way
// at a time, in program order.
class Collective : public Operation {
 protected:
  using Operation::Operation;

  // Starts MPI's collectives on memory of our own, with `Add`.
  virtual ffi::Error Begin() = 0;
  // Writes the results.
  virtual ffi::Error Finish() = 0;

  // Memory for as long as MPI needs it.
  std::byte* Allocate(std::size_t bytes) {
    buffers_.emplace_back(bytes);
    return buffers_.back().get();
  }
  // The next request; one was made room for.
  MPI_Request* Add() { return Slot(used_++); }
  void Reserve(std::size_t requests) {
    used_ = 0;
    Resize(requests);
  }

  // A collective's payload is counted as what this rank contributes and gets,
  // under this rank itself: which peers it crosses is the MPI library's secret.
  void Count(std::size_t sent, std::size_t received) {
    comm().CountSent(comm().rank(), sent);
    comm().CountReceived(comm().rank(), received);
  }

 private:
  enum Stage { kQueued, kAgreeing, kComparing, kMoving };

  ffi::Error Post() override {
    ticket_ = comm().TakeTicket();
    return Proceed();
  }

  ffi::Error Resume(bool* moved) override {
    *moved = stage_ == kQueued && comm().turn() == ticket_;
    return *moved ? Proceed() : ffi::Error::Success();
  }

  bool is_waiting() const override { return stage_ == kQueued; }

  ffi::Error Proceed() {
    if (comm().turn() != ticket_) return ffi::Error::Success();
    stage_ = kAgreeing;
    // The maximum of a value and that of its complement are each other's
    // complement exactly where all ranks brought the same value.
    const std::uint64_t own = Fingerprint();
    agreed_ = reinterpret_cast<std::uint64_t*>(Allocate(2 * sizeof(own)));
    agreed_[0] = own;
    agreed_[1] = ~own;
    Reserve(1);
    JFOG_MPI_RETURN_IF_ERROR(MPI_Iallreduce(
        MPI_IN_PLACE, agreed_, 2, MPI_UINT64_T, MPI_MAX, comm().comm(), Add()));
    return ffi::Error::Success();
  }

  ffi::Error Completed(std::size_t) override { return ffi::Error::Success(); }

  ffi::Error Drained(bool* ended) override {
    switch (stage_) {
      case kAgreeing:
        if (agreed_[0] != ~agreed_[1]) return Compare();
        stage_ = kMoving;
        return Begin();
      case kComparing:
        for (int rank = 0; rank < comm().size(); ++rank) {
          JFOG_RETURN_IF_ERROR(CheckHeader(rank, headers_[rank]));
        }
        return Fail(ffi::ErrorCode::kInternal, "disagrees for unknown reasons");
      default:
        *ended = true;
        return Finish();
    }
  }

  // All ranks see the disagreement, so all can name the two sides of it.
  ffi::Error Compare() {
    stage_ = kComparing;
    const Header mine = MakeHeader(leaves().payload_bytes);
    std::byte* sent = Allocate(sizeof(Header));
    std::memcpy(sent, &mine, sizeof(mine));
    headers_ = reinterpret_cast<Header*>(
        Allocate(sizeof(Header) * static_cast<std::size_t>(comm().size())));
    Reserve(1);
    JFOG_MPI_RETURN_IF_ERROR(MPI_Iallgather(sent, sizeof(Header), MPI_BYTE,
                                            headers_, sizeof(Header), MPI_BYTE,
                                            comm().comm(), Add()));
    return ffi::Error::Success();
  }

  // Which ranks a collective waits for MPI does not tell: those that have not
  // said that they are here.
  std::vector<int> Missing() const override {
    std::vector<int> missing;
    for (int rank = 0; rank < comm().size(); ++rank) {
      const std::optional<Header> note = comm().LastControlMessage(rank);
      const bool is_here = note && Matches(*note);
      if (rank != comm().rank() && !is_here) missing.push_back(rank);
    }
    return missing;
  }

  void Leak() override {
    for (Buffer& buffer : buffers_) buffer.Leak();
  }

  // Also after a failure, so that what is queued behind sees it.
  void Ended() override { comm().EndTurn(); }

  Stage stage_ = kQueued;
  std::uint64_t ticket_ = 0;
  std::size_t used_ = 0;
  std::uint64_t* agreed_ = nullptr;
  Header* headers_ = nullptr;
  std::vector<Buffer> buffers_;
};

class AllreduceOperation : public Collective {
 public:
  AllreduceOperation(std::shared_ptr<Communicator> comm, Payload leaves,
                     Reduction reduction)
      : Collective(std::move(comm), "allreduce", std::move(leaves), reduction),
        reduction_(reduction) {}

 private:
  // Payload of one wire type form one vector, whatever their number.
  struct Vector {
    std::size_t count = 0;
    std::byte* wire = nullptr;
  };

  ffi::Error Begin() override {
    std::size_t pieces = 0;
    for (const Leaf& leaf : leaves()) {
      Vector& vector = vectors_[WireType(leaf.type)];
      starts_.push_back(vector.count);
      vector.count += leaf.count;
    }
    for (auto& [type, vector] : vectors_) {
      vector.wire = Allocate(vector.count * SizeOf(type));
      pieces += (vector.count + kPiece - 1) / kPiece;
    }
    for (std::size_t i = 0; i < leaves().size(); ++i) {
      const Leaf& leaf = leaves()[i];
      Pack(leaf.type, leaf.input, leaf.count, Place(i));
    }
    Reserve(pieces);
    for (const auto& [type, vector] : vectors_) {
      for (std::size_t start = 0; start < vector.count; start += kPiece) {
        const int count =
            static_cast<int>(std::min(kPiece, vector.count - start));
        JFOG_MPI_RETURN_IF_ERROR(MPI_Iallreduce(
            MPI_IN_PLACE, vector.wire + start * SizeOf(type), count,
            MpiType(type), MpiOp(reduction_, type), comm().comm(), Add()));
      }
      Count(vector.count * SizeOf(type), vector.count * SizeOf(type));
    }
    return ffi::Error::Success();
  }

  ffi::Error Finish() override {
    if (reduction_ == kMean) {
      for (const auto& [type, vector] : vectors_) {
        Divide(type, vector.count, comm().size(), vector.wire);
      }
    }
    for (std::size_t i = 0; i < leaves().size(); ++i) {
      const Leaf& leaf = leaves()[i];
      Unpack(leaf.type, Place(i), leaf.count, leaf.output);
    }
    return ffi::Error::Success();
  }

  std::byte* Place(std::size_t i) {
    const DataType type = WireType(leaves()[i].type);
    return vectors_[type].wire + starts_[i] * SizeOf(type);
  }

  const Reduction reduction_;
  std::map<DataType, Vector> vectors_;
  std::vector<std::size_t> starts_;  // of the leaves, in their vectors
};

class BroadcastOperation : public Collective {
 public:
  BroadcastOperation(std::shared_ptr<Communicator> comm, Payload leaves,
                     std::int64_t root)
      : Collective(std::move(comm), "broadcast", std::move(leaves), root),
        root_(static_cast<int>(root)) {}

 private:
  ffi::Error Begin() override {
    const std::size_t total = leaves().payload_bytes;
    const bool is_root = comm().rank() == root_;
    packed_ = Allocate(total);
    if (is_root) {
      for (const Leaf& leaf : leaves()) {
        Copy(packed_ + leaf.offset, leaf.input, leaf.bytes());
      }
    }
    Reserve((total + kPiece - 1) / kPiece);
    for (std::size_t start = 0; start < total; start += kPiece) {
      const int count = static_cast<int>(std::min(kPiece, total - start));
      JFOG_MPI_RETURN_IF_ERROR(MPI_Ibcast(packed_ + start, count, MPI_BYTE,
                                          root_, comm().comm(), Add()));
    }
    Count(is_root ? total : 0, is_root ? 0 : total);
    return ffi::Error::Success();
  }

  ffi::Error Finish() override {
    for (const Leaf& leaf : leaves()) {
      Copy(leaf.output, packed_ + leaf.offset, leaf.bytes());
    }
    return ffi::Error::Success();
  }

  const int root_;
  std::byte* packed_ = nullptr;
};

// Ranks bring different lengths, so what must agree are the rows and results.
class AllgatherOperation : public Collective {
 public:
  // `rows[i * size + r]` is the length of axis 0 that rank r brings of leaf i;
  // `row_bytes[i]` the bytes of one of it.
  AllgatherOperation(std::shared_ptr<Communicator> comm, Payload leaves,
                     Longs rows, std::vector<std::size_t> row_bytes)
      : Collective(std::move(comm), "allgather", std::move(leaves), 0) {
    const std::size_t size = this->comm().size();
    std::uint64_t signature = this->leaves().size();
    for (std::size_t i = 0; i < this->leaves().size(); ++i) {
      const Leaf& leaf = this->leaves()[i];
      signature = Mix(signature, static_cast<std::uint64_t>(leaf.type));
      signature = Mix(signature, row_bytes[i]);
      std::size_t total = 0;
      lengths_.emplace_back();
      starts_.emplace_back();
      for (std::size_t r = 0; r < size; ++r) {
        const std::size_t bytes = rows[i * size + r] * row_bytes[i];
        signature = Mix(signature, bytes);
        lengths_.back().push_back(static_cast<int>(bytes));
        starts_.back().push_back(static_cast<int>(total));
        total += bytes;
      }
    }
    SetSignature(signature);
  }

 private:
  ffi::Error Begin() override {
    Reserve(leaves().size());
    for (std::size_t i = 0; i < leaves().size(); ++i) {
      const Leaf& leaf = leaves()[i];
      gathered_.push_back(Allocate(leaf.output_bytes()));
      Copy(gathered_[i] + starts_[i][comm().rank()], leaf.input, leaf.bytes());
      JFOG_MPI_RETURN_IF_ERROR(MPI_Iallgatherv(
          MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, gathered_[i], lengths_[i].data(),
          starts_[i].data(), MPI_BYTE, comm().comm(), Add()));
      Count(leaf.bytes(), leaf.output_bytes() - leaf.bytes());
    }
    return ffi::Error::Success();
  }

  ffi::Error Finish() override {
    for (std::size_t i = 0; i < leaves().size(); ++i) {
      Copy(leaves()[i].output, gathered_[i], leaves()[i].output_bytes());
    }
    return ffi::Error::Success();
  }

  std::vector<std::vector<int>> lengths_, starts_;  // in bytes, of every rank
  std::vector<std::byte*> gathered_;
};

// To agree is to have met.
class Meeting : public Collective {
 public:
  using Collective::Collective;

 private:
  ffi::Error Begin() override { return ffi::Error::Success(); }
  ffi::Error Finish() override { return ffi::Error::Success(); }
};

Completion AllreduceImpl(ffi::Token, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>, ffi::RemainingRets results,
                         std::int64_t context, std::int64_t mode,
                         std::int64_t reduction_number) {
  JFOG_ASSIGN_OR_RETURN(comm, Ready(context, "allreduce"));
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, mode));
  const auto reduction = static_cast<Reduction>(reduction_number);
  for (const Leaf& leaf : leaves) {
    const DataType type = WireType(leaf.type);
    if (MpiType(type) == MPI_DATATYPE_NULL ||
        MpiOp(reduction, type) == MPI_OP_NULL) {
      return MakeError(ffi::ErrorCode::kInvalidArgument,
                       std::string("allreduce has no such reduction of ") +
                           NameOf(leaf.type));
    }
  }
  if (mode == kStart) leaves.Stage();
  return Launch(
      std::make_shared<AllreduceOperation>(comm, std::move(leaves), reduction),
      results, mode);
}

Completion BroadcastImpl(ffi::Token, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>, ffi::RemainingRets results,
                         std::int64_t context, std::int64_t mode,
                         std::int64_t root) {
  JFOG_ASSIGN_OR_RETURN(comm, Ready(context, "broadcast"));
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, mode));
  if (mode == kStart) leaves.Stage();
  return Launch(
      std::make_shared<BroadcastOperation>(comm, std::move(leaves), root),
      results, mode);
}

Completion AllgatherImpl(ffi::Token, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>, ffi::RemainingRets results,
                         std::int64_t context, std::int64_t mode, Longs rows,
                         Longs row_sizes) {
  JFOG_ASSIGN_OR_RETURN(comm, Ready(context, "allgather"));
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, mode));
  std::vector<std::size_t> row_bytes;
  const std::size_t size = comm->size();
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    Leaf& leaf = leaves[i];
    std::size_t total = 0;
    for (std::size_t r = 0; r < size; ++r) total += rows[i * size + r];
    leaf.output_count = total * row_sizes[i];
    row_bytes.push_back(row_sizes[i] * SizeOf(leaf.type));
    if (leaf.output_bytes() >
        static_cast<std::size_t>(std::numeric_limits<int>::max())) {
      return MakeError(ffi::ErrorCode::kInvalidArgument,
                       "allgather of more than 2 GiB of one leaf");
    }
  }
  if (mode == kStart) leaves.Stage();
  return Launch(std::make_shared<AllgatherOperation>(
                    comm, std::move(leaves), rows, std::move(row_bytes)),
                results, mode);
}

Completion BarrierImpl(ffi::Token, ffi::RemainingArgs, ffi::Result<ffi::Token>,
                       ffi::RemainingRets results, std::int64_t context,
                       std::int64_t mode) {
  JFOG_ASSIGN_OR_RETURN(comm, Ready(context, "barrier"));
  return Launch(std::make_shared<Meeting>(comm, "barrier", Payload(), 0),
                results, mode);
}

}  // namespace

ffi::Error CheckedBarrier(const std::shared_ptr<Communicator>& comm,
                          const char* name, Payload leaves,
                          std::uint64_t variant) {
  Meeting meeting(comm, name, std::move(leaves), variant);
  meeting.Start();
  return meeting.Complete();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Allreduce, AllreduceImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()  // order in
                                  .RemainingArgs()    // leaves
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets()    // leaves, or handle
                                  .Attr<std::int64_t>("context")
                                  .Attr<std::int64_t>("mode")
                                  .Attr<std::int64_t>("reduction"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Broadcast, BroadcastImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()  // order in
                                  .RemainingArgs()    // leaves
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets()    // leaves, or handle
                                  .Attr<std::int64_t>("context")
                                  .Attr<std::int64_t>("mode")
                                  .Attr<std::int64_t>("root"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Allgather, AllgatherImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()  // order in
                                  .RemainingArgs()    // leaves
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets()    // leaves, or handle
                                  .Attr<std::int64_t>("context")
                                  .Attr<std::int64_t>("mode")
                                  .Attr<Longs>("rows")
                                  .Attr<Longs>("row_sizes"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Barrier, BarrierImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()  // order in
                                  .RemainingArgs()    // none
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets()    // none
                                  .Attr<std::int64_t>("context")
                                  .Attr<std::int64_t>("mode"));

}  // namespace jfog::mpi
