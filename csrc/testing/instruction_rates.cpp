// How many 512-bit instructions of a kind the processor starts a second, on one thread and on several at once: the floor
// of kernels that are bound by operations, and whether the threads have a core each. Prints JSON; built and run by
// bench.decode_cpu.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define REGISTERS(one)                                                                                            \
    one(0) one(1) one(2) one(3) one(4) one(5) one(6) one(7) one(8) one(9) one(10) one(11) one(12) one(13) one(14) \
        one(15) one(16) one(17) one(18) one(19)
#define CLOBBERED                                                                                                    \
    "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", \
        "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm30", "zmm31"

// 20 in a row that do not wait for each other, of zeros, `n` times.
#define LOOP(name, instruction)                                                                              \
    void name(long n) {                                                                                      \
        asm volatile("vpxorq %%zmm30, %%zmm30, %%zmm30\nvpxorq %%zmm31, %%zmm31, %%zmm31\n1:\n" instruction \
                     "dec %0\njnz 1b\n"                                                                      \
                     : "+r"(n)                                                                               \
                     :                                                                                       \
                     : CLOBBERED);                                                                           \
    }

#define MULTIPLY_ADD(r) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #r "\n"
#define MULTIPLY_BF16(r) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #r "\n"
#define PERMUTE(r) "vpermd %%zmm30, %%zmm31, %%zmm" #r "\n"
#define LOGICAL(r) "vpandd %%zmm30, %%zmm31, %%zmm" #r "\n"
LOOP(multiply_add, REGISTERS(MULTIPLY_ADD))
LOOP(multiply_bf16, REGISTERS(MULTIPLY_BF16))
LOOP(permute, REGISTERS(PERMUTE))
LOOP(logical, REGISTERS(LOGICAL))

double rate(void (*loop)(long)) {
    const long n = 20'000'000;
    auto started = std::chrono::steady_clock::now();
    loop(n);
    return 20.0 * n / std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const struct {
        const char* name;
        void (*loop)(long);
    } kinds[] = {{"multiply-add", multiply_add}, {"bfloat16 multiply-add", multiply_bf16}, {"permute", permute},
                 {"logical", logical}};
    std::printf("{");
    for (const auto& kind : kinds) {
        double one = rate(kind.loop);
        std::vector<double> rates(threads);
        std::vector<std::thread> all;
        for (int i = 0; i < threads; ++i) all.emplace_back([&, i] { rates[i] = rate(kind.loop); });
        for (std::thread& thread : all) thread.join();
        double sum = 0;
        for (double each : rates) sum += each;
        std::printf("%s\"%s\": {\"one\": %.4g, \"all\": %.4g}", kind.loop == multiply_add ? "" : ", ", kind.name, one, sum);
    }
    std::printf("}\n");
}
