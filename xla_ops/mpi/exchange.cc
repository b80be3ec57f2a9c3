// Point-to-point exchanges with neighbors, in chunks.
#include "mpi/exchange.h"

#include <algorithm>
#include <cstring>

#include "mpi/wire_format.h"

namespace jfog::mpi {
namespace {

// Where all ranks share memory, all but very short ones go through lanes.
constexpr std::size_t kShortShared = 512;

}  // namespace

Exchange::Exchange(std::shared_ptr<Communicator> comm, const char* name,
                   Payload leaves, std::uint64_t variant, Edges edges)
    : Operation(std::move(comm), name, std::move(leaves), variant),
      edges_(std::move(edges)),
      payload_(this->leaves().payload_bytes),
      source_lanes_(sources().size()),
      parts_(sources().size()) {
  if (edges_.source_bytes.empty()) {
    edges_.source_bytes.assign(sources().size(), payload_);
  }
  if (edges_.destination_bytes.empty()) {
    edges_.destination_bytes.assign(destinations().size(), payload_);
  }
  std::size_t longest = 0;
  for (std::size_t bytes : edges_.source_bytes) {
    longest = std::max(longest, bytes);
  }
  for (std::size_t bytes : edges_.destination_bytes) {
    longest = std::max(longest, bytes);
  }
  chunks_ = ChunksOf(longest);
  lane_chunks_ = ChunksOf(payload_);
  stride_ = chunks_ == 1 ? RoundUp(sizeof(Header) + longest)
                         : std::max(kChunk, kEnvelope);
  Resize(std::min<std::size_t>(chunks_, kWindows) *
         (sources().size() + destinations().size()));
  if (lane_chunks_ > 1 && edges_.alike && this->comm().lanes() != nullptr) {
    for (int destination : destinations()) {
      const int rank = this->comm().RankInRoot(destination);
      if (this->comm().lanes()->Reaches(rank)) sharing_.push_back(rank);
    }
  }
  ComputeOffsets();
}

void Exchange::ComputeOffsets() {
  used_ = 0;
  packed_ = lane_chunks_;
  unchecked_ = sources().size();
  if (buffer_) return;
  const std::size_t windows = std::min<std::size_t>(chunks_, kWindows);
  const std::size_t sends =
      edges_.alike ? std::min<std::size_t>(destinations().size(), 1)
                   : destinations().size();
  // A small exchange sends what it has, but may receive a whole envelope.
  const std::size_t window =
      sends * stride_ + sources().size() * std::max(stride_, kEnvelope);
  buffer_ = Buffer(window * windows);
  for (std::size_t w = 0; w < windows; ++w) {
    windows_[w].sent = buffer_.get() + w * window;
    windows_[w].received = windows_[w].sent + sends * stride_;
  }
}

void Exchange::Renew() {
  // Large windows are for everybody.
  if (chunks_ > 1) buffer_ = Buffer();
  ComputeOffsets();
  Operation::Renew();
}

// The same on both ends of an edge, whatever else each of them exchanges.
std::size_t Exchange::ChunksOf(std::size_t bytes) const {
  const std::size_t limit = comm().shares_memory() ? kShortShared : kShort;
  return bytes <= limit ? 1 : 1 + (bytes + kChunk - 1) / kChunk;
}

std::size_t Exchange::Begin(std::size_t bytes, std::size_t chunk) const {
  if (chunk == 0) return 0;
  if (ChunksOf(bytes) == 1) return bytes;
  return std::min((chunk - 1) * kChunk, bytes);
}

int Exchange::tag(std::size_t chunk) const {
  const int number = static_cast<int>(sequence() % kChunkTags);
  if (chunk > 0) return kChunkTag + number;
  return edges_.late ? kSecondTag + number : kEnvelopeTag;
}

Header Exchange::Envelope() const {
  Header header = MakeHeader(payload_);
  if (lane_) {
    header.lane = lane_->lane;
    header.stamp = lane_->stamp;
  }
  return header;
}

// Every edge has a request in each window: those of the sources come first.
std::size_t Exchange::FirstSlot(std::size_t chunk) const {
  return chunk % kWindows * (sources().size() + destinations().size());
}

ffi::Error Exchange::Post() {
  for (std::size_t d = 0; d < destinations().size(); ++d) {
    comm().CountSent(destinations()[d], CountOfDestination(d));
  }
  // Who exchanges with nobody has nothing to wait for.
  if (sources().empty() && destinations().empty()) {
    used_ = chunks_;
    return Consume(0, payload_, parts_);
  }
  if (!sharing_.empty()) {
    lane_ = comm().lanes()->Acquire(sharing_, lane_chunks_);
    if (lane_) packed_ = 1;
  }
  JFOG_RETURN_IF_ERROR(PostReceives(0));
  JFOG_RETURN_IF_ERROR(PostSends(0));
  // The receives of the others wait for the headers.
  return chunks_ > 1 ? PostSends(1) : ffi::Error::Success();
}

ffi::Error Exchange::PostSends(std::size_t chunk) {
  Window& w = WindowOf(chunk);
  const std::size_t ahead = chunk == 0 ? sizeof(Header) : 0;
  bool packed = false;
  std::byte* to = w.sent;
  for (std::size_t d = 0; d < destinations().size(); ++d) {
    const std::size_t bytes = edges_.destination_bytes[d];
    if (chunk >= ChunksOf(bytes)) continue;
    if (chunk > 0 && lane_ &&
        comm().lanes()->Reaches(comm().RankInRoot(destinations()[d]))) {
      continue;
    }
    const std::size_t begin = Begin(bytes, chunk);
    const std::size_t end = Begin(bytes, chunk + 1);
    if (!packed || !edges_.alike) {
      if (packed) to += stride_;
      packed = true;
      if (chunk == 0) {
        const Header header = Envelope();
        std::memcpy(to, &header, sizeof(header));
      }
      Pack(d, begin, end, to + ahead);
    }
    ++w.outstanding;
    JFOG_MPI_RETURN_IF_ERROR(
        MPI_Isend(to, static_cast<int>(ahead + end - begin), MPI_BYTE,
                  destinations()[d], tag(chunk), comm().comm(),
                  Slot(FirstSlot(chunk) + sources().size() + d)));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::PostReceives(std::size_t chunk) {
  Window& w = WindowOf(chunk);
  const std::size_t stride = std::max(stride_, kEnvelope);
  for (std::size_t s = 0; s < sources().size(); ++s) {
    const std::size_t whole = edges_.source_bytes[s];
    if (chunk >= ChunksOf(whole)) continue;
    if (chunk > 0 && source_lanes_[s]) continue;
    const std::size_t bytes =
        chunk == 0 ? kEnvelope : Begin(whole, chunk + 1) - Begin(whole, chunk);
    ++w.outstanding;
    JFOG_MPI_RETURN_IF_ERROR(MPI_Irecv(
        w.received + s * stride, static_cast<int>(bytes), MPI_BYTE,
        sources()[s], tag(chunk), comm().comm(), Slot(FirstSlot(chunk) + s)));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::Completed(std::size_t slot) {
  const std::size_t edges = sources().size() + destinations().size();
  Window& w = windows_[slot / edges];
  --w.outstanding;
  const std::size_t edge = slot % edges;
  if (unchecked_ == 0 || slot >= sources().size()) return ffi::Error::Success();
  Header theirs;
  std::memcpy(&theirs, w.received + edge * std::max(stride_, kEnvelope),
              sizeof(theirs));
  JFOG_RETURN_IF_ERROR(CheckHeader(sources()[edge], theirs));
  comm().CountReceived(sources()[edge], CountOfSource(edge));
  source_lanes_[edge].reset();
  if (theirs.stamp != 0 && comm().lanes() != nullptr &&
      comm().lanes()->Reaches(comm().RankInRoot(sources()[edge]))) {
    source_lanes_[edge] = Lanes::Claim{theirs.lane, theirs.stamp};
  }
  if (--unchecked_ > 0 || chunks_ == 1) return ffi::Error::Success();
  return PostReceives(1);
}

ffi::Error Exchange::Resume(bool* moved) {
  for (bool any = true; any;) {
    any = false;
    if (packed_ < lane_chunks_) {
      if (std::byte* to = comm().lanes()->Place(*lane_, packed_)) {
        Pack(0, Begin(payload_, packed_), Begin(payload_, packed_ + 1), to);
        comm().lanes()->Publish(*lane_, packed_);
        ++packed_;
        any = true;
      }
    }
    if (used_ < chunks_ && IsThere(used_)) {
      JFOG_RETURN_IF_ERROR(Use(used_));
      any = true;
    }
    if (any) *moved = true;
  }
  return ffi::Error::Success();
}

bool Exchange::IsThere(std::size_t chunk) {
  const Window& w = WindowOf(chunk);
  if (w.outstanding > 0) return false;
  if (chunk > 0 && unchecked_ > 0) return false;
  if (packed_ < lane_chunks_ && packed_ <= chunk) return false;
  const std::size_t ahead = chunk == 0 ? sizeof(Header) : 0;
  for (std::size_t s = 0; s < sources().size(); ++s) {
    const std::size_t bytes = edges_.source_bytes[s];
    Part& part = parts_[s];
    part.begin = Begin(bytes, chunk);
    part.end = Begin(bytes, chunk + 1);
    if (chunk >= ChunksOf(bytes)) {
      part.bytes = nullptr;
    } else if (chunk > 0 && source_lanes_[s]) {
      part.bytes = comm().lanes()->Find(comm().RankInRoot(sources()[s]),
                                        *source_lanes_[s], chunk);
      if (part.bytes == nullptr) return false;
    } else {
      part.bytes = w.received + s * std::max(stride_, kEnvelope) + ahead;
    }
  }
  return true;
}

ffi::Error Exchange::Use(std::size_t chunk) {
  JFOG_RETURN_IF_ERROR(
      Consume(Begin(payload_, chunk), Begin(payload_, chunk + 1), parts_));
  for (std::size_t s = 0; chunk > 0 && s < sources().size(); ++s) {
    if (!source_lanes_[s] || parts_[s].bytes == nullptr) continue;
    comm().lanes()->Done(comm().RankInRoot(sources()[s]), *source_lanes_[s],
                         chunk);
  }
  used_ = chunk + 1;
  // Its window is free for a later one.
  const std::size_t next = chunk + kWindows;
  if (next >= chunks_) return ffi::Error::Success();
  // Receives first: what arrives finds its place.
  JFOG_RETURN_IF_ERROR(PostReceives(next));
  return PostSends(next);
}

ffi::Error Exchange::AgreeOnPeers(bool check) {
  Pattern pattern{sources(), destinations()};
  if (check) check_.emplace(pattern);
  return mpi::AgreeOnPeers(shared_comm(), *this, std::move(pattern), check);
}

ffi::Error Exchange::Stalled() {
  if (!check_) return ffi::Error::Success();
  check_->Ask(comm(), MakeHeader(payload_));
  const auto text = check_->ReadAnswers(comm(), MakeHeader(payload_));
  if (!text) return ffi::Error::Success();
  return Fail(ffi::ErrorCode::kFailedPrecondition, *text);
}

void Exchange::Ended() {
  if (lane_ && error().success()) {
    comm().lanes()->Release(*lane_);
    lane_.reset();
  }
}

std::vector<int> Exchange::Missing() const {
  const std::size_t edges = sources().size() + destinations().size();
  std::vector<int> missing;
  for (std::size_t slot = 0; slot < slots(); ++slot) {
    const std::size_t edge = slot % edges;
    if (!is_pending(slot)) continue;
    missing.push_back(edge < sources().size()
                          ? sources()[edge]
                          : destinations()[edge - sources().size()]);
  }
  if (used_ > 0 && used_ < chunks_ && unchecked_ == 0) {
    for (std::size_t s = 0; s < sources().size(); ++s) {
      if (source_lanes_[s] && used_ < ChunksOf(edges_.source_bytes[s]) &&
          comm().lanes()->Find(comm().RankInRoot(sources()[s]),
                               *source_lanes_[s], used_) == nullptr) {
        missing.push_back(sources()[s]);
      }
    }
  }
  if (packed_ < lane_chunks_) {
    const std::vector<int> behind = comm().lanes()->Behind(*lane_, packed_);
    for (int destination : destinations()) {
      const int rank = comm().RankInRoot(destination);
      if (std::count(behind.begin(), behind.end(), rank) > 0) {
        missing.push_back(destination);
      }
    }
  }
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  return missing;
}

}  // namespace jfog::mpi
