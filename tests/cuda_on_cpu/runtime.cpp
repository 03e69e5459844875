// Runs a grid: blocks on a few OS threads, the threads of a block as fibers of one of them.
//
// A fiber runs until it waits; then the scheduler resumes the next one that can go on: in ascending
// order, or warp after warp in shuffled order, each as far as it can go. Where none can and some
// have not ended, the block is in a deadlock.
//
// The blocks of a cluster have an OS thread each, since shared memory is thread-local, and take
// turns: one runs as far as it can, then the next. So a barrier that is missing, or a write into a
// block that has not started, does its harm in every run.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <latch>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

// -- Switching stacks ----------------------------------------------------------------------------

#ifdef __x86_64__
// Saves what a call preserves on the stack, and continues where the other stack was left.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
  .text
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
  .size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack, void (*entry)()) {
    // Six registers, the entry, and an unused return address: the entry finds the stack 8 bytes off
    // a multiple of 16, as after a call.
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
    top[0] = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }
  static void switch_between(Context& from, Context& to) {
    cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
  }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void switch_between(Context& from, Context& to) {
    swapcontext(&from.context, &to.context);
  }
};
#endif

// -- State ---------------------------------------------------------------------------------------

struct Exchange {
  unsigned mask = 0, arrived = 0;
  Where where;
  uint64_t values[32];
};

struct Warp {
  std::vector<std::unique_ptr<Exchange>> open;
  // Lanes read a finished exchange in the same round of the scheduler, so few are alive at once.
  Exchange finished[64];
  unsigned next = 0;
};

enum class State { kReady, kAtBarrier, kAtExchange, kAtCluster, kEnded };

// An asynchronous copy that was begun: done when it is waited for, and not before.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  Context context;
  Coordinates self;
  State state = State::kReady;
  Where where;
  const uint64_t* values = nullptr;
  unsigned cluster_arrivals = 0;
  std::vector<std::vector<Copy>> copies;  // by groups; the last is open
};

struct Grid {
  Body body;
  void* argument;
  dim3 grid, block;
  unsigned cluster;  // blocks
  std::atomic<unsigned> next_cluster{0};
  std::atomic<bool> failed{false};
};

// The blocks of a cluster, and whose turn it is. The turn guards all but `failed`.
struct Cluster {
  explicit Cluster(unsigned size) : size(size), live(size), anchors(size), order(size) {
    std::iota(order.begin(), order.end(), 0u);
  }

  const unsigned size;
  unsigned live;                // blocks that have not ended
  std::vector<char*> anchors;   // of each block's shared memory
  std::vector<unsigned> order;  // of turns, by rank
  std::vector<bool> ended = std::vector<bool>(size);
  unsigned turn = 0;     // index into `order`
  unsigned idle = 0;     // turns since a fiber went on
  unsigned arrived = 0;  // blocks at the barrier
  unsigned phase = 0;    // barriers passed
  bool failed = false;
  std::mutex mutex;
  std::condition_variable changed;

  // Waits for the turn of `rank`; false where the cluster has failed.
  bool wait_for_turn(unsigned rank) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return failed || order[turn] == rank; });
    return !failed;
  }
  void next_turn() {
    const std::lock_guard lock(mutex);
    do {
      turn = (turn + 1) % size;
    } while (live > 0 && ended[order[turn]]);
    changed.notify_all();
  }
  void fail() {
    const std::lock_guard lock(mutex);
    failed = true;
    changed.notify_all();
  }
};

struct Block {
  Grid* grid = nullptr;
  Cluster* cluster = nullptr;
  unsigned rank = 0;                // in the cluster
  unsigned arrived_at_cluster = 0;  // threads
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Fiber* running = nullptr;
  unsigned at_barrier = 0;
  unsigned resumed = 0;
  Where barrier;
  bool failed = false;
};

thread_local Block* block = nullptr;

std::mutex failure_mutex;
std::string failure;
unsigned order_seed = 0;  // 0: ascending
unsigned worker_count = 2;

