// The CUDA driver of the emulation: contexts, streams, events and memory.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>

#include "emulation.h"
#include "heap.h"

namespace jfog::emulation {

using nccl::CudaContext;
using nccl::CudaEvent;
using nccl::CudaStream;
using nccl::DevicePointer;

namespace {

enum CudaResult : int {
  kOk = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotReady = 600,
};

constexpr int kDevices = 8;

const CudaContext kContext = reinterpret_cast<CudaContext>(0xc0de0);

// Counts of calls, and the calls that are to fail.
struct Ledger {
  std::mutex mutex;
  std::map<std::string, long> calls;
  std::map<std::string, std::pair<long, int>> failures;  // call and code
  std::atomic<long> faults{0};
  std::atomic<long> primary_contexts{0};

  Ledger() {
    const char* const spec = std::getenv("JFOG_EMULATION_FAIL");
    char function[64];
    long call;
    int code;
    if (spec &&
        std::sscanf(spec, "%63[^:]:%ld:%d", function, &call, &code) == 3)
      failures[function] = {call, code};
  }
};

Ledger& TheLedger() {
  static Ledger& ledger = *new Ledger;
  return ledger;
}

// A position in a stream.
struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  bool passed = false;

  void Pass() {
    std::lock_guard<std::mutex> lock(mutex);
    passed = true;
    changed.notify_all();
  }
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return passed; });
  }
};

struct Event {
  std::mutex mutex;
  std::shared_ptr<Mark> mark;  // null: never recorded

  std::shared_ptr<Mark> Get() {
    std::lock_guard<std::mutex> lock(mutex);
    return mark;
  }
};

Registry<Event>& Events() {
  static auto& events = *new Registry<Event>;
  return events;
}

int Wrong(int code, const char* function, const std::string& why) {
  Fault(std::string(function) + ": " + why);
  return code;
}

void* At(DevicePointer pointer) { return reinterpret_cast<void*>(pointer); }

std::shared_ptr<Stream> FindStream(const char* function, CudaStream handle) {
  std::shared_ptr<Stream> stream = Streams().Find(handle);
  if (!stream)
    Fault(std::string(function) + ": " +
          (handle ? "the stream was destroyed or never made"
                  : "the null stream orders nothing"));
  return stream;
}

std::shared_ptr<Event> FindEvent(const char* function, CudaEvent handle) {
  std::shared_ptr<Event> event = Events().Find(handle);
  if (!event)
    Fault(std::string(function) + ": the event was destroyed or never made");
  return event;
}

// One side of a copy.
struct Place {
  void* begin;
  Memory memory;
};

// Copies as the driver does: pinned memory is read and written when the stream
// comes to it, other memory of the host before the call returns.
int Copy(const char* function, Place to, Place from, std::size_t bytes,
         CudaStream handle) {
  if (!HasContext(function)) return kInvalidContext;
  const std::shared_ptr<Stream> stream = FindStream(function, handle);
  if (!stream) return kInvalidHandle;
  if (!bytes) return kOk;
  if (!to.begin || !from.begin)
    return Wrong(kInvalidValue, function, "a null pointer");
  if (!CheckMemory(function, to.begin, bytes, to.memory) ||
      !CheckMemory(function, from.begin, bytes, from.memory))
    return kInvalidValue;
  std::shared_ptr<std::vector<char>> read;
  if (from.memory == Memory::kHost && !TheHeap().IsPinned(from.begin)) {
    const char* const begin = static_cast<const char*>(from.begin);
    read = std::make_shared<std::vector<char>>(begin, begin + bytes);
  }
  stream->Enqueue([=] {
    if (CheckMemory(function, to.begin, bytes, to.memory) &&
        (read || CheckMemory(function, from.begin, bytes, from.memory)))
      std::memmove(to.begin, read ? read->data() : from.begin, bytes);
  });
  if (to.memory == Memory::kHost && !TheHeap().IsPinned(to.begin))
    stream->Synchronize();
  return kOk;
}

