// Point-to-point exchanges with neighbors, in chunks.
#include "mpi/exchange.h"

#include <algorithm>
#include <cstring>

namespace jfog::mpi {
namespace {

// The first message of an exchange is at most this long. No rank makes room for
// more than that before it has seen the header, for Open MPI 5.0.11 writes past
// the end of a buffer that is too short for what arrives, and ranks that
// disagree bring just that.
constexpr std::size_t kEnvelope = 60 * 1024;
constexpr std::size_t kFirst = kEnvelope - sizeof(Header);
// The length of the further ones: see benchmarks/README.md.
constexpr std::size_t kChunk = 60 * 1024;

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
      parts_(sources_.size()) {
  const std::size_t payload = this->leaves().payload_bytes;
  const std::size_t rest = payload > kFirst ? payload - kFirst : 0;
  chunks_ = 1 + (rest + kChunk - 1) / kChunk;
  stride_ = chunks_ == 1 ? RoundUp(sizeof(Header) + payload)
                         : std::max(kChunk, kEnvelope);
  Resize(std::min<std::size_t>(chunks_, kWindows) *
         (sources_.size() + destinations_.size()));
  Lay();
}

void Exchange::Lay() {
  next_ = std::min<std::size_t>(chunks_, kWindows);
  unchecked_ = sources_.size();
  for (std::size_t w = 0; w < kWindows; ++w) windows_[w].chunk = w;
  if (buffer_) return;
  const std::size_t sends = alike_
                                ? std::min<std::size_t>(destinations_.size(), 1)
                                : destinations_.size();
  // A small exchange sends what it has, but may receive a whole envelope.
  const std::size_t window =
      sends * stride_ + sources_.size() * std::max(stride_, kEnvelope);
  buffer_ = Buffer(window * next_);
  for (std::size_t w = 0; w < next_; ++w) {
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
  if (chunk == 0) return 0;
  return std::min(kFirst + (chunk - 1) * kChunk, leaves().payload_bytes);
}

int Exchange::tag(std::size_t chunk) const {
  if (chunk == 0) return kEnvelopeTag;
  return kChunkTag + static_cast<int>(sequence() % kChunkTags);
}

ffi::Error Exchange::Post() {
  const std::size_t payload = leaves().payload_bytes;
  for (int destination : destinations_) comm().CountSent(destination, payload);
  // Who exchanges with nobody has nothing to wait for.
  if (sources_.empty() && destinations_.empty())
    return Consume(0, payload, parts_);
  windows_[0].outstanding = sources_.size() + destinations_.size();
  JFOG_RETURN_IF_ERROR(PostReceives(0));
  JFOG_RETURN_IF_ERROR(PostSends(0, 0));
  if (chunks_ == 1) return ffi::Error::Success();
  // Its receives wait for the headers.
  return PostSends(1, 1);
}

ffi::Error Exchange::PostSends(int window, std::size_t chunk) {
  Window& w = windows_[window];
  w.chunk = chunk;
  w.outstanding = sources_.size() + destinations_.size();
  const std::size_t begin = Begin(chunk);
  const std::size_t end = Begin(chunk + 1);
  const std::size_t ahead = chunk == 0 ? sizeof(Header) : 0;
  const std::size_t base =
      window * (sources_.size() + destinations_.size()) + sources_.size();
  std::byte* to = w.sent;
  for (std::size_t d = 0; d < destinations_.size(); ++d) {
    if (d == 0 || !alike_) {
      if (d > 0) to += stride_;
      if (chunk == 0) {
        const Header header = MakeHeader(leaves().payload_bytes);
        std::memcpy(to, &header, sizeof(header));
      }
      Pack(d, begin, end, to + ahead);
    }
    JFOG_MPI_RETURN_IF_ERROR(
        MPI_Isend(to, static_cast<int>(ahead + end - begin), MPI_BYTE,
                  destinations_[d], tag(chunk), comm().comm(), Slot(base + d)));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::PostReceives(int window) {
  const Window& w = windows_[window];
  const std::size_t base = window * (sources_.size() + destinations_.size());
  const std::size_t bytes =
      w.chunk == 0 ? kEnvelope : Begin(w.chunk + 1) - Begin(w.chunk);
  const std::size_t stride = std::max(stride_, kEnvelope);
  for (std::size_t s = 0; s < sources_.size(); ++s) {
    JFOG_MPI_RETURN_IF_ERROR(
        MPI_Irecv(w.received + s * stride, static_cast<int>(bytes), MPI_BYTE,
                  sources_[s], tag(w.chunk), comm().comm(), Slot(base + s)));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::Completed(std::size_t slot) {
  const std::size_t edges = sources_.size() + destinations_.size();
  const int window = static_cast<int>(slot / edges);
  const std::size_t edge = slot % edges;
  Window& w = windows_[window];
  if (w.chunk == 0 && edge < sources_.size()) {
    Header theirs;
    std::memcpy(&theirs, w.received + edge * std::max(stride_, kEnvelope),
                sizeof(theirs));
    JFOG_RETURN_IF_ERROR(CheckHeader(sources_[edge], theirs));
    comm().CountReceived(sources_[edge], leaves().payload_bytes);
    if (--unchecked_ == 0 && chunks_ > 1) {
      JFOG_RETURN_IF_ERROR(PostReceives(1));
    }
  }
  return --w.outstanding == 0 ? Finish(window) : ffi::Error::Success();
}

ffi::Error Exchange::Finish(int window) {
  Window& w = windows_[window];
  const std::size_t ahead = w.chunk == 0 ? sizeof(Header) : 0;
  const std::size_t stride = std::max(stride_, kEnvelope);
  for (std::size_t s = 0; s < sources_.size(); ++s) {
    parts_[s] = w.received + s * stride + ahead;
  }
  JFOG_RETURN_IF_ERROR(Consume(Begin(w.chunk), Begin(w.chunk + 1), parts_));
  if (next_ == chunks_) return ffi::Error::Success();
  // Receives first: what arrives finds its place.
  w.chunk = next_++;
  JFOG_RETURN_IF_ERROR(PostReceives(window));
  return PostSends(window, w.chunk);
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
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  return missing;
}

}  // namespace jfog::mpi
