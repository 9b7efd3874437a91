#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace igpo {
namespace {

bool runs(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == Isa::portable;
}

const char* name_of(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable"; }

Isa named(const char* name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (!std::strcmp(name, name_of(isa))) {
      if (runs(isa)) return isa;
      throw std::invalid_argument(std::string("IGPO_ISA: this processor does not run ") + name);
    }
  throw std::invalid_argument(std::string("IGPO_ISA must be portable, avx2 or avx512, got ") + name);
}

Isa best() {
  if (const char* name = std::getenv("IGPO_ISA")) return named(name);
  return runs(Isa::avx512) ? Isa::avx512 : runs(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

Isa& current() {
  static Isa isa = best();
  return isa;
}

}  // namespace

Isa isa() { return current(); }
void set_isa(const char* name) { current() = named(name); }
const char* isa_name() { return name_of(current()); }

}  // namespace igpo