std::string text_of(const Where& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void record_failure(const std::string& message) {
  block->failed = true;
  block->cluster->fail();
  if (!block->grid->failed.exchange(true)) {
    const std::lock_guard lock(failure_mutex);
    failure = message;
  }
}

void yield_to_scheduler() {
  Block* const b = block;
  Context::switch_between(b->running->context, b->scheduler);
}

[[noreturn]] void end_with(const std::string& message) {
  const uint3 t = block->running->self.thread, b = block->running->self.block;
  record_failure(message + " (block " + std::to_string(b.x) + ", thread " + std::to_string(t.x) +
                 ")");
  for (;;) yield_to_scheduler();
}

void fiber_main() {
  block->grid->body(block->grid->argument);
  block->running->state = State::kEnded;
  yield_to_scheduler();
}

// -- Shared memory -------------------------------------------------------------------------------

// Shared variables are thread-local variables of this library: fills all of them with NaN.
int fill_thread_locals(dl_phdr_info* info, size_t, void* base) {
  if (reinterpret_cast<void*>(info->dlpi_addr) != base || info->dlpi_tls_data == nullptr) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_TLS) std::memset(info->dlpi_tls_data, 0xff, header.p_memsz);
  }
  return 1;
}

void fill_shared_memory() {
  static void* const base = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&fill_shared_memory), &info);
    return info.dli_fbase;
  }();
  Block* const own = block;  // the one thread-local variable that is not shared memory
  dl_iterate_phdr(fill_thread_locals, base);
  block = own;
}

// Of this OS thread: variables lie equally far from it in every one.
char* anchor_of_shared_memory() {
  return reinterpret_cast<char*>(&block);
}

// -- Scheduler -----------------------------------------------------------------------------------

void report_deadlock(const Block& b) {
  unsigned waiting = 0, ended = 0;
  const Fiber* first = nullptr;
  for (const Fiber& fiber : b.fibers) {
    ended += fiber.state == State::kEnded;
    waiting += fiber.state != State::kEnded;
    if (first == nullptr && fiber.state != State::kEnded) first = &fiber;
  }
  record_failure("deadlock in block " + std::to_string(first->self.block.x) + ": " +
                 std::to_string(waiting) + " threads wait, thread " +
                 std::to_string(first->self.thread.x) + " at " + text_of(first->where) + ", and " +
                 std::to_string(ended) + " have ended");
}

// Resumes the fibers [first, last) until all of them wait for others or have ended; returns how
// many ended. In shuffled order that is one warp, which so runs ahead of the others as far as it
// can: what a missing barrier lets it overwrite, it does overwrite.
unsigned run_warp(Block& b, unsigned first, unsigned last, std::mt19937& random) {
  std::vector<unsigned> order(last - first);
  std::iota(order.begin(), order.end(), first);
  unsigned ended = 0;
  for (bool progress = true; progress;) {
    progress = false;
    if (order_seed != 0) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned t : order) {
      Fiber& fiber = b.fibers[t];
      if (fiber.state != State::kReady) continue;
      progress = true;
      ++b.resumed;
      b.running = &fiber;
      Context::switch_between(b.scheduler, fiber.context);
      if (b.failed) return ended;
      ended += fiber.state == State::kEnded;
    }
  }
  return ended;
}

// Lets the other blocks of the cluster run until this one's threads may go on; false where that
// will not be. `progress`: whether any did in this turn.
bool yield_to_cluster(Block& b, bool progress) {
  Cluster& cluster = *b.cluster;
  cluster.idle = progress ? 0 : cluster.idle + 1;
  if (cluster.idle >= cluster.live) {
    report_deadlock(b);
    return false;
  }
  cluster.next_turn();
  if (!cluster.wait_for_turn(b.rank)) b.failed = true;
  return !b.failed;
}

// Makes the threads ready whose cluster barrier was passed; returns how many wait for theirs.
unsigned release_from_cluster(Block& b) {
  unsigned waiting = 0;
  for (Fiber& fiber : b.fibers) {
    if (fiber.state != State::kAtCluster) continue;
    if (fiber.cluster_arrivals <= b.cluster->phase) {
      fiber.state = State::kReady;
    } else {
      ++waiting;
    }
  }
  return waiting;
}

