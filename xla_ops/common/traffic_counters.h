// Counters of the traffic of one communicator.
#ifndef JFOG_XLA_OPS_COMMON_TRAFFIC_COUNTERS_H_
#define JFOG_XLA_OPS_COMMON_TRAFFIC_COUNTERS_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace jfog {

class TrafficCounters {
 public:
  explicit TrafficCounters(int size)
      : bytes_sent_(size),
        bytes_received_(size),
        messages_sent_(size),
        waited_for_(size) {}

  void CountSent(int peer, std::size_t bytes) {
    bytes_sent_[peer].fetch_add(static_cast<std::int64_t>(bytes), kRelaxed);
    messages_sent_[peer].fetch_add(1, kRelaxed);
  }
  void CountReceived(int peer, std::size_t bytes) {
    bytes_received_[peer].fetch_add(static_cast<std::int64_t>(bytes), kRelaxed);
  }
  void CountOperation() { operations_.fetch_add(1, kRelaxed); }
  void CountWait(std::chrono::nanoseconds wait, const std::vector<int>& peers) {
    waited_.fetch_add(wait.count(), kRelaxed);
    for (int peer : peers) waited_for_[peer].fetch_add(wait.count(), kRelaxed);
  }
  void CountAgreement() { agreements_.fetch_add(1, kRelaxed); }

  // bytes_sent, bytes_received and messages_sent by peer; then the numbers of
  // operations and of consistency checks.
  std::vector<std::vector<std::int64_t>> Read() const {
    const auto values = [](const Counts& counts) {
      return std::vector<std::int64_t>(counts.begin(), counts.end());
    };
    return {values(bytes_sent_),
            values(bytes_received_),
            values(messages_sent_),
            {operations_.load(kRelaxed), agreements_.load(kRelaxed)}};
  }
  // Nanoseconds waited for each peer, then those waited in all.
  std::vector<std::int64_t> ReadWaits() const {
    std::vector<std::int64_t> waits(waited_for_.begin(), waited_for_.end());
    waits.push_back(waited_.load(kRelaxed));
    return waits;
  }
  void Reset() {
    for (Counts* counts :
         {&bytes_sent_, &bytes_received_, &messages_sent_, &waited_for_}) {
      for (auto& count : *counts) count.store(0, kRelaxed);
    }
    operations_.store(0, kRelaxed);
    agreements_.store(0, kRelaxed);
    waited_.store(0, kRelaxed);
  }

 private:
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;
  using Counts = std::vector<std::atomic<std::int64_t>>;

  Counts bytes_sent_, bytes_received_, messages_sent_, waited_for_;
  std::atomic<std::int64_t> operations_{0};
  std::atomic<std::int64_t> agreements_{0};
  std::atomic<std::int64_t> waited_{0};
};

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_TRAFFIC_COUNTERS_H_
