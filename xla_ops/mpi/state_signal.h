// The signal that asks a process for the state of its operations in flight.
#ifndef JFOG_XLA_OPS_MPI_STATE_SIGNAL_H_
#define JFOG_XLA_OPS_MPI_STATE_SIGNAL_H_

namespace jfog::mpi {

// Prints the state of the operations in flight on stderr whenever the signal
// comes, unless the process handles or ignores it already. Returns whether it
// does. The handler only posts a semaphore; a thread that waits for it prints.
bool HandleStateSignal(int signal);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_STATE_SIGNAL_H_
