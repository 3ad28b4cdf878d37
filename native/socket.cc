// Unix stream sockets that carry descriptors.
#include "native.h"

#include <cstring>
#include <vector>

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

namespace strata {
namespace {

constexpr size_t kDescriptorsMax = 253;  // SCM_MAX_FD
constexpr int kBacklog = 16;

// Keeps a descriptor until it is released: every early return closes it.
class UniqueFd {
 public:
  explicit UniqueFd(int fd) : fd_(fd) {}
  ~UniqueFd() {
    if (fd_ >= 0) {
      int saved_errno = errno;
      close(fd_);
      errno = saved_errno;
    }
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  int get() const { return fd_; }
  int release() {
    int fd = fd_;
    fd_ = -1;
    return fd;
  }

 private:
  int fd_;
};

// False with errno = ENAMETOOLONG when the path does not fit.
bool FillAddress(const std::string& path, struct sockaddr_un* address) {
  std::memset(address, 0, sizeof *address);
  address->sun_family = AF_UNIX;
  if (path.size() >= sizeof address->sun_path) {
    errno = ENAMETOOLONG;
    return false;
  }
  std::memcpy(address->sun_path, path.c_str(), path.size());
  return true;
}

// Binds a socket to a path that is free, with exactly this mode and group. Nobody can connect before listen(2).
int Bind(const Napi::CallbackInfo& info) {
  std::string path = String(info, 0);
  mode_t mode = static_cast<mode_t>(Int(info, 1));
  struct sockaddr_un address;
  if (!FillAddress(path, &address)) return -1;
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (fd.get() < 0) return -1;
  // The mode of the inode is that of the descriptor at bind time, less the umask: no moment with wider rights.
  fchmod(fd.get(), mode);
  if (bind(fd.get(), reinterpret_cast<struct sockaddr*>(&address), sizeof address) != 0) return -1;
  // A change of group may take bits of the mode, so the mode comes last.
  bool grouped = info.Length() < 3 || chown(path.c_str(), static_cast<uid_t>(-1), static_cast<gid_t>(Number(info, 2))) == 0;
  if (!grouped || chmod(path.c_str(), mode) != 0) {
    int error = errno;
    unlink(path.c_str());
    errno = error;
    return -1;
  }
  return fd.release();
}

// socketBind(path, mode, gid?) -> fd, on which nobody listens yet
Napi::Value BindOnly(const Napi::CallbackInfo& info) {
  return Outcome(info, Bind(info));
}

// socketStartListening(fd)
Napi::Value StartListening(const Napi::CallbackInfo& info) {
  return Outcome(info, listen(Int(info, 0), kBacklog));
}

// socketListen(path, mode, gid?) -> fd. The path must be free.
Napi::Value Listen(const Napi::CallbackInfo& info) {
  UniqueFd fd(Bind(info));
  if (fd.get() < 0) return Outcome(info, -1);
  if (listen(fd.get(), kBacklog) != 0) {
    int error = errno;
    unlink(String(info, 0).c_str());
    errno = error;
    return Outcome(info, -1);
  }
  return Outcome(info, fd.release());
}

// socketConnect(path) -> fd, non-blocking once connected
Napi::Value Connect(const Napi::CallbackInfo& info) {
  struct sockaddr_un address;
  if (!FillAddress(String(info, 0), &address)) return Outcome(info, -1);
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (fd.get() < 0) return Outcome(info, -1);
  if (connect(fd.get(), reinterpret_cast<struct sockaddr*>(&address), sizeof address) != 0) return Outcome(info, -1);
  return Outcome(info, fd.release());
}

// socketPair() -> [fd, fd] or -errno
Napi::Value Pair(const Napi::CallbackInfo& info) {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0) return Outcome(info, -1);
  Napi::Array result = Napi::Array::New(info.Env(), 2);
  result.Set(uint32_t{0}, fds[0]);
  result.Set(uint32_t{1}, fds[1]);
  return result;
}

Napi::Value Accept(const Napi::CallbackInfo& info) {
  return Outcome(info, accept4(Int(info, 0), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

// socketSetNonblocking(fd), for sockets made by others
Napi::Value SetNonblocking(const Napi::CallbackInfo& info) {
  int flags = fcntl(Int(info, 0), F_GETFL);
  return Outcome(info, flags < 0 ? -1 : fcntl(Int(info, 0), F_SETFL, flags | O_NONBLOCK));
}

// socketReceive(fd, address, length, fds: Int32Array, counts: Int32Array) -> bytes, 0 at the end of the stream, or -errno.
// counts[0] = descriptors received into fds; counts[1] = 1 when the kernel cut descriptors off (MSG_CTRUNC) or more came
// than fds holds: the surplus is closed here.
Napi::Value Receive(const Napi::CallbackInfo& info) {
  Napi::Int32Array fds = info[3].As<Napi::Int32Array>();
  Napi::Int32Array counts = info[4].As<Napi::Int32Array>();
  counts[0] = 0;
  counts[1] = 0;
  struct iovec data = {Pointer(info, 1), Size(info, 2)};
  alignas(struct cmsghdr) char control[CMSG_SPACE(kDescriptorsMax * sizeof(int))];
  struct msghdr message;
  std::memset(&message, 0, sizeof message);
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t received = recvmsg(Int(info, 0), &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (received < 0) return Outcome(info, -1);
  if (message.msg_flags & MSG_CTRUNC) counts[1] = 1;
  for (struct cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
      if (static_cast<size_t>(counts[0]) < fds.ElementLength()) {
        fds[counts[0]] = fd;
        counts[0] = counts[0] + 1;
      } else {
        close(fd);
        counts[1] = 1;
      }
    }
  }
  return Napi::Number::New(info.Env(), static_cast<double>(received));
}

// socketSend(fd, address, length, fds: Int32Array) -> bytes or -errno
Napi::Value Send(const Napi::CallbackInfo& info) {
  Napi::Int32Array fds = info[3].As<Napi::Int32Array>();
  size_t count = fds.ElementLength();
  if (count > kDescriptorsMax) {
    errno = E2BIG;
    return Outcome(info, -1);
  }
  struct iovec data = {Pointer(info, 1), Size(info, 2)};
  alignas(struct cmsghdr) char control[CMSG_SPACE(kDescriptorsMax * sizeof(int))];
  struct msghdr message;
  std::memset(&message, 0, sizeof message);
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (count > 0) {
    std::memset(control, 0, sizeof control);
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    struct cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(count * sizeof(int));
    std::memcpy(CMSG_DATA(c), fds.Data(), count * sizeof(int));
  }
  return Outcome(info, sendmsg(Int(info, 0), &message, MSG_NOSIGNAL | MSG_DONTWAIT));
}

// socketPeer(fd) -> {pid, uid, gid} or -errno
Napi::Value Peer(const Napi::CallbackInfo& info) {
  struct ucred credentials;
  socklen_t length = sizeof credentials;
  if (getsockopt(Int(info, 0), SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) return Outcome(info, -1);
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("pid", credentials.pid);
  result.Set("uid", credentials.uid);
  result.Set("gid", credentials.gid);
  return result;
}

// socketPeerGroups(fd) -> supplementary groups of the peer as it connected, or -errno
Napi::Value PeerGroups(const Napi::CallbackInfo& info) {
  // NGROUPS_MAX of Linux.
  static constexpr size_t kGroupsMax = 65536;
  std::vector<gid_t> groups(64);
  socklen_t length = static_cast<socklen_t>(groups.size() * sizeof(gid_t));
  int outcome = getsockopt(Int(info, 0), SOL_SOCKET, SO_PEERGROUPS, groups.data(), &length);
  if (outcome != 0 && errno == ERANGE && length <= kGroupsMax * sizeof(gid_t)) {
    groups.resize(length / sizeof(gid_t));
    outcome = getsockopt(Int(info, 0), SOL_SOCKET, SO_PEERGROUPS, groups.data(), &length);
  }
  if (outcome != 0) return Outcome(info, -1);
  Napi::Array result = Napi::Array::New(info.Env(), length / sizeof(gid_t));
  for (uint32_t i = 0; i < length / sizeof(gid_t); i++) result.Set(i, groups[i]);
  return result;
}

}  // namespace

void InitSocket(Napi::Env env, Napi::Object exports) {
  Export<Listen>(env, exports, "socketListen");
  Export<BindOnly>(env, exports, "socketBind");
  Export<StartListening>(env, exports, "socketStartListening");
  Export<Connect>(env, exports, "socketConnect");
  Export<Pair>(env, exports, "socketPair");
  Export<Accept>(env, exports, "socketAccept");
  Export<SetNonblocking>(env, exports, "socketSetNonblocking");
  Export<Receive>(env, exports, "socketReceive");
  Export<Send>(env, exports, "socketSend");
  Export<Peer>(env, exports, "socketPeer");
  Export<PeerGroups>(env, exports, "socketPeerGroups");
}

}  // namespace strata
