// The owner of what lives as long as the process.
#ifndef JFOG_XLA_OPS_COMMON_PROCESS_WIDE_H_
#define JFOG_XLA_OPS_COMMON_PROCESS_WIDE_H_

namespace jfog {

// The one object of type T in a module, made at the first use and never
// destroyed: programs of XLA and threads of MPI and NCCL may still run while
// the process ends.
template <typename T>
T& ProcessWide() {
  static T* const object = new T;
  return *object;
}

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_PROCESS_WIDE_H_
