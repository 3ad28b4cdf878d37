// Encryption of sectors with a key: see cipher.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include <openssl/evp.h>

namespace strata {

constexpr size_t kCipherSectorBytes = 512;

struct CipherContextEnd {
  void operator()(EVP_CIPHER_CTX* context) const { EVP_CIPHER_CTX_free(context); }  // wipes the key
};
using CipherContext = std::unique_ptr<EVP_CIPHER_CTX, CipherContextEnd>;

// How the vector of a sector is made of its number. luks-cipher.ts has the same numbers.
enum class VectorKind : int { kPlain = 0, kPlain64 = 1, kEssiv = 2 };

// What a thread works with: contexts keep the state of a call, so threads have their own.
struct CipherContexts {
  CipherContext encrypt, decrypt, essiv;

  bool Make();
  bool CopyFrom(const CipherContexts& other);
  // Forgets the key.
  void Reset();
};

struct Cipher {
  // Keyed; nobody works with these, they are copied.
  CipherContexts keyed;
  // Of the thread that made the cipher.
  CipherContexts own;
  VectorKind vector = VectorKind::kPlain64;

  // Whole sectors; source and destination are the same or do not overlap. Returns false when the library fails.
  bool Run(CipherContexts* contexts, bool encrypt, const unsigned char* source, unsigned char* destination, size_t bytes,
           uint64_t sector) const;
};

// The cipher of a handle; the handle is open.
const Cipher& CipherOf(uint32_t handle);
// The same, for the thread that opened it.
Cipher& OwnCipherOf(uint32_t handle);

}  // namespace strata
