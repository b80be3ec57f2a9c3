// The Python module `jfog._mpi`: a table of functions and FFI handlers.
#include "common/module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/deadline.h"
#include "common/places.h"
#include "common/weighted_sum.h"
#include "mpi/clock_offset.h"
#include "mpi/collectives.h"
#include "mpi/fault_tolerance.h"
#include "mpi/finite_time.h"
#include "mpi/hierarchical.h"
#include "mpi/lifecycle.h"
#include "mpi/neighbor_allgather.h"
#include "mpi/neighbor_allreduce.h"
#include "mpi/plan.h"
#include "mpi/program.h"
#include "mpi/raw_exchange.h"
#include "mpi/state_signal.h"
#include "mpi/timeline.h"
#include "mpi/wait.h"
#include "mpi/windows/handlers.h"
#include "mpi/windows/mutex.h"
#include "xla/ffi/api/ffi.h"

namespace py = pybind11;

namespace jfog::mpi {
namespace {

py::list AsBytes(const std::vector<std::string>& texts) {
  py::list all;
  for (const std::string& each : texts) all.append(py::bytes(each));
  return all;
}

}  // namespace

PYBIND11_MODULE(_mpi, m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.attr("__doc__") = "MPI for jfog: communicators and FFI handlers.";
  m.attr("BUILT_WITH") = JFOG_MPI_BUILT_WITH;
  m.def("library_version", &LibraryVersion);
  m.def("start", &Start, NoGil());
  m.def("open_world", &OpenWorld, py::arg("local_size"), py::arg("timeout"),
        py::arg("spares") = 0, NoGil());
  m.def("open_fortran", &OpenFortran, py::arg("handle"), py::arg("local_size"),
        py::arg("timeout"), NoGil());
  // The timeout is that of the communicator, whatever is passed.
  m.def(
      "split",
      [](std::int64_t context, int color, int key, double) {
        return Split(context, color, key);
      },
      py::arg("context"), py::arg("color"), py::arg("key"),
      py::arg("timeout") = 0, NoGil());
  m.def("rank", &Rank, py::arg("context"));
  m.def("size", &Size, py::arg("context"));
  m.def("machines", &Machines, py::arg("context"), NoGil());
  m.def("leader_in_job", &LeaderInJob, NoGil());
  m.def(
      "gather",
      [](std::int64_t context, const py::bytes& text, bool patient) {
        std::vector<std::string> texts;
        {
          const std::string mine = text;
          py::gil_scoped_release release;
          texts = Gather(context, mine, patient);
        }
        return AsBytes(texts);
      },
      py::arg("context"), py::arg("text"), py::arg("patient") = false);
  m.def("renumber", &Renumber, py::arg("context"), py::arg("number"));
  m.def("close", &Close, py::arg("context"));
  m.def("has_fault_tolerance", &HasFaultTolerance);
  m.def("missing", &Missing, py::arg("context"));
  m.def("set_reweights", &SetReweights, py::arg("context"),
        py::arg("reweights"));
  m.def("find_hangs", &FindHangs, py::arg("context"), py::arg("shortest"),
        py::arg("processes"));
  m.def("interrupt", &Interrupt, py::arg("context"), NoGil());
  m.def("call_spares", &CallSpares, NoGil());
  m.def("look_as_spare", [] {
    SpareState state;
    {
      py::gil_scoped_release release;
      state = LookAsSpare();
    }
    return py::make_tuple(state.is_called, state.failed);
  });
  m.def("shrink_job", &ShrinkJob, NoGil());
  m.def(
      "gather_in_start",
      [](const py::bytes& text) {
        std::vector<std::string> texts;
        {
          const std::string mine = text;
          py::gil_scoped_release release;
          texts = GatherInStart(mine);
        }
        return AsBytes(texts);
      },
      py::arg("text"));
  m.def("open_in_start", &OpenInStart, py::arg("place"), py::arg("machine"),
        py::arg("timeout"), NoGil());
  m.def("look_at_start", &LookAtStart, NoGil());
  m.def("agree_on_survivors", &AgreeOnSurvivors, py::arg("is_made"), NoGil());
  m.def("failures", &Failures);
  m.def("reset_program_device", &ResetProgramDevice);
  m.def("abandon", &Abandon, py::arg("reason"));
  m.def("leave", &Leave, NoGil());
  m.def("finish", &Finish, NoGil());
  m.def("counters", &ReadCounters, py::arg("context"));
  m.def("reset_counters", &ResetCounters, py::arg("context"));
  m.def("waits", &ReadWaits, py::arg("context"));
  m.def("shared_memory_ranks", &SharedMemoryRanks, py::arg("context"));
  m.def("chunks_in_flight", &ChunksInFlight, py::arg("context"));
  m.def("weighted_sum_kernel", &WeightedSumKernel);
  m.def("add_place", &AddPlace, py::arg("operation"), py::arg("bytes"),
        py::arg("place"), py::arg("leaves"));
  m.def("set_warnings", &Deadline::SetWarnings, py::arg("on"));
  m.def("handle_state_signal", &HandleStateSignal, py::arg("signal"));
  m.def("raw_neighbor_allreduce", &RawNeighborAllreduce, py::arg("address"),
        py::arg("count"), py::arg("source_begin"), py::arg("sources"),
        py::arg("weights"), py::arg("destination_begin"),
        py::arg("destinations"), py::arg("iterations"), NoGil());
  m.def("raw_allreduce", &RawAllreduce, py::arg("address"), py::arg("count"),
        py::arg("iterations"), NoGil());
  m.def("begin_timeline", &BeginTimeline, py::arg("events"));
  m.def("end_timeline", &EndTimeline);
  m.def("read_timeline", [] {
    TimelineEvents events;
    {
      py::gil_scoped_release release;
      events = ReadTimeline();
    }
    return py::make_tuple(py::bytes(events.bytes), events.lost);
  });
  m.def("timeline_names", &TimelineNames);
  m.def("measure_clock", &MeasureClock, py::arg("context"), NoGil());
  m.def("lock_window", &LockWindow, py::arg("number"), py::arg("ranks"),
        NoGil());
  m.def("unlock_window", &UnlockWindow, py::arg("number"), py::arg("ranks"),
        NoGil());
  m.def("registrations", [] {
    py::dict targets;
    targets["jfog_mpi_neighbor_allreduce"] =
        Stages(MakeNeighborAllreduce, NeighborAllreduce);
    targets["jfog_mpi_peer_allreduce"] = Capsule(PeerAllreduce);
    targets["jfog_mpi_hierarchical_neighbor_allreduce"] = Stages(
        MakeHierarchicalNeighborAllreduce, HierarchicalNeighborAllreduce);
    targets["jfog_mpi_finite_time_average"] =
        Stages(MakeFiniteTimeAverage, FiniteTimeAverage);
    targets["jfog_mpi_neighbor_allgather"] =
        Stages(MakeNeighborAllgather, NeighborAllgather);
    targets["jfog_mpi_neighbor_allgather_transpose"] =
        Stages(MakeNeighborAllgatherTranspose, NeighborAllgatherTranspose);
    targets["jfog_mpi_allreduce"] = Capsule(Allreduce);
    targets["jfog_mpi_broadcast"] = Capsule(Broadcast);
    targets["jfog_mpi_allgather"] = Capsule(Allgather);
    targets["jfog_mpi_barrier"] = Capsule(Barrier);
    targets["jfog_mpi_win_create"] = Capsule(WinCreate);
    targets["jfog_mpi_win_put"] = Capsule(WinPut);
    targets["jfog_mpi_win_accumulate"] = Capsule(WinAccumulate);
    targets["jfog_mpi_win_get"] = Capsule(WinGet);
    targets["jfog_mpi_win_update"] = Capsule(WinUpdate);
    targets["jfog_mpi_win_missing"] = Capsule(WinMissing);
    targets["jfog_mpi_win_version"] = Capsule(WinVersion);
    targets["jfog_mpi_win_associated_p"] = Capsule(WinAssociatedP);
    targets["jfog_mpi_win_free"] = Capsule(WinFree);
    targets["jfog_mpi_program_begin"] = Capsule(ProgramBegin);
    targets["jfog_mpi_program_ready"] = Capsule(ProgramReady);
    targets["jfog_mpi_wait"] = Capsule(Wait);
    targets["jfog_mpi_poll"] = Capsule(Poll);
    return targets;
  });
  m.def("types", [] { return Types<State>("jfog_mpi_plan"); });
}

}  // namespace jfog::mpi
