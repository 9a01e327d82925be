// Waiting and waking between processes of one host that share memory.
//
// A word in shared memory counts events: its writer adds one and wakes the waiters, which wait until the count differs
// from the one they know. Waiters spin first, because a message between two busy cores takes less than a microsecond,
// and then sleep on a futex, because ranks may outnumber cores. `waiting` lets the writer skip the system call while no
// reader sleeps; the fences on both sides (sequentially consistent operations) ensure that either the writer sees the
// sleeper or the sleeper sees the new count. `core` is where the writer ran last: a waiter on that core does not spin,
// because the writer could not run meanwhile.
//
// The ops take an address instead of a tensor: they are called twice per message, and a call without tensors bypasses
// torch's dispatcher. Torch releases the GIL around them.

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

#include <torch/library.h>

namespace {

struct Word {
  std::atomic<uint32_t> count;
  std::atomic<uint32_t> waiting;
  std::atomic<int32_t> core;  // 0 before the first event, which at worst costs one spin or one sleep
};
static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t) && std::atomic<uint32_t>::is_always_lock_free);

Word& word_at(int64_t address) { return *reinterpret_cast<Word*>(static_cast<intptr_t>(address)); }

// Not FUTEX_PRIVATE: the word is shared between processes.
void futex(std::atomic<uint32_t>& count, int operation, uint32_t value, const timespec* timeout) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&count), operation, value, timeout, nullptr, 0);
}

void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

bool differs(const Word& word, uint32_t known) { return word.count.load(std::memory_order_acquire) != known; }

bool spin(const Word& word, uint32_t known, int64_t nanoseconds) {
  if (differs(word, known)) return true;
  if (nanoseconds <= 0 || word.core.load(std::memory_order_relaxed) == sched_getcpu()) return false;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::nanoseconds(nanoseconds);
  do {
    for (int i = 0; i < 32; ++i) {  // reading the clock costs as much as several checks
      pause_core();
      if (differs(word, known)) return true;
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

// Returns true once the word differs from `known`; false after the timeout or a signal, so that the caller can check
// whether the peer is alive, let Python handle signals, and call again.
bool shm_wait(int64_t address, int64_t known, int64_t spin_ns, int64_t timeout_ms) {
  Word& word = word_at(address);
  const auto value = static_cast<uint32_t>(known);
  if (spin(word, value, spin_ns)) return true;
  const timespec timeout{static_cast<time_t>(timeout_ms / 1000), static_cast<long>(timeout_ms % 1000) * 1000000L};
  word.waiting.fetch_add(1);
  if (word.count.load() == value) futex(word.count, FUTEX_WAIT, value, &timeout);
  word.waiting.fetch_sub(1);
  return differs(word, value);
}

// Adds one to the word and wakes all its waiters, to which all earlier writes of this thread are visible.
void shm_publish(int64_t address) {
  Word& word = word_at(address);
  word.core.store(sched_getcpu(), std::memory_order_relaxed);
  word.count.fetch_add(1);
  if (word.waiting.load() != 0) futex(word.count, FUTEX_WAKE, INT_MAX, nullptr);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hetis, m) {
  m.def("shm_wait(int address, int known, int spin_ns, int timeout_ms) -> bool", &shm_wait);
  m.def("shm_publish(int address) -> ()", &shm_publish);
}
