// Which instruction set runs: asked of the processor, never of the compiler.
#include <cstring>

#include "acip/decode.h"
#include "acip/training.h"

namespace acip {

#define ACIP_TABLES(isa)                  \
    namespace isa {                       \
    extern const Training training_table; \
    extern const Decode decode_table;     \
    }

ACIP_TABLES(portable)
#ifdef ACIP_X86
ACIP_TABLES(avx2)
ACIP_TABLES(avx512)
ACIP_TABLES(avx512_bf16)
#endif

namespace {

struct Isa {
    const Training* training;
    const Decode* decode;
    bool runs;
};

// The named one, or the last that runs here.
const Isa* find(const char* name) {
#ifdef ACIP_X86
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const Isa isas[] = {
        {&portable::training_table, &portable::decode_table, true},
        {&avx2::training_table, &avx2::decode_table, avx2},
        {&avx512::training_table, &avx512::decode_table, avx512},
        {&avx512_bf16::training_table, &avx512_bf16::decode_table,
         avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512vnni")},
    };
#else
    static const Isa isas[] = {{&portable::training_table, &portable::decode_table, true}};
#endif
    const Isa* best = nullptr;
    for (const Isa& isa : isas) {
        if (!isa.runs) continue;
        if (name && !std::strcmp(name, isa.decode->name)) return &isa;
        best = &isa;
    }
    return name ? nullptr : best;
}

}  // namespace

const Training* training(const char* isa) {
    const Isa* found = find(isa);
    return found ? found->training : nullptr;
}

const Decode* decode(const char* isa) {
    const Isa* found = find(isa);
    return found ? found->decode : nullptr;
}

}  // namespace acip
