// The calling thread: where it runs, what it is called, what its event loop waits on.
#include "native.h"

#include <ctime>

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <uv.h>

namespace strata {
namespace {

// threadSetAffinity(cpu)
Napi::Value SetAffinity(const Napi::CallbackInfo& info) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(Int(info, 0), &set);
  return Outcome(info, sched_setaffinity(0, sizeof set, &set));
}

// threadSetName(name): at most 15 bytes are kept
Napi::Value SetName(const Napi::CallbackInfo& info) {
  errno = pthread_setname_np(pthread_self(), String(info, 0).substr(0, 15).c_str());
  return Outcome(info, errno == 0 ? 0 : -1);
}

// threadCpuUs() -> CPU time of this thread
Napi::Value CpuUs(const Napi::CallbackInfo& info) {
  struct timespec time;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) != 0) return Outcome(info, -1);
  return Napi::Number::New(info.Env(), static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) / 1e3);
}

// clockRead(cell): writes CLOCK_MONOTONIC in microseconds to cell[0]. Once per step of a reactor: a returned double would
// be an allocation.
void ClockRead(const v8::FunctionCallbackInfo<v8::Value>& info) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  *static_cast<double*>(ViewData(info, 0)) = static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) / 1e3;
}

// eventLoopFd() -> descriptor that is readable when this thread's event loop has something to do
Napi::Value EventLoopFd(const Napi::CallbackInfo& info) {
  uv_loop_t* loop = nullptr;
  if (napi_get_uv_event_loop(info.Env(), &loop) != napi_ok) {
    errno = EINVAL;
    return Outcome(info, -1);
  }
  return Napi::Number::New(info.Env(), uv_backend_fd(loop));
}

}  // namespace

void InitThread(Napi::Env env, Napi::Object exports) {
  Export<SetAffinity>(env, exports, "threadSetAffinity");
  Export<SetName>(env, exports, "threadSetName");
  Export<CpuUs>(env, exports, "threadCpuUs");
  ExportRaw(env, exports, "clockRead", ClockRead);
  Export<EventLoopFd>(env, exports, "eventLoopFd");
}

}  // namespace strata