template <typename T>
int Fill(const char* function, DevicePointer to, T value, std::size_t count,
         CudaStream handle) {
  if (!HasContext(function)) return kInvalidContext;
  const std::shared_ptr<Stream> stream = FindStream(function, handle);
  if (!stream) return kInvalidHandle;
  if (!count) return kOk;
  if (!to || to % sizeof(T))
    return Wrong(kInvalidValue, function, "a null or misaligned pointer");
  const std::size_t bytes = count * sizeof(T);
  if (!CheckMemory(function, At(to), bytes, Memory::kDevice))
    return kInvalidValue;
  stream->Enqueue([=] {
    if (!CheckMemory(function, At(to), bytes, Memory::kDevice)) return;
    for (std::size_t i = 0; i < count; ++i)
      std::memcpy(static_cast<char*>(At(to)) + i * sizeof(T), &value,
                  sizeof(T));
  });
  return kOk;
}

int Allocate(const char* function, std::size_t size, Memory memory,
             void** pointer) {
  if (!HasContext(function)) return kInvalidContext;
  if (!pointer || !size)
    return Wrong(kInvalidValue, function, "a null pointer or no bytes");
  return TheHeap().Allocate(size, memory, pointer) ? kOk : kOutOfMemory;
}

int Free(const char* function, void* pointer, Memory memory) {
  if (!HasContext(function)) return kInvalidContext;
  if (!pointer) return Wrong(kInvalidValue, function, "a null pointer");
  const std::string wrong = TheHeap().Free(pointer, memory);
  return wrong.empty() ? kOk : Wrong(kInvalidValue, function, wrong);
}

}  // namespace

long Setting(const char* name, long otherwise) {
  const char* const value = std::getenv(name);
  return value && *value ? std::atol(value) : otherwise;
}

int Enter(const char* function) {
  Ledger& ledger = TheLedger();
  std::lock_guard<std::mutex> lock(ledger.mutex);
  const long call = ++ledger.calls[function];
  const auto failure = ledger.failures.find(function);
  if (failure == ledger.failures.end() || failure->second.first != call)
    return 0;
  return failure->second.second;
}

void Fault(const std::string& text) {
  ++TheLedger().faults;
  const long strict = Setting("JFOG_EMULATION_STRICT", 1);
  if (strict) std::fprintf(stderr, "emulation: %s\n", text.c_str());
  if (strict > 1) std::abort();
}

std::shared_ptr<Stream> Stream::Create() {
  auto stream = std::make_shared<Stream>();
  std::thread([stream] { stream->Run(); }).detach();
  return stream;
}

void Stream::Enqueue(std::function<void()> work) {
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(std::move(work));
  ++enqueued_;
  changed_.notify_all();
}

void Stream::Synchronize() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this, all = enqueued_] { return done_ >= all; });
}

void Stream::End() {
  std::lock_guard<std::mutex> lock(mutex_);
  ending_ = true;
  changed_.notify_all();
}

void Stream::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return ending_ || !queue_.empty(); });
    if (queue_.empty()) return;
    std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    work();
    work = nullptr;
    lock.lock();
    ++done_;
    changed_.notify_all();
  }
}

Registry<Stream>& Streams() {
  static auto& streams = *new Registry<Stream>;
  return streams;
}

CudaStream MainStream() {
  static void* const stream = Streams().Add(Stream::Create());
  return static_cast<CudaStream>(stream);
}

std::vector<CudaContext>& ContextStack() {
  thread_local std::vector<CudaContext> stack;
  return stack;
}

bool HasContext(const char* function) {
  if (!ContextStack().empty()) return true;
  Fault(std::string(function) + ": no context is current on this thread");
  return false;
}

bool CheckMemory(const char* function, const void* begin, std::size_t bytes,
                 Memory memory) {
  const std::string wrong = TheHeap().Check(begin, bytes, memory);
  if (!wrong.empty())
    Fault(std::string(function) + ": memory of " + std::to_string(bytes) +
          " bytes cannot be used: " + wrong);
  return wrong.empty();
}

