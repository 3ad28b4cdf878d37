// Byte-crunching leaves, called once per batch.
#include "native.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#endif

namespace strata {
namespace {

// One entry of a copy list: three doubles.
struct CopyEntry {
  double destination;
  double source;  // 0: fill with zeroes
  double length;
};

// The first lines of what is copied next are fetched meanwhile. Hardware goes on from there by itself; without it, a page that is in
// no cache takes almost twice as long.
constexpr size_t kPrefetchBytes = 1024;
constexpr size_t kCacheLine = 64;

void Prefetch(const CopyEntry& entry) {
  uintptr_t at = static_cast<uintptr_t>(entry.source);
  size_t length = std::min(static_cast<size_t>(entry.length), kPrefetchBytes);
  for (uintptr_t end = at + length; at < end; at += kCacheLine) __builtin_prefetch(reinterpret_cast<const void*>(at));
}

// copyList(entries, count): entries in order; source and destination of one entry may overlap.
void CopyList(const v8::FunctionCallbackInfo<v8::Value>& info) {
  const auto* entry = static_cast<const CopyEntry*>(ViewData(info, 0));
  const CopyEntry* end = entry + Int(info, 1);
  for (; entry != end; entry++) {
    if (entry + 1 != end) Prefetch(entry[1]);
    auto* destination = reinterpret_cast<void*>(static_cast<uintptr_t>(entry->destination));
    const auto* source = reinterpret_cast<const void*>(static_cast<uintptr_t>(entry->source));
    size_t length = static_cast<size_t>(entry->length);
    if (source == nullptr) {
      std::memset(destination, 0, length);
    } else {
      std::memmove(destination, source, length);
    }
  }
}

// isZero(address, length) -> boolean
void IsZero(const v8::FunctionCallbackInfo<v8::Value>& info) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(static_cast<uintptr_t>(Number(info, 0)));
  size_t length = static_cast<size_t>(Number(info, 1));
  // The first 16 bytes by hand, the rest compared with itself 16 bytes further on: memcmp is vectorised.
  size_t head = length < 16 ? length : 16;
  bool zero = true;
  for (size_t i = 0; i < head && zero; i++) zero = bytes[i] == 0;
  if (zero && length > 16) zero = std::memcmp(bytes, bytes + 16, length - 16) == 0;
  info.GetReturnValue().Set(zero);
}

#if !defined(__x86_64__) && !defined(__aarch64__)
uint32_t Crc32cByte(uint32_t crc, unsigned char byte) {
  crc ^= byte;
  for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1)));
  return crc;
}
#endif

uint32_t Crc32c(uint32_t crc, const unsigned char* bytes, size_t length) {
  crc = ~crc;
#if defined(__x86_64__)
  uint64_t wide = crc;
  for (; length >= 8; length -= 8, bytes += 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = static_cast<uint32_t>(wide);
  for (; length > 0; length--) crc = _mm_crc32_u8(crc, *bytes++);
#elif defined(__aarch64__)
  for (; length >= 8; length -= 8, bytes += 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    crc = __crc32cd(crc, word);
  }
  for (; length > 0; length--) crc = __crc32cb(crc, *bytes++);
#else
  for (; length > 0; length--) crc = Crc32cByte(crc, *bytes++);
#endif
  return ~crc;
}

// crc32c(seed, address, length) -> unsigned 32-bit checksum
void Crc(const v8::FunctionCallbackInfo<v8::Value>& info) {
  uint32_t seed = static_cast<uint32_t>(Number(info, 0));
  const auto* bytes = reinterpret_cast<const unsigned char*>(static_cast<uintptr_t>(Number(info, 1)));
  info.GetReturnValue().Set(Crc32c(seed, bytes, static_cast<size_t>(Number(info, 2))));
}

}  // namespace

void InitBytes(Napi::Env env, Napi::Object exports) {
  ExportRaw(env, exports, "copyList", CopyList);
  ExportRaw(env, exports, "isZero", IsZero);
  ExportRaw(env, exports, "crc32c", Crc);
}

}  // namespace strata
