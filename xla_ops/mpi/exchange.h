// Point-to-point exchanges with neighbors, in chunks.
#ifndef JFOG_XLA_OPS_MPI_EXCHANGE_H_
#define JFOG_XLA_OPS_MPI_EXCHANGE_H_

#include <array>
#include <cstddef>
#include <memory>
#include <vector>

#include "mpi/buffers.h"
#include "mpi/operation.h"

namespace jfog::mpi {

// Sends the payload to some ranks and receives one from others. It travels in
// chunks through two sets of buffers that stay in the cache: while one chunk is
// on its way, the one before it is used. Results may lie in the place of the
// input, since a chunk is used after it was sent.
class Exchange : public Operation {
 protected:
  // With `alike`, all destinations get the same bytes.
  Exchange(std::shared_ptr<Communicator> comm, const char* name, Leaves leaves,
           std::uint64_t variant, std::vector<int> sources,
           std::vector<int> destinations, bool alike);

  // Writes the payload's bytes [begin, end) for a destination, by its index.
  virtual void Pack(std::size_t destination, std::size_t begin, std::size_t end,
                    std::byte* to) = 0;
  // Takes in what every source sent of [begin, end), in their order.
  virtual ffi::Error Consume(std::size_t begin, std::size_t end,
                             const std::vector<const std::byte*>& received) = 0;

  const std::vector<int>& sources() const { return sources_; }
  const std::vector<int>& destinations() const { return destinations_; }

  // See Operation::Renew.
  void Renew();

  ffi::Error Post() override;
  ffi::Error Completed(std::size_t slot) override;
  std::vector<int> Missing() const override;
  void Bury() override { buffer_.Bury(); }

 private:
  static constexpr int kWindows = 2;

  // One chunk on its way.
  struct Window {
    std::size_t chunk = 0;
    std::size_t outstanding = 0;  // messages, sent and received
    std::byte* sent = nullptr;
    std::byte* received = nullptr;
  };

  void Lay();
  std::size_t Begin(std::size_t chunk) const;
  ffi::Error PostSends(int window, std::size_t chunk);
  ffi::Error PostReceives(int window);
  ffi::Error Finish(int window);
  int tag(std::size_t chunk) const;

  const std::vector<int> sources_;
  const std::vector<int> destinations_;
  const bool alike_;
  std::size_t chunks_;
  std::size_t next_;       // the first chunk that is not under way
  std::size_t unchecked_;  // sources whose header has not come
  std::size_t stride_;     // bytes between the buffers of a window
  std::array<Window, kWindows> windows_;
  Buffer buffer_;
  std::vector<const std::byte*> parts_;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_EXCHANGE_H_
