// MPI in this process: its start, its end, and the communicators made of it.
#include "mpi/lifecycle.h"

#include <mpi.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "common/deadline.h"
#include "common/fork.h"
#include "common/process_wide.h"
#include "mpi/collective_start.h"
#include "mpi/communicator.h"
#include "mpi/fault_tolerance.h"
#include "mpi/handles.h"
#include "mpi/launch.h"
#include "mpi/progress_engine.h"
#include "mpi/windows/window.h"

namespace jfog::mpi {
namespace {

// A rank that has left may still have messages in transit.
constexpr std::chrono::seconds kLeaveGrace{5};
// Interval at which control messages are read.
constexpr std::chrono::milliseconds kPatientNap{1};
// Seconds that a rank of a fault-tolerant job waits at its end for the others.
constexpr double kLeaveAfter = 2;
// In place of the context of a communicator that a spare is not part of.
constexpr std::int64_t kNoContext = -1;

// MPI in this process.
struct Process {
  std::atomic<bool> has_started_mpi{false};
  std::atomic<bool> is_abandoned{false};
  std::atomic<bool> has_left{false};
  std::mutex mutex;  // guards all below
  // Open communicators that were not split off another one.
  std::vector<std::shared_ptr<Communicator>> roots;
  // The channels of MPI_COMM_WORLD by the local size, kept from one jfog.init
  // to the next.
  std::map<int, std::shared_ptr<Channels>> channels;
  // Of a fault-tolerant job: its ranks, with the spares, and those of the
  // world.
  MPI_Comm job = MPI_COMM_WORLD;
  MPI_Comm world = MPI_COMM_WORLD;
  // Of the job; revoked to call the spares. Null in a job without spares.
  MPI_Comm call = MPI_COMM_NULL;
  bool is_spare = false;
  int leader = 0;  // in a job with spares, the lowest rank on this machine
  // The next `world` and `call`, until the ranks have agreed on them.
  MPI_Comm next_world = MPI_COMM_NULL;
  MPI_Comm next_call = MPI_COMM_NULL;
};

Process& ThisProcess() { return ProcessWide<Process>(); }

std::shared_ptr<Communicator> Get(std::int64_t context) {
  std::shared_ptr<Communicator> comm = Communicators().Find(context);
  if (comm == nullptr) {
    throw std::runtime_error("jfog: no communicator " +
                             std::to_string(context));
  }
  return comm;
}

// Whether this machine has more ranks than cores that they may run on.
bool IsOversubscribed(MPI_Comm comm) {
  const TemporaryComm machine = TemporaryComm::OfMachine(comm, 0);
  cpu_set_t cores;
  CPU_ZERO(&cores);
  sched_getaffinity(0, sizeof(cores), &cores);
  Require(MPI_Allreduce(MPI_IN_PLACE, &cores, sizeof(cores), MPI_BYTE, MPI_BOR,
                        machine.comm()),
          "MPI_Allreduce");
  int ranks = 0;
  MPI_Comm_size(machine.comm(), &ranks);
  return ranks > CPU_COUNT(&cores);
}

// The lowest rank on the machine of this one. Collective.
int LeaderOf(MPI_Comm comm) {
  int leader = 0;
  MPI_Comm_rank(comm, &leader);
  const TemporaryComm machine = TemporaryComm::OfMachine(comm, leader);
  Require(MPI_Bcast(&leader, 1, MPI_INT, 0, machine.comm()), "MPI_Bcast");
  return leader;
}

// Makes the last ranks of the job its spares, and the others its world.
void SetAside(int spares) {
  Process& process = ThisProcess();
  int rank = 0, size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  process.is_spare = rank >= size - spares;
  process.world = PartOf(MPI_COMM_WORLD, process.is_spare, rank);
  process.call = DuplicateOf(MPI_COMM_WORLD);
  process.leader = LeaderOf(MPI_COMM_WORLD);
}

// The pretended machine of this rank; 0 for real ones.
int MachineOf(MPI_Comm comm, int local_size) {
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  return local_size > 0 ? rank / local_size : 0;
}

std::shared_ptr<Channels> ChannelsOf(MPI_Comm comm, int local_size) {
  if (comm != MPI_COMM_WORLD) {
    return Channels::Make(comm, MachineOf(comm, local_size));
  }
  Process& process = ThisProcess();
  {
    std::lock_guard<std::mutex> lock(process.mutex);
    const auto found = process.channels.find(local_size);
    if (found != process.channels.end()) return found->second;
  }
  // Without the lock: this waits for the other ranks.
  std::shared_ptr<Channels> channels =
      Channels::Make(comm, MachineOf(comm, local_size));
  std::lock_guard<std::mutex> lock(process.mutex);
  process.channels.emplace(local_size, channels);
  return channels;
}

std::int64_t AddRoot(std::shared_ptr<Communicator> comm) {
  {
    Process& process = ThisProcess();
    std::lock_guard<std::mutex> lock(process.mutex);
    process.roots.push_back(comm);
  }
  return Communicators().Add(std::move(comm));
}

bool AnyHasLeft(Communicator& comm) {
  for (int rank = 0; rank < comm.size(); ++rank) {
    if (rank != comm.rank() && comm.HasLeft(rank)) return true;
  }
  return false;
}

std::int64_t Open(MPI_Comm parent, int local_size, double timeout) {
  if (IsFaultTolerant()) {
    // The failure of a rank is an error of each call that needs it.
    MPI_Comm_set_errhandler(parent, MPI_ERRORS_RETURN);
  }
  auto comm = std::make_shared<Communicator>(
      parent, timeout, ChannelsOf(parent, local_size), nullptr);
  SetOversubscribed(IsOversubscribed(comm->collective_comm()));
  return AddRoot(std::move(comm));
}

bool Finalized() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  return finalized != 0;
}

}  // namespace

