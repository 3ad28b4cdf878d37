// Compression and decompression of one cluster. Deflate is node's own zlib, whose functions the program exports; zstd is compiled
// in from the sources that zstd-napi brings.
//
// What is decompressed is hostile: the output ends at its capacity, and what a stream may make us allocate is bounded.
#include "native.h"
#include "codec.h"

#include <utility>

namespace strata {
namespace {

// Raw deflate. A window of 15 bits understands all that one of 12 does; writing, other programs count on 12.
constexpr int kInflateWindowBits = -15;
constexpr int kDeflateWindowBits = -12;
constexpr int kDeflateMemoryLevel = 9;
// A frame that asks for a larger window is refused: decoding it would take as much memory. Clusters end at 2 MiB.
constexpr int kZstdWindowBitsMax = 23;

Bytef* Source(const CodecJob& job) { return reinterpret_cast<Bytef*>(static_cast<uintptr_t>(job.source)); }
Bytef* Destination(const CodecJob& job) { return reinterpret_cast<Bytef*>(static_cast<uintptr_t>(job.destination)); }

void PointAt(const CodecJob& job, z_stream* stream) {
  stream->next_in = Source(job);
  stream->avail_in = job.source_bytes;
  stream->next_out = Destination(job);
  stream->avail_out = job.capacity_bytes;
}

}  // namespace

// Succeeds when the output is full, whether or not the stream ends there: a compressed cluster's length is known in sectors only.
CodecStatus CodecContexts::Inflate(const CodecJob& job, size_t* produced) {
  if (inflate_ == nullptr) {
    auto stream = std::make_unique<Stream<inflateEnd>>();
    if (inflateInit2(stream.get(), kInflateWindowBits) != Z_OK) return CodecStatus::kFailed;
    inflate_ = std::move(stream);
  } else {
    inflateReset(inflate_.get());
  }
  PointAt(job, inflate_.get());
  int outcome = inflate(inflate_.get(), Z_FINISH);
  *produced = job.capacity_bytes - inflate_->avail_out;
  if (outcome == Z_MEM_ERROR) return CodecStatus::kFailed;
  if (inflate_->avail_out == 0 && (outcome == Z_STREAM_END || outcome == Z_BUF_ERROR)) return CodecStatus::kOk;
  return outcome == Z_STREAM_END ? CodecStatus::kShort : CodecStatus::kDamaged;
}

CodecStatus CodecContexts::Deflate(const CodecJob& job, size_t* produced) {
  if (deflate_ == nullptr || deflate_level_ != job.level) {
    auto stream = std::make_unique<Stream<deflateEnd>>();
    int outcome =
        deflateInit2(stream.get(), job.level, Z_DEFLATED, kDeflateWindowBits, kDeflateMemoryLevel, Z_DEFAULT_STRATEGY);
    if (outcome != Z_OK) return CodecStatus::kFailed;
    deflate_ = std::move(stream);
    deflate_level_ = job.level;
  } else {
    deflateReset(deflate_.get());
  }
  PointAt(job, deflate_.get());
  int outcome = deflate(deflate_.get(), Z_FINISH);
  *produced = job.capacity_bytes - deflate_->avail_out;
  return outcome == Z_STREAM_END ? CodecStatus::kOk : CodecStatus::kTooLong;
}

// Takes one frame after the other until the output is full; the last one has to end there.
CodecStatus CodecContexts::ZstdDecompress(const CodecJob& job, size_t* produced) {
  if (zstd_in_ == nullptr) {
    zstd_in_.reset(ZSTD_createDCtx());
    if (zstd_in_ == nullptr) return CodecStatus::kFailed;
    ZSTD_DCtx_setParameter(zstd_in_.get(), ZSTD_d_windowLogMax, kZstdWindowBitsMax);
  } else {
    ZSTD_DCtx_reset(zstd_in_.get(), ZSTD_reset_session_only);
  }
  ZSTD_inBuffer in = {Source(job), job.source_bytes, 0};
  ZSTD_outBuffer out = {Destination(job), job.capacity_bytes, 0};
  size_t left = 0;  // of the frame
  while (out.pos < out.size) {
    if (left == 0 && in.pos == in.size) return CodecStatus::kShort;
    size_t in_before = in.pos;
    size_t out_before = out.pos;
    left = ZSTD_decompressStream(zstd_in_.get(), &out, &in);
    *produced = out.pos;
    if (ZSTD_isError(left)) return CodecStatus::kDamaged;
    if (in.pos == in_before && out.pos == out_before) return CodecStatus::kDamaged;
  }
  return left == 0 ? CodecStatus::kOk : CodecStatus::kTooLong;
}

CodecStatus CodecContexts::ZstdCompress(const CodecJob& job, size_t* produced) {
  if (zstd_out_ == nullptr) {
    zstd_out_.reset(ZSTD_createCCtx());
    if (zstd_out_ == nullptr) return CodecStatus::kFailed;
  }
  ZSTD_CCtx_setParameter(zstd_out_.get(), ZSTD_c_compressionLevel, job.level);
  size_t outcome =
      ZSTD_compress2(zstd_out_.get(), Destination(job), job.capacity_bytes, Source(job), job.source_bytes);
  if (ZSTD_isError(outcome)) return CodecStatus::kTooLong;
  *produced = outcome;
  return CodecStatus::kOk;
}

// A thread of the pool takes a copy of the keyed contexts, and does not keep it.
CodecStatus CodecContexts::Crypt(const CodecJob& job, bool is_owner, size_t* produced) {
  if (job.source_bytes > job.capacity_bytes || job.source_bytes % kCipherSectorBytes != 0) return CodecStatus::kTooLong;
  bool encrypt = job.operation == CodecOperation::kEncrypt;
  auto sector = static_cast<uint64_t>(job.sector);
  bool good;
  if (is_owner) {
    Cipher& cipher = OwnCipherOf(job.cipher);
    good = cipher.Run(&cipher.own, encrypt, Source(job), Destination(job), job.source_bytes, sector);
  } else {
    const Cipher& cipher = CipherOf(job.cipher);
    if (cipher_.encrypt == nullptr && !cipher_.Make()) return CodecStatus::kFailed;
    good = cipher_.CopyFrom(cipher.keyed) &&
           cipher.Run(&cipher_, encrypt, Source(job), Destination(job), job.source_bytes, sector);
    cipher_.Reset();
  }
  *produced = good ? job.source_bytes : 0;
  return good ? CodecStatus::kOk : CodecStatus::kFailed;
}

void CodecContexts::Run(CodecJob* shared, bool is_owner) {
  const CodecJob job = *shared;
  CodecStatus status = CodecStatus::kDamaged;
  size_t produced = 0;
  switch (job.operation) {
    case CodecOperation::kInflate: status = Inflate(job, &produced); break;
    case CodecOperation::kDeflate: status = Deflate(job, &produced); break;
    case CodecOperation::kZstdDecompress: status = ZstdDecompress(job, &produced); break;
    case CodecOperation::kZstdCompress: status = ZstdCompress(job, &produced); break;
    case CodecOperation::kEncrypt:
    case CodecOperation::kDecrypt: status = Crypt(job, is_owner, &produced); break;
  }
  shared->produced_bytes = static_cast<uint32_t>(produced);
  shared->status = status;
}

namespace {

// codecRun(job): carries out the job at the start of a typed array on the calling thread.
void RunHere(const v8::FunctionCallbackInfo<v8::Value>& info) {
  thread_local CodecContexts contexts;
  contexts.Run(static_cast<CodecJob*>(ViewData(info, 0)), true);
}

}  // namespace

void InitCodec(Napi::Env env, Napi::Object exports) { ExportRaw(env, exports, "codecRun", RunHere); }

}  // namespace strata
