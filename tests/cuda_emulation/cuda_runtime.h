// CUDA's execution model for the processor, for tests without a GPU: what the sources in csrc/cuda take from the real
// header of this name. Blocks run one after another. The threads of a block are coroutines that run until they wait for
// others, in an order drawn anew each time: a result that depends on it, for want of a barrier, changes with the seed.
//
// A barrier or a warp's exchange that not all threads reach ends the program with a message; so does an exchange in
// which lanes call different functions. Copies to shared memory happen when they are waited for, no sooner. Dynamic
// shared memory begins as NaN.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};
using cudaError_t = int;
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
struct float2 {
  float x, y;
};
constexpr cudaError_t cudaSuccess = 0;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMultiProcessorCount };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kLanes = 32;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u of %u)\n", message, blockIdx.x, gridDim.x);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Barrier {
  int arrived = 0, expected = 0;
  uint64_t generation = 0;
};

struct Thread {
  int index;
  ucontext_t start;
  jmp_buf resumed;
  bool started = false, done = false;
  const Barrier* waits = nullptr;
  uint64_t generation = 0;
  std::vector<char> stack = std::vector<char>(128 << 10);
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> uncommitted;
};

struct Warp {
  Barrier barrier;
  const char* names[kLanes];
  alignas(16) char slots[kLanes][64];
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<char> shared;
  std::function<void()> body;
  ucontext_t home;
  jmp_buf scheduler;
  Thread* current = nullptr;
};
inline Block block;
inline std::mt19937 order;

inline void entry() {
  block.body();
  block.current->done = true;
  _longjmp(block.scheduler, 1);
}

inline void run(Thread& thread) {
  block.current = &thread;
  threadIdx.x = unsigned(thread.index);
  if (_setjmp(block.scheduler)) return;
  if (thread.started) _longjmp(thread.resumed, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.data();
  thread.start.uc_stack.ss_size = thread.stack.size();
  thread.start.uc_link = &block.home;
  makecontext(&thread.start, entry, 0);
  setcontext(&thread.start);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Thread& self = *block.current;
  self.waits = &barrier;
  self.generation = barrier.generation;
  if (!_setjmp(self.resumed)) _longjmp(block.scheduler, 1);
  self.waits = nullptr;
}

inline void run_block(int threads, size_t shared_bytes, const std::function<void()>& body) {
  block.body = body;
  block.shared.assign(shared_bytes + 256, char(0xff));
  block.barrier = {0, threads, 0};
  block.warps.assign((threads + kLanes - 1) / kLanes, Warp());
  for (size_t w = 0; w < block.warps.size(); ++w) block.warps[w].barrier.expected = kLanes;
  while (int(block.threads.size()) < threads) block.threads.push_back(std::make_unique<Thread>());
  std::vector<Thread*> alive;
  for (int t = 0; t < threads; ++t) {
    Thread& thread = *block.threads[t];
    thread.index = t;
    thread.started = thread.done = false;
    thread.waits = nullptr;
    thread.groups.clear();
    thread.uncommitted.clear();
    alive.push_back(&thread);
  }
  while (!alive.empty()) {
    std::shuffle(alive.begin(), alive.end(), order);
    bool progress = false;
    for (Thread* thread : alive)
      if (!thread->waits || thread->waits->generation != thread->generation) {
        progress = true;
        run(*thread);
      }
    if (!progress) fail("threads wait at a barrier that others never reach");
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](Thread* t) { return t->done; }), alive.end());
  }
}

// Every lane gives a value and reads all lanes' values.
template <class T, class Read>
auto exchange(const char* name, const T& value, const Read& read) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]), "a larger slot is needed");
  const int lane = block.current->index % kLanes;
  Warp& warp = block.warps[block.current->index / kLanes];
  warp.names[lane] = name;
  std::memcpy(warp.slots[lane], &value, sizeof value);
  wait(warp.barrier);
  for (int l = 0; l < kLanes; ++l)
    if (std::strcmp(warp.names[l], name) != 0) fail("lanes of a warp exchange by different functions");
  const auto at = [&](int l) -> const T& { return *reinterpret_cast<const T*>(warp.slots[l]); };
  const auto result = read(at, lane);
  wait(warp.barrier);
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block.barrier); }
inline void __syncwarp() {
  emulation::exchange("syncwarp", 0, [](const auto&, int) { return 0; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange("shfl_xor", value, [=](const auto& at, int lane) { return at(lane ^ mask); });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return emulation::exchange("shfl_up", value,
                             [=](const auto& at, int lane) { return at(lane < delta ? lane : lane - delta); });
}
inline unsigned __ballot_sync(unsigned, bool condition) {
  return emulation::exchange("ballot", condition, [](const auto& at, int) {
    unsigned bits = 0;
    for (int l = 0; l < emulation::kLanes; ++l) bits |= unsigned(at(l)) << l;
    return bits;
  });
}
inline unsigned __match_any_sync(unsigned, int value) {
  return emulation::exchange("match_any", value, [](const auto& at, int lane) {
    unsigned bits = 0;
    for (int l = 0; l < emulation::kLanes; ++l) bits |= unsigned(at(l) == at(lane)) << l;
    return bits;
  });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}

template <class To, class From>
To emulated_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }

inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 3;
  return cudaSuccess;
}

// Not deduced from: arguments convert to what the kernel takes, as in a launch.
template <class T>
struct Plain {
  using type = T;
};
template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               typename Plain<Parameters>::type... arguments) {
  std::vector<unsigned> blocks(config->gridDim.x);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), emulation::order);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (const unsigned b : blocks) {
    blockIdx.x = b;
    emulation::run_block(int(blockDim.x), config->dynamicSmemBytes, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}
