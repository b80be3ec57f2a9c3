// The timeline: what operations do and when, in a ring of events for each
// thread.
#include "mpi/timeline.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "common/process_wide.h"

namespace jfog::mpi {
namespace {

// Written by one thread, without a lock and without waiting for the reader: an
// event that was not read in time is overwritten, and counted by the reader.
class EventRing {
 public:
  explicit EventRing(std::size_t capacity)
      : capacity_(capacity),
        words_(new (std::nothrow) Word[capacity * kWords]),
        thread_(static_cast<std::uint64_t>(syscall(SYS_gettid))) {}

  void Write(TimelineEvent event) {
    const std::uint64_t at = written_.load(std::memory_order_relaxed);
    if (words_ != nullptr) {
      event.thread = thread_;
      std::array<std::uint64_t, kWords> words;
      std::memcpy(words.data(), &event, sizeof(event));
      Word* const to = &words_[at % capacity_ * kWords];
      // Release: a reader that sees one of these words sees `written_` as it is
      // now, and so that the event before it in this place is gone.
      for (std::size_t i = 0; i < kWords; ++i) {
        to[i].store(words[i], std::memory_order_release);
      }
    }
    written_.store(at + 1, std::memory_order_release);
  }

  // Appends the events that have not been read; returns how many are lost.
  std::uint64_t Read(std::vector<TimelineEvent>* events) {
    const std::uint64_t end = written_.load(std::memory_order_acquire);
    const std::uint64_t first = read_;
    read_ = end;
    if (words_ == nullptr) return end - first;
    const std::uint64_t from =
        std::max(first, end - std::min<std::uint64_t>(end, capacity_));
    const std::size_t size = events->size();
    for (std::uint64_t at = from; at < end; ++at) {
      const Word* const of = &words_[at % capacity_ * kWords];
      std::array<std::uint64_t, kWords> words;
      for (std::size_t i = 0; i < kWords; ++i) {
        words[i] = of[i].load(std::memory_order_acquire);
      }
      TimelineEvent& event = events->emplace_back();
      std::memcpy(static_cast<void*>(&event), words.data(), sizeof(event));
    }
    // The writer has gone on, and may be at the place of the event after.
    const std::uint64_t now = written_.load(std::memory_order_acquire);
    const std::uint64_t valid = now < capacity_ ? 0 : now - capacity_ + 1;
    const std::uint64_t overwritten =
        std::clamp<std::uint64_t>(valid, from, end) - from;
    events->erase(events->begin() + size, events->begin() + size + overwritten);
    return from - first + overwritten;
  }

 private:
  using Word = std::atomic<std::uint64_t>;
  static constexpr std::size_t kWords =
      sizeof(TimelineEvent) / sizeof(std::uint64_t);

  const std::size_t capacity_;
  const std::unique_ptr<Word[]> words_;  // null: there was no memory
  const std::uint64_t thread_;
  std::atomic<std::uint64_t> written_{0};
  std::uint64_t read_ = 0;  // the reader's
};

// The rings of the timeline that is recorded, or was last.
struct Rings {
  std::atomic<std::uint64_t> timeline{0};    // its ordinal
  std::atomic<std::uint64_t> operations{0};  // recorded
  std::mutex mutex;                          // guards all below
  std::size_t capacity = 0;
  std::vector<std::shared_ptr<EventRing>> rings;
  std::vector<std::string> names;
  std::map<std::uint64_t, std::uint64_t> indices;  // of names, by address
};

Rings& AllRings() { return ProcessWide<Rings>(); }

// This thread's ring, and the timeline that it belongs to.
struct OwnRing {
  std::shared_ptr<EventRing> ring;
  std::uint64_t timeline = 0;
};

EventRing& ThisThreadsRing() {
  thread_local OwnRing own;
  Rings& all = AllRings();
  const std::uint64_t timeline = all.timeline.load(std::memory_order_relaxed);
  if (own.timeline != timeline) {
    std::lock_guard<std::mutex> lock(all.mutex);
    own.ring = std::make_shared<EventRing>(all.capacity);
    own.timeline = timeline;
    all.rings.push_back(own.ring);
  }
  return *own.ring;
}

}  // namespace

void Trace::BeginRecord(const char* name, std::uint64_t sequence,
                        std::size_t bytes, int communicator) {
  TimelineEvent event;
  event.time = Time();
  operation_ = 1 + AllRings().operations.fetch_add(1);
  event.operation = operation_;
  event.sequence = sequence;
  event.bytes = bytes;
  event.name = reinterpret_cast<std::uintptr_t>(name);
  event.kind = TimelineEvent::kBegin | static_cast<unsigned>(communicator) << 8;
  ThisThreadsRing().Write(event);
}

void Trace::Write(TimelineEvent::Kind kind, int peer, std::size_t bytes) {
  TimelineEvent event;
  event.time = Time();
  event.operation = operation_;
  event.bytes = bytes;
  event.kind = kind;
  event.peer = peer;
  ThisThreadsRing().Write(event);
}

void Trace::WriteSince(TimelineEvent::Kind kind, std::int64_t since,
                       const char* name, int peer, std::size_t bytes) {
  TimelineEvent event;
  event.time = since;
  event.duration = Time() - since;
  event.operation = operation_;
  event.bytes = bytes;
  event.name = reinterpret_cast<std::uintptr_t>(name);
  event.kind = kind;
  event.peer = peer;
  ThisThreadsRing().Write(event);
}

void BeginTimeline(std::size_t events) {
  Rings& all = AllRings();
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    all.capacity = std::max<std::size_t>(events, 1);
    all.rings.clear();
    all.timeline.fetch_add(1);
  }
  timeline_is_on.store(true);
}

void EndTimeline() { timeline_is_on.store(false); }

TimelineEvents ReadTimeline() {
  Rings& all = AllRings();
  std::vector<std::shared_ptr<EventRing>> rings;
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    rings = all.rings;
  }
  TimelineEvents result;
  std::vector<TimelineEvent> events;
  for (const auto& ring : rings) result.lost += ring->Read(&events);
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    for (TimelineEvent& event : events) {
      const auto [found, is_new] =
          all.indices.emplace(event.name, all.names.size());
      if (is_new) {
        const auto* name = reinterpret_cast<const char*>(event.name);
        all.names.emplace_back(name == nullptr ? "" : name);
      }
      event.name = found->second;
    }
  }
  result.bytes.assign(reinterpret_cast<const char*>(events.data()),
                      events.size() * sizeof(TimelineEvent));
  return result;
}

std::vector<std::string> TimelineNames() {
  Rings& all = AllRings();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.names;
}

}  // namespace jfog::mpi
