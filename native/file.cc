// Descriptors: files, block devices, eventfds, memfds.
#include "native.h"

#include <cstring>

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#ifndef STATX_DIOALIGN
#define STATX_DIOALIGN 0x00002000U
#endif

namespace strata {
namespace {

// fileOpen(path, flags, mode) -> fd
Napi::Value Open(const Napi::CallbackInfo& info) {
  return Outcome(info, open(String(info, 0).c_str(), Int(info, 1) | O_CLOEXEC, static_cast<mode_t>(Int(info, 2))));
}

// fileOpenBeneath(folderFd, path, flags) -> fd
Napi::Value OpenBeneath(const Napi::CallbackInfo& info) {
  open_how how{};
  how.flags = static_cast<uint64_t>(Int(info, 2)) | O_CLOEXEC;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
  long fd = syscall(SYS_openat2, Int(info, 0), String(info, 1).c_str(), &how, sizeof(how));
  return Outcome(info, static_cast<int>(fd));
}

Napi::Value Close(const Napi::CallbackInfo& info) { return Outcome(info, close(Int(info, 0))); }
Napi::Value Duplicate(const Napi::CallbackInfo& info) { return Outcome(info, fcntl(Int(info, 0), F_DUPFD_CLOEXEC, 0)); }
Napi::Value Truncate(const Napi::CallbackInfo& info) {
  return Outcome(info, ftruncate(Int(info, 0), static_cast<off_t>(Number(info, 1))));
}
Napi::Value Sync(const Napi::CallbackInfo& info) { return Outcome(info, fdatasync(Int(info, 0))); }
Napi::Value Allocate(const Napi::CallbackInfo& info) {
  return Outcome(info, fallocate(Int(info, 0), Int(info, 1), static_cast<off_t>(Number(info, 2)),
                                 static_cast<off_t>(Number(info, 3))));
}
// fileSeek(fd, offset, whence) -> offset: where data or a hole begins. Nothing here reads by the position that it sets.
Napi::Value Seek(const Napi::CallbackInfo& info) {
  return Outcome(info, lseek(Int(info, 0), static_cast<off_t>(Number(info, 1)), Int(info, 2)));
}
Napi::Value Read(const Napi::CallbackInfo& info) {
  return Outcome(info, pread(Int(info, 0), Pointer(info, 1), Size(info, 2), static_cast<off_t>(Number(info, 3))));
}
Napi::Value Write(const Napi::CallbackInfo& info) {
  return Outcome(info, pwrite(Int(info, 0), Pointer(info, 1), Size(info, 2), static_cast<off_t>(Number(info, 3))));
}

// A range of bytes that an advisory lock is about; length 0 reaches to the end.
struct flock LockRange(short type, const Napi::Value& start, const Napi::Value& length) {
  struct flock lock;
  std::memset(&lock, 0, sizeof lock);
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(start.As<Napi::Number>().Int64Value());
  lock.l_len = static_cast<off_t>(length.As<Napi::Number>().Int64Value());
  return lock;
}

// fileLock(fd, kind, start, length): 0 shared, 1 exclusive, 2 none, of the open file description; fails at once when it is taken.
Napi::Value Lock(const Napi::CallbackInfo& info) {
  constexpr short kinds[] = {F_RDLCK, F_WRLCK, F_UNLCK};
  struct flock lock = LockRange(kinds[Int(info, 1) % 3], info[2], info[3]);
  return Outcome(info, fcntl(Int(info, 0), F_OFD_SETLK, &lock));
}

// fileLockTest(fd, start, length) -> 1 when another open file description holds a lock there, else 0.
Napi::Value LockTest(const Napi::CallbackInfo& info) {
  struct flock lock = LockRange(F_WRLCK, info[1], info[2]);
  int outcome = fcntl(Int(info, 0), F_OFD_GETLK, &lock);
  return Outcome(info, outcome != 0 ? outcome : lock.l_type != F_UNLCK);
}

Napi::Value FileFlags(const Napi::CallbackInfo& info) { return Outcome(info, fcntl(Int(info, 0), F_GETFL)); }

// What a module needs to know of a file or a block device: one object, or -errno.
Napi::Value Stat(const Napi::CallbackInfo& info) {
  int fd = Int(info, 0);
  struct statx data;
  std::memset(&data, 0, sizeof data);
  if (statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_DIOALIGN, &data) != 0) return Outcome(info, -1);
  Napi::Object result = Napi::Object::New(info.Env());
  bool block = S_ISBLK(data.stx_mode);
  double size = static_cast<double>(data.stx_size);
  int logical = 512;
  unsigned physical = 512;
  if (block) {
    uint64_t bytes = 0;
    if (ioctl(fd, BLKGETSIZE64, &bytes) != 0 || ioctl(fd, BLKSSZGET, &logical) != 0 ||
        ioctl(fd, BLKPBSZGET, &physical) != 0) {
      return Outcome(info, -1);
    }
    size = static_cast<double>(bytes);
  }
  // The two fields were appended to struct statx after the headers of older systems were written.
  uint32_t dio[2] = {0, 0};
  if (data.stx_mask & STATX_DIOALIGN) std::memcpy(dio, reinterpret_cast<char*>(&data) + 0x98, sizeof dio);
  result.Set("kind", block ? "block" : S_ISREG(data.stx_mode) ? "file" : "other");
  result.Set("sizeBytes", size);
  result.Set("allocatedBytes", static_cast<double>(data.stx_blocks) * 512);
  result.Set("logicalBlockBytes", logical);
  result.Set("physicalBlockBytes", physical);
  result.Set("directMemoryAlignmentBytes", dio[0]);
  result.Set("directOffsetAlignmentBytes", dio[1]);
  result.Set("deviceMajor", block ? data.stx_rdev_major : data.stx_dev_major);
  result.Set("deviceMinor", block ? data.stx_rdev_minor : data.stx_dev_minor);
  result.Set("inode", static_cast<double>(data.stx_ino));
  result.Set("preferredIoBytes", data.stx_blksize);
  return result;
}

Napi::Value Eventfd(const Napi::CallbackInfo& info) { return Outcome(info, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)); }

