#include "scheduler.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace emu {
namespace {

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kDone };

struct Thread {
  Context context;
  uint3 index;
  State state = State::kReady;
  bool predicate = false;
  Site site{};
  const Exchange* exchange = nullptr;
};

enum class Order { kForward, kReversed, kShuffled };

Order order_from_environment() {
  const char* value = std::getenv("D2DET_EMULATOR_ORDER");
  const std::string name = value ? value : "forward";
  if (name == "forward") return Order::kForward;
  if (name == "reversed") return Order::kReversed;
  if (name == "shuffled") return Order::kShuffled;
  throw std::runtime_error("D2DET_EMULATOR_ORDER must be forward, reversed or shuffled, got " +
                           name);
}

constexpr size_t kGuard = 1024;  // bytes around dynamic shared memory
constexpr unsigned char kGuardByte = 0xa5;
constexpr unsigned char kGarbage = 0xff;  // NaN in every floating-point format

// The one kernel that runs.
struct Machine {
  Context scheduler;
  Stacks stacks;
  std::vector<Thread> threads;
  size_t count = 0;
  size_t current = 0;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::vector<unsigned char> shared_memory;
  unsigned char* shared = nullptr;  // dynamic shared memory, between two guard zones
  size_t shared_bytes = 0;
  int barrier_count = 0;
  std::string error;
  uint64_t random = 1;
};

Machine machine;
std::recursive_mutex running;

Thread& current() { return machine.threads[machine.current]; }

void give_way() { switch_to(current().context, machine.scheduler); }

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string text(uint3 index) {
  std::ostringstream out;
  out << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return out.str();
}

void thread_main() {
  try {
    machine.body(machine.context);
  } catch (const std::exception& error) {
    if (machine.error.empty()) machine.error = error.what();
  }
  current().state = State::kDone;
  give_way();
}

// Threads that were not `kDone`, by what they wait for.
std::string describe_waiting() {
  std::ostringstream out;
  size_t shown = 0, done = 0;
  const Thread* last = nullptr;
  for (size_t i = 0; i < machine.count; ++i) {
    const Thread& thread = machine.threads[i];
    if (thread.state == State::kDone) {
      ++done;
      continue;
    }
    if (last && last->state == thread.state && same(last->site, thread.site)) continue;
    last = &thread;
    if (++shown > 8) continue;
    out << "; from thread " << text(thread.index) << " on, threads wait "
        << (thread.state == State::kAtBarrier ? "at the barrier in " : "for their warp in ")
        << text(thread.site);
    if (thread.state == State::kInWarp)
      out << " with mask " << std::hex << thread.exchange->mask << std::dec;
  }
  out << "; " << done << " of " << machine.count << " threads have returned";
  return out.str();
}

// Lets all go on if every thread of the block waits at one barrier; otherwise nothing can.
void release_barrier() {
  int predicates = 0;
  const Site site = machine.threads[0].site;
  for (size_t i = 0; i < machine.count; ++i) {
    const Thread& thread = machine.threads[i];
    if (thread.state != State::kAtBarrier || !same(thread.site, site)) {
      machine.error =
          "a barrier or warp collective that not all of its threads reach" + describe_waiting();
      return;
    }
    predicates += thread.predicate;
  }
  machine.barrier_count = predicates;
  for (size_t i = 0; i < machine.count; ++i) machine.threads[i].state = State::kReady;
}

uint64_t draw() {
  machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
  return machine.random >> 33;
}

void run_block(Order order) {
  std::vector<size_t> sequence(machine.count);
  for (size_t i = 0; i < machine.count; ++i) {
    sequence[i] = order == Order::kReversed ? machine.count - 1 - i : i;
    Thread& thread = machine.threads[i];
    const auto x = static_cast<unsigned>(i) % blockDim.x;
    const auto rest = static_cast<unsigned>(i) / blockDim.x;
    thread = {.context = {}, .index = {x, rest % blockDim.y, rest / blockDim.y}};
    prepare(thread.context, machine.stacks.at(i), Stacks::kBytes, &thread_main);
  }
  std::memset(machine.shared, kGarbage, machine.shared_bytes);
  size_t done = 0;
  while (done < machine.count && machine.error.empty()) {
    if (order == Order::kShuffled) {
      for (size_t i = machine.count; i > 1; --i) std::swap(sequence[i - 1], sequence[draw() % i]);
    }
    bool moved = false;
    for (const size_t i : sequence) {
      Thread& thread = machine.threads[i];
      if (thread.state != State::kReady) continue;
      moved = true;
      machine.current = i;
      threadIdx = thread.index;
      switch_to(machine.scheduler, thread.context);
      done += thread.state == State::kDone;
      if (!machine.error.empty()) return;
    }
    if (!moved) release_barrier();
  }
}

