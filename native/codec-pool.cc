// Threads that carry out the jobs of all reactors of the process, and the ring by which each reactor hands them over.
//
// The ring lies in the reactor's memory (thread-codec-pool.ts): 64 bytes of header, `entries` jobs, `entries` completions of 4 bytes,
// and as many for the queue between the reactor and the threads.
// - the reactor fills in a job that is free, and submits its number; a thread takes it, carries it out, and writes number + 1 to
//   the next completion. The reactor takes completions in their order and sets them back to 0;
// - at most `entries` jobs are on their way, so no queue overflows;
// - header[0] != 0: the reactor sleeps and wants its eventfd to be signalled.
//
// Threads come when there is a job and nobody to do it, up to a number, sleep without a time limit, and go when the last ring is
// closed. They run nothing of V8.
#include "native.h"
#include "codec.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <csignal>
#include <mutex>
#include <thread>

#include <linux/futex.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace strata {
namespace {

constexpr int kRingsMax = 256;
constexpr size_t kCacheLine = 64;

using Cell = std::atomic<uint32_t>;
static_assert(sizeof(Cell) == 4 && Cell::is_always_lock_free, "cells lie in memory that is shared with TypeScript");

// Never freed: a thread may look at a ring that was closed a moment ago.
struct Ring {
  std::atomic<bool> open{false};
  // Threads that may be looking into the memory below.
  std::atomic<int> visitors{0};
  Cell* armed = nullptr;
  CodecJob* jobs = nullptr;
  Cell* completions = nullptr;
  Cell* queue = nullptr;
  uint32_t mask = 0;
  int event_fd = -1;
  alignas(kCacheLine) std::atomic<uint64_t> tail{0};       // submitted
  alignas(kCacheLine) std::atomic<uint64_t> head{0};       // taken
  alignas(kCacheLine) std::atomic<uint64_t> completed{0};
};

Ring rings[kRingsMax];
std::atomic<int> rings_used{0};  // a ring beyond was never open

// Guards opening, closing, and the coming and going of threads.
std::mutex control;
int open_rings = 0;
int threads = 0;
std::atomic<int> threads_wanted{0};  // how many more there may be

// Changes with each submission; threads sleep on it.
Cell submissions{0};
std::atomic<int> sleepers{0};

long Futex(Cell* cell, int operation, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(cell), operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

bool Take(Ring* ring, uint32_t* number) {
  uint64_t head = ring->head.load(std::memory_order_relaxed);
  while (head != ring->tail.load(std::memory_order_acquire)) {
    *number = ring->queue[head & ring->mask].load(std::memory_order_relaxed);
    // The number may have been overwritten when somebody else has taken this place: then so is the head.
    if (ring->head.compare_exchange_weak(head, head + 1)) return true;
  }
  return false;
}

void Complete(Ring* ring, uint32_t number) {
  uint64_t at = ring->completed.fetch_add(1);
  ring->completions[at & ring->mask].store(number + 1);
  if (ring->armed->load() == 0 || ring->armed->exchange(0) == 0) return;
  const uint64_t one = 1;
  if (write(ring->event_fd, &one, sizeof one) < 0) return;  // full: it is readable already
}

// Carries out one job of any ring. Returns whether there was one.
bool RunOne(CodecContexts* contexts, int* first) {
  int count = rings_used.load();
  for (int i = 0; i < count; i++) {
    int at = (*first + i) % count;
    Ring* ring = &rings[at];
    ring->visitors.fetch_add(1);
    uint32_t number;
    bool found = ring->open.load() && Take(ring, &number);
    if (found) {
      contexts->Run(&ring->jobs[number], false);
      Complete(ring, number);
      *first = at + 1;
    }
    ring->visitors.fetch_sub(1);
    if (found) return true;
  }
  return false;
}

// Whether the calling thread may end: nobody is left to work for.
bool Leave() {
  std::lock_guard<std::mutex> lock(control);
  if (open_rings > 0) return false;
  threads--;
  threads_wanted.fetch_add(1);
  return true;
}

void* Work(void*) {
  pthread_setname_np(pthread_self(), "strata-codec");
  CodecContexts contexts;
  int first = 0;
  for (;;) {
    // Read before looking: what is submitted after that ends the sleep at once.
    uint32_t seen = submissions.load();
    if (RunOne(&contexts, &first)) continue;
    if (Leave()) return nullptr;
    sleepers.fetch_add(1);
    Futex(&submissions, FUTEX_WAIT, seen);
    sleepers.fetch_sub(1);
  }
}

// Whether there is a thread that will look for jobs.
bool StartThread() {
  std::lock_guard<std::mutex> lock(control);
  if (threads_wanted.load() <= 0) return threads > 0;
  // Signals are the business of the program's own threads. The new one inherits the mask.
  sigset_t all, before;
  sigfillset(&all);
  for (int signal : {SIGBUS, SIGSEGV, SIGILL, SIGFPE, SIGABRT}) sigdelset(&all, signal);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t thread;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  int outcome = pthread_create(&thread, &attributes, Work, nullptr);
  pthread_attr_destroy(&attributes);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (outcome != 0) return threads > 0;
  threads++;
  threads_wanted.fetch_sub(1);
  return true;
}

void CloseRing(Ring* ring) {
  {
    std::lock_guard<std::mutex> lock(control);
    if (!ring->open.exchange(false)) return;
    open_rings--;
  }
  // At most for as long as a job takes.
  while (ring->visitors.load() > 0) std::this_thread::yield();
  // Whoever sleeps looks whether there is still somebody to work for.
  submissions.fetch_add(1);
  Futex(&submissions, FUTEX_WAKE, INT_MAX);
}

void CloseAtEnd(void* ring) { CloseRing(static_cast<Ring*>(ring)); }

// codecOpen(address, entries, eventFd, threadsMax) -> number of the ring, or -errno. `entries` is a power of two.
Napi::Value Open(const Napi::CallbackInfo& info) {
  uint32_t entries = Uint(info, 1);
  if (entries == 0 || (entries & (entries - 1)) != 0) {
    errno = EINVAL;
    return Outcome(info, -1);
  }
  std::lock_guard<std::mutex> lock(control);
  int at = 0;
  while (at < kRingsMax && (rings[at].open.load() || rings[at].visitors.load() > 0)) at++;
  if (at == kRingsMax) {
    errno = ENOSPC;
    return Outcome(info, -1);
  }
  Ring* ring = &rings[at];
  char* memory = static_cast<char*>(Pointer(info, 0));
  ring->armed = reinterpret_cast<Cell*>(memory);
  ring->jobs = reinterpret_cast<CodecJob*>(memory + kCacheLine);
  ring->completions = reinterpret_cast<Cell*>(ring->jobs + entries);
  ring->queue = ring->completions + entries;
  ring->mask = entries - 1;
  ring->event_fd = Int(info, 2);
  ring->tail.store(0);
  ring->head.store(0);
  ring->completed.store(0);
  ring->open.store(true);
  open_rings++;
  threads_wanted.store(Int(info, 3) - threads);
  rings_used.store(std::max(rings_used.load(), at + 1));
  // The memory goes with the thread that runs this: no job may be at work in it then.
  napi_add_env_cleanup_hook(info.Env(), CloseAtEnd, ring);
  return Outcome(info, at);
}

// codecClose(ring): waits for jobs that are being carried out; those that wait are dropped.
Napi::Value Close(const Napi::CallbackInfo& info) {
  Ring* ring = &rings[Int(info, 0)];
  napi_remove_env_cleanup_hook(info.Env(), CloseAtEnd, ring);
  CloseRing(ring);
  return Outcome(info, 0);
}

// codecSubmit(ring, job). Of the reactor that opened the ring.
void Submit(const v8::FunctionCallbackInfo<v8::Value>& info) {
  Ring* ring = &rings[Int(info, 0)];
  uint64_t tail = ring->tail.load(std::memory_order_relaxed);
  ring->queue[tail & ring->mask].store(static_cast<uint32_t>(Int(info, 1)), std::memory_order_relaxed);
  ring->tail.store(tail + 1, std::memory_order_release);
  submissions.fetch_add(1);
  if (sleepers.load() > 0 && Futex(&submissions, FUTEX_WAKE, 1) > 0) return;
  if (threads_wanted.load() <= 0 || StartThread()) return;
  // Not a single thread was to be had: the job is done here.
  CodecContexts contexts;
  int first = 0;
  while (RunOne(&contexts, &first)) continue;
}

}  // namespace

void InitCodecPool(Napi::Env env, Napi::Object exports) {
  Export<Open>(env, exports, "codecOpen");
  Export<Close>(env, exports, "codecClose");
  ExportRaw(env, exports, "codecSubmit", Submit);
}

}  // namespace strata
