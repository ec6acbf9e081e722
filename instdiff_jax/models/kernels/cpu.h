// What the CPU's kernels share: vectors as wide as the processor's, and work shared by the threads of XLA's pool.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
static inline Floats splat(float x) { return x - Floats{}; }

struct Work {
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;
};

// Runs `item(i, buffers)` for all i < items; every thread takes the next until none is left, with buffers of its own.
template <typename MakeBuffers, typename Item>
static void share(ffi::ThreadPool& pool, int64_t items, MakeBuffers make_buffers, Item item) {
  auto work = std::make_shared<Work>();
  auto run = [=] {
    decltype(make_buffers()) buffers;
    for (int64_t i; (i = work->next++) < items;) {
      if (!buffers) buffers = make_buffers();
      item(i, *buffers);
      if (++work->done == items) {
        std::lock_guard<std::mutex> lock(work->mutex);
        work->finished.notify_all();
      }
    }
  };
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  for (int64_t i = 1; i < std::min(threads, items); i++) pool.Schedule(decltype(run)(run));
  run();  // this thread works too; one that starts too late finds nothing to do
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done == items; });
}
