"""A writer of published ACIP checkpoints, from the description of the format, and what they compute in float64."""

import copy
import json
import math

import torch
from safetensors.torch import save_file

from acip_kernels.models.targets import linear_layers


def config(*, mask_func="ste", scaling=0.02, adapters=None, base="toy", pretrained_config=None, dtype="bfloat16"):
    """config.json; `adapters` is `{name: PEFT's fields}` or None."""
    peft = {
        name: {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "lora_dropout": 0.05, "use_rslora": False, **fields}
        for name, fields in (adapters or {}).items()
    }
    return {
        "architectures": ["ACIPModel"],
        "model_type": "acip_model",
        "adapter_config": {"peft_config": peft} if peft else None,
        "base_model_config": {
            "pretrained_config": pretrained_config,
            "pretrained_model_cls": "transformers.models.auto.modeling_auto.AutoModelForCausalLM",
            "pretrained_model_kwargs": {"pretrained_model_name_or_path": base, "torch_dtype": dtype},
        },
        "parametrization_config": {
            "exclude_modules": None,
            "module_factory_cls": "svd",
            "module_factory_kwargs": {"mask_func": mask_func, "mask_scaling_factor": scaling},
        },
        "transformers_version": "4.46.3",
        "weight_quantization_config": {"module_factory_cls": "bnb4bit"},
    }


class Published:
    """`model`, a dense toy, as the published code would hold it: parts by name, in `dtype`.

    threshold: scores at or below are pruned; None keeps all. compressed: pruned ranks are taken out, and layers that
    two factors do not make smaller are dense. adapters: `{name: PEFT's fields}`.
    """

    def __init__(
        self,
        model,
        *,
        dtype=torch.float32,
        mask_func="ste",
        scaling=0.02,
        adapters=None,
        threshold=None,
        compressed=False,
        seed=0,
    ):
        pick = torch.Generator().manual_seed(seed)
        self.model, self.dtype = model, dtype
        self.config = config(mask_func=mask_func, scaling=scaling, adapters=adapters, dtype=str(dtype)[6:])
        self.adapters = adapters or {}
        self.tensors, self.effective, self.scores, self.kept_dense = {}, {}, {}, []
        layers = linear_layers(model)[0]
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[0] not in layers:
                self.tensors[f"model.{name}"] = tensor.to(dtype)
        if model.config.tie_word_embeddings:
            del self.tensors["model.lm_head.weight"]
        for name, layer in layers.items():
            self._add(name, layer, scaling, threshold, compressed, pick)

    def _add(self, name, layer, scaling, threshold, compressed, pick):
        W = layer.weight.detach().double()
        out, in_ = W.shape
        k = min(out, in_)
        c = k**-0.5 if scaling == "norm" else scaling
        U, S, _ = torch.linalg.svd(W, full_matrices=False)
        ortho = (U / math.sqrt(c)).to(self.dtype)
        base = (ortho.double().T @ W).to(self.dtype)
        scores = torch.randn(k, generator=pick)
        live = torch.ones(k, dtype=torch.bool) if threshold is None else scores > threshold
        mask = torch.where(live, c, 0.0).to(self.dtype)
        c = float(torch.tensor(c, dtype=self.dtype))
        weight = (ortho.double()[:, live] * c) @ base.double()[live]
        self.scores[name] = scores
        prefix = f"model.{name}.base_layer." if self.adapters else f"model.{name}."
        own = {"S": S.to(self.dtype), "mask_score": scores}
        if compressed and int(live.sum()) * (out + in_) >= out * in_:
            self.kept_dense.append(name)
            weight = weight.to(self.dtype).double()
            self.tensors[f"{prefix}weight"] = weight.to(self.dtype)
            if layer.bias is not None:
                self.tensors[f"{prefix}bias"] = layer.bias.detach().to(self.dtype)
        else:
            if compressed:
                ortho, base, mask = ortho[:, live], base[live], mask[live]
            own |= {"ortho.weight": ortho, "base.weight": base, "mask": mask}
            if layer.bias is not None:
                own["ortho.bias"] = layer.bias.detach().to(self.dtype)
            self.tensors |= {f"{prefix}parametrization.{key}": tensor for key, tensor in own.items()}
        for adapter, fields in self.adapters.items():
            r = fields.get("r", 4)
            A = (torch.randn(r, in_, generator=pick) / in_**0.5).to(self.dtype)
            B = (0.1 * torch.randn(out, r, generator=pick)).to(self.dtype)
            alpha = fields.get("lora_alpha", 16)
            for pattern, value in fields.get("alpha_pattern", {}).items():
                if name.endswith(f".{pattern}"):
                    alpha = value
            scale = alpha / (math.sqrt(r) if fields.get("use_rslora") else r)
            weight = weight + scale * B.double() @ A.double()
            self.tensors |= {
                f"model.{name}.lora_A.{adapter}.weight": A,
                f"model.{name}.lora_B.{adapter}.weight": B,
            }
        self.effective[name] = weight

    def write(self, path, shards=1):
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        if shards == 1:
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
            return path
        where = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
            save_file(part, path / file, {"format": "pt"})
            where |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return path

    @torch.no_grad()
    def logits(self, ids):
        """Of the dense model with the layers' effective weights, in float64."""
        model = copy.deepcopy(self.model)
        for parameter in model.parameters():  # not the buffers, which stay precise
            parameter.copy_(parameter.to(self.dtype))
        model.double()
        for name, weight in self.effective.items():
            model.get_submodule(name).weight.copy_(weight)
        return model(input_ids=ids).logits