std::string LibraryVersion() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  return std::string(text, length);
}

void Start() {
  WatchForks();
  if (Finalized()) {
    throw std::runtime_error(
        "jfog: MPI has been finalized in this process and cannot start again");
  }
  int initialized = 0;
  MPI_Initialized(&initialized);
  int provided = MPI_THREAD_SINGLE;
  if (initialized) {
    MPI_Query_thread(&provided);
  } else {
    if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided) !=
        MPI_SUCCESS) {
      throw std::runtime_error("jfog: MPI_Init_thread failed");
    }
    ThisProcess().has_started_mpi = true;
  }
  if (provided < MPI_THREAD_MULTIPLE) {
    throw std::runtime_error(
        "jfog: MPI runs without MPI_THREAD_MULTIPLE, which XLA's threads need; "
        "call jfog.init() before other libraries start MPI");
  }
}

std::int64_t OpenWorld(int local_size, double timeout, int spares) {
  Process& process = ThisProcess();
  if (spares > 0 && process.call == MPI_COMM_NULL) SetAside(spares);
  if (process.is_spare) return kNoContext;
  // Not what an earlier world of mpi4py has left.
  if (process.world == MPI_COMM_WORLD) process.job = MPI_COMM_WORLD;
  return Open(process.world, local_size, timeout);
}

std::int64_t OpenFortran(int handle, int local_size, double timeout) {
  const MPI_Comm parent = MPI_Comm_f2c(static_cast<MPI_Fint>(handle));
  ThisProcess().job = parent;
  return Open(parent, local_size, timeout);
}

int LeaderInJob() { return ThisProcess().leader; }

std::int64_t Split(std::int64_t context, int color, int key) {
  const std::shared_ptr<Communicator> root = Get(context);
  const TemporaryComm made =
      TemporaryComm::Split(root->collective_comm(), color, key);
  auto comm = std::make_shared<Communicator>(made.comm(), root->timeout(),
                                             root->shared_channels(), root);
  comm->SetReweights(root->reweights());
  return Communicators().Add(std::move(comm));
}

int Rank(std::int64_t context) { return Get(context)->rank(); }

int Size(std::int64_t context) { return Get(context)->size(); }

std::vector<int> Machines(std::int64_t context) {
  const std::shared_ptr<Communicator> comm = Get(context);
  const int leader = LeaderOf(comm->collective_comm());
  std::vector<int> leaders(comm->size());
  if (MPI_Allgather(&leader, 1, MPI_INT, leaders.data(), 1, MPI_INT,
                    comm->collective_comm()) != MPI_SUCCESS) {
    throw std::runtime_error("jfog: MPI_Allgather failed");
  }
  return leaders;
}

