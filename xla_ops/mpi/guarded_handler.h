// Handlers whose exceptions are errors: none passes into XLA.
#ifndef JFOG_XLA_OPS_MPI_GUARDED_HANDLER_H_
#define JFOG_XLA_OPS_MPI_GUARDED_HANDLER_H_

#include <cstdint>
#include <memory>
#include <type_traits>

#include "common/status.h"
#include "mpi/communicator.h"
#include "mpi/plan.h"

namespace jfog::mpi {

template <auto* handler, const char* name>
struct GuardedHandler;

template <typename Result, typename... Args, Result (*handler)(Args...),
          const char* name>
struct GuardedHandler<handler, name> {
  static Result Call(Args... args) {
    try {
      return handler(args...);
    } catch (...) {
      std::shared_ptr<Communicator> comm;
      (Find(args, &comm), ...);
      return Failure{FailByException(comm.get(), name)};
    }
  }

 private:
  // The communicator is that of the plan, or of the first whole number among
  // the attributes, `context`.
  template <typename T>
  static void Find(const T& argument, std::shared_ptr<Communicator>* comm) {
    if (*comm != nullptr) return;
    if constexpr (std::is_same_v<T, State*>) {
      *comm = argument->comm;
    } else if constexpr (std::is_same_v<T, std::int64_t>) {
      *comm = Communicators().Find(argument);
    }
  }
};

}  // namespace jfog::mpi

// Defines a handler symbol like XLA_FFI_DEFINE_HANDLER_SYMBOL. `title` begins
// the texts of errors.
#define JFOG_DEFINE_HANDLER(symbol, title, handler, binding)               \
  static constexpr char symbol##Title[] = title;                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                           \
      symbol, (::jfog::mpi::GuardedHandler<handler, symbol##Title>::Call), \
      binding)

#endif  // JFOG_XLA_OPS_MPI_GUARDED_HANDLER_H_
