// Parallel loops over independent tasks.
//
// A task index, never a thread index, decides what is computed: results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace igpo {

using Task = void (*)(void* context, int64_t task);

// Calls task(context, i) for every i in [0, num_tasks), on at most num_threads threads.
// Runs on the OpenMP team torch already owns when there is one, so that no second pool competes for the cores.
void run_tasks(int64_t num_tasks, int num_threads, Task task, void* context);

// "openmp" or "std::thread": which of the two run_tasks uses in this process.
const char* thread_runtime();

// The form the kernels use: parallel_for(n, threads, [&](int64_t i) { ... }).
template <class Body>
inline void parallel_for(int64_t num_tasks, int num_threads, Body&& body) {
  run_tasks(
      num_tasks, num_threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

}  // namespace igpo
