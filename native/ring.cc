// io_uring: the three system calls. The rings themselves are mapped into the arena and worked from TypeScript.
#include "native.h"

#include <cstring>
#include <ctime>

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

// Newer than the headers of Debian 12.
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif
#ifndef IORING_ENTER_REGISTERED_RING
#define IORING_ENTER_REGISTERED_RING (1U << 4)
#endif

namespace strata {
namespace {

// ringSetup(entries, cqEntries, flags) -> object with the descriptor and the offsets of the rings, or -errno
Napi::Value Setup(const Napi::CallbackInfo& info) {
  struct io_uring_params params;
  std::memset(&params, 0, sizeof params);
  params.flags = Uint(info, 2) | IORING_SETUP_CQSIZE;
  params.cq_entries = Uint(info, 1);
  long fd = syscall(__NR_io_uring_setup, Uint(info, 0), &params);
  if (fd < 0) return Outcome(info, -1);
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("fd", static_cast<double>(fd));
  result.Set("features", params.features);
  result.Set("sqEntries", params.sq_entries);
  result.Set("cqEntries", params.cq_entries);
  result.Set("sqHead", params.sq_off.head);
  result.Set("sqTail", params.sq_off.tail);
  result.Set("sqFlags", params.sq_off.flags);
  result.Set("sqArray", params.sq_off.array);
  result.Set("cqHead", params.cq_off.head);
  result.Set("cqTail", params.cq_off.tail);
  result.Set("cqCqes", params.cq_off.cqes);
  return result;
}

// Keeps a mapping of ring memory alive as long as its ArrayBuffer.
void Unmap(void* data, size_t length, void*) { munmap(data, length); }

// ringMap(fd, offset, length) -> ArrayBuffer or -errno. Not in the arena: kernels from 6.4 on choose the address themselves.
Napi::Value Map(const Napi::CallbackInfo& info) {
  size_t length = Size(info, 2);
  void* mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, Int(info, 0),
                      static_cast<off_t>(Number(info, 1)));
  if (mapped == MAP_FAILED) return Outcome(info, -1);
  std::unique_ptr<v8::BackingStore> store = v8::ArrayBuffer::NewBackingStore(mapped, length, Unmap, nullptr);
  v8::Local<v8::ArrayBuffer> buffer = v8::ArrayBuffer::New(v8::Isolate::GetCurrent(), std::move(store));
  napi_value value;
  std::memcpy(&value, &buffer, sizeof value);
  return Napi::Value(info.Env(), value);
}

// ringRegister(fd, opcode, address, count)
Napi::Value Register(const Napi::CallbackInfo& info) {
  return Outcome(info, syscall(__NR_io_uring_register, Int(info, 0), Uint(info, 1), Pointer(info, 2), Uint(info, 3)));
}

// ringEnter(fd, toSubmit, flags) -> submitted or -errno. Never sleeps.
void Enter(const v8::FunctionCallbackInfo<v8::Value>& info) {
  long result = syscall(__NR_io_uring_enter, Int(info, 0), Int(info, 1), 0, Int(info, 2) | IORING_ENTER_GETEVENTS,
                        nullptr, 0);
  info.GetReturnValue().Set(static_cast<int32_t>(result < 0 ? -errno : result));
}

// ringWait(fd, toSubmit, flags, timeoutUs) -> submitted or -errno (-ETIME, -EINTR are ordinary). Sleeps until one completion.
void Wait(const v8::FunctionCallbackInfo<v8::Value>& info) {
  double timeout_us = Number(info, 3);
  struct __kernel_timespec timeout;
  timeout.tv_sec = static_cast<int64_t>(timeout_us / 1e6);
  timeout.tv_nsec = static_cast<int64_t>((timeout_us - static_cast<double>(timeout.tv_sec) * 1e6) * 1e3);
  struct io_uring_getevents_arg arg;
  std::memset(&arg, 0, sizeof arg);
  arg.ts = reinterpret_cast<uintptr_t>(&timeout);
  long result = syscall(__NR_io_uring_enter, Int(info, 0), Int(info, 1), 1,
                        Int(info, 2) | IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &arg, sizeof arg);
  info.GetReturnValue().Set(static_cast<int32_t>(result < 0 ? -errno : result));
}

}  // namespace

void InitRing(Napi::Env env, Napi::Object exports) {
  Export<Setup>(env, exports, "ringSetup");
  Export<Map>(env, exports, "ringMap");
  Export<Register>(env, exports, "ringRegister");
  ExportRaw(env, exports, "ringEnter", Enter);
  ExportRaw(env, exports, "ringWait", Wait);
}

}  // namespace strata
