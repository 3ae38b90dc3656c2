// The CUDA kernels as torch operators: checks, outputs, workspace, torch's stream. The only file of them with torch in
// it, and that by its stable ABI alone: compiled beside a torch without CUDA, loaded by one with it. Compiled with the
// kernels for the CPU (csrc/testing/gpu_shim.h), the operators take tensors on the CPU, for tests.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <mutex>
#include <vector>

#include "acip/cuda_decode.h"

#if defined(ACIP_SHIM)
#include "testing/gpu_shim.h"
#endif

namespace {

using acip::Matrix;
using acip::Number;
using acip::cuda::Form;
using acip::cuda::Layer;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(ACIP_SHIM)
bool here(const Tensor& tensor) { return tensor.is_cpu(); }
#define ACIP_NAMESPACE acip_cuda_shim
#define ACIP_DEVICE CPU
#else
bool here(const Tensor& tensor) { return tensor.is_cuda(); }
#define ACIP_NAMESPACE acip_cuda
#define ACIP_DEVICE CUDA
#endif

void check(acip::cuda::Status status) {
    STD_TORCH_CHECK(status == acip::cuda::Status::ok, "acip_cuda: ", acip::cuda::message(status));
}

// What the kernels need to know of a device, asked for once.
acip::cuda::Device device_of(int index) {
    static std::mutex mutex;
    static std::array<acip::cuda::Device, 64> known{};
    STD_TORCH_CHECK(index >= 0 && index < int(known.size()), "acip_cuda: device ", index);
    std::lock_guard<std::mutex> lock(mutex);
    acip::cuda::Device& device = known[index];
    if (!device.multiprocessors) check(acip::cuda::describe(index, &device));
    return device;
}

// Reads `spec` and `tensors`, as acip_kernels/ops/fused_linear/op.py has them, one after the other, and checks all that
// is read: the kernels trust it, but for the places of a pivoted layer, which are in the GPU's memory.
struct Reader {
    const std::vector<int64_t>& spec;
    const std::vector<Tensor>& tensors;
    const Tensor& x;
    size_t number = 0, tensor = 0;

    int64_t next_number() {
        STD_TORCH_CHECK(number < spec.size(), "acip_cuda: spec ends too early, after ", spec.size(), " numbers");
        return spec[number++];
    }

    // Of `sizes`, a size of -1 being any; rows contiguous, and all of it unless `rows` may lie apart.
    const Tensor& next(const char* what, ScalarType type, std::vector<int64_t> sizes, bool rows_apart = false) {
        STD_TORCH_CHECK(tensor < tensors.size(), "acip_cuda: there are ", tensors.size(), " tensors, and no ", what);
        const Tensor& t = tensors[tensor++];
        bool fits = t.defined() && here(t) && t.get_device() == x.get_device() && t.scalar_type() == type &&
                    t.dim() == int64_t(sizes.size());
        for (int64_t i = 0; fits && i < t.dim(); ++i) fits = sizes[i] < 0 || t.size(i) == sizes[i];
        if (fits)
            fits = rows_apart ? t.size(1) <= 1 || t.stride(1) == 1 : t.is_contiguous();
        STD_TORCH_CHECK(fits, "acip_cuda: tensor ", tensor - 1, ", ", what,
                        ", is not of the dtype, shape, strides or device that spec and x say");
#if defined(ACIP_SHIM)
        const char* begin = static_cast<const char*>(t.const_data_ptr());
        size_t bytes = t.numel() * t.element_size();
        if (rows_apart && t.size(0)) bytes = ((t.size(0) - 1) * t.stride(0) + t.size(1)) * t.element_size();
        if (bytes) shim::add_array(begin, bytes, what, false);
#endif
        return t;
    }

    Matrix next_matrix() {
        int64_t kind = next_number(), cols = next_number(), group = next_number();
        STD_TORCH_CHECK(kind >= 0 && kind <= 3 && cols >= 0, "acip_cuda: no matrix is of kind ", kind, " with ", cols,
                        " columns");
        Matrix m{};
        m.cols = cols, m.group = group;
        m.type = kind == 1 ? Number::i8 : kind >= 2 ? Number::i4
                 : x.scalar_type() == ScalarType::BFloat16 ? Number::bf16 : Number::f16;
        if (kind >= 2)
            STD_TORCH_CHECK(group == 32 || group == 64 || group == 128,
                            "acip_cuda: a group must be 32, 64 or 128, got ", group);
        const ScalarType type = kind == 0 ? x.scalar_type() : kind == 1 ? ScalarType::Char : ScalarType::Byte;
        const Tensor& data = next("a weight", type, {-1, kind >= 2 ? (cols + 63) / 64 * 32 : cols}, true);
        m.rows = data.size(0), m.data = data.const_data_ptr();
        m.stride = (m.rows > 1 ? data.stride(0) : data.size(1)) * int64_t(data.element_size());
        if (kind == 1) m.scales = next("scales", ScalarType::Float, {m.rows}).const_data_ptr();
        if (kind >= 2) {
            int64_t groups = (cols + group - 1) / group;
            const std::vector<int64_t> sizes = {m.rows, groups};
            m.scales = next("scales", ScalarType::BFloat16, sizes).const_data_ptr();
            if (kind == 3)
                m.zeros = static_cast<const uint8_t*>(next("zeros", ScalarType::Byte, sizes).const_data_ptr());
        }
        return m;
    }

