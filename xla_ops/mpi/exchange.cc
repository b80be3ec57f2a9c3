// Point-to-point exchanges with neighbors, in chunks.
#include "mpi/exchange.h"

#include <algorithm>
#include <cstring>

namespace jfog::mpi {
namespace {

// The first message of an exchange is at most this long: all of a short
// payload, or the header alone. No rank makes room for more than that before it
// has seen the header, for Open MPI 5.0.11 writes past the end of a buffer that
// is too short for what arrives, and ranks that disagree bring just that.
constexpr std::size_t kEnvelope = 60 * 1024;
constexpr std::size_t kShort = kEnvelope - sizeof(Header);
// Where all ranks share memory, all but very short ones go through lanes.
constexpr std::size_t kShortShared = 512;
// The length of the further ones: see benchmarks/README.md.
constexpr std::size_t kChunk = Lanes::kSlotBytes;

constexpr int kEnvelopeTag = 1;
// Chunks of different operations overtake each other, so each operation has a
// tag of its own; MPI promises tags up to 32767.
constexpr int kChunkTag = 16;
constexpr int kChunkTags = 16384;

constexpr std::size_t RoundUp(std::size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace

Exchange::Exchange(std::shared_ptr<Communicator> comm, const char* name,
                   Leaves leaves, std::uint64_t variant,
                   std::vector<int> sources, std::vector<int> destinations,
                   bool alike)
    : Operation(std::move(comm), name, std::move(leaves), variant),
      sources_(std::move(sources)),
      destinations_(std::move(destinations)),
      alike_(alike),
      source_lanes_(sources_.size()),
      parts_(sources_.size()) {
  const std::size_t payload = this->leaves().payload_bytes;
  // The same on all ranks, whatever each of them sends.
  const std::size_t limit =
      this->comm().shares_memory() ? kShortShared : kShort;
  chunks_ = payload <= limit ? 1 : 1 + (payload + kChunk - 1) / kChunk;
  stride_ = chunks_ == 1 ? RoundUp(sizeof(Header) + payload)
                         : std::max(kChunk, kEnvelope);
  Resize(std::min<std::size_t>(chunks_, kWindows) *
         (sources_.size() + destinations_.size()));
  if (chunks_ > 1 && alike_ && this->comm().lanes() != nullptr) {
    for (int destination : destinations_) {
      const int rank = this->comm().RankInRoot(destination);
      if (this->comm().lanes()->Reaches(rank)) sharing_.push_back(rank);
    }
  }
  Lay();
}

void Exchange::Lay() {
  used_ = 0;
  packed_ = chunks_;
  unchecked_ = sources_.size();
  if (buffer_) return;
  const std::size_t windows = std::min<std::size_t>(chunks_, kWindows);
  const std::size_t sends = alike_
                                ? std::min<std::size_t>(destinations_.size(), 1)
                                : destinations_.size();
  // A small exchange sends what it has, but may receive a whole envelope.
  const std::size_t window =
      sends * stride_ + sources_.size() * std::max(stride_, kEnvelope);
  buffer_ = Buffer(window * windows);
  for (std::size_t w = 0; w < windows; ++w) {
    windows_[w].sent = buffer_.get() + w * window;
    windows_[w].received = windows_[w].sent + sends * stride_;
  }
}

void Exchange::Renew() {
  // Large windows are for everybody.
  if (chunks_ > 1) buffer_ = Buffer();
  Lay();
  Operation::Renew();
}

std::size_t Exchange::Begin(std::size_t chunk) const {
  const std::size_t payload = leaves().payload_bytes;
  if (chunk == 0) return 0;
  return chunks_ == 1 ? payload : std::min((chunk - 1) * kChunk, payload);
}

int Exchange::tag(std::size_t chunk) const {
  if (chunk == 0) return kEnvelopeTag;
  return kChunkTag + static_cast<int>(sequence() % kChunkTags);
}

Header Exchange::Envelope() const {
  Header header = MakeHeader(leaves().payload_bytes);
  if (lane_) {
    header.lane = lane_->lane;
    header.stamp = lane_->stamp;
  }
  return header;
}

// Every edge has a request in each window: those of the sources come first.
std::size_t Exchange::FirstSlot(std::size_t chunk) const {
  return chunk % kWindows * (sources_.size() + destinations_.size());
}

ffi::Error Exchange::Post() {
  const std::size_t payload = leaves().payload_bytes;
  for (int destination : destinations_) {
    comm().CountSent(destination, leaves().bytes);
  }
  // Who exchanges with nobody has nothing to wait for.
  if (sources_.empty() && destinations_.empty()) {
    used_ = chunks_;
    return Consume(0, payload, parts_);
  }
  if (!sharing_.empty()) {
    lane_ = comm().lanes()->Acquire(sharing_, chunks_);
    if (lane_) packed_ = 1;
  }
  JFOG_RETURN_IF_ERROR(PostReceives(0));
  JFOG_RETURN_IF_ERROR(PostSends(0));
  // The receives of the others wait for the headers.
  return chunks_ > 1 ? PostSends(1) : ffi::Error::Success();
}

ffi::Error Exchange::PostSends(std::size_t chunk) {
  Window& w = WindowOf(chunk);
  const std::size_t begin = Begin(chunk);
  const std::size_t end = Begin(chunk + 1);
  const std::size_t ahead = chunk == 0 ? sizeof(Header) : 0;
  bool packed = false;
  std::byte* to = w.sent;
  for (std::size_t d = 0; d < destinations_.size(); ++d) {
    if (chunk > 0 && lane_ &&
        comm().lanes()->Reaches(comm().RankInRoot(destinations_[d]))) {
      continue;
    }
    if (!packed || !alike_) {
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
                  destinations_[d], tag(chunk), comm().comm(),
                  Slot(FirstSlot(chunk) + sources_.size() + d)));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::PostReceives(std::size_t chunk) {
  Window& w = WindowOf(chunk);
  const std::size_t bytes =
      chunk == 0 ? kEnvelope : Begin(chunk + 1) - Begin(chunk);
  const std::size_t stride = std::max(stride_, kEnvelope);
  for (std::size_t s = 0; s < sources_.size(); ++s) {
    if (chunk > 0 && source_lanes_[s]) continue;
    ++w.outstanding;
    JFOG_MPI_RETURN_IF_ERROR(MPI_Irecv(
        w.received + s * stride, static_cast<int>(bytes), MPI_BYTE, sources_[s],
        tag(chunk), comm().comm(), Slot(FirstSlot(chunk) + s)));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::Completed(std::size_t slot) {
  const std::size_t edges = sources_.size() + destinations_.size();
  Window& w = windows_[slot / edges];
  --w.outstanding;
  const std::size_t edge = slot % edges;
  if (unchecked_ == 0 || slot >= sources_.size()) return ffi::Error::Success();
  Header theirs;
  std::memcpy(&theirs, w.received + edge * std::max(stride_, kEnvelope),
              sizeof(theirs));
  JFOG_RETURN_IF_ERROR(CheckHeader(sources_[edge], theirs));
  comm().CountReceived(sources_[edge], leaves().bytes);
  source_lanes_[edge].reset();
  if (theirs.stamp != 0 && comm().lanes() != nullptr &&
      comm().lanes()->Reaches(comm().RankInRoot(sources_[edge]))) {
    source_lanes_[edge] = Lanes::Claim{theirs.lane, theirs.stamp};
  }
  if (--unchecked_ > 0 || chunks_ == 1) return ffi::Error::Success();
  return PostReceives(1);
}

ffi::Error Exchange::Resume(bool* moved) {
  for (bool any = true; any;) {
    any = false;
    if (packed_ < chunks_) {
      if (std::byte* to = comm().lanes()->Place(*lane_, packed_)) {
        Pack(0, Begin(packed_), Begin(packed_ + 1), to);
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
  if (chunk > 0 && (unchecked_ > 0 || packed_ <= chunk)) return false;
  const std::size_t ahead = chunk == 0 ? sizeof(Header) : 0;
  for (std::size_t s = 0; s < sources_.size(); ++s) {
    if (chunk > 0 && source_lanes_[s]) {
      parts_[s] = comm().lanes()->Find(comm().RankInRoot(sources_[s]),
                                       *source_lanes_[s], chunk);
      if (parts_[s] == nullptr) return false;
    } else {
      parts_[s] = w.received + s * std::max(stride_, kEnvelope) + ahead;
    }
  }
  return true;
}

ffi::Error Exchange::Use(std::size_t chunk) {
  JFOG_RETURN_IF_ERROR(Consume(Begin(chunk), Begin(chunk + 1), parts_));
  for (std::size_t s = 0; chunk > 0 && s < sources_.size(); ++s) {
    if (!source_lanes_[s]) continue;
    comm().lanes()->Done(comm().RankInRoot(sources_[s]), *source_lanes_[s],
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

void Exchange::Ended() {
  if (lane_ && error().success()) {
    comm().lanes()->Release(*lane_);
    lane_.reset();
  }
}

std::vector<int> Exchange::Missing() const {
  const std::size_t edges = sources_.size() + destinations_.size();
  std::vector<int> missing;
  for (std::size_t slot = 0; slot < slots(); ++slot) {
    const std::size_t edge = slot % edges;
    if (!is_pending(slot)) continue;
    missing.push_back(edge < sources_.size()
                          ? sources_[edge]
                          : destinations_[edge - sources_.size()]);
  }
  if (used_ > 0 && used_ < chunks_ && unchecked_ == 0) {
    for (std::size_t s = 0; s < sources_.size(); ++s) {
      if (source_lanes_[s] &&
          comm().lanes()->Find(comm().RankInRoot(sources_[s]),
                               *source_lanes_[s], used_) == nullptr) {
        missing.push_back(sources_[s]);
      }
    }
  }
  if (packed_ < chunks_) {
    const std::vector<int> behind = comm().lanes()->Behind(*lane_, packed_);
    for (int destination : destinations_) {
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
