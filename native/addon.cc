// Entry point of the addon. It is context-aware: each worker thread loads its own instance.
#include "native.h"

#include <cstring>

namespace strata {

void ExportRaw(Napi::Env env, Napi::Object exports, const char* name, RawCallback callback) {
  v8::Isolate* isolate = v8::Isolate::GetCurrent();
  v8::Local<v8::Context> context = isolate->GetCurrentContext();
  v8::Local<v8::Function> function =
      v8::Function::New(context, callback, v8::Local<v8::Value>(), 0, v8::ConstructorBehavior::kThrow)
          .ToLocalChecked();
  static_assert(sizeof(napi_value) == sizeof(function), "a napi_value is a V8 handle");
  napi_value value;
  std::memcpy(&value, &function, sizeof value);
  exports.Set(name, Napi::Value(env, value));
}

static Napi::Object Init(Napi::Env env, Napi::Object exports) {
  InitArena(env, exports);
  InitBytes(env, exports);
  InitCipher(env, exports);
  InitCodec(env, exports);
  InitCodecPool(env, exports);
  InitFile(env, exports);
  InitRing(env, exports);
  InitSocket(env, exports);
  InitThread(env, exports);
  return exports;
}

}  // namespace strata

static Napi::Object InitModule(Napi::Env env, Napi::Object exports) { return strata::Init(env, exports); }
NODE_API_MODULE(strata, InitModule)
