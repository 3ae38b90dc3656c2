// Which instruction set runs: asked of the processor, never of the compiler.
#include <cstring>

#include "acip/training.h"

namespace acip {

namespace portable {
extern const Training table;
}
#ifdef ACIP_X86
namespace avx2 {
extern const Training table;
}
namespace avx512 {
extern const Training table;
}
#endif

const Training* training(const char* isa) {
    const Training* best = &portable::table;
    if (isa && !std::strcmp(isa, best->name)) return best;
#ifdef ACIP_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        best = &avx2::table;
        if (isa && !std::strcmp(isa, best->name)) return best;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        best = &avx512::table;
        if (isa && !std::strcmp(isa, best->name)) return best;
    }
#endif
    return isa ? nullptr : best;
}

}  // namespace acip