std::vector<std::string> Gather(std::int64_t context, const std::string& text,
                                bool patient) {
  const std::shared_ptr<Communicator> comm = Get(context);
  const int length = static_cast<int>(text.size());
  // Until the others have come, MPI may read and write these.
  struct Buffers {
    std::string mine, all;
  };
  auto buffers = std::make_unique<Buffers>();
  buffers->mine = text;
  buffers->all.resize(text.size() * comm->size());
  MPI_Request request = MPI_REQUEST_NULL;
  if (MPI_Iallgather(buffers->mine.data(), length, MPI_BYTE,
                     buffers->all.data(), length, MPI_BYTE,
                     comm->agreement_comm(), &request) != MPI_SUCCESS) {
    throw std::runtime_error("jfog: MPI_Iallgather failed");
  }
  WaitTime wait;
  Clock::time_point left_since = Clock::now();
  int done = 0;
  while (!done) {
    if (MPI_Test(&request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) {
      throw std::runtime_error("jfog: MPI_Iallgather failed");
    }
    if (done) break;
    bool gives_up = Seconds(wait.Look()) > comm->timeout();
    if (patient) {
      // The others may still work for hours, unless one has failed or left.
      comm->ReadControlMessages();
      if (!AnyHasLeft(*comm)) left_since = Clock::now();
      gives_up = comm->failed() || Clock::now() - left_since > kLeaveGrace;
      std::this_thread::sleep_for(kPatientNap);
    }
    if (gives_up) {
      buffers.release();  // NOLINT: MPI's for good
      throw std::runtime_error(
          "jfog: DEADLINE_EXCEEDED: rank " + std::to_string(comm->rank()) +
          " has waited for the other ranks of " + std::to_string(comm->size()) +
          " to make the communicator");
    }
    sched_yield();
  }
  std::vector<std::string> texts;
  for (int rank = 0; rank < comm->size(); ++rank) {
    texts.push_back(buffers->all.substr(rank * text.size(), text.size()));
  }
  return texts;
}

std::vector<int> Missing(std::int64_t context) {
  const std::shared_ptr<Communicator> comm = Get(context);
  comm->ReadControlMessages();  // lets MPI take note of what has happened
  comm->FindGone();
  return comm->Gone();
}

void SetReweights(std::int64_t context, bool reweights) {
  Get(context)->SetReweights(reweights);
}

void FindHangs(std::int64_t context, double shortest,
               const std::vector<int>& processes) {
  const std::shared_ptr<Communicator> comm = Get(context);
  comm->hangs().Begin(shortest, processes);
  Engine::Get().Watch(comm);
}

void Interrupt(std::int64_t context) {
  const std::shared_ptr<Communicator> comm = Get(context);
  comm->Fail(ffi::ErrorCode::kUnavailable,
             "jfog.recover has been called on this rank");
  for (MPI_Comm each : comm->duplicates().all()) Revoke(each);
}

void CallSpares() {
  const MPI_Comm call = ThisProcess().call;
  if (call != MPI_COMM_NULL) Revoke(call);
}

SpareState LookAsSpare() {
  Process& process = ThisProcess();
  int found = 0;
  // Lets MPI take note of what has happened; there are no such messages. It
  // would refuse to look after a failure that is not acknowledged.
  AcknowledgeFailures(process.call);
  MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, process.call, &found,
             MPI_STATUS_IGNORE);
  return {IsRevoked(process.call), FailedRanks(process.job)};
}

void ShrinkJob() {
  BeginMaking(ThisProcess().job);
  const MPI_Comm made = Shrink(ThisProcess().job);
  if (made == MPI_COMM_NULL) {
    throw std::runtime_error("jfog: MPIX_Comm_shrink failed");
  }
  // From here on all ranks that are left have it, and it may be revoked.
  AgreeOn(made, 0);
  BeginStart(made);
}

std::vector<std::string> GatherInStart(const std::string& text) {
  const MPI_Comm job = StartComm();
  int size = 0;
  MPI_Comm_size(job, &size);
  const int length = static_cast<int>(text.size());
  std::string all(text.size() * size, '\0');
  Require(MPI_Allgather(text.data(), length, MPI_BYTE, all.data(), length,
                        MPI_BYTE, job),
          "MPI_Allgather");
  std::vector<std::string> texts;
  for (int rank = 0; rank < size; ++rank) {
    texts.push_back(all.substr(rank * text.size(), text.size()));
  }
  return texts;
}

std::int64_t OpenInStart(int place, int machine, double timeout) {
  Process& process = ThisProcess();
  const MPI_Comm job = StartComm();
  if (process.call != MPI_COMM_NULL) process.next_call = DuplicateOf(job);
  const bool is_spare = place < 0;
  process.next_world =
      PartOf(job, is_spare ? MPI_UNDEFINED : 0, std::max(place, 0));
  if (is_spare) return kNoContext;
  const MPI_Comm world = process.next_world;
  SetOversubscribed(IsOversubscribed(world));
  return AddRoot(std::make_shared<Communicator>(
      world, timeout, Channels::Make(world, machine), nullptr));
}