void check_guards() {
  const unsigned char* low = machine.shared - kGuard;
  const unsigned char* high = machine.shared + machine.shared_bytes;
  for (size_t i = 0; i < kGuard; ++i) {
    if (low[i] == kGuardByte && high[i] == kGuardByte) continue;
    machine.error = "a write outside of the block's dynamic shared memory";
    return;
  }
}

void check_limits(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool fits = threads > 0 && threads <= 1024 && block.z <= 64 && grid.x > 0 && grid.y > 0 &&
                    grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
                    shared_bytes <= size_t{227} * 1024;
  if (!fits) machine.error = "a grid, block or amount of shared memory that no GPU accepts";
}

}  // namespace

void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
            void* context) {
  const std::lock_guard<std::recursive_mutex> lock(running);
  const Order order = order_from_environment();
  machine.error.clear();
  check_limits(grid, block, shared_bytes);
  if (machine.error.empty()) {
    machine.count = size_t{block.x} * block.y * block.z;
    machine.stacks.reserve(machine.count);
    machine.threads.resize(machine.count);
    machine.body = body;
    machine.context = context;
    machine.shared_bytes = shared_bytes;
    machine.shared_memory.assign(shared_bytes + 3 * kGuard, kGuardByte);
    const auto start = reinterpret_cast<uintptr_t>(machine.shared_memory.data()) + 2 * kGuard;
    machine.shared = reinterpret_cast<unsigned char*>(start / kGuard * kGuard);
    gridDim = grid;
    blockDim = block;
  }
  const uint64_t blocks = machine.error.empty() ? uint64_t{grid.x} * grid.y * grid.z : 0;
  for (uint64_t i = 0; i < blocks && machine.error.empty(); ++i) {
    const uint64_t block_id = order == Order::kForward ? i : blocks - 1 - i;
    blockIdx.x = static_cast<unsigned>(block_id % grid.x);
    blockIdx.y = static_cast<unsigned>(block_id / grid.x % grid.y);
    blockIdx.z = static_cast<unsigned>(block_id / grid.x / grid.y);
    run_block(order);
    if (machine.error.empty()) check_guards();
  }
  if (!machine.error.empty()) {
    throw std::runtime_error("emulated CUDA kernel " + std::string(name) + ", block " +
                             text(blockIdx) + ": " + machine.error);
  }
}

void fail(const char* message, Site site) {
  machine.error = std::string(message) + " in " + text(site) + ", thread " + text(threadIdx);
  give_way();
  std::abort();  // a thread that failed is never resumed
}

int wait_for_block(bool predicate, Site site) {
  current().state = State::kAtBarrier;
  current().predicate = predicate;
  current().site = site;
  give_way();
  return machine.barrier_count;
}

void wait_for_warp(const Exchange& exchange, Site site) {
  const size_t first = machine.current & ~size_t{31};
  const size_t own = machine.current - first;
  if (!(exchange.mask >> own & 1u)) fail("the calling lane is not in the collective's mask", site);
  current().state = State::kInWarp;
  current().site = site;
  current().exchange = &exchange;
  for (size_t lane = 0; lane < 32; ++lane) {
    if (!(exchange.mask >> lane & 1u)) continue;
    if (first + lane >= machine.count) fail("the collective's mask names no thread", site);
    const Thread& other = machine.threads[first + lane];
    const bool here = other.state == State::kInWarp && same(other.site, site) &&
                      other.exchange->mask == exchange.mask &&
                      other.exchange->size == exchange.size;
    if (!here) {
      give_way();
      return;
    }
  }
  // The last one to come hands out the values. Those of the others lie on their stacks, which stay
  // as they are until they are resumed.
  static std::vector<unsigned char> values;
  values.assign(32 * exchange.size, 0);
  for (size_t lane = 0; lane < 32; ++lane) {
    if (!(exchange.mask >> lane & 1u)) continue;
    std::memcpy(values.data() + lane * exchange.size, machine.threads[first + lane].exchange->value,
                exchange.size);
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    if (!(exchange.mask >> lane & 1u)) continue;
    Thread& receiver = machine.threads[first + lane];
    std::memcpy(receiver.exchange->results, values.data(), values.size());
    receiver.state = State::kReady;
  }
}

unsigned char* dynamic_shared() { return machine.shared; }

unsigned lane() { return static_cast<unsigned>(machine.current & 31u); }

}  // namespace emu
