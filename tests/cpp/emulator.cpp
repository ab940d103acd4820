// Fibers, their meetings, and what sanitizers are told of them. See emulator.h.
//
// A fiber that waits switches to the next that can run; the last to arrive at a meeting makes the
// others runnable and goes on. A fiber is at most one meeting ahead of another of its warp or
// block, so everything that belongs to a meeting exists twice.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cuda/platform.cuh"

#if defined(__has_feature)
#define GEOT_HAS_FEATURE(x) __has_feature(x)
#else
#define GEOT_HAS_FEATURE(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || GEOT_HAS_FEATURE(address_sanitizer)
#define GEOT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__) || GEOT_HAS_FEATURE(thread_sanitizer)
#define GEOT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

// Fibers touch the emulator's own state only in functions that ThreadSanitizer does not look into.
#define GEOT_UNSEEN __attribute__((noinline, no_sanitize("thread")))

// -DGEOT_UCONTEXT asks for what other processors have, at a system call for each switch.
#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(GEOT_UCONTEXT)
#define GEOT_UCONTEXT
#endif

#if !defined(GEOT_UCONTEXT)
// Saves the registers that a call preserves on this stack, and its address in *from.
extern "C" void geot_switch_stack(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl geot_switch_stack
.type geot_switch_stack, @function
geot_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size geot_switch_stack, .-geot_switch_stack
)");
#else
asm(R"(
.text
.globl geot_switch_stack
.type geot_switch_stack, %function
geot_switch_stack:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size geot_switch_stack, .-geot_switch_stack
)");
#endif
#else
#include <ucontext.h>
#endif

namespace geot::cuda {
namespace host {
namespace {

constexpr int kMostThreads = 1024, kMostFibers = 2 * kMostThreads;
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;

struct Context {
#if !defined(GEOT_UCONTEXT)
  void* stack = nullptr;

  GEOT_UNSEEN void prepare(char* bottom, void (*entry)()) {
#if defined(__x86_64__)
    constexpr int kWords = 8, kEntry = 6, kFrame = 5;
#else
    constexpr int kWords = 20, kEntry = 1, kFrame = 0;
#endif
    void** words = reinterpret_cast<void**>(bottom + kStackBytes) - kWords;
    words[kFrame] = words[kWords - 1] = nullptr;  // nobody called the entry
    words[kEntry] = reinterpret_cast<void*>(entry);
    stack = words;
  }
  GEOT_UNSEEN static void change(Context& from, Context& to) {
    geot_switch_stack(&from.stack, to.stack);
  }
#else
  ucontext_t context;

  GEOT_UNSEEN void prepare(char* bottom, void (*entry)()) {
    getcontext(&context);
    context.uc_stack = {bottom, 0, kStackBytes};
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  GEOT_UNSEEN static void change(Context& from, Context& to) {
    swapcontext(&from.context, &to.context);
  }
#endif
};

// Where fibers meet.
constexpr const char* kSyncBlock = "GEOT_SYNC_BLOCK";
constexpr const char* kAnyInBlock = "any_in_block";
constexpr const char* kSyncWarp = "GEOT_SYNC_WARP";
constexpr const char* kBallot = "ballot";
constexpr const char* kShuffle = "shuffle";
constexpr const char* kShuffleXor = "shuffle_xor";
constexpr const char* kMma = "mma";
constexpr const char* kLoadTransposed = "load_transposed";

struct Fiber {
  Context context;
  int index = 0;
  bool ended = false;
  const char* waits_in = nullptr;
  Site site;
  char* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* logical = nullptr;     // ThreadSanitizer's
};

// What a lane brings to a meeting of its warp.
union Packet {
  uint64_t word;
  Operands operands;
};

struct Meeting {
  int arrived = 0;
  unsigned parity = 0;
  const char* what = nullptr;
  Site site;
  uint64_t gathered[2] = {};
  uint64_t* order = nullptr;  // [2], known to ThreadSanitizer by address
};

struct Warp {
  Meeting meeting;
  Packet packets[2][32];
};

// Fibers that can run, first in first out.
struct Queue {
  int first = 0, size = 0;
  Fiber* fibers[kMostThreads];

