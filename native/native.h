// Shared by the files of the addon: argument access, registration, and the two calling conventions.
//
// Conventions, see index.ts for the documentation of every function:
// - memory is named by absolute addresses in doubles (exact up to 2^53); only index.ts hands them out;
// - a system call's outcome is returned as a number: >= 0, or -errno. Nothing throws for an outcome;
// - what runs once per batch is a raw V8 callback (about 11 ns a call), the rest goes through Node-API.
#pragma once

#include <napi.h>
#include <string>
#include <v8.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>

namespace strata {

inline double Number(const Napi::CallbackInfo& info, size_t i) {
  return info[i].As<Napi::Number>().DoubleValue();
}
inline int Int(const Napi::CallbackInfo& info, size_t i) {
  return info[i].As<Napi::Number>().Int32Value();
}
inline uint32_t Uint(const Napi::CallbackInfo& info, size_t i) {
  return info[i].As<Napi::Number>().Uint32Value();
}
inline std::string String(const Napi::CallbackInfo& info, size_t i) {
  return info[i].As<Napi::String>().Utf8Value();
}
inline uint64_t Size(const Napi::CallbackInfo& info, size_t i) {
  return static_cast<uint64_t>(Number(info, i));
}
inline void* Pointer(const Napi::CallbackInfo& info, size_t i) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(Number(info, i)));
}

// The outcome of a system call as it is returned to TypeScript.
inline Napi::Value Outcome(const Napi::CallbackInfo& info, long result) {
  return Napi::Number::New(info.Env(), result < 0 ? -errno : static_cast<double>(result));
}

// Arguments of a raw callback. index.ts guarantees that they are numbers.
inline double Number(const v8::FunctionCallbackInfo<v8::Value>& info, int i) {
  return info[i].As<v8::Number>()->Value();
}
inline int Int(const v8::FunctionCallbackInfo<v8::Value>& info, int i) {
  return static_cast<int>(info[i].As<v8::Number>()->Value());
}

// First byte of a typed array that lies over external or off-heap memory.
inline void* ViewData(const v8::FunctionCallbackInfo<v8::Value>& info, int i) {
  v8::Local<v8::ArrayBufferView> view = info[i].As<v8::ArrayBufferView>();
  return static_cast<char*>(view->Buffer()->Data()) + view->ByteOffset();
}

using RawCallback = void (*)(const v8::FunctionCallbackInfo<v8::Value>&);
// Adds a raw V8 function to the exports: Node-API values are V8 handles underneath.
void ExportRaw(Napi::Env env, Napi::Object exports, const char* name, RawCallback callback);

template <Napi::Value (*function)(const Napi::CallbackInfo&)>
void Export(Napi::Env env, Napi::Object exports, const char* name) {
  exports.Set(name, Napi::Function::New<function>(env, name));
}

void InitArena(Napi::Env env, Napi::Object exports);
void InitBytes(Napi::Env env, Napi::Object exports);
void InitCipher(Napi::Env env, Napi::Object exports);
void InitCodec(Napi::Env env, Napi::Object exports);
void InitCodecPool(Napi::Env env, Napi::Object exports);
void InitFile(Napi::Env env, Napi::Object exports);
void InitRing(Napi::Env env, Napi::Object exports);
void InitSocket(Napi::Env env, Napi::Object exports);
void InitThread(Napi::Env env, Napi::Object exports);

}  // namespace strata
