// The signal that asks a process for the state of its operations in flight.
#include "mpi/state_signal.h"

#include <semaphore.h>
#include <signal.h>

#include <cerrno>
#include <cstdio>
#include <string>
#include <system_error>
#include <thread>

#include "mpi/progress_engine.h"

namespace jfog::mpi {
namespace {

sem_t requests;

void PostRequest(int) {
  const int error = errno;
  sem_post(&requests);
  errno = error;
}

void PrintStates() {
  for (;;) {
    if (sem_wait(&requests) != 0) continue;  // interrupted by a signal
    const std::string state = Engine::Get().State();
    std::fwrite(state.data(), 1, state.size(), stderr);
    std::fflush(stderr);
  }
}

}  // namespace

bool HandleStateSignal(int signal) {
  struct sigaction present = {};
  if (sigaction(signal, nullptr, &present) != 0) return false;
  if ((present.sa_flags & SA_SIGINFO) != 0) return false;
  if (present.sa_handler == PostRequest) return true;
  if (present.sa_handler != SIG_DFL) return false;
  static const bool has_thread = [] {
    sem_init(&requests, 0, 0);
    try {
      std::thread(PrintStates).detach();
    } catch (const std::system_error&) {
      return false;
    }
    return true;
  }();
  if (!has_thread) return false;
  struct sigaction action = {};
  action.sa_handler = PostRequest;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  return sigaction(signal, &action, nullptr) == 0;
}

}  // namespace jfog::mpi