    Layer next_layer() {
        int64_t form = next_number(), flags = next_number();
        STD_TORCH_CHECK(form >= 0 && form <= 2 && flags >= 0 && flags < 4, "acip_cuda: no layer is of form ", form,
                        " with flags ", flags);
        Layer layer{};
        layer.form = Form(form);
        layer.first = next_matrix();
        if (layer.form != Form::dense) layer.second = next_matrix();
        int64_t out = outputs(layer);
        if (layer.form == Form::pivoted)
            layer.place = static_cast<const int32_t*>(next("places", ScalarType::Int, {out}).const_data_ptr());
        if (flags & 1)
            layer.s = static_cast<const float*>(next("s", ScalarType::Float, {layer.first.rows}).const_data_ptr());
        if (flags & 2) layer.bias = next("a bias", x.scalar_type(), {out}).const_data_ptr();
        return layer;
    }

    static int64_t outputs(const Layer& layer) {
        return layer.form == Form::dense ? layer.first.rows
                                         : layer.second.rows + (layer.form == Form::pivoted ? layer.first.rows : 0);
    }
};

Tensor fused_linear(const Tensor& x, const std::vector<Tensor>& tensors, const std::vector<int64_t>& spec, int64_t mode,
                    int64_t launch, int64_t splits, int64_t slots, bool bulk) {
    STD_TORCH_CHECK(here(x) && x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1),
                    "acip_cuda: x must be a matrix with contiguous rows on the device of the kernels");
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                    "acip_cuda: x must be bfloat16 or float16");
    STD_TORCH_CHECK(mode >= 0 && mode <= 2 && launch >= 0 && launch <= 2, "acip_cuda: no mode ", mode, " or launch ",
                    launch);
#if defined(ACIP_SHIM)
    shim::arrays.clear();
    shim::reports.clear();
    if (x.numel()) shim::add_array(x.const_data_ptr(), ((x.size(0) - 1) * x.stride(0) + x.size(1)) * 2, "x", false);
    void* stream = nullptr;
    const int index = 0;
#else
    const int index = x.get_device();
    torch::stable::accelerator::DeviceGuard guard(index);
    void* stream = torch::stable::accelerator::getCurrentStream(index).nativeHandle();
#endif
    Reader reader{spec, tensors, x};
    std::vector<Layer> layers;
    while (reader.number < spec.size()) layers.push_back(reader.next_layer());
    STD_TORCH_CHECK(reader.tensor == tensors.size(), "acip_cuda: ", tensors.size() - reader.tensor,
                    " tensors more than spec speaks of");
    STD_TORCH_CHECK(!layers.empty() && x.size(1) == layers[0].first.cols, "acip_cuda: x has ", x.size(1), " columns");
    int64_t width = 0;
    for (const Layer& layer : layers) width += Reader::outputs(layer);
    if (mode) width = Reader::outputs(layers.back());

    acip::cuda::Problem problem{};
    problem.activation = x.scalar_type() == ScalarType::BFloat16 ? Number::bf16 : Number::f16;
    problem.mode = acip::cuda::Mode(mode), problem.layers = layers.data(), problem.count = int(layers.size());
    problem.tokens = x.size(0), problem.x = x.const_data_ptr();
    problem.x_stride = x.size(0) > 1 ? x.stride(0) : x.size(1), problem.y_stride = width;
    acip::cuda::Choices choices{acip::cuda::Launch(launch), int(splits), int(slots),
                                bulk ? acip::cuda::Copies::bulk : acip::cuda::Copies::threads};
    const acip::cuda::Device device = device_of(index);
    acip::cuda::Schedule plan{};
    check(acip::cuda::schedule(problem, device, choices, &plan));
    Tensor y = torch::stable::new_empty(x, {x.size(0), width});
    // Torch's memory on a GPU is aligned to 512 bytes, on the CPU to 64.
    Tensor memory = torch::stable::new_empty(x, {int64_t(plan.workspace_bytes) + 256}, ScalarType::Byte);
    uintptr_t at = (reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 255) / 256 * 256;
    problem.y = y.mutable_data_ptr();
#if defined(ACIP_SHIM)
    if (y.numel()) shim::add_array(y.const_data_ptr(), y.numel() * 2, "y", true);
    if (plan.workspace_bytes) shim::add_array(reinterpret_cast<void*>(at), plan.workspace_bytes, "workspace", true);
#endif
    check(acip::cuda::decode(problem, device, reinterpret_cast<void*>(at), plan.workspace_bytes, stream, choices));
#if defined(ACIP_SHIM)
    STD_TORCH_CHECK(shim::reports.empty(), shim::reports.empty() ? "" : shim::reports[0]);
#endif
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(ACIP_NAMESPACE, m) {
    m.def(
        "fused_linear(Tensor x, Tensor[] tensors, int[] spec, int mode, int launch=0, int splits=0, int slots=0, "
        "bool bulk=True) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ACIP_NAMESPACE, ACIP_DEVICE, m) { m.impl("fused_linear", TORCH_BOX(&fused_linear)); }