  GEOT_UNSEEN Fiber*& at(int n) { return fibers[(first + n) % kMostThreads]; }
  GEOT_UNSEEN void push(Fiber* fiber) { at(size++) = fiber; }
  GEOT_UNSEEN Fiber* pop_first() {
    Fiber* fiber = at(0);
    first = (first + 1) % kMostThreads, --size;
    return fiber;
  }
  GEOT_UNSEEN Fiber* pop_last() { return at(--size); }
};

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// A copy of strcmp() that ThreadSanitizer does not intercept.
GEOT_UNSEEN bool same(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

struct Settings {
  const char* dropped_file = nullptr;
  int dropped_line = 0;
  bool lists = false;
  bool reverse = false;
  uint64_t seed = 0;

  Settings() {
    static char file[256];
    if (const char* site = std::getenv("GEOT_DROP_SYNC")) {
      const char* colon = std::strrchr(site, ':');
      if (colon == nullptr || colon - site >= 256) {
        std::fprintf(stderr, "GEOT_DROP_SYNC is file:line, not %s\n", site);
        std::exit(2);
      }
      std::memcpy(file, site, static_cast<size_t>(colon - site));
      dropped_file = base_name(file);
      dropped_line = std::atoi(colon + 1);
    }
    const char* list = std::getenv("GEOT_LIST_SYNC");
    lists = list != nullptr && std::strcmp(list, "1") == 0;
    if (const char* schedule = std::getenv("GEOT_SCHEDULE")) {
      reverse = std::strcmp(schedule, "reverse") == 0;
      seed = reverse ? 0 : std::strtoull(schedule, nullptr, 10);
    }
  }

  GEOT_UNSEEN bool drops(Site site) const {
    if (site.line != dropped_line || dropped_file == nullptr) return false;
    const char* name = site.file;
    for (const char* c = site.file; *c; ++c) {
      if (*c == '/') name = c + 1;
    }
    return same(name, dropped_file);
  }
};
const Settings settings;

// The barriers that were passed, printed at exit.
struct Passed {
  static constexpr int kMost = 1024;
  struct Entry {
    Site site;
    const char* kind;
  };
  Entry entries[kMost] = {};
  int size = 0;
  bool locked = false;

  // The lock is unseen too: it must not order anything.
  GEOT_UNSEEN void add(Site site, const char* kind) {
    while (__atomic_test_and_set(&locked, __ATOMIC_ACQUIRE)) {
    }
    int n = 0;
    while (n < size && !(entries[n].site.line == site.line && entries[n].kind == kind &&
                         same(entries[n].site.file, site.file))) {
      ++n;
    }
    if (n == size && n < kMost) entries[size++] = {site, kind};
    __atomic_clear(&locked, __ATOMIC_RELEASE);
  }
  ~Passed() {
    for (int n = 0; n < size; ++n) {
      const Entry& entry = entries[n];
      std::printf("sync %s:%d %s\n", base_name(entry.site.file), entry.site.line, entry.kind);
    }
    std::fflush(stdout);
  }
};
Passed passed;

struct Emulator {
  int64_t block = 0, blocks = 0;
  int threads = 0;
  size_t shared_bytes = 0;
  char* shared = nullptr;
  const void* call = nullptr;
  Body body = nullptr;

  Fiber* current = nullptr;
  Fiber host;
  Queue queue;
  Meeting meeting;
  Fiber pool[kMostFibers];
  Fiber* fibers = pool;  // of this block
  Warp warps[kMostThreads / 32];

  char* stacks = nullptr;
  int num_stacks = 0;
  uint64_t random = 0;
  char message[1024] = "";
  uint64_t begin = 0, end = 0;  // known to ThreadSanitizer by address

  ~Emulator();

  GEOT_UNSEEN const char* run();
  int num_sets() const;
  void map_stacks(int number);
  void unmap_stacks();
  GEOT_UNSEEN void run_block();
  GEOT_UNSEEN void begin_logical_threads();
  GEOT_UNSEEN void end_logical_threads();
  GEOT_UNSEEN void explain_deadlock();

  GEOT_UNSEEN Fiber* next();
  GEOT_UNSEEN void change_to(Fiber& to);
  GEOT_UNSEEN void fail(const char* what, Site site, const char* why);
  GEOT_UNSEEN uint64_t meet(Meeting& meeting, int first, int size, const char* what, Site site,
                            uint64_t gather, bool orders);
  GEOT_UNSEEN const Packet* meet_in_warp(const Packet& packet, const char* what, Site site);
};

thread_local Emulator* self = nullptr;

// Where fibers begin, and end.
GEOT_UNSEEN void entry() {
  Emulator& e = *self;
#if defined(GEOT_ASAN)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  // The first fiber of a block comes from the host, whose stack nobody else tells.
  if (e.host.stack_bottom == nullptr)
    e.host.stack_bottom = static_cast<char*>(const_cast<void*>(bottom)), e.host.stack_bytes = bytes;
#endif
  e.body(e.call, e.shared);
  e.current->ended = true;
  Fiber* to = e.next();
  e.change_to(*to);
  std::abort();
}

Fiber* Emulator::next() {
  if (queue.size == 0) return &host;
  if (settings.reverse) return queue.pop_last();
  if (settings.seed) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    Fiber*& chosen = queue.at(static_cast<int>(random % static_cast<uint64_t>(queue.size)));
    Fiber* first = queue.at(0);
    queue.at(0) = chosen, chosen = first;
  }
  return queue.pop_first();
}

void Emulator::change_to(Fiber& to) {
  Fiber& from = *current;
  current = &to;
#if defined(GEOT_TSAN)
  __tsan_switch_to_fiber(to.logical, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(GEOT_ASAN)
  __sanitizer_start_switch_fiber(from.ended ? nullptr : &from.fake_stack, to.stack_bottom,
                                 to.stack_bytes);
#endif
  Context::change(from.context, to.context);
#if defined(GEOT_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Gives the block up; its fibers are never resumed.
void Emulator::fail(const char* what, Site site, const char* why) {
  std::snprintf(message, sizeof(message), "block %lld, thread %d in %s at %s:%d: %s",
                static_cast<long long>(block), current->index, what, base_name(site.file),
                site.line, why);
  change_to(host);
}

// Returns when `size` threads from `first` on are here, with the union of what they gather.
uint64_t Emulator::meet(Meeting& m, int first, int size, const char* what, Site site,
                        uint64_t gather, bool orders) {
  Fiber& me = *current;
  const unsigned parity = m.parity;
  if (m.arrived == 0) {
    m.what = what, m.site = site, m.gathered[parity] = 0;
  } else if (m.what != what || m.site.line != site.line || !same(m.site.file, site.file)) {
    char why[256];
    std::snprintf(why, sizeof(why), "others of its %s are in %s at %s:%d",
                  &m == &meeting ? "block" : "warp", m.what, base_name(m.site.file), m.site.line);
    fail(what, site, why);
  }
  m.gathered[parity] |= gather;
#if defined(GEOT_TSAN)
  if (orders) __tsan_release(&m.order[parity]);
#endif
  if (++m.arrived == size) {
    m.arrived = 0, m.parity ^= 1;
    for (int n = 0; n < size; ++n) {
      Fiber& fiber = fibers[first + n];
      fiber.waits_in = nullptr;
      if (&fiber != &me) queue.push(&fiber);
    }
  } else {
    me.waits_in = what, me.site = site;
    Fiber* to = next();
    change_to(*to);
  }
#if defined(GEOT_TSAN)
  if (orders) __tsan_acquire(&m.order[parity]);
#endif
  (void)orders;
  return m.gathered[parity];
}

const Packet* Emulator::meet_in_warp(const Packet& packet, const char* what, Site site) {
  const int index = current->index;
  Warp& w = warps[index / 32];
  Packet* packets = w.packets[w.meeting.parity];
  packets[index % 32] = packet;
  meet(w.meeting, index / 32 * 32, 32, what, site, 0, false);
  return packets;
}

void* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    std::exit(2);
  }
  return memory;
}

// ThreadSanitizer finds races of two blocks where they are run by different logical threads. These
// are too dear to be made anew, so that blocks take one of a few sets in turn.
int Emulator::num_sets() const {
#if defined(GEOT_TSAN)
  return std::clamp(512 / threads, 2, 8);
#else
  return 1;
#endif
}

// A stack belongs to one fiber of the pool, and so to one logical thread.
void Emulator::map_stacks(int number) {
  const size_t each = kStackBytes + kGuardBytes;
  stacks = static_cast<char*>(map(each * static_cast<size_t>(number)));
  num_stacks = number;
  for (int n = 0; n < number; ++n) {
    char* guard = stacks + each * static_cast<size_t>(n);
    mprotect(guard, kGuardBytes, PROT_NONE);
    pool[n].stack_bottom = guard + kGuardBytes;
    pool[n].stack_bytes = kStackBytes;
  }
}

void Emulator::unmap_stacks() {
  if (num_stacks == 0) return;
  munmap(stacks, (kStackBytes + kGuardBytes) * static_cast<size_t>(num_stacks));
}

Emulator::~Emulator() {
  unmap_stacks();
#if defined(GEOT_TSAN)
  for (Fiber& fiber : pool) {
    if (fiber.logical) __tsan_destroy_fiber(fiber.logical);
  }
#endif
}

// Logical threads of a block begin after what the host did, and know nothing of other sets.
void Emulator::begin_logical_threads() {
#if defined(GEOT_TSAN)
  const int num_meetings = 1 + threads / 32;
  auto* order = static_cast<uint64_t*>(std::calloc(static_cast<size_t>(num_meetings) * 2, 8));
  meeting.order = order;
  for (int n = 1; n < num_meetings; ++n) warps[n - 1].meeting.order = order + n * 2;
  host.logical = __tsan_get_current_fiber();
  __tsan_release(&begin);
  for (int n = 0; n < threads; ++n) {
    Fiber& fiber = fibers[n];
    if (fiber.logical == nullptr) fiber.logical = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(fiber.logical, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(&begin);
    __tsan_switch_to_fiber(host.logical, __tsan_switch_to_fiber_no_sync);
  }
#endif
}

// What a block did comes before what the host does after the launch, and before nothing else.
void Emulator::end_logical_threads() {
#if defined(GEOT_TSAN)
  for (int n = 0; n < threads; ++n) {
    __tsan_switch_to_fiber(fibers[n].logical, __tsan_switch_to_fiber_no_sync);
    __tsan_release(&end);
    __tsan_switch_to_fiber(host.logical, __tsan_switch_to_fiber_no_sync);
  }
  std::free(meeting.order);
#endif
}

void Emulator::run_block() {
#if defined(GEOT_TSAN)
  // Mapped memory is new to ThreadSanitizer: blocks that have it one after the other don't race.
  const size_t mapped = shared_bytes + 1;
  shared = static_cast<char*>(map(mapped));
#endif
  std::memset(shared, 0xff, shared_bytes);
  fibers = pool + block % num_sets() * threads;
  meeting = Meeting{};
  for (int n = 0; n < threads / 32; ++n) warps[n].meeting = Meeting{};
  begin_logical_threads();
  queue.first = queue.size = 0;
  for (int n = 0; n < threads; ++n) {
    Fiber& fiber = fibers[n];
    fiber.index = n;
    fiber.ended = false;
    fiber.waits_in = nullptr;
#if defined(GEOT_ASAN)
    __asan_unpoison_memory_region(fiber.stack_bottom, kStackBytes);  // of frames never left
#endif
    fiber.context.prepare(fiber.stack_bottom, entry);
    queue.push(&fiber);
  }
  host.stack_bottom = nullptr;
  current = &host;
  change_to(*next());
  if (message[0] == 0) explain_deadlock();
  end_logical_threads();
#if defined(GEOT_TSAN)
  munmap(shared, mapped);
#endif
}

// Writes where threads wait, where not all have ended: so many at each place.
void Emulator::explain_deadlock() {
  bool told[kMostThreads] = {};
  int all_ended = 0;
  for (int n = 0; n < threads; ++n) all_ended += fibers[n].ended;
  if (all_ended == threads) return;
  size_t size = static_cast<size_t>(std::snprintf(
      message, sizeof(message), "block %lld waits forever:", static_cast<long long>(block)));
  for (int n = 0; n < threads; ++n) {
    const Fiber& a = fibers[n];
    int count = 0;
    for (int k = n; k < threads && !told[n]; ++k) {
      const Fiber& b = fibers[k];
      if (a.ended == b.ended &&
          (a.ended || (a.waits_in == b.waits_in && a.site.line == b.site.line &&
                       same(a.site.file, b.site.file)))) {
        ++count;
        if (k > n) told[k] = true;
      }
    }
    if (count == 0 || size >= sizeof(message)) continue;
    char place[256] = "ended";
    if (!a.ended) {
      std::snprintf(place, sizeof(place), "in %s at %s:%d", a.waits_in, base_name(a.site.file),
                    a.site.line);
    }
    size += static_cast<size_t>(std::snprintf(message + size, sizeof(message) - size,
                                              " [%d threads from %d on %s]", count, n, place));
  }
}

const char* Emulator::run() {
  message[0] = 0;
  random = settings.seed;
  const int needed = threads * static_cast<int>(std::min<int64_t>(blocks, num_sets()));
  if (num_stacks < needed) {
    unmap_stacks();
    map_stacks(needed);
  }
#if !defined(GEOT_TSAN)
  // Of the very size, so that AddressSanitizer sees the end.
  shared = static_cast<char*>(std::malloc(shared_bytes));
#endif
  for (block = 0; block < blocks && message[0] == 0; ++block) run_block();
#if defined(GEOT_TSAN)
  __tsan_acquire(&end);
#else
  std::free(shared);
#endif
  return message[0] == 0 ? nullptr : message;
}

}  // namespace

const char* launch(int64_t blocks, int threads, size_t shared_bytes, const void* call, Body body) {
  if (threads > kMostThreads) return "more threads than a block can have";
  if (blocks == 0) return nullptr;
  if (self != nullptr) return "a kernel cannot launch another";
  thread_local std::unique_ptr<Emulator> emulator;
  if (!emulator) emulator = std::make_unique<Emulator>();
  emulator->blocks = blocks;
  emulator->threads = threads;
  emulator->shared_bytes = shared_bytes;
  emulator->call = call;
  emulator->body = body;
  self = emulator.get();
  const char* message = emulator->run();
  self = nullptr;
  return message;
}

GEOT_UNSEEN void sync_block(Site site) {
  Emulator& e = *self;
  if (settings.lists) passed.add(site, "block");
  const bool orders = !settings.drops(site);
#if !defined(GEOT_TSAN)
  if (!orders) return;
#endif
  e.meet(e.meeting, 0, e.threads, kSyncBlock, site, 0, orders);
}

GEOT_UNSEEN void sync_warp(Site site) {
  Emulator& e = *self;
  if (settings.lists) passed.add(site, "warp");
  const bool orders = !settings.drops(site);
#if !defined(GEOT_TSAN)
  if (!orders) return;
#endif
  const int warp = e.current->index / 32;
  e.meet(e.warps[warp].meeting, warp * 32, 32, kSyncWarp, site, 0, orders);
}

GEOT_UNSEEN bool any_in_block(bool x, Site site) {
  Emulator& e = *self;
  return e.meet(e.meeting, 0, e.threads, kAnyInBlock, site, x, !settings.drops(site));
}

GEOT_UNSEEN unsigned ballot(bool x, Site site) {
  Emulator& e = *self;
  const int warp = e.current->index / 32;
  const uint64_t bit = uint64_t{x} << e.current->index % 32;
  return static_cast<unsigned>(
      e.meet(e.warps[warp].meeting, warp * 32, 32, kBallot, site, bit, false));
}

GEOT_UNSEEN uint64_t shuffle(uint64_t bits, int source_lane, Site site) {
  Emulator& e = *self;
  Packet packet;
  packet.word = bits;
  return e.meet_in_warp(packet, kShuffle, site)[source_lane & 31].word;
}

GEOT_UNSEEN uint64_t shuffle_xor(uint64_t bits, int lane_mask, Site site) {
  Emulator& e = *self;
  if (lane_mask < 0 || lane_mask > 31) e.fail(kShuffleXor, site, "the mask is not in [0, 32)");
  Packet packet;
  packet.word = bits;
  const Packet* packets = e.meet_in_warp(packet, kShuffleXor, site);
  return packets[e.current->index % 32 ^ lane_mask].word;
}

// Products and sums in double, rounded once, where the hardware has its own order.
GEOT_UNSEEN void multiply(float (&c)[4], const Operands& operands, Site site) {
  Emulator& e = *self;
  Packet packet;
  packet.operands = operands;
  const Packet* packets = e.meet_in_warp(packet, kMma, site);
  const int g = e.current->index % 32 / 4, t = e.current->index % 4;
  double sum[4] = {c[0], c[1], c[2], c[3]};
  for (int quad = 0; quad < 4; ++quad) {  // whose lanes hold columns 2 quad, + 1, + 8, + 9
    const Operands& a = packets[4 * g + quad].operands;
    const Operands& left = packets[4 * (2 * t) + quad].operands;
    const Operands& right = packets[4 * (2 * t + 1) + quad].operands;
    for (int k = 0; k < 4; ++k) {
      const int at = k / 2 * 4 + k % 2;
      sum[0] += double{a.a[at]} * double{left.b[k]};
      sum[1] += double{a.a[at]} * double{right.b[k]};
      sum[2] += double{a.a[at + 2]} * double{left.b[k]};
      sum[3] += double{a.a[at + 2]} * double{right.b[k]};
    }
  }
  for (int n = 0; n < 4; ++n) c[n] = static_cast<float>(sum[n]);
}

GEOT_UNSEEN Rows exchange_rows(uint64_t row, Site site) {
  Emulator& e = *self;
  const uint64_t begin = reinterpret_cast<uintptr_t>(e.shared);
  if (row % 16 != 0) e.fail(kLoadTransposed, site, "a row that is not aligned to 16 bytes");
  if (row < begin || row + 16 > begin + e.shared_bytes) {
    e.fail(kLoadTransposed, site, "a row that is not in shared memory");
  }
  Packet packet;
  packet.word = row;
  const Packet* packets = e.meet_in_warp(packet, kLoadTransposed, site);
  const int t = e.current->index % 4;
  return {{{packets[2 * t].word, packets[2 * t + 1].word},
           {packets[2 * t + 8].word, packets[2 * t + 9].word}}};
}

}  // namespace host

GEOT_UNSEEN int thread_index() { return host::self->current->index; }
GEOT_UNSEEN int num_threads() { return host::self->threads; }
GEOT_UNSEEN int64_t block_index() { return host::self->block; }
GEOT_UNSEEN int64_t num_blocks() { return host::self->blocks; }

}  // namespace geot::cuda