extern "C" {

int cuGetErrorName(int code, const char** name) {
  JFOG_ENTER(int);
  static const std::map<int, const char*> names = {
      {kOk, "CUDA_SUCCESS"},
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
      {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
      {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
      {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
      {kNotReady, "CUDA_ERROR_NOT_READY"},
      {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
  };
  if (!name) return Wrong(kInvalidValue, __func__, "a null pointer");
  const auto found = names.find(code);
  *name = found == names.end() ? nullptr : found->second;
  return *name ? kOk : kInvalidValue;
}

// These three are of the benchmarks' raw peers, not of jfog.

int cuInit(unsigned int flags) { return flags == 0 ? kOk : kInvalidValue; }

int cuDriverGetVersion(int* version) {
  if (!version) return kInvalidValue;
  *version = 13000;
  return kOk;
}

int cuCtxSetCurrent(CudaContext context) {
  JFOG_ENTER(int);
  if (context != kContext)
    return Wrong(kInvalidContext, __func__, "there is no such context");
  if (ContextStack().empty()) ContextStack().push_back(context);
  return kOk;
}

int cuDeviceGet(int* device, int ordinal) {
  JFOG_ENTER(int);
  if (!device) return Wrong(kInvalidValue, __func__, "a null pointer");
  if (ordinal < 0 || ordinal >= kDevices) return kInvalidDevice;
  *device = ordinal;
  return kOk;
}

int cuDevicePrimaryCtxRetain(CudaContext* context, int device) {
  JFOG_ENTER(int);
  if (!context) return Wrong(kInvalidValue, __func__, "a null pointer");
  if (device < 0 || device >= kDevices) return kInvalidDevice;
  ++TheLedger().primary_contexts;
  *context = kContext;
  return kOk;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  JFOG_ENTER(int);
  if (device < 0 || device >= kDevices) return kInvalidDevice;
  if (--TheLedger().primary_contexts < 0) {
    ++TheLedger().primary_contexts;
    return Wrong(kInvalidContext, __func__,
                 "released more often than retained");
  }
  return kOk;
}

int cuStreamGetCtx(CudaStream stream, CudaContext* context) {
  JFOG_ENTER(int);
  if (!context) return Wrong(kInvalidValue, __func__, "a null pointer");
  if (!FindStream(__func__, stream)) return kInvalidHandle;
  *context = kContext;
  return kOk;
}

int cuCtxPushCurrent_v2(CudaContext context) {
  JFOG_ENTER(int);
  if (context != kContext)
    return Wrong(kInvalidContext, __func__, "there is no such context");
  ContextStack().push_back(context);
  return kOk;
}

int cuCtxPopCurrent_v2(CudaContext* context) {
  JFOG_ENTER(int);
  if (!HasContext(__func__)) return kInvalidContext;
  if (context) *context = ContextStack().back();
  ContextStack().pop_back();
  return kOk;
}

int cuStreamCreate(CudaStream* stream, unsigned int flags) {
  JFOG_ENTER(int);
  if (!HasContext(__func__)) return kInvalidContext;
  if (!stream || flags > nccl::kStreamNonBlocking)
    return Wrong(kInvalidValue, __func__, "a null pointer or unknown flags");
  *stream = static_cast<CudaStream>(Streams().Add(Stream::Create()));
  return kOk;
}

int cuStreamDestroy_v2(CudaStream stream) {
  JFOG_ENTER(int);
  if (!HasContext(__func__)) return kInvalidContext;
  if (!FindStream(__func__, stream)) return kInvalidHandle;
  if (stream == MainStream())
    return Wrong(kInvalidHandle, __func__, "the stream is XLA's");
  Streams().Remove(stream)->End();
  return kOk;
}

int cuStreamSynchronize(CudaStream handle) {
  JFOG_ENTER(int);
  if (!HasContext(__func__)) return kInvalidContext;
  const std::shared_ptr<Stream> stream = FindStream(__func__, handle);
  if (!stream) return kInvalidHandle;
  stream->Synchronize();
  return kOk;
}

int cuStreamWaitEvent(CudaStream stream_handle, CudaEvent event_handle,
                      unsigned int flags) {
  JFOG_ENTER(int);
  if (!HasContext(__func__)) return kInvalidContext;
  if (flags) return Wrong(kInvalidValue, __func__, "unknown flags");
  const std::shared_ptr<Stream> stream = FindStream(__func__, stream_handle);
  const std::shared_ptr<Event> event = FindEvent(__func__, event_handle);
  if (!stream || !event) return kInvalidHandle;
  if (const std::shared_ptr<Mark> mark = event->Get())
    stream->Enqueue([mark] { mark->Wait(); });
  return kOk;
}

int cuEventCreate(CudaEvent* event, unsigned int flags) {
  JFOG_ENTER(int);
  if (!HasContext(__func__)) return kInvalidContext;
  if (!event || flags > 3)
    return Wrong(kInvalidValue, __func__, "a null pointer or unknown flags");
  *event = static_cast<CudaEvent>(Events().Add(std::make_shared<Event>()));
  return kOk;
}

int cuEventDestroy_v2(CudaEvent event) {
  JFOG_ENTER(int);
  if (!HasContext(__func__)) return kInvalidContext;
  if (!FindEvent(__func__, event)) return kInvalidHandle;
  Events().Remove(event);
  return kOk;
}

int cuEventRecord(CudaEvent event_handle, CudaStream stream_handle) {
  JFOG_ENTER(int);
  if (!HasContext(__func__)) return kInvalidContext;
  const std::shared_ptr<Stream> stream = FindStream(__func__, stream_handle);
  const std::shared_ptr<Event> event = FindEvent(__func__, event_handle);
  if (!stream || !event) return kInvalidHandle;
  auto mark = std::make_shared<Mark>();
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    event->mark = mark;
  }
  stream->Enqueue([mark] { mark->Pass(); });
  return kOk;
}

int cuEventQuery(CudaEvent handle) {
  JFOG_ENTER(int);
  const std::shared_ptr<Event> event = FindEvent(__func__, handle);
  if (!event) return kInvalidHandle;
  const std::shared_ptr<Mark> mark = event->Get();
  if (!mark) return kOk;
  std::lock_guard<std::mutex> lock(mark->mutex);
  return mark->passed ? kOk : kNotReady;
}

int cuMemAlloc_v2(DevicePointer* pointer, std::size_t size) {
  JFOG_ENTER(int);
  void* begin = nullptr;
  const int code =
      Allocate(__func__, size, Memory::kDevice, pointer ? &begin : nullptr);
  if (code == kOk) *pointer = reinterpret_cast<DevicePointer>(begin);
  return code;
}

int cuMemFree_v2(DevicePointer pointer) {
  JFOG_ENTER(int);
  return Free(__func__, At(pointer), Memory::kDevice);
}

int cuMemAllocHost_v2(void** pointer, std::size_t size) {
  JFOG_ENTER(int);
  return Allocate(__func__, size, Memory::kHost, pointer);
}

int cuMemFreeHost(void* pointer) {
  JFOG_ENTER(int);
  return Free(__func__, pointer, Memory::kHost);
}

int cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, std::size_t bytes,
                         CudaStream stream) {
  JFOG_ENTER(int);
  return Copy(__func__, {to, Memory::kHost}, {At(from), Memory::kDevice}, bytes,
              stream);
}

int cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, std::size_t bytes,
                         CudaStream stream) {
  JFOG_ENTER(int);
  return Copy(__func__, {At(to), Memory::kDevice},
              {const_cast<void*>(from), Memory::kHost}, bytes, stream);
}

int cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from,
                         std::size_t bytes, CudaStream stream) {
  JFOG_ENTER(int);
  return Copy(__func__, {At(to), Memory::kDevice}, {At(from), Memory::kDevice},
              bytes, stream);
}

int cuMemsetD32Async(DevicePointer to, unsigned int word, std::size_t count,
                     CudaStream stream) {
  JFOG_ENTER(int);
  return Fill(__func__, to, word, count, stream);
}

int cuMemsetD8Async(DevicePointer to, unsigned char byte, std::size_t count,
                    CudaStream stream) {
  JFOG_ENTER(int);
  return Fill(__func__, to, byte, count, stream);
}

// Queries for tests.

// How often production has called a function.
long jfog_emulation_calls(const char* function) {
  Ledger& ledger = TheLedger();
  std::lock_guard<std::mutex> lock(ledger.mutex);
  const auto found = ledger.calls.find(function);
  return found == ledger.calls.end() ? 0 : found->second;
}

// Lets the `call`-th call from now of a function return `code`.
void jfog_emulation_fail(const char* function, long call, int code) {
  Ledger& ledger = TheLedger();
  std::lock_guard<std::mutex> lock(ledger.mutex);
  ledger.failures[function] = {ledger.calls[function] + call, code};
}

// How many wrong calls there have been.
long jfog_emulation_faults() { return TheLedger().faults; }

long jfog_emulation_group_count() { return GroupCount(); }

// How many there are now of "device", "pinned" (allocations), "streams" (XLA's
// apart), "events", "communicators", "contexts" (retained); -1 for other words.
long jfog_emulation_live(const char* what) {
  const std::string kind = what;
  MainStream();
  if (kind == "device") return TheHeap().Live(Memory::kDevice);
  if (kind == "pinned") return TheHeap().Live(Memory::kHost);
  if (kind == "streams") return static_cast<long>(Streams().size()) - 1;
  if (kind == "events") return static_cast<long>(Events().size());
  if (kind == "communicators") return static_cast<long>(CommunicatorCount());
  if (kind == "contexts") return TheLedger().primary_contexts;
  return -1;
}

// XLA's stream, for tests that call the functions themselves.
void* jfog_emulation_main_stream() { return MainStream(); }

}  // extern "C"