void run_block(Block& b, unsigned index, const char* stacks) {
  Grid& grid = *b.grid;
  const unsigned threads = grid.block.x;
  b.fibers.assign(threads, Fiber());
  b.warps = std::vector<Warp>((threads + 31) / 32);
  b.at_barrier = b.arrived_at_cluster = 0;
  for (unsigned t = 0; t < threads; ++t) {
    b.fibers[t].self = {{t, 0, 0}, {index, 0, 0}, grid.block, grid.grid};
    b.fibers[t].context.start(const_cast<char*>(stacks) + t * kStackBytes, fiber_main);
  }
  block = &b;
  fill_shared_memory();
  std::vector<unsigned> warps(order_seed == 0 ? 1 : b.warps.size());
  std::iota(warps.begin(), warps.end(), 0u);
  std::mt19937 random(order_seed + index);
  unsigned turn_began = b.resumed;
  for (unsigned ended = 0; ended < threads && !b.failed;) {
    const unsigned at_cluster = release_from_cluster(b);
    std::shuffle(warps.begin(), warps.end(), random);
    const unsigned before = b.resumed;
    for (const unsigned warp : warps) {
      const unsigned first = warp * 32;
      ended +=
          run_warp(b, first, order_seed == 0 ? threads : std::min(first + 32, threads), random);
      if (b.failed) break;
    }
    if (b.resumed != before || b.failed) continue;
    if (at_cluster == 0) {
      report_deadlock(b);
    } else if (yield_to_cluster(b, b.resumed != turn_began)) {
      turn_began = b.resumed;
    }
  }
}

// A block's stacks, kept for later launches: each thread has a copy of its kernel's arguments, and
// fresh pages for those would cost more than what runs on them.
class Stacks {
 public:
  Stacks() {
    const std::lock_guard lock(guard);
    if (kept.empty()) {
      memory_ = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    } else {
      memory_ = kept.back();
      kept.pop_back();
    }
  }
  ~Stacks() {
    const std::lock_guard lock(guard);
    kept.push_back(memory_);
  }
  Stacks(const Stacks&) = delete;
  const char* get() const { return static_cast<const char*>(memory_); }

 private:
  static constexpr unsigned kMaxThreads = 1024;  // of a block
  static inline std::mutex guard;
  static inline std::vector<void*> kept;
  void* memory_;
};

void run_cluster(Grid& grid, unsigned first_block) {
  Cluster cluster(grid.cluster);
  std::mt19937 random(order_seed + first_block);
  if (order_seed != 0) std::shuffle(cluster.order.begin(), cluster.order.end(), random);
  // A block's shared memory lives as long as any block of the cluster.
  std::latch started(grid.cluster), ended(grid.cluster);
  std::vector<std::thread> members;
  for (unsigned rank = 0; rank < grid.cluster; ++rank) {
    members.emplace_back([&, rank] {
      const Stacks stacks;
      Block own;
      own.grid = &grid;
      own.cluster = &cluster;
      own.rank = rank;
      cluster.anchors[rank] = anchor_of_shared_memory();
      started.arrive_and_wait();
      if (cluster.wait_for_turn(rank)) run_block(own, first_block + rank, stacks.get());
      if (!own.failed && !cluster.failed) {
        cluster.ended[rank] = true;
        --cluster.live;
        cluster.idle = 0;
        cluster.next_turn();
      }
      ended.arrive_and_wait();
    });
  }
  for (std::thread& member : members) member.join();
}

void work(Grid& grid) {
  const unsigned clusters = grid.grid.x / grid.cluster;
  const Stacks stacks;
  Block own;
  own.grid = &grid;
  for (;;) {
    unsigned index = grid.next_cluster++;
    if (index >= clusters || grid.failed) break;
    if (order_seed != 0) index = clusters - 1 - index;
    if (grid.cluster > 1) {
      run_cluster(grid, index * grid.cluster);
      continue;
    }
    Cluster alone(1);
    alone.anchors[0] = anchor_of_shared_memory();
    own.cluster = &alone;
    run_block(own, index, stacks.get());
  }
}

}  // namespace

const Coordinates& self() {
  return block->running->self;
}

void wait_for_block(const Where& where) {
  Block& b = *block;
  if (b.at_barrier == 0) b.barrier = where;
  if (b.barrier.line() != where.line()) {
    end_with("divergent barriers: " + text_of(b.barrier) + " and " + text_of(where));
  }
  if (++b.at_barrier == b.fibers.size()) {
    b.at_barrier = 0;
    for (Fiber& fiber : b.fibers) fiber.state = State::kReady;
    return;
  }
  b.running->where = where;
  b.running->state = State::kAtBarrier;
  yield_to_scheduler();
}

