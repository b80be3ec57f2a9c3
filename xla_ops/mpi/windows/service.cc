// Service of this rank's windows to remote ranks.
#include "mpi/windows/service.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <list>
#include <set>
#include <string>
#include <utility>

#include "mpi/buffer_pool.h"
#include "mpi/fault_tolerance.h"
#include "mpi/progress_engine.h"
#include "mpi/windows/window.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {
namespace {

// The service of one communicator. All calls are on the progress thread that
// reads control messages, so its state needs no lock. A lock of a record is
// held for a copy only; the user's mutex may be held for long, so requests for
// it are queued and polled.
class WindowService {
 public:
  explicit WindowService(std::shared_ptr<Communicator> comm)
      : comm_(std::move(comm)), arriving_(comm_->size()) {}

  // Handles what has arrived. Returns whether requests or replies are still in
  // flight, which is when the thread polls without a pause.
  bool Serve() {
    bool busy = ReadRequests();
    for (int source = 0; source < comm_->size(); ++source) {
      busy = Receive(source) || busy;
    }
    GrantMutexes();
    for (auto it = sent_.begin(); it != sent_.end();) {
      int done = 0;
      const bool ended =
          MPI_Test(&it->request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS ||
          done;
      it = ended ? sent_.erase(it) : std::next(it);
    }
    return busy || !sent_.empty() || !waiting_.empty();
  }

 private:
  // A put or an accumulate whose payload is in flight, or has arrived with the
  // request.
  struct Arrival {
    WindowRequest request;
    Buffer message;
    const std::byte* payload = nullptr;
    std::vector<MPI_Request> receives = {};
    std::vector<MPI_Status> statuses = {};
  };
  struct Sent {
    Buffer bytes;
    MPI_Request request = MPI_REQUEST_NULL;
  };
  // A remote rank that waits for the mutex of this rank.
  struct Waiting {
    int source;
    WindowRequest request;
    std::shared_ptr<Window> window;
    std::uint32_t ticket;
    LockLook look = {};
  };

  bool ReadRequests() {
    bool any = false;
    for (;;) {
      int found = 0;
      MPI_Message matched = MPI_MESSAGE_NULL;
      MPI_Status status;
      // Matched, since a plain receive refuses what a rank sent before its end.
      const int probed =
          MPI_Improbe(MPI_ANY_SOURCE, kRequestTag, comm_->control_comm(),
                      &found, &matched, &status);
      // An unacknowledged failure is an error of each probe from any source.
      if (IsRankFailure(probed)) AcknowledgeFailures(comm_->control_comm());
      if (probed != MPI_SUCCESS || !found) return any;
      any = true;
      int bytes = 0;
      MPI_Get_count(&status, MPI_BYTE, &bytes);
      Buffer message(static_cast<std::size_t>(bytes));
      const int code = MPI_Mrecv(message.get(), bytes, MPI_BYTE, &matched,
                                 MPI_STATUS_IGNORE);
      comm_->duplicates().CountReceived(status.MPI_SOURCE);
      if (IsRankFailure(code)) continue;
      if (code != MPI_SUCCESS) {
        Refuse(status.MPI_SOURCE, ErrorText(code));
        return any;
      }
      Handle(status.MPI_SOURCE, std::move(message),
             static_cast<std::size_t>(bytes));
    }
  }

  // Fails all ranks: the source of a malformed request gets no reply.
  void Refuse(int source, const std::string& wrong) {
    comm_->FailMalformed(source, "request to a window with " + wrong);
  }

  void Handle(int source, Buffer message, std::size_t bytes) {
    WindowRequest request;
    std::string wrong = Read(message.get(), bytes, &request);
    std::shared_ptr<Window> window = FindWindow(*comm_, request.window);
    if (wrong.empty() && window != nullptr) {
      wrong = CheckRequest(request, window->layout().payload_bytes,
                           window->RecordOf(source));
    }
    if (!wrong.empty()) return Refuse(source, wrong);
    switch (request.kind) {
      case WindowRequest::kPut:
      case WindowRequest::kAccumulate: {
        // Complete before it is queued: an arrival that memory ran out for is
        // not taken for one that has arrived.
        Arrival arrival{request};
        if (request.MessageBytes() > sizeof(request)) {
          arrival.message = std::move(message);
          arrival.payload = arrival.message.get() + WindowRequest::kPayload;
        } else {
          // Received even if the window is gone: the source sends the payload
          // together with the request.
          const std::size_t pieces = Pieces(request.bytes);
          arrival.message = Buffer(request.bytes);
          arrival.payload = arrival.message.get();
          arrival.receives.resize(pieces, MPI_REQUEST_NULL);
          arrival.statuses.resize(pieces);
        }
        arriving_[source].push_back(std::move(arrival));
        PostReceives(source, &arriving_[source].back());
        return;
      }
      case WindowRequest::kGet:
        return SendValue(source, request, window);
      case WindowRequest::kLock:
        if (window == nullptr) return Reply(source, request, GoneState(*comm_));
        waiting_.push_back(
            {source, request, window, window->own().head().mutex.TakeTicket()});
        return;
      case WindowRequest::kUnlock:
        if (window != nullptr) {
          const auto held = held_.find({source, request.window});
          if (held == held_.end()) {
            return Refuse(source, "kind=" + std::to_string(request.kind) +
                                      ", to unlock a mutex that it lacks");
          }
          held_.erase(held);
          window->own().head().mutex.Release();
        }
        return Reply(source, request, WindowMemory::kOpen);
      default:
        return;
    }
  }

  void PostReceives(int source, Arrival* arrival) {
    const std::size_t bytes = arrival->request.bytes;
    std::size_t at = 0;
    for (MPI_Request& receive : arrival->receives) {
      MPI_Irecv(arrival->message.get() + at,
                static_cast<int>(PieceAt(at, bytes) / kLineBytes), Line(),
                source, kRequestPayloadTag, comm_->control_comm(), &receive);
      at += PieceBytes(bytes);
    }
  }

  // Writes the payloads of a rank that have arrived, in the order of its
  // requests, so that its later put overwrites the earlier one. Returns whether
  // one is still in flight.
  bool Receive(int source) {
    auto& arriving = arriving_[source];
    while (!arriving.empty()) {
      Arrival& first = arriving.front();
      int done = 0;
      const int code =
          MPI_Testall(static_cast<int>(first.receives.size()),
                      first.receives.data(), &done, first.statuses.data());
      if (code != MPI_SUCCESS) {
        first.message.Leak();
        if (!IsRankFailure(code, first.statuses)) {
          Refuse(source, ErrorText(code));
        }
      } else if (!done && comm_->IsGone(source)) {
        first.message.Leak();  // what is missing does not come
      } else if (!done) {
        return true;
      } else if (const std::string wrong = CheckPieces(first); !wrong.empty()) {
        Refuse(source, wrong);
      } else {
        WriteSlot(source, first);
      }
      arriving.pop_front();
    }
    return false;
  }

  std::string CheckPieces(const Arrival& arrival) {
    std::size_t at = 0;
    for (const MPI_Status& status : arrival.statuses) {
      comm_->duplicates().CountReceived(status.MPI_SOURCE);
      MPI_Count bytes = 0;
      MPI_Get_elements_x(&status, MPI_BYTE, &bytes);
      const std::size_t expected = PieceAt(at, arrival.request.bytes);
      const std::string wrong =
          CheckLength(static_cast<std::size_t>(bytes), expected);
      if (!wrong.empty()) return "a piece of " + wrong;
      at += expected;
    }
    return "";
  }

  // The operation of another rank that this one executes, for errors.
  std::string Served(int source, const char* name) const {
    return "the service of windows on rank " + std::to_string(comm_->rank()) +
           ", at a " + name + " of rank " + std::to_string(source) + ",";
  }

  void WriteSlot(int source, const Arrival& arrival) {
    const WindowRequest& request = arrival.request;
    const std::shared_ptr<Window> window = FindWindow(*comm_, request.window);
    if (window == nullptr) return Reply(source, request, GoneState(*comm_));
    WindowMemory::Record& record = window->own().record(request.record);
    // After an error without a reply: the communicator has failed.
    if (window
            ->Acquire(record.lock, comm_->rank(),
                      [&] { return Served(source, "put"); })
            .failure())
      return;
    const Payload value = window->PayloadAt(arrival.payload);
    std::byte* slot = window->own().payload(request.record);
    if (request.kind == WindowRequest::kPut) {
      WriteScaled(value, request.weight, slot);
    } else {
      AddScaled(value, request.weight, slot);
    }
    record.version.fetch_add(1, std::memory_order_relaxed);
    record.lock.Release();
    Reply(source, request, WindowMemory::kOpen);
  }

  // Replies with the value that this rank exposes.
  void SendValue(int source, const WindowRequest& request,
                 const std::shared_ptr<Window>& window) {
    if (window == nullptr) return Reply(source, request, GoneState(*comm_));
    const std::size_t bytes = window->layout().payload_bytes;
    Buffer value(bytes);  // may throw, so not under the lock
    WindowMemory::Record& record = window->own().record(0);
    if (window
            ->Acquire(record.lock, comm_->rank(),
                      [&] { return Served(source, "get"); })
            .failure())
      return;
    std::memcpy(value.get(), window->own().payload(0), bytes);
    // The lock is dropped before the sends: a writer does not wait for MPI.
    record.lock.Release();
    Reply(source, request, WindowMemory::kOpen);
    Sent& sent = sent_.emplace_back();
    comm_->duplicates().CountSent(source);
    sent.bytes = std::move(value);
    MPI_Isend(sent.bytes.get(), static_cast<int>(bytes / kLineBytes), Line(),
              source, ReplyPayloadTag(request.tag), comm_->control_comm(),
              &sent.request);
  }

  // Replies to the remote rank whose ticket is next, if any. Remote ranks and
  // ranks that share the memory draw tickets from the same lock.
  void GrantMutexes() {
    if (!waiting_.empty()) comm_->LookForGone();
    waiting_.remove_if([this](Waiting& waiting) {
      // The ticket of a rank that has failed is passed by those behind it.
      if (comm_->IsGone(waiting.source)) return true;
      TicketLock& mutex = waiting.window->own().head().mutex;
      waiting.window->FreeFromGone(mutex, &waiting.look);
      if (!mutex.TryEnter(waiting.ticket, waiting.source)) return false;
      held_.emplace(waiting.source, waiting.request.window);
      Reply(waiting.source, waiting.request, WindowMemory::kOpen);
      return true;
    });
  }

  void Reply(int source, const WindowRequest& request,
             WindowMemory::State state) {
    Sent& sent = sent_.emplace_back();
    comm_->duplicates().CountSent(source);
    sent.bytes = Buffer(sizeof(WindowReply));
    const WindowReply reply = WithCheck(WindowReply{state, request.tag});
    std::memcpy(sent.bytes.get(), &reply, sizeof(reply));
    MPI_Isend(sent.bytes.get(), sizeof(reply), MPI_BYTE, source, request.tag,
              comm_->control_comm(), &sent.request);
  }

  std::shared_ptr<Communicator> comm_;
  std::vector<std::deque<Arrival>> arriving_;  // by their source
  std::list<Waiting> waiting_;
  // The remote ranks that hold this rank's mutex of a window, one by one.
  std::multiset<std::pair<int, std::uint64_t>> held_;
  std::list<Sent> sent_;
};

}  // namespace

MPI_Datatype Line() {
  static const MPI_Datatype line = [] {
    MPI_Datatype type = MPI_DATATYPE_NULL;
    MPI_Type_contiguous(kLineBytes, MPI_BYTE, &type);
    MPI_Type_commit(&type);
    return type;
  }();
  return line;
}

void ServeWindows(const std::shared_ptr<Communicator>& comm) {
  auto service = std::make_shared<WindowService>(comm);
  Engine::Get().Serve(comm, [service] { return service->Serve(); });
}

}  // namespace jfog::mpi
