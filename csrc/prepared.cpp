// A call of acip::fused_linear whose arguments Python looked up once, and which goes on as long as they are true.
//
// Which tensors a layer's call takes depends on much that may change between two calls: children are replaced, hooks
// and forwards put on, parameters exchanged. To look all of that up in Python takes longer than a small layer's
// products. Here it is remembered, by references that keep nothing alive, and compared, which takes a microsecond.
#include "acip/prepared.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace py = pybind11;

namespace {

using at::Tensor;

// What a weak reference refers to; null where that is gone.
py::object target(const py::object& reference) {
    PyObject* found = nullptr;
#if PY_VERSION_HEX >= 0x030D0000
    if (PyWeakref_GetRef(reference.ptr(), &found) < 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
#else
    found = PyWeakref_GetObject(reference.ptr());
    return py::reinterpret_borrow<py::object>(found == Py_None ? nullptr : found);
#endif
}

// None, or a weak reference.
py::object weak(py::handle object) {
    if (object.is_none()) return py::none();
    PyObject* reference = PyWeakref_NewRef(object.ptr(), nullptr);
    if (!reference) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(reference);
}

bool is_target(const py::object& reference, PyObject* object) {
    if (reference.is_none()) return object == Py_None;
    return object != Py_None && target(reference).ptr() == object;
}

PyObject* interned(const char* name) {
    PyObject* string = PyUnicode_InternFromString(name);
    if (!string) throw py::error_already_set();
    return string;  // never released
}

struct Names {
    PyObject* forward = interned("forward");
    PyObject* states[3] = {interned("_parameters"), interned("_buffers"), interned("_modules")};
    PyObject* hooks[4] = {interned("_forward_pre_hooks"), interned("_forward_hooks"), interned("_backward_pre_hooks"),
                          interned("_backward_hooks")};
};

const Names& names() {
    static const Names* all = new Names();
    return *all;
}

py::object instance_dict(PyObject* object) {
    PyObject* dict = PyObject_GenericGetDict(object, nullptr);
    if (!dict) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(dict);
}

// Where a call will look. All of it is small and lies everywhere, and between two calls of a layer the weights of a model
// push it out of the caches: looked at one after the other it takes longer than the comparison, and asked for all at
// once it does not. These are addresses to prefetch and nothing else: what is gone meanwhile does no harm.
class Places {
   public:
    void add(const void* from, size_t bytes) {
        auto first = reinterpret_cast<uintptr_t>(from) / kLine, last = (reinterpret_cast<uintptr_t>(from) + bytes - 1) / kLine;
        for (auto line = first; from && bytes && line <= last; ++line)
            lines_.push_back(reinterpret_cast<const char*>(line * kLine));
    }

    // A dictionary with about `entries` entries.
    void add_dict(PyObject* object, size_t entries) {
        auto* dict = reinterpret_cast<PyDictObject*>(object);
        add(dict, sizeof(PyDictObject));
        // Keys that are shared by all instances of a class are needed by each of them.
        if (dict->ma_values)
            add(dict->ma_values, (entries + 2) * sizeof(PyObject*));
        else
            add(dict->ma_keys, 64 + entries * 32);
    }

    void add_tensor(PyObject* object) {
        add(object, sizeof(THPVariable));
        const at::TensorImpl* tensor = THPVariable_Unpack(object).unsafeGetTensorImpl();
        add(tensor, sizeof(at::TensorImpl));
        if (tensor->has_storage()) add(tensor->unsafe_storage().unsafeGetStorageImpl(), sizeof(c10::StorageImpl));
    }

    void prefetch() const {
        for (const char* line : lines_) __builtin_prefetch(line);
    }

   private:
    static constexpr uintptr_t kLine = 64;
    std::vector<const char*> lines_;
};

// An nn.Module as it was: of the same class, with the same parameters, buffers, children and forward, and no hooks.
class Module {
   public:
    Module(py::handle module, bool without_hooks)
        : module_(weak(module)), type_(Py_TYPE(module.ptr())), without_hooks_(without_hooks) {
        py::object dict = instance_dict(module.ptr());
        PyObject* forward = PyDict_GetItemWithError(dict.ptr(), names().forward);
        forward_ = weak(forward ? forward : Py_None);
        for (int i = 0; i < 3; ++i) {
            PyObject* state = PyDict_GetItemWithError(dict.ptr(), names().states[i]);
            if (!state || !PyDict_Check(state)) throw py::type_error("Prepared: watches torch.nn.Module only");
            for (auto item : py::reinterpret_borrow<py::dict>(state))
                states_[i].emplace_back(py::reinterpret_borrow<py::object>(item.first), weak(item.second));
        }
    }

    bool is_unchanged() const {
        py::object module = target(module_);
        if (!module || Py_TYPE(module.ptr()) != type_) return false;
        py::object held = instance_dict(module.ptr());
        PyObject* dict = held.ptr();
        PyObject* forward = PyDict_GetItemWithError(dict, names().forward);
        if (!is_target(forward_, forward ? forward : Py_None)) return false;
        if (without_hooks_)
            for (PyObject* name : names().hooks) {
                PyObject* hooks = PyDict_GetItemWithError(dict, name);
                if (!hooks || !PyDict_Check(hooks) || PyDict_Size(hooks)) return false;
            }
        for (int i = 0; i < 3; ++i) {
            PyObject* state = PyDict_GetItemWithError(dict, names().states[i]);
            if (!state || !PyDict_Check(state) || size_t(PyDict_Size(state)) != states_[i].size()) return false;
            for (const auto& [key, reference] : states_[i]) {
                PyObject* found = PyDict_GetItemWithError(state, key.ptr());
                if (!found || !is_target(reference, found)) return false;
            }
        }
        return true;
    }

    // Once this is where it stays.
    void add_places(Places& places) const {
        py::object module = target(module_);
        if (!module) return;
        places.add(this, sizeof *this);
        places.add(module_.ptr(), sizeof(PyWeakReference));
        places.add(module.ptr(), 64);
        py::object held = instance_dict(module.ptr());
        places.add_dict(held.ptr(), size_t(PyDict_Size(held.ptr())));
        if (without_hooks_)
            for (PyObject* name : names().hooks)
                if (PyObject* hooks = PyDict_GetItemWithError(held.ptr(), name)) places.add(hooks, 32);
        for (int i = 0; i < 3; ++i) {
            if (PyObject* state = PyDict_GetItemWithError(held.ptr(), names().states[i]))
                places.add_dict(state, states_[i].size());
            places.add(states_[i].data(), states_[i].size() * sizeof states_[i][0]);
            for (const auto& [key, reference] : states_[i])
                if (!reference.is_none()) places.add(reference.ptr(), sizeof(PyWeakReference));
        }
    }

   private:
    py::object module_;
    PyTypeObject* type_;
    bool without_hooks_;
    py::object forward_;
    std::vector<std::pair<py::object, py::object>> states_[3];
};

class Prepared {
   public:
    Prepared(const py::list& modules, const py::list& tensors, std::vector<int64_t> spec, int64_t mode, py::handle dtype_of,
             const py::list& global_hooks)
        : spec_(std::move(spec)), mode_(mode) {
        for (py::handle entry : modules) {
            auto [module, without_hooks] = entry.cast<std::pair<py::object, bool>>();
            modules_.emplace_back(module, without_hooks);
        }
        if (!THPVariable_Check(dtype_of.ptr())) throw py::type_error("Prepared: takes an input of torch.Tensor");
        dtype_ = THPVariable_Unpack(dtype_of.ptr()).scalar_type();
        for (py::handle tensor : tensors) {
            if (!THPVariable_Check(tensor.ptr())) throw py::type_error("Prepared: takes tensors of torch.Tensor");
            tensors_.emplace_back(weak(tensor), THPVariable_Unpack(tensor.ptr()).scalar_type());
        }
        for (py::handle hooks : global_hooks) global_hooks_.push_back(hooks.cast<py::dict>());
        for (const Module& module : modules_) module.add_places(places_);
        places_.add(tensors_.data(), tensors_.size() * sizeof tensors_[0]);
        places_.add(spec_.data(), spec_.size() * sizeof spec_[0]);
        for (const auto& [reference, type] : tensors_) {
            places_.add(reference.ptr(), sizeof(PyWeakReference));
            if (py::object tensor = target(reference)) places_.add_tensor(tensor.ptr());
        }
    }

    // The output; None where what was looked up does not hold any more, or not for this input.
    py::object operator()(py::handle input) const {
        places_.prefetch();
        if (!THPVariable_CheckExact(input.ptr()) || c10::GradMode::is_enabled() ||
            at::autocast::is_autocast_enabled(at::kCPU))
            return py::none();
        const Tensor& x = THPVariable_Unpack(input.ptr());
        if (x.scalar_type() != dtype_ || !x.device().is_cpu() || x.dim() == 0) return py::none();
        for (const py::dict& hooks : global_hooks_)
            if (PyDict_Size(hooks.ptr())) return py::none();
        for (const Module& module : modules_)
            if (!module.is_unchanged()) return py::none();
        std::vector<Tensor> tensors;
        tensors.reserve(tensors_.size());
        for (const auto& [reference, type] : tensors_) {
            py::object tensor = target(reference);
            if (!tensor) return py::none();
            tensors.push_back(THPVariable_Unpack(tensor.ptr()));
            // A module that is moved or cast keeps its parameters and gives them other data.
            if (tensors.back().scalar_type() != type || !tensors.back().device().is_cpu()) return py::none();
        }
        static const auto fused_linear =
            c10::Dispatcher::singleton()
                .findSchemaOrThrow("acip::fused_linear", "")
                .typed<Tensor(const Tensor&, at::TensorList, at::IntArrayRef, int64_t)>();
        Tensor y;
        {
            py::gil_scoped_release released;
            y = fused_linear.call(x, tensors, spec_, mode_);
        }
        return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(y)));
    }

   private:
    std::vector<Module> modules_;
    std::vector<std::pair<py::object, at::ScalarType>> tensors_;
    std::vector<int64_t> spec_;
    int64_t mode_;
    at::ScalarType dtype_;
    std::vector<py::dict> global_hooks_;
    Places places_;
};

}  // namespace

namespace acip {

void bind_prepared(py::module_& module) {
    py::class_<Prepared>(module, "Prepared",
                         "Prepared(modules, tensors, spec, mode, x, global_hooks): a call of fused_linear for inputs of x's "
                         "dtype; modules are (module, whether it may have no hooks).")
        .def(py::init<const py::list&, const py::list&, std::vector<int64_t>, int64_t, py::handle, const py::list&>())
        .def("__call__", &Prepared::operator(), "The output, or None where the layer has to be looked up anew.")
        // A copy of the layer has other children: it prepares its own.
        .def("__deepcopy__", [](const Prepared&, py::handle) { return py::none(); })
        .def("__copy__", [](const Prepared&) { return py::none(); })
        .def("__reduce__", [](const Prepared&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); });
}

}  // namespace acip
