// The load generator's per-request loop: the guest side of one split virtqueue with virtio-blk requests on it. An addon of
// its own, for benchmarks and tests only; test/frontend/load.ts is its typed face.
//
// One call runs on the calling thread until its time is over and every request has come back. It keeps `depth` requests
// in flight, watches the used ring without sleeping, asks for no interrupts, and kicks only when the device wants it, as
// Linux does. Every request has fixed buffers and fixed descriptors, so that a request costs the client little more than
// the cache misses on what the device wrote.
//
// Memory of the pool, from its start: for each request a control block of 128 bytes {indirect table of three descriptors,
// header at 64, status at 96}; then, on the next page, the data buffers, each a block long.
#include "native.h"

#include <cstring>
#include <memory>
#include <vector>

#include <sched.h>
#include <time.h>
#include <unistd.h>

namespace strata {
namespace {

constexpr uint16_t kNext = 1;
constexpr uint16_t kWrite = 2;
constexpr uint16_t kIndirect = 4;
constexpr uint16_t kNoInterrupt = 1;
constexpr uint16_t kNoNotify = 1;
constexpr uint32_t kTypeIn = 0;
constexpr uint32_t kTypeOut = 1;
constexpr uint32_t kChainLength = 3;
constexpr size_t kControlBytes = 128;
constexpr size_t kHeaderAt = 64;
constexpr size_t kStatusAt = 96;
constexpr size_t kPageBytes = 4096;
constexpr uint32_t kSectorBytes = 512;
constexpr uint8_t kStatusUnanswered = 0xff;
// An event index this far ahead is never passed between two looks at the ring.
constexpr uint16_t kEventFarAhead = 0x7fff;
constexpr uint32_t kSpinsPerClockRead = 1024;
// Requests made available at once: the device is to work on the first while the client makes the next.
constexpr uint16_t kPublishEvery = 4;
// The client times its own work in one batch of so many, and leaves out those that were interrupted.
constexpr uint32_t kBatchesPerTiming = 64;
constexpr uint64_t kInterruptedNs = 20000;

struct Descriptor {
  uint64_t address;
  uint32_t length;
  uint16_t flags;
  uint16_t next;
};
static_assert(sizeof(Descriptor) == 16, "VIRTIO 1.2, 2.7.5");

struct UsedElement {
  uint32_t id;
  uint32_t length;
};

struct RequestHeader {
  uint32_t type;
  uint32_t reserved;
  uint64_t sector;
};

uint64_t NowNs() {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

void SleepNs(uint64_t ns) {
  struct timespec span = {static_cast<time_t>(ns / 1000000000u), static_cast<long>(ns % 1000000000u)};
  clock_nanosleep(CLOCK_MONOTONIC, 0, &span, nullptr);
}

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Latencies in nanoseconds, 64 buckets to each power of two: no bucket is wider than 1.6 % of its value.
class Histogram {
 public:
  void Add(uint64_t ns) {
    counts_[Index(ns)]++;
    count_++;
    sum_ += ns;
    if (ns > max_) max_ = ns;
  }

  double Percentile(double fraction) const {
    uint64_t rank = static_cast<uint64_t>(fraction * static_cast<double>(count_));
    uint64_t seen = 0;
    for (size_t i = 0; i < kBuckets; i++) {
      seen += counts_[i];
      if (seen > rank) return Middle(i);
    }
    return static_cast<double>(max_);
  }

  double Mean() const { return count_ == 0 ? 0 : static_cast<double>(sum_) / static_cast<double>(count_); }
  double Max() const { return static_cast<double>(max_); }

 private:
  static constexpr size_t kBuckets = 2304;  // up to 2^41 ns

  static size_t Index(uint64_t ns) {
    if (ns < 64) return ns;
    uint32_t exponent = 63 - static_cast<uint32_t>(__builtin_clzll(ns));
    size_t index = (exponent - 5) * 64 + ((ns >> (exponent - 6)) & 63);
    return index < kBuckets ? index : kBuckets - 1;
  }

  static double Middle(size_t index) {
    if (index < 64) return static_cast<double>(index);
    uint32_t shift = static_cast<uint32_t>(index / 64) - 1;
    uint64_t low = (64 + index % 64) << shift;
    return static_cast<double>(low) + static_cast<double>(uint64_t{1} << shift) / 2;
  }

  uint64_t counts_[kBuckets] = {};
  uint64_t count_ = 0;
  uint64_t sum_ = 0;
  uint64_t max_ = 0;
};

// What test/frontend/load.ts passes, by the same names.
struct Parameters {
  // Absolute addresses in this process.
  Descriptor* descriptors;
  uint16_t* available;  // {flags, idx, ring[size], used_event}
  uint16_t* used;       // {flags, idx, elements[size], avail_event}
  char* pool;
  uint64_t pool_guest_address;
  uint32_t size;
  uint32_t depth;
  uint32_t block_bytes;
  uint64_t first_block;
  uint64_t block_count;
  uint32_t read_percent;
  bool sequential;
  bool event_idx;
  bool indirect;
  bool polite;
  int kick_fd;
  uint64_t duration_ns;
  uint64_t requests_max;  // 0: no limit
  uint64_t gap_ns;        // pause before each request
  uint64_t stall_ns;
  uint64_t seed;
};

class Generator {
 public:
  explicit Generator(const Parameters& parameters)
      : p_(parameters),
        mask_(parameters.size - 1),
        per_request_(parameters.indirect ? 1 : kChainLength),
        data_at_((parameters.depth * kControlBytes + kPageBytes - 1) / kPageBytes * kPageBytes),
        random_(parameters.seed | 1),
        next_block_(0),
        submitted_(parameters.depth, 0),
        pending_(parameters.depth, false) {}

  // Returns 0, or ETIMEDOUT when the device stopped answering, or EBADMSG when it answered what was not asked.
  int Run() {
    available_index_ = p_.available[1];
    used_index_ = LoadUsedIndex();
    SuppressInterrupts();
    for (uint32_t slot = 0; slot < p_.depth; slot++) LayOut(slot);
    uint64_t now = NowNs();
    start_ns_ = now;
    end_ns_ = now + p_.duration_ns;
    uint64_t last_progress = now;
    for (uint32_t slot = 0; slot < p_.depth && MayStart(now); slot++) Start(slot, now);
    Publish();
    uint32_t spins = 0;
    while (inflight_ > 0) {
      uint16_t device_index = LoadUsedIndex();
      if (device_index == used_index_) {
        Pause();
        if (++spins % kSpinsPerClockRead != 0) continue;
        if (NowNs() - last_progress > p_.stall_ns) return ETIMEDOUT;
        if (p_.polite) sched_yield();
        continue;
      }
      now = NowNs();
      last_progress = now;
      uint64_t finished_before = finished_;
      if (!Reap(device_index, now)) return EBADMSG;
      if (p_.gap_ns == 0 && ++batches_ % kBatchesPerTiming == 0) TimeOwnWork(now, finished_ - finished_before);
    }
    elapsed_ns_ = NowNs() - start_ns_;
    return 0;
  }

  void Report(Napi::Env env, Napi::Object result) const {
    auto set = [&](const char* name, double value) { result.Set(name, Napi::Number::New(env, value)); };
    set("requests", static_cast<double>(finished_));
    set("errors", static_cast<double>(errors_));
    set("kicks", static_cast<double>(kicks_));
    set("elapsedUs", static_cast<double>(elapsed_ns_) / 1000);
    set("clientNsPerRequest", timed_requests_ == 0 ? 0 : static_cast<double>(timed_ns_) / static_cast<double>(timed_requests_));
    set("meanUs", latencies_.Mean() / 1000);
    set("p50Us", latencies_.Percentile(0.5) / 1000);
    set("p99Us", latencies_.Percentile(0.99) / 1000);
    set("p999Us", latencies_.Percentile(0.999) / 1000);
    set("maxUs", latencies_.Max() / 1000);
  }

 private:
  char* Control(uint32_t slot) const { return p_.pool + slot * kControlBytes; }
  RequestHeader* Header(uint32_t slot) const { return reinterpret_cast<RequestHeader*>(Control(slot) + kHeaderAt); }
  volatile uint8_t* Status(uint32_t slot) const {
    return reinterpret_cast<volatile uint8_t*>(Control(slot) + kStatusAt);
  }
  Descriptor* Chain(uint32_t slot) const {
    return p_.indirect ? reinterpret_cast<Descriptor*>(Control(slot)) : p_.descriptors + slot * kChainLength;
  }
  const UsedElement* UsedAt(uint16_t index) const {
    return reinterpret_cast<const UsedElement*>(p_.used + 2) + (index & mask_);
  }
  uint16_t LoadUsedIndex() const { return __atomic_load_n(&p_.used[1], __ATOMIC_ACQUIRE); }

  // Descriptors of a request never change but for the direction of its data.
  void LayOut(uint32_t slot) {
    uint64_t control = p_.pool_guest_address + slot * kControlBytes;
    uint64_t data = p_.pool_guest_address + data_at_ + uint64_t{slot} * p_.block_bytes;
    uint16_t first = p_.indirect ? 0 : static_cast<uint16_t>(slot * kChainLength);
    Descriptor* chain = Chain(slot);
    chain[0] = {control + kHeaderAt, sizeof(RequestHeader), kNext, static_cast<uint16_t>(first + 1)};
    chain[1] = {data, p_.block_bytes, kNext, static_cast<uint16_t>(first + 2)};
    chain[2] = {control + kStatusAt, 1, kWrite, 0};
    if (p_.indirect) {
      p_.descriptors[slot] = {control, kChainLength * sizeof(Descriptor), kIndirect, 0};
    }
  }

  // From seeing a batch of answers to having made the next requests available.
  void TimeOwnWork(uint64_t since, uint64_t requests) {
    uint64_t ns = NowNs() - since;
    if (ns > kInterruptedNs) return;
    timed_ns_ += ns;
    timed_requests_ += requests;
  }

  bool MayStart(uint64_t now) const {
    return now < end_ns_ && (p_.requests_max == 0 || started_ < p_.requests_max);
  }

  // Puts the request into the available ring; the device sees it after Publish.
  void Start(uint32_t slot, uint64_t now) {
    bool read = p_.read_percent >= 100 || (p_.read_percent > 0 && Random() % 100 < p_.read_percent);
    Chain(slot)[1].flags = read ? kNext | kWrite : kNext;
    Header(slot)->type = read ? kTypeIn : kTypeOut;
    Header(slot)->sector = (p_.first_block + NextBlock()) * (p_.block_bytes / kSectorBytes);
    *Status(slot) = kStatusUnanswered;
    p_.available[2 + (available_index_ & mask_)] = static_cast<uint16_t>(slot * per_request_);
    available_index_++;
    submitted_[slot] = now;
    pending_[slot] = true;
    inflight_++;
    started_++;
  }

  void Publish() {
    uint16_t before = p_.available[1];
    if (before == available_index_) return;
    __atomic_store_n(&p_.available[1], available_index_, __ATOMIC_RELEASE);
    // The device must see the index before we look whether it wants to be told (VIRTIO 1.2, 2.7.13.4.1).
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!DeviceWantsKick(before)) return;
    uint64_t one = 1;
    if (write(p_.kick_fd, &one, sizeof one) == sizeof one) kicks_++;
  }

  bool DeviceWantsKick(uint16_t before) const {
    if (!p_.event_idx) return (__atomic_load_n(&p_.used[0], __ATOMIC_RELAXED) & kNoNotify) == 0;
    uint16_t event = __atomic_load_n(&p_.used[2 + p_.size * 4], __ATOMIC_RELAXED);
    return static_cast<uint16_t>(available_index_ - event - 1) < static_cast<uint16_t>(available_index_ - before);
  }

  void SuppressInterrupts() {
    p_.available[0] = kNoInterrupt;
    if (p_.event_idx) p_.available[2 + p_.size] = static_cast<uint16_t>(used_index_ + kEventFarAhead);
  }

  // Takes what the device has finished and starts as many anew. False when an answer belongs to no request.
  bool Reap(uint16_t device_index, uint64_t now) {
    while (used_index_ != device_index) {
      uint32_t slot = UsedAt(used_index_)->id / per_request_;
      if (slot >= p_.depth || !pending_[slot]) return false;
      used_index_++;
      pending_[slot] = false;
      inflight_--;
      latencies_.Add(now - submitted_[slot]);
      if (*Status(slot) != 0) errors_++;
      finished_++;
      if (p_.gap_ns > 0) {
        SleepNs(p_.gap_ns);
        now = NowNs();
      }
      if (MayStart(now)) Start(slot, now);
      if (static_cast<uint16_t>(available_index_ - p_.available[1]) == kPublishEvery) Publish();
    }
    SuppressInterrupts();
    Publish();
    return true;
  }

  uint64_t NextBlock() {
    if (!p_.sequential) {
      // The upper half of the product spreads the random word evenly over the range without a division.
      return static_cast<uint64_t>((static_cast<unsigned __int128>(Random()) * p_.block_count) >> 64);
    }
    uint64_t block = next_block_++;
    if (next_block_ == p_.block_count) next_block_ = 0;
    return block;
  }

  // xorshift64*
  uint64_t Random() {
    random_ ^= random_ >> 12;
    random_ ^= random_ << 25;
    random_ ^= random_ >> 27;
    return random_ * 0x2545f4914f6cdd1dull;
  }

  const Parameters p_;
  const uint32_t mask_;
  const uint32_t per_request_;
  const size_t data_at_;
  uint64_t random_;
  uint64_t next_block_;
  std::vector<uint64_t> submitted_;
  std::vector<uint8_t> pending_;
  uint16_t available_index_ = 0;
  uint16_t used_index_ = 0;
  uint32_t inflight_ = 0;
  uint64_t started_ = 0;
  uint64_t finished_ = 0;
  uint64_t errors_ = 0;
  uint64_t kicks_ = 0;
  uint32_t batches_ = 0;
  uint64_t timed_ns_ = 0;
  uint64_t timed_requests_ = 0;
  uint64_t start_ns_ = 0;
  uint64_t end_ns_ = 0;
  uint64_t elapsed_ns_ = 0;
  Histogram latencies_;
};

// run(parameters) -> result, or -errno. load.ts has checked that queue and pool hold what is asked for.
Napi::Value RunLoad(const Napi::CallbackInfo& info) {
  Napi::Object given = info[0].As<Napi::Object>();
  auto number = [&](const char* name) { return given.Get(name).As<Napi::Number>().DoubleValue(); };
  auto whole = [&](const char* name) { return static_cast<uint64_t>(number(name)); };
  auto truth = [&](const char* name) { return given.Get(name).As<Napi::Boolean>().Value(); };
  Parameters parameters;
  parameters.descriptors = reinterpret_cast<Descriptor*>(whole("descriptorsAddress"));
  parameters.available = reinterpret_cast<uint16_t*>(whole("availableAddress"));
  parameters.used = reinterpret_cast<uint16_t*>(whole("usedAddress"));
  parameters.pool = reinterpret_cast<char*>(whole("poolAddress"));
  parameters.pool_guest_address = whole("poolGuestAddress");
  parameters.size = static_cast<uint32_t>(whole("queueSize"));
  parameters.depth = static_cast<uint32_t>(whole("depth"));
  parameters.block_bytes = static_cast<uint32_t>(whole("blockBytes"));
  parameters.first_block = whole("firstBlock");
  parameters.block_count = whole("blockCount");
  parameters.read_percent = static_cast<uint32_t>(whole("readPercent"));
  parameters.sequential = truth("sequential");
  parameters.event_idx = truth("eventIdx");
  parameters.indirect = truth("indirect");
  parameters.polite = truth("polite");
  parameters.kick_fd = static_cast<int>(whole("kickFd"));
  parameters.duration_ns = static_cast<uint64_t>(number("durationUs") * 1000);
  parameters.requests_max = whole("requestsMax");
  parameters.gap_ns = static_cast<uint64_t>(number("gapUs") * 1000);
  parameters.stall_ns = static_cast<uint64_t>(number("stallUs") * 1000);
  parameters.seed = whole("seed");

  auto generator = std::make_unique<Generator>(parameters);
  int error = generator->Run();
  if (error != 0) return Napi::Number::New(info.Env(), -error);
  Napi::Object result = Napi::Object::New(info.Env());
  generator->Report(info.Env(), result);
  return result;
}

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  Export<RunLoad>(env, exports, "run");
  return exports;
}

}  // namespace
}  // namespace strata

static Napi::Object InitModule(Napi::Env env, Napi::Object exports) { return strata::Init(env, exports); }
NODE_API_MODULE(strata_loadgen, InitModule)
