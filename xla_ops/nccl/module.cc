// The Python module `jfog._nccl`: a table of functions and FFI handlers.
#include "common/module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "common/deadline.h"
#include "nccl/collectives.h"
#include "nccl/dynamic_library.h"
#include "nccl/exchange.h"
#include "nccl/handles.h"
#include "nccl/hierarchical.h"
#include "nccl/host_fallback.h"
#include "nccl/instantiate.h"
#include "nccl/lifecycle.h"
#include "nccl/plan.h"
#include "nccl/wait.h"
#include "nccl/watchdog.h"
#include "xla/ffi/api/ffi.h"

namespace py = pybind11;

namespace jfog::nccl {
PYBIND11_MODULE(_nccl, m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.attr("__doc__") = "NCCL for jfog: communicators and FFI handlers.";
  m.def("open_nccl", &OpenNccl, py::arg("path"), NoGil());
  m.def("open_cuda", &OpenCuda, py::arg("path"), NoGil());
  m.def("set_warnings", &Deadline::SetWarnings, py::arg("on"));
  m.def("version", &NcclVersion);
  m.def("path", &NcclPath);
  m.def("unique_id", [] { return py::bytes(MakeUniqueId()); });
  m.def("create", &Create, py::arg("context"), py::arg("unique_ids"),
        py::arg("rank"), py::arg("size"), py::arg("device"), py::arg("timeout"),
        NoGil());
  m.def("close", &Close, py::arg("context"), NoGil());
  m.def("failures", &Failures);
  m.def("abandon", &Abandon, py::arg("reason"), NoGil());
  m.def("finish", &Finish, NoGil());
  m.def("counters", &ReadCounters, py::arg("context"));
  m.def("reset_counters", &ResetCounters, py::arg("context"));
  m.def(
      "set_interval",
      [](double seconds) { Watchdog::Get().SetInterval(seconds); },
      py::arg("seconds"));
  m.def("registrations", [] {
    const py::dict exchange = Stages(NcclMakeExchange, NcclExchange);
    py::dict targets;
    targets["jfog_nccl_neighbor_allreduce"] = exchange;
    targets["jfog_nccl_peer_allreduce"] = exchange;
    targets["jfog_nccl_neighbor_allgather"] = exchange;
    targets["jfog_nccl_neighbor_allgather_transpose"] = exchange;
    targets["jfog_nccl_hierarchical_neighbor_allreduce"] = exchange;
    targets["jfog_nccl_finite_time_average"] = exchange;
    targets["jfog_nccl_hierarchical_start"] =
        Stages(NcclMakeHierarchical, NcclHierarchicalStart);
    targets["jfog_nccl_allreduce"] = Stages(NcclMakeCollective, NcclAllreduce);
    targets["jfog_nccl_broadcast"] = Stages(NcclMakeCollective, NcclBroadcast);
    targets["jfog_nccl_allgather"] = Stages(NcclMakeCollective, NcclAllgather);
    targets["jfog_nccl_barrier"] = Stages(NcclMakeCollective, NcclBarrier);
    targets["jfog_nccl_wait"] = Stages(NcclWait);
    targets["jfog_nccl_poll"] = Stages(NcclPoll);
    return targets;
  });
  m.def("types", [] { return Types<State>("jfog_nccl_plan"); });
  m.def(
      "staged",
      [](const std::map<std::string, py::capsule>& host) {
        py::dict targets;
        for (const auto& [operation, capsule] : host) {
          XLA_FFI_Handler* handler = Staged(
              reinterpret_cast<XLA_FFI_Handler*>(capsule.get_pointer<void>()));
          if (handler == nullptr) {
            throw std::runtime_error("jfog: too many handlers to stage");
          }
          targets[("jfog_nccl_" + operation).c_str()] = Capsule(handler);
        }
        return targets;
      },
      py::arg("host"));
}

}  // namespace jfog::nccl
