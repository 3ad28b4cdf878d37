// One piece of byte work - compressing, decompressing, encrypting - as it lies in the memory of a reactor: see codec.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include <zlib.h>
#include <zstd.h>

#include "cipher.h"

namespace strata {

// What is to be done. codec.ts has the same numbers.
enum class CodecOperation : uint32_t { kInflate = 0, kZstdDecompress = 1, kDeflate = 2, kZstdCompress = 3, kEncrypt = 4, kDecrypt = 5 };

// How it went. codec.ts has the same numbers.
enum class CodecStatus : uint32_t { kOk = 0, kDamaged = 1, kShort = 2, kTooLong = 3, kFailed = 4 };

// Written by a reactor through typed arrays; 64 bytes. Addresses are absolute, in doubles.
struct CodecJob {
  double source;
  double destination;
  uint32_t source_bytes;
  uint32_t capacity_bytes;
  CodecOperation operation;
  int32_t level;
  // Answered:
  CodecStatus status;
  uint32_t produced_bytes;
  // Of the cipher:
  double sector;
  uint32_t cipher;
  uint32_t reserved[3];
};
static_assert(sizeof(CodecJob) == 64, "codec-job.ts counts on it");

// What a thread keeps from job to job. Made when first needed.
class CodecContexts {
 public:
  CodecContexts() = default;
  CodecContexts(const CodecContexts&) = delete;
  CodecContexts& operator=(const CodecContexts&) = delete;

  // Carries out a job and answers it. Writes nothing beyond [destination, destination + capacity_bytes).
  // is_owner: of all ciphers that are used, by the thread that opened them.
  void Run(CodecJob* job, bool is_owner);

 private:
  CodecStatus Inflate(const CodecJob& job, size_t* produced);
  CodecStatus Deflate(const CodecJob& job, size_t* produced);
  CodecStatus ZstdDecompress(const CodecJob& job, size_t* produced);
  CodecStatus ZstdCompress(const CodecJob& job, size_t* produced);
  CodecStatus Crypt(const CodecJob& job, bool is_owner, size_t* produced);

  struct End {
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
    void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
  };
  template <int (*end)(z_streamp)>
  struct Stream : z_stream {
    ~Stream() { end(this); }
  };
  std::unique_ptr<Stream<inflateEnd>> inflate_;
  std::unique_ptr<Stream<deflateEnd>> deflate_;
  int deflate_level_ = 0;
  std::unique_ptr<ZSTD_DCtx, End> zstd_in_;
  std::unique_ptr<ZSTD_CCtx, End> zstd_out_;
  CipherContexts cipher_;
};

}  // namespace strata