// eventfdSignal(fd) -> 0 or -errno. Once per notification of a guest.
void EventfdSignal(const v8::FunctionCallbackInfo<v8::Value>& info) {
  const uint64_t one = 1;
  ssize_t written = write(Int(info, 0), &one, sizeof one);
  info.GetReturnValue().Set(written < 0 ? -errno : 0);
}

// eventfdDrain(fd) -> count read (0 when there was none), or -errno
Napi::Value EventfdDrain(const Napi::CallbackInfo& info) {
  uint64_t count = 0;
  if (read(Int(info, 0), &count, sizeof count) < 0 && errno != EAGAIN) return Outcome(info, -1);
  return Napi::Number::New(info.Env(), static_cast<double>(count));
}

Napi::Value Memfd(const Napi::CallbackInfo& info) {
  int fd = memfd_create(String(info, 0).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return Outcome(info, -1);
  if (ftruncate(fd, static_cast<off_t>(Number(info, 1))) != 0) {
    int error = errno;
    close(fd);
    errno = error;
    return Outcome(info, -1);
  }
  return Outcome(info, fd);
}

Napi::Value GetSeals(const Napi::CallbackInfo& info) { return Outcome(info, fcntl(Int(info, 0), F_GET_SEALS)); }
Napi::Value AddSeals(const Napi::CallbackInfo& info) {
  return Outcome(info, fcntl(Int(info, 0), F_ADD_SEALS, Int(info, 1)));
}

}  // namespace

void InitFile(Napi::Env env, Napi::Object exports) {
  Export<Open>(env, exports, "fileOpen");
  Export<OpenBeneath>(env, exports, "fileOpenBeneath");
  Export<Close>(env, exports, "fileClose");
  Export<Duplicate>(env, exports, "fileDuplicate");
  Export<Truncate>(env, exports, "fileTruncate");
  Export<Sync>(env, exports, "fileSync");
  Export<Allocate>(env, exports, "fileAllocate");
  Export<Seek>(env, exports, "fileSeek");
  Export<Read>(env, exports, "fileRead");
  Export<Write>(env, exports, "fileWrite");
  Export<Lock>(env, exports, "fileLock");
  Export<LockTest>(env, exports, "fileLockTest");
  Export<FileFlags>(env, exports, "fileFlags");
  Export<Stat>(env, exports, "fileStat");
  Export<Eventfd>(env, exports, "eventfdCreate");
  ExportRaw(env, exports, "eventfdSignal", EventfdSignal);
  Export<EventfdDrain>(env, exports, "eventfdDrain");
  Export<Memfd>(env, exports, "memfdCreate");
  Export<GetSeals>(env, exports, "memfdGetSeals");
  Export<AddSeals>(env, exports, "memfdAddSeals");
}

}  // namespace strata
