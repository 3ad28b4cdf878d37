// The arena: one reserved address range, seen from TypeScript as one ArrayBuffer, and the guard that keeps a truncated
// guest memory file from killing the process.
#include "native.h"

#include <atomic>
#include <csignal>
#include <cstring>
#include <mutex>

#include <sys/mman.h>
#include <unistd.h>

namespace strata {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = size_t{1} << 30;  // lets regions backed by 1 GiB pages be mapped in place
constexpr int kArenasMax = 256;

// First page of every arena; index.ts reads it through the ArrayBuffer.
struct Header {
  uint32_t faults;  // SIGBUS caught so far
  uint32_t reserved;
  double fault_offset;  // where the latest was
};

// Read by the signal handler: slots are published with release order and never move.
struct Slot {
  std::atomic<char*> base{nullptr};
  std::atomic<size_t> size{0};
};
Slot slots[kArenasMax];
std::mutex slots_mutex;
struct sigaction previous_action;

bool ReplaceFaultingPage(char* address) {
  // Huge pages can be replaced only whole: try the page sizes upwards.
  for (size_t page : {kPage, size_t{2} << 20, size_t{1} << 30}) {
    char* start = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(address) & ~(page - 1));
    void* mapped = mmap(start, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (mapped == start) return true;
  }
  return false;
}

// An access to guest memory beyond the end of its file: put a zero page there and take note, so that the
// session is failed and the daemon lives (reference: CVE class of truncated memfds).
void OnSigbus(int signal, siginfo_t* info, void* context) {
  char* address = static_cast<char*>(info->si_addr);
  for (Slot& slot : slots) {
    char* base = slot.base.load(std::memory_order_acquire);
    if (base == nullptr || address < base || address >= base + slot.size.load(std::memory_order_relaxed)) continue;
    int saved_errno = errno;
    bool replaced = ReplaceFaultingPage(address);
    errno = saved_errno;
    if (!replaced) break;
    auto* header = reinterpret_cast<Header*>(base);
    header->fault_offset = static_cast<double>(address - base);
    __atomic_fetch_add(&header->faults, 1, __ATOMIC_RELEASE);
    return;
  }
  if (previous_action.sa_flags & SA_SIGINFO) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (previous_action.sa_handler == SIG_DFL || previous_action.sa_handler == SIG_IGN) {
    std::signal(SIGBUS, SIG_DFL);  // the access repeats and ends the process, as it should
  } else {
    previous_action.sa_handler(signal);
  }
}

void InstallGuard() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action;
    std::memset(&action, 0, sizeof action);
    action.sa_sigaction = OnSigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigaction(SIGBUS, &action, &previous_action);
  });
}

bool PublishSlot(char* base, size_t size) {
  std::lock_guard<std::mutex> lock(slots_mutex);
  for (Slot& slot : slots) {
    if (slot.base.load(std::memory_order_relaxed) != nullptr) continue;
    slot.size.store(size, std::memory_order_relaxed);
    slot.base.store(base, std::memory_order_release);
    return true;
  }
  return false;
}

void WithdrawSlot(char* base) {
  std::lock_guard<std::mutex> lock(slots_mutex);
  for (Slot& slot : slots) {
    if (slot.base.load(std::memory_order_relaxed) == base) slot.base.store(nullptr, std::memory_order_release);
  }
}

void FreeArena(void* data, size_t length, void*) {
  WithdrawSlot(static_cast<char*>(data));
  munmap(data, length);
}

// arenaReserve(sizeBytes) -> ArrayBuffer, or -errno
Napi::Value Reserve(const Napi::CallbackInfo& info) {
  InstallGuard();
  size_t size = Size(info, 0);
  // Reserve with room to align, then give the ends back.
  void* raw = mmap(nullptr, size + kAlignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return Outcome(info, -1);
  char* start = static_cast<char*>(raw);
  char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(start) + kAlignment - 1) & ~(kAlignment - 1));
  if (base != start) munmap(start, base - start);
  if (base + size != start + size + kAlignment) munmap(base + size, start + kAlignment - base);
  madvise(base, size, MADV_DONTDUMP);  // guest data stays out of core dumps
  if (mprotect(base, kPage, PROT_READ | PROT_WRITE) != 0 || !PublishSlot(base, size)) {
    munmap(base, size);
    errno = ENOMEM;
    return Outcome(info, -1);
  }
  // Node-API's external ArrayBuffer ends at 4 GiB, V8's own does not.
  v8::Isolate* isolate = v8::Isolate::GetCurrent();
  std::unique_ptr<v8::BackingStore> store = v8::ArrayBuffer::NewBackingStore(base, size, FreeArena, nullptr);
  v8::Local<v8::ArrayBuffer> buffer = v8::ArrayBuffer::New(isolate, std::move(store));
  napi_value value;
  std::memcpy(&value, &buffer, sizeof value);
  return Napi::Value(info.Env(), value);
}

// arenaBase(buffer) -> address
Napi::Value Base(const Napi::CallbackInfo& info) {
  void* data = nullptr;
  size_t length = 0;
  napi_get_arraybuffer_info(info.Env(), info[0], &data, &length);
  return Napi::Number::New(info.Env(), static_cast<double>(reinterpret_cast<uintptr_t>(data)));
}

// arenaMapAnonymous(address, length): on huge pages, where the kernel has them and whole ones fit in.
Napi::Value MapAnonymous(const Napi::CallbackInfo& info) {
  void* mapped = mmap(Pointer(info, 0), Size(info, 1), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return Outcome(info, -1);
  madvise(mapped, Size(info, 1), MADV_HUGEPAGE);
  return Outcome(info, 0);
}

// arenaMapFile(address, length, fd, fileOffset)
Napi::Value MapFile(const Napi::CallbackInfo& info) {
  void* mapped = mmap(Pointer(info, 0), Size(info, 1), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                      Int(info, 2), static_cast<off_t>(Number(info, 3)));
  if (mapped == MAP_FAILED) return Outcome(info, -1);
  madvise(mapped, Size(info, 1), MADV_DONTDUMP);
  return Outcome(info, 0);
}

// arenaUnmap(address, length): what was there is gone, the range stays reserved.
Napi::Value Unmap(const Napi::CallbackInfo& info) {
  void* mapped = mmap(Pointer(info, 0), Size(info, 1), PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  return Outcome(info, mapped == MAP_FAILED ? -1 : 0);
}

}  // namespace

void InitArena(Napi::Env env, Napi::Object exports) {
  Export<Reserve>(env, exports, "arenaReserve");
  Export<Base>(env, exports, "arenaBase");
  Export<MapAnonymous>(env, exports, "arenaMapAnonymous");
  Export<MapFile>(env, exports, "arenaMapFile");
  Export<Unmap>(env, exports, "arenaUnmap");
}

}  // namespace strata