void LookAtStart() {
  const MPI_Comm parent = StartComm();
  if (parent != MPI_COMM_NULL && !FailedRanks(parent).empty()) RevokeStart();
}

bool AgreeOnSurvivors(bool is_made) {
  Process& process = ThisProcess();
  const MPI_Comm parent = StartComm();
  StartStep step = AgreeInStart(is_made, true);
  // A spare waits for the steps of the ranks of the world.
  while (step == StartStep::kMade) step = AgreeInStart(true, true);
  const bool agreed = step == StartStep::kEnded;
  if (agreed) {
    process.job = parent;
    process.world = process.next_world;
    process.call = process.next_call;
    process.is_spare = process.world == MPI_COMM_NULL;
  }
  EndStart();
  EndMaking();
  return agreed;
}

void Renumber(std::int64_t context, std::int64_t number) {
  Communicators().Move(context, number);
}

int Close(std::int64_t context) {
  const std::shared_ptr<Communicator> comm = Communicators().Find(context);
  if (comm == nullptr) return 0;
  Communicators().Remove(context);
  comm->Close();
  const int forgotten = ForgetHandles(*comm);
  LeaveWindows(comm.get());
  Process& process = ThisProcess();
  std::lock_guard<std::mutex> lock(process.mutex);
  auto& roots = process.roots;
  const auto root = std::find(roots.begin(), roots.end(), comm);
  if (root == roots.end()) return forgotten;
  roots.erase(root);
  if (!Finalized() && !comm->failed()) comm->AnnounceLeave();
  return forgotten;
}

std::vector<std::string> Failures() {
  return FailuresOf(Communicators().All());
}

void Abandon(const std::string& reason) {
  ThisProcess().is_abandoned = true;
  for (const auto& comm : Communicators().All()) {
    comm->Fail(ffi::ErrorCode::kAborted, reason);
  }
}

bool Leave() {
  Process& process = ThisProcess();
  if (Finalized() || process.is_abandoned) return false;
  if (process.has_left) return true;
  // Peers still need the messages of operations that were not waited on here.
  Engine::Get().Drain();
  LeaveWindows(nullptr);
  std::lock_guard<std::mutex> lock(process.mutex);
  for (const auto& root : process.roots) {
    if (root->failed()) return false;
  }
  for (const auto& root : process.roots) root->AnnounceLeave();
  WaitTime waited;
  for (const auto& root : process.roots) {
    // The others may still work for hours; MPI_Finalize would spin meanwhile.
    const timespec nap{0, 1'000'000};
    for (int rank = 0; rank < root->size(); ++rank) {
      while (rank != root->rank()) {
        root->ReadControlMessages();
        if (root->failed()) return false;
        if (root->HasLeft(rank)) break;
        // A fault-tolerant job goes on without this rank, once the others have
        // taken what it has sent.
        root->FindGone();
        if (root->IsGone(rank) || (root->is_fault_tolerant() &&
                                   Seconds(waited.Look()) > kLeaveAfter)) {
          break;
        }
        nanosleep(&nap, nullptr);
      }
    }
  }
  process.has_left = true;
  return true;
}

void Finish() {
  if (!Leave()) return;
  Engine::Get().Stop();
  // With messages to failed ranks it might wait for good.
  if (ThisProcess().has_started_mpi && !IsFaultTolerant()) MPI_Finalize();
}

std::vector<std::vector<std::int64_t>> ReadCounters(std::int64_t context) {
  const std::shared_ptr<Communicator> comm = Get(context);
  std::vector<std::vector<std::int64_t>> counters = comm->traffic().Read();
  counters.push_back(comm->Missing());
  return counters;
}

std::vector<std::int64_t> ReadWaits(std::int64_t context) {
  return Get(context)->traffic().ReadWaits();
}

std::vector<int> SharedMemoryRanks(std::int64_t context) {
  const std::shared_ptr<Communicator> comm = Get(context);
  std::vector<int> ranks;
  for (int rank = 0; rank < comm->size(); ++rank) {
    if (rank == comm->rank() || comm->mailboxes() == nullptr) continue;
    if (comm->mailboxes()->Reaches(rank)) ranks.push_back(rank);
  }
  return ranks;
}

int ChunksInFlight(std::int64_t context) {
  return static_cast<int>(Get(context)->chunks_in_flight());
}

void ResetCounters(std::int64_t context) {
  Get(context)->traffic().Reset();
  Get(context)->ResetMissing();
}

}  // namespace jfog::mpi
