#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace igpo {
namespace {

struct Job {
  std::atomic<int64_t> next{0};
  int64_t num_tasks;
  Task task;
  void* context;
};

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.num_tasks;) job.task(job.context, i);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// torch loads its OpenMP runtime with global symbols; both libgomp and libiomp5 export this entry.
GompParallel find_openmp() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

GompParallel openmp() {
  static const GompParallel entry = find_openmp();
  return entry;
}

}  // namespace

const char* thread_runtime() { return openmp() ? "openmp" : "std::thread"; }

void run_tasks(int64_t num_tasks, int num_threads, Task task, void* context) {
  Job job;
  job.num_tasks = num_tasks;
  job.task = task;
  job.context = context;
  const int64_t wanted = num_threads < num_tasks ? num_threads : num_tasks;
  if (wanted <= 1) return work(&job);
  if (openmp()) return openmp()(work, &job, static_cast<unsigned>(wanted), 0);
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < wanted; ++i) helpers.emplace_back(work, &job);
  work(&job);
  for (auto& helper : helpers) helper.join();
}

}  // namespace igpo
