// NCCL and the CUDA driver, opened at run time: two tables of functions.
#include "nccl/dynamic_library.h"

#include <dlfcn.h>
#include <link.h>
#include <stdlib.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "common/process_wide.h"

namespace jfog::nccl {
namespace {

constexpr char kNccl[] = "libnccl.so.2";
constexpr char kCuda[] = "libcuda.so.1";

// Neither library is closed again: its threads may run until the process ends.
struct Libraries {
  std::mutex mutex;
  void* nccl = nullptr;
  void* cuda = nullptr;
  int version = 0;
  std::string nccl_path;
  std::string cuda_path;
  NcclFunctions nccl_functions;
  CudaFunctions cuda_functions;
};

struct LibraryDeleter {
  void operator()(void* library) const { dlclose(library); }
};
using Library = std::unique_ptr<void, LibraryDeleter>;

std::string LoaderError() {
  const char* text = dlerror();
  return text == nullptr ? "no reason given" : text;
}

// The file of a loaded object whose name starts with libnccl.so, or "". JAX's
// plugin loads it by its path, under which name alone it is not always found.
std::string LoadedNccl() {
  std::string found;
  dl_iterate_phdr(
      [](dl_phdr_info* object, std::size_t, void* result) {
        const char* path = object->dlpi_name;
        if (path == nullptr) return 0;
        const char* slash = std::strrchr(path, '/');
        const char* file = slash == nullptr ? path : slash + 1;
        if (std::strncmp(file, "libnccl.so", 10) != 0) return 0;
        *static_cast<std::string*>(result) = path;
        return 1;
      },
      &found);
  return found;
}

Library Load(const std::string& name, int flags) {
  return Library(dlopen(name.c_str(), flags));
}

// The file that an address lies in.
std::string FileOf(void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return "?";
  const std::unique_ptr<char, decltype(&std::free)> full(
      realpath(info.dli_fname, nullptr), &std::free);
  return full == nullptr ? info.dli_fname : full.get();
}

// Fills in a member of a table, or notes what is missing.
template <typename Function>
void Find(void* library, const char* symbol, Function* function,
          std::vector<const char*>* missing) {
  *function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (*function == nullptr) missing->push_back(symbol);
}

void ThrowIfMissing(const std::vector<const char*>& missing,
                    const std::string& name, const std::string& path,
                    const std::string& remedy) {
  if (missing.empty()) return;
  std::string text = "jfog: " + name + " in " + path + " lacks ";
  for (std::size_t i = 0; i < missing.size(); ++i) {
    if (i > 0) text += ", ";
    text += missing[i];
  }
  throw std::runtime_error(text + "; " + remedy);
}

Library OpenAnyNccl(const std::string& path) {
  constexpr int kFlags = RTLD_NOW | RTLD_LOCAL;
  const std::string remedy =
      "; JAX's CUDA plugin brings one (pip install \"jax[cuda13]\"), and so "
      "does pip install nvidia-nccl-cu13";
  if (!path.empty()) {
    Library library = Load(path, kFlags);
    if (library == nullptr) {
      throw std::runtime_error("jfog: cannot open NCCL at " + path + ": " +
                               LoaderError() + remedy);
    }
    return library;
  }
  if (Library library = Load(kNccl, kFlags | RTLD_NOLOAD)) return library;
  const std::string loaded = LoadedNccl();
  if (!loaded.empty()) {
    if (Library library = Load(loaded, kFlags | RTLD_NOLOAD)) return library;
  }
  Library library = Load(kNccl, kFlags);
  if (library == nullptr) {
    throw std::runtime_error(
        "jfog: cannot open NCCL: this process has loaded no libnccl.so, and "
        "the loader finds none (" +
        LoaderError() + ")" + remedy);
  }
  return library;
}

void ThrowIfOther(void* open, void* library, const std::string& open_path,
                  const char* name) {
  if (open == library) return;
  throw std::runtime_error(std::string("jfog: another ") + name +
                           " is open in this process, " + open_path);
}

}  // namespace

#define JFOG_FIND(member, symbol, result, arguments) \
  Find(library.get(), symbol, &functions.member, &missing);

void OpenNccl(const std::string& path) {
  Libraries& libraries = ProcessWide<Libraries>();
  std::lock_guard<std::mutex> lock(libraries.mutex);
  if (libraries.nccl != nullptr && path.empty()) return;
  Library library = OpenAnyNccl(path);
  if (libraries.nccl != nullptr) {
    return ThrowIfOther(libraries.nccl, library.get(), libraries.nccl_path,
                        "NCCL");
  }
  NcclFunctions functions;
  std::vector<const char*> missing;
  JFOG_NCCL_FUNCTIONS(JFOG_FIND)
  const std::string remedy = "pip install --upgrade nvidia-nccl-cu13";
  const std::string file =
      functions.get_version == nullptr
          ? path
          : FileOf(reinterpret_cast<void*>(functions.get_version));
  int version = 0;
  if (functions.get_version != nullptr &&
      functions.get_version(&version) == kSuccess && version < kOldestVersion) {
    throw std::runtime_error("jfog: NCCL " + VersionText(version) + " in " +
                             file + " is older than " +
                             VersionText(kOldestVersion) + "; " + remedy);
  }
  ThrowIfMissing(missing, "NCCL " + VersionText(version), file, remedy);
  libraries.nccl_functions = functions;
  libraries.version = version;
  libraries.nccl_path = file;
  libraries.nccl = library.release();
}

void OpenCuda(const std::string& path) {
  Libraries& libraries = ProcessWide<Libraries>();
  std::lock_guard<std::mutex> lock(libraries.mutex);
  if (libraries.cuda != nullptr && path.empty()) return;
  const std::string name = path.empty() ? kCuda : path;
  Library library = Load(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error("jfog: cannot open the CUDA driver " + name +
                             ": " + LoaderError() +
                             "; it comes with the driver of the GPU");
  }
  if (libraries.cuda != nullptr) {
    return ThrowIfOther(libraries.cuda, library.get(), libraries.cuda_path,
                        "CUDA driver");
  }
  CudaFunctions functions;
  std::vector<const char*> missing;
  JFOG_CUDA_FUNCTIONS(JFOG_FIND)
  ThrowIfMissing(missing, "the CUDA driver", name,
                 "update the driver of the GPU");
  libraries.cuda_functions = functions;
  libraries.cuda_path = name;
  libraries.cuda = library.release();
}

#undef JFOG_FIND

int NcclVersion() { return ProcessWide<Libraries>().version; }

std::string NcclPath() { return ProcessWide<Libraries>().nccl_path; }

const NcclFunctions& Nccl() { return ProcessWide<Libraries>().nccl_functions; }

const CudaFunctions& Cuda() { return ProcessWide<Libraries>().cuda_functions; }

std::string VersionText(int version) {
  return std::to_string(version / 10000) + "." +
         std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

}  // namespace jfog::nccl
