// Ciphers of encrypted images: AES in the modes of LUKS, sector by sector, by the OpenSSL that the program exports.
#include "native.h"
#include "cipher.h"

#include <atomic>
#include <cstring>
#include <mutex>

namespace strata {
namespace {

constexpr uint32_t kCiphersMax = 65536;
constexpr size_t kVectorBytes = 16;

// Handles are indices. Threads look ciphers up while others are opened, without a lock.
std::atomic<Cipher*> ciphers[kCiphersMax];
std::mutex control;

bool Key(EVP_CIPHER_CTX* context, const EVP_CIPHER* cipher, const unsigned char* key, int encrypt) {
  return EVP_CipherInit_ex(context, cipher, nullptr, key, nullptr, encrypt) == 1 &&
         EVP_CIPHER_CTX_set_padding(context, 0) == 1;
}

// A vector for each sector: its number, little endian, as it is or encrypted.
bool Vector(VectorKind kind, EVP_CIPHER_CTX* essiv, uint64_t sector, unsigned char* vector) {
  std::memset(vector, 0, kVectorBytes);
  if (kind == VectorKind::kPlain) sector &= 0xffffffff;
  for (size_t i = 0; i < sizeof sector; i++) vector[i] = static_cast<unsigned char>(sector >> (8 * i));
  int written = 0;
  return kind != VectorKind::kEssiv || EVP_CipherUpdate(essiv, vector, &written, vector, kVectorBytes) == 1;
}

bool CopyOne(const CipherContext& from, const CipherContext& to) {
  return from == nullptr || EVP_CIPHER_CTX_copy(to.get(), from.get()) == 1;
}

// Has to be that long, or OpenSSL would read beyond.
const EVP_CIPHER* Named(const std::string& name, size_t key_bytes) {
  const EVP_CIPHER* cipher = EVP_get_cipherbyname(name.c_str());
  return cipher != nullptr && static_cast<size_t>(EVP_CIPHER_get_key_length(cipher)) == key_bytes ? cipher : nullptr;
}

// cipherOpen(name, key, vectorKind, essivName, essivKey) -> handle or -errno. The keys may be wiped afterwards.
Napi::Value Open(const Napi::CallbackInfo& info) {
  auto cipher = std::make_unique<Cipher>();
  auto key = info[1].As<Napi::Uint8Array>();
  auto essiv_key = info[4].As<Napi::Uint8Array>();
  cipher->vector = static_cast<VectorKind>(Int(info, 2));
  CipherContexts& keyed = cipher->keyed;
  const EVP_CIPHER* name = Named(String(info, 0), key.ByteLength());
  bool good = name != nullptr && keyed.Make() && cipher->own.Make() && Key(keyed.encrypt.get(), name, key.Data(), 1) &&
              Key(keyed.decrypt.get(), name, key.Data(), 0);
  if (good && cipher->vector == VectorKind::kEssiv) {
    const EVP_CIPHER* essiv = Named(String(info, 3), essiv_key.ByteLength());
    good = essiv != nullptr && Key(keyed.essiv.get(), essiv, essiv_key.Data(), 1);
  }
  errno = EINVAL;
  if (!good || !cipher->own.CopyFrom(keyed)) return Outcome(info, -1);
  std::lock_guard<std::mutex> lock(control);
  for (uint32_t handle = 0; handle < kCiphersMax; handle++) {
    if (ciphers[handle].load() != nullptr) continue;
    ciphers[handle].store(cipher.release());
    return Outcome(info, handle);
  }
  errno = ENOSPC;
  return Outcome(info, -1);
}

// cipherClose(handle)
Napi::Value Close(const Napi::CallbackInfo& info) {
  std::lock_guard<std::mutex> lock(control);
  delete ciphers[Uint(info, 0)].exchange(nullptr);
  return Outcome(info, 0);
}

}  // namespace

bool CipherContexts::Make() {
  encrypt.reset(EVP_CIPHER_CTX_new());
  decrypt.reset(EVP_CIPHER_CTX_new());
  essiv.reset(EVP_CIPHER_CTX_new());
  return encrypt != nullptr && decrypt != nullptr && essiv != nullptr;
}

bool CipherContexts::CopyFrom(const CipherContexts& other) {
  bool has_essiv = EVP_CIPHER_CTX_get0_cipher(other.essiv.get()) != nullptr;
  return CopyOne(other.encrypt, encrypt) && CopyOne(other.decrypt, decrypt) && (!has_essiv || CopyOne(other.essiv, essiv));
}

void CipherContexts::Reset() {
  EVP_CIPHER_CTX_reset(encrypt.get());
  EVP_CIPHER_CTX_reset(decrypt.get());
  EVP_CIPHER_CTX_reset(essiv.get());
}

bool Cipher::Run(CipherContexts* contexts, bool encrypt, const unsigned char* source, unsigned char* destination,
                 size_t bytes, uint64_t sector) const {
  EVP_CIPHER_CTX* context = (encrypt ? contexts->encrypt : contexts->decrypt).get();
  unsigned char iv[kVectorBytes];
  for (size_t done = 0; done < bytes; done += kCipherSectorBytes, sector++) {
    int written = 0;
    if (!Vector(vector, contexts->essiv.get(), sector, iv) ||
        EVP_CipherInit_ex(context, nullptr, nullptr, nullptr, iv, -1) != 1 ||
        EVP_CipherUpdate(context, destination + done, &written, source + done, kCipherSectorBytes) != 1) {
      return false;
    }
  }
  return true;
}

const Cipher& CipherOf(uint32_t handle) { return *ciphers[handle].load(std::memory_order_acquire); }
Cipher& OwnCipherOf(uint32_t handle) { return *ciphers[handle].load(std::memory_order_acquire); }

void InitCipher(Napi::Env env, Napi::Object exports) {
  Export<Open>(env, exports, "cipherOpen");
  Export<Close>(env, exports, "cipherClose");
}

}  // namespace strata