void arrive_at_cluster() {
  Block& b = *block;
  if (b.running->cluster_arrivals != b.cluster->phase) end_with("a second arrival before the wait");
  ++b.running->cluster_arrivals;
  if (++b.arrived_at_cluster < b.fibers.size()) return;
  b.arrived_at_cluster = 0;
  if (++b.cluster->arrived < b.cluster->size) return;
  b.cluster->arrived = 0;
  ++b.cluster->phase;
}

void wait_for_cluster(const Where& where) {
  Fiber& fiber = *block->running;
  if (fiber.cluster_arrivals <= block->cluster->phase) return;
  fiber.where = where;
  fiber.state = State::kAtCluster;
  yield_to_scheduler();
}

unsigned cluster_rank() {
  return block->rank;
}

unsigned cluster_size() {
  return block->cluster->size;
}

void* map_to_block(void* shared, unsigned rank) {
  if (rank >= block->cluster->size) end_with("no block of this rank in the cluster");
  return static_cast<char*>(shared) - block->cluster->anchors[block->rank] +
         block->cluster->anchors[rank];
}

void begin_copy(void* to, const void* from, size_t bytes) {
  auto& groups = block->running->copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, bytes});
}

void end_copy_group() {
  auto& groups = block->running->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void wait_for_copies(size_t later_groups) {
  auto& groups = block->running->copies;
  while (groups.size() > later_groups + 1) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

const uint64_t* exchange(unsigned mask, uint64_t value, const Where& where) {
  Fiber& fiber = *block->running;
  const unsigned lane = fiber.self.thread.x % 32;
  const unsigned first_thread = fiber.self.thread.x - lane;
  Warp& warp = block->warps[first_thread / 32];
  if (!(mask >> lane & 1)) end_with("lane outside its own mask at " + text_of(where));
  auto found = std::find_if(warp.open.begin(), warp.open.end(),
                            [&](const auto& open) { return (open->mask & mask) != 0; });
  if (found == warp.open.end()) {
    found = warp.open.insert(found, std::make_unique<Exchange>());
    (*found)->mask = mask;
    (*found)->where = where;
  }
  Exchange& open = **found;
  if (open.mask != mask || open.where.line() != where.line()) {
    end_with("lanes of a warp meet in different calls: " + text_of(open.where) + " and " +
             text_of(where));
  }
  open.values[lane] = value;
  open.arrived |= 1u << lane;
  if (open.arrived != mask) {
    fiber.where = where;
    fiber.state = State::kAtExchange;
    yield_to_scheduler();
    return fiber.values;
  }
  Exchange& finished = warp.finished[warp.next++ % 64];
  finished = open;
  warp.open.erase(found);
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    block->fibers[first_thread + i].values = finished.values;
    block->fibers[first_thread + i].state = State::kReady;
  }
  return finished.values;
}

void fail(const Where& where, const char* message) {
  end_with(std::string(message) + " at " + text_of(where));
}

bool run_grid(dim3 grid, dim3 block_size, unsigned cluster, Body body, void* context) {
  Grid state{body, context, grid, block_size, cluster};
  std::vector<std::thread> others;
  const unsigned workers = std::min(worker_count, grid.x);
  // The calling thread only waits: its own thread-local variables stay as they are.
  for (unsigned i = 0; i < workers; ++i) others.emplace_back([&] { work(state); });
  for (std::thread& other : others) other.join();
  return !state.failed;
}

const char* last_failure() {
  return failure.c_str();
}

Device& device() {
  static Device current = {0, 1, 227 * 1024, 16};
  return current;
}

extern "C" void set_device(int number, int shared_bytes, int largest_cluster) {
  device() = {number, 1, shared_bytes, largest_cluster};
}

extern "C" void set_schedule(unsigned seed, unsigned workers) {
  order_seed = seed;
  worker_count = workers;
}

}  // namespace cuda_on_cpu

// assert() of a kernel ends the launch, as it does on a GPU, and not the process.
extern "C" void __assert_fail(const char* expression, const char* file, unsigned line,
                              const char*) noexcept {
  const std::string path = file;
  cuda_on_cpu::end_with("device-side assert triggered: " + std::string(expression) + " at " +
                        path.substr(path.rfind('/') + 1) + ":" + std::to_string(line));
}