namespace {

struct Exported {
  decltype(&cuGetErrorName) get_error_name;
  decltype(&cuDeviceGet) device_get;
  decltype(&cuDevicePrimaryCtxRetain) retain_primary_context;
  decltype(&cuDevicePrimaryCtxRelease_v2) release_primary_context;
  decltype(&cuStreamGetCtx) stream_get_context;
  decltype(&cuCtxPushCurrent_v2) push_context;
  decltype(&cuCtxPopCurrent_v2) pop_context;
  decltype(&cuStreamCreate) stream_create;
  decltype(&cuStreamDestroy_v2) stream_destroy;
  decltype(&cuStreamSynchronize) stream_synchronize;
  decltype(&cuStreamWaitEvent) stream_wait_event;
  decltype(&cuEventCreate) event_create;
  decltype(&cuEventDestroy_v2) event_destroy;
  decltype(&cuEventRecord) event_record;
  decltype(&cuEventQuery) event_query;
  decltype(&cuMemAlloc_v2) memory_allocate;
  decltype(&cuMemFree_v2) memory_free;
  decltype(&cuMemAllocHost_v2) host_allocate;
  decltype(&cuMemFreeHost) host_free;
  decltype(&cuMemcpyDtoHAsync_v2) copy_to_host;
  decltype(&cuMemcpyHtoDAsync_v2) copy_to_device;
  decltype(&cuMemcpyDtoDAsync_v2) copy_on_device;
  decltype(&cuMemsetD32Async) set_words;
  decltype(&cuMemsetD8Async) set_bytes;
};

using namespace nccl;
#define JFOG_CHECK(member, symbol, result, arguments)                  \
  static_assert(                                                       \
      std::is_same_v<decltype(Exported::member), result(*) arguments>, \
      symbol " has another type in nccl/api.h");
JFOG_CUDA_FUNCTIONS(JFOG_CHECK)
#undef JFOG_CHECK

}  // namespace
}  // namespace jfog::emulation
